"""Data sets: preparation commands on generated files, labels, masks, splits, memory maps, clusters."""

import os
import re
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from common.datasets.sprites import Sprites
from common.errors import UserError
from glancenet import cluster, labels, prepare_celeba, prepare_mpi3d
from glancenet.data import TrainingBatches, load_data, open_npz
from glancenet.options import parse

CPU = torch.device("cpu")
MPI3D_SIZES = (3, 2, 2, 1, 2, 3, 4)


def options(name: str, folder, *words: str):
    base = ["--alg", "CBNM", "--encoder", "SimpleGaussianConv64", "--batch_size", "8"]
    return parse([*base, "--dset_name", name, "--dset_dir", str(folder), *words])


def test_masks_are_nested_and_seeded():
    masks = [labels.supervision_mask(20_000, percent, seed=3, discard=10) for percent in (1, 10, 50, 100)]
    assert [round(100 * mask.mean()) for mask in masks] == [1, 10, 50, 100]
    for small, large in pairwise(masks):
        assert (large | ~small).all(), "a smaller set lies inside a larger one"
    assert np.array_equal(masks[1], labels.supervision_mask(20_000, 10, seed=3, discard=10))
    assert not np.array_equal(masks[1], labels.supervision_mask(20_000, 10, seed=4, discard=10))
    assert labels.supervision_mask(1000, 0, seed=0).sum() == 0
    with pytest.raises(UserError, match="percentage"):
        labels.supervision_mask(10, 101, seed=0)


def test_mask_follows_the_published_stream():
    """Uniform numbers of numpy's global stream: 6 for the plane, one an image for the label noise, then the mask."""
    rng = np.random.RandomState(7)
    rng.uniform(size=6)
    for _ in range(50):
        rng.uniform()
    expected = np.array([rng.uniform() for _ in range(50)]) <= 0.3
    assert np.array_equal(labels.supervision_mask(50, 30, seed=7, discard=56), expected)


def test_split_follows_the_published_shuffle():
    np.random.seed(9)
    order = list(range(103))
    np.random.shuffle(order)
    train, val, test = labels.random_split(103, 9)
    assert train.tolist() == order[20:] and val.tolist() == order[:10] and test.tolist() == order[10:20]


def test_sprites_concepts_describe_the_image(tmp_path):
    data = load_data(options("sprites", tmp_path, "--sprites_sizes", "3", "2", "2", "4", "4", "--masking_fact", "25"))
    assert data.concept_names[:3] == ["square", "ellipse", "heart"] and data.shape.n_concepts == 7
    assert len(data.train) + len(data.val) + len(data.test) == len(data.grid) == 192
    assert 0.1 < data.train.mask.mean() < 0.4
    for place in (0, 17, 99):
        batch = data.train.gather(torch.tensor([place]), CPU)
        factors = data.grid.factors_of(int(data.train.rows[place]))[0]
        assert batch.x.dtype == torch.float32 and set(batch.x.unique().tolist()) == {0.0, 1.0}
        assert batch.labels[0, :3].argmax() == factors[0] and batch.labels[0, :3].sum() == 1
        np.testing.assert_allclose(batch.labels[0, 3:].numpy(), factors[1:] / np.array([1, 1, 3, 3]), atol=1e-6)
        rows, columns = torch.nonzero(batch.x[0, 0], as_tuple=True)
        # posX and posY place the centre of the sprite between a quarter and three quarters of the image
        centre = (columns.float().mean() + 0.5) / 64, (rows.float().mean() + 0.5) / 64
        assert centre[0] == pytest.approx(0.25 + 0.5 * float(batch.labels[0, 5]), abs=0.05)
        assert centre[1] == pytest.approx(0.25 + 0.5 * float(batch.labels[0, 6]), abs=0.05)


def test_include_labels_choose_concepts(tmp_path):
    data = load_data(
        options("sprites", tmp_path, "--sprites_sizes", "3", "2", "2", "4", "4", "--include_labels", "1", "5")
    )
    assert data.concept_names == ["square", "ellipse", "heart", "pos_y"] and data.code_sizes == (3, 4)


def test_epoch_order_is_a_function_of_seed_and_epoch(tmp_path):
    o = options("sprites", tmp_path, "--sprites_sizes", "3", "2", "2", "4", "4", "--batch_size", "32", "--seed", "1")
    data = load_data(o)
    part = data.train
    assert torch.equal(part.order(1, 4), part.order(1, 4)) and not torch.equal(part.order(1, 4), part.order(1, 5))
    whole, later = (list(TrainingBatches(part, o, CPU).epoch(0, start)) for start in (0, 2))
    assert len(whole) == 4 and len(later) == 2 and torch.equal(whole[2][0].x, later[0][0].x)
    pairs = list(TrainingBatches(part, o, CPU, second=True).epoch(0))
    assert all(torch.equal(second.x, whole[(i + 1) % 4][0].x) for i, (_, second) in enumerate(pairs))
    everything = torch.cat([batch.y for batch in part.batches(50, CPU)])
    assert torch.equal(everything, part.y), "without drop_last every example comes once"


@pytest.fixture
def dsprites_file(tmp_path):
    """A small file in dSprites' format (compressed, as published), from rendered sprites."""
    grid = Sprites(sizes=(3, 2, 2, 3, 3))
    rows = np.arange(len(grid))
    folder = tmp_path / "dsprites"
    folder.mkdir()
    np.savez_compressed(
        folder / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64_smaller.npz",
        imgs=(grid.images_at(rows)[:, 0].numpy() > 0).astype(np.uint8),
        latents_values=grid.latents_values(rows), latents_classes=grid.latents_classes(rows),
    )  # fmt: skip
    return tmp_path, grid


def test_dsprites_file_is_mapped_and_equals_the_rendered_grid(dsprites_file):
    folder, _ = dsprites_file
    from_file = load_data(options("dsprites", folder, "--d_version", "smaller"))
    rendered = load_data(options("sprites", folder, "--sprites_sizes", "3", "2", "2", "3", "3"))
    assert isinstance(from_file.train.images.source, np.memmap)
    assert torch.equal(from_file.train.rows, rendered.train.rows)
    one, other = (data.train.gather(torch.arange(20), CPU) for data in (from_file, rendered))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_stored_npz_is_mapped_in_place(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    np.savez(tmp_path / "a.npz", first=np.zeros(5), X=array)
    mapped = open_npz(tmp_path / "a.npz", "X", "make it")
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, array)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npz"], "no copy is made"
    with pytest.raises(UserError, match="no array 'Y'"):
        open_npz(tmp_path / "a.npz", "Y", "make it")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    with pytest.raises(UserError, match="damaged"):
        open_npz(tmp_path / "b.npz", "X", "make it")
    with pytest.raises(UserError, match="make it by: the command"):
        open_npz(tmp_path / "c.npz", "X", "the command")


def test_absent_data_names_the_command(tmp_path):
    for name, text in (
        ("mpi3d", "prepare_mpi3d.py"),
        ("celebA", "prepare_celeba.py"),
        ("dsprites_leakage", "prepare_dsprites_leakage.py"),
    ):
        with pytest.raises(UserError, match=re.escape(text)):
            load_data(options(name, tmp_path))
    with pytest.raises(UserError, match="prepare dsprites"):
        load_data(options("dsprites", tmp_path))


# ---- leakage --------------------------------------------------------------------------------------------------------


def test_leakage_files(leakage_data):
    with np.load(leakage_data / "dsprites_leakage_train.npz") as train:
        assert len(train["X"]) == 3 * 2 * 4 * 4 and train["G"].shape == (96, 3) and set(train["Y"]) == {1, 2, 3}
        rows, _ = np.nonzero(train["X"].sum(0))
        assert rows.min() > 8 and rows.max() < 56, "training sprites stand in the middle"
    with np.load(leakage_data / "dsprites_leakage_test.npz") as test:
        far = test["Y"] == 1
        assert len(test["X"]) == 400 and 0.4 < far.mean() < 0.6
        assert (test["G"][far][:, 3:] > 0.75).all() and (test["G"][~far][:, 3:] < 0.25).all()
        middles = [np.argwhere(test["X"][rows].sum(0)).mean(0) for rows in (far, ~far)]
        assert (middles[0] > 36).all() and (middles[1] < 28).all(), "the label is where the sprite stands"


def test_leakage_test_concepts_mean_what_training_concepts_mean(leakage_data):
    data = load_data(options("dsprites_leakage", leakage_data, "--masking_fact", "1"))
    assert data.n_classes == 3 and data.shape.n_concepts == 5
    assert data.train.mask.min() == 1, "the leakage data are fully supervised"
    for part in (data.train, data.test):
        assert torch.equal(part.concepts[:, :3].argmax(1), part.y) and (part.concepts[:, :3].sum(1) == 1).all()
        assert part.concepts[:, 3:].min() == 0 and part.concepts[:, 3:].max() == 1
    assert len(data.train) == 76 and len(data.val) == 20 and len(data.corner) == len(data.test) == 400


# ---- MPI3D ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mpi3d_root(tmp_path):
    """A small file in MPI3D's published format; the image holds its own factors in its first pixels."""
    n = int(np.prod(MPI3D_SIZES))
    factors = np.stack(np.unravel_index(np.arange(n), MPI3D_SIZES), 1)
    images = np.zeros((n, 64, 64, 3), np.uint8)
    images[:, 0, :7, 0] = factors
    np.savez_compressed(tmp_path / "mpi3d_toy.npz", images=images)
    sizes = [str(size) for size in MPI3D_SIZES]
    prepare_mpi3d.main(
        ["--in", str(tmp_path / "mpi3d_toy.npz"), "--out", str(tmp_path), "--sizes", *sizes, "--small", "50"]
    )
    return tmp_path


def test_mpi3d_preparation_and_labels(mpi3d_root):
    data = load_data(options("mpi3d_toy", mpi3d_root))
    assert data.shape.n_concepts == 21 and data.n_classes == 10 and data.shape.channels == 3
    batch = data.train.gather(torch.arange(40), CPU)
    stored = (255 * batch.x[:, 0, 0, :7]).round().long()
    assert torch.equal(stored, batch.codes), "images and factors belong together"
    assert torch.equal(batch.labels[:, :6].argmax(1), batch.codes[:, 0])
    np.testing.assert_allclose(batch.labels[:, 19].numpy(), batch.codes[:, 5].numpy() / 39, rtol=1e-6)
    assert data.grid is None, "a part of the grid has no factor metrics"
    small = load_data(options("mpi3d_toy", mpi3d_root, "--d_version", "smaller"))
    assert len(small.train) + len(small.val) + len(small.test) == 50


def test_mpi3d_clusters_replace_the_table(mpi3d_root):
    cluster.main(["--dset_name", "mpi3d_toy", "--dset_dir", str(mpi3d_root), "--n_classes", "3", "--rows", "200"])
    with np.load(mpi3d_root / "mpi3d_toy" / "clusters_3.npz") as saved:
        assert saved["centroids"].shape == (3, 5) and saved["shares"].sum() == pytest.approx(1)
        centroids = saved["centroids"]
    data = load_data(options("mpi3d_toy", mpi3d_root, "--n_classes", "3"))
    assert torch.equal(data.train.y, torch.from_numpy(labels.nearest_mode(data.train.codes[:, :5].numpy(), centroids)))
    with pytest.raises(UserError, match=r"cluster\.py"):
        load_data(options("mpi3d_toy", mpi3d_root, "--n_classes", "4"))


def test_published_mpi3d_classes_have_the_published_shares():
    combos = np.stack(np.unravel_index(np.arange(648), (6, 6, 2, 3, 3)), 1)
    y = labels.mpi3d_classes(np.concatenate([combos, np.zeros((648, 2), int)], 1))
    assert np.bincount(y).tolist() == [110, 90, 90, 98, 66, 51, 29, 33, 45, 36]


def test_kmodes_finds_planted_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 1, 2, 3, 0, 1], [3, 3, 0, 0, 2, 2], [1, 0, 1, 2, 3, 3]])
    truth = rng.integers(0, 3, 300)
    rows = centres[truth]
    noisy = rng.random(rows.shape) < 0.1
    rows = np.where(noisy, rng.integers(0, 4, rows.shape), rows)
    centroids, cost = labels.fit_kmodes(rows, 3, seed=1)
    assert {tuple(c) for c in centroids} == {tuple(c) for c in centres}
    assert cost == (rows != centroids[labels.nearest_mode(rows, centroids)]).sum()
    again, _ = labels.fit_kmodes(rows, 3, seed=1)
    assert np.array_equal(centroids, again)
    with pytest.raises(UserError, match="distinct rows"):
        labels.fit_kmodes(np.zeros((10, 3), int), 2)


def test_ties_go_to_the_lowest_cluster():
    assert labels.nearest_mode(np.array([[0, 1]]), np.array([[0, 0], [1, 1]])).tolist() == [0]


# ---- CelebA ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def celeba_root(tmp_path):
    """Sixty generated images in CelebA's layout; the red level of the centre tells the image's number."""
    rng, folder = np.random.default_rng(0), tmp_path / "download"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [*labels.CELEBA_ATTRIBUTES, "Young"]
    table = rng.integers(0, 2, (60, len(names)))
    lines, parts = ["60", " ".join(names)], []
    for i, row in enumerate(table):
        picture = np.zeros((218, 178, 3), np.uint8)
        picture[20:198] = (4 * i, 128, 10)
        Image.fromarray(picture).save(folder / "img_align_celeba" / f"{i:06d}.jpg", quality=95)
        lines.append(f"{i:06d}.jpg " + " ".join("1" if value else "-1" for value in row))
        parts.append(f"{i:06d}.jpg {0 if i < 40 else 1 if i < 50 else 2}")
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    prepare_celeba.main(["--in", str(folder), "--out", str(tmp_path), "--n_classes", "3"])
    return tmp_path, table


def test_celeba_preparation(celeba_root):
    root, table = celeba_root
    kept = np.flatnonzero(labels.celeba_kept_rows(table[:, :10]))
    data = load_data(options("celebA", root, "--n_classes", "3"))
    assert [len(part) for part in (data.train, data.val, data.test)] == [
        (kept < 40).sum(), ((kept >= 40) & (kept < 50)).sum(), (kept >= 50).sum(),
    ]  # fmt: skip
    batch = data.train.gather(torch.arange(len(data.train)), CPU)
    assert batch.x.shape[1:] == (3, 64, 64)
    number = (255 * batch.x[:, 0, 32, 32] / 4).round().long()
    assert torch.equal(number, torch.from_numpy(kept[kept < 40])), "crops keep their order and their centre"
    np.testing.assert_array_equal(batch.labels.numpy(), table[kept[kept < 40], :10])
    assert batch.x[:, 0, 1, 32].max() > 0.05, "the crop drops the upper and lower border"


def test_celeba_hair_rule():
    rows = np.zeros((5, 10), int)
    rows[0, [0]] = 1  # bald
    rows[1, [0, 1]] = 1  # bald with black hair
    rows[2, [1, 2]] = 1  # two colours
    rows[3, [4]] = 1  # glasses only
    rows[4, [5, 9]] = 1  # gray, with a hat
    assert labels.celeba_kept_rows(rows).tolist() == [True, False, True, False, True]
    assert labels.celeba_kept_rows(rows, unique_hair=True).tolist() == [True, False, False, False, True]


def test_celeba_training_draws_classes_evenly(celeba_root):
    data = load_data(options("celebA", celeba_root[0], "--n_classes", "3"))
    drawn = torch.cat([data.train.y[data.train.order(0, epoch)] for epoch in range(300)])
    share = np.bincount(drawn.numpy(), minlength=3) / len(drawn)
    np.testing.assert_allclose(share, 1 / 3, atol=0.02)


def test_damaged_celeba_tables_are_named(celeba_root):
    folder = celeba_root[0] / "download"
    (folder / "list_attr_celeba.txt").write_text("60\nBald Young\n000000.jpg 1 1\n")
    with pytest.raises(UserError, match="no attribute Black_Hair"):
        prepare_celeba.main(["--in", str(folder), "--out", str(folder)])


def test_compressed_copies_are_renewed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, X=np.zeros(3))
    assert open_npz(path, "X", "").tolist() == [0, 0, 0]
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["X.npy"]
    copy = tmp_path / "a.npz.X.npy"
    assert copy.exists()
    np.savez_compressed(path, X=np.ones(3))
    os.utime(path, (copy.stat().st_mtime + 5,) * 2)
    assert open_npz(path, "X", "").tolist() == [1, 1, 1]


# ---- files whose content is not what it should be -------------------------------------------------------------------


def rewritten(path, **changes):
    """The npz file with some arrays replaced (a function of the old one)."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    np.savez(path, **arrays | {key: change(arrays[key].copy()) for key, change in changes.items()})


def put(place, value):
    def change(array):
        array = array.astype(np.asarray(value).dtype) if np.asarray(value).dtype.kind == "f" else array
        array[place] = value
        return array

    return change


WRONG_CELEBA = {
    "labels of -1 and 1": {"Y": lambda y: 2 * y.astype(np.int64) - 1},
    "a label of 3": {"Y": put((0, 0), 3)},
    "a missing label": {"Y": put((0, 0), np.nan)},
    "half a label": {"Y": put((0, 0), 0.5)},
    "too few attributes": {"Y": lambda y: y[:, :9]},
    "fewer labels than images": {"Y": lambda y: y[:-1]},
    "images as floats": {"X": lambda x: x / np.float32(255)},
    "images of 0 and 1": {"X": lambda x: x // 255},
    "images of another size": {"X": lambda x: x[:, :32]},
    "images with channels first": {"X": lambda x: x.transpose(0, 3, 1, 2)},
    "splits beyond the end": {"splits": lambda s: s + 1000},
    "splits the wrong way round": {"splits": lambda s: s[::-1]},
}


@pytest.mark.parametrize("case", WRONG_CELEBA)
def test_wrong_celeba_values_are_refused(celeba_root, case):
    path = celeba_root[0] / "celebA" / "celebA64-full-10.npz"
    load_data(options("celebA", celeba_root[0], "--n_classes", "3"))
    rewritten(path, **WRONG_CELEBA[case])
    with pytest.raises(UserError, match=r"celebA64-full-10\.npz.*prepare_celeba\.py"):
        load_data(options("celebA", celeba_root[0], "--n_classes", "3"))


@pytest.mark.parametrize("change", [put((0, 0), -1), put((0, 0), 6), put((0, 6), 40), put((0, 0), np.nan)])
def test_wrong_mpi3d_factors_are_refused(mpi3d_root, change):
    rewritten(mpi3d_root / "mpi3d_toy" / "mpi3d_toy_full.npz", Y=change)
    with pytest.raises(UserError, match=r"mpi3d_toy_full\.npz.*prepare_mpi3d\.py"):
        load_data(options("mpi3d_toy", mpi3d_root))


@pytest.mark.parametrize(
    ("split", "changes"),
    [("train", {"X": lambda x: x * 255}), ("test", {"X": lambda x: x * 255}), ("train", {"G": put((0, 0), 0)}),
     ("train", {"G": put((0, 1), np.nan)}), ("test", {"Y": lambda y: y + 1}), ("train", {"Y": lambda y: y[1:]})],
)  # fmt: skip
def test_wrong_leakage_files_are_refused(leakage_data, tmp_path, split, changes):
    for name in ("train", "test"):
        (tmp_path / f"dsprites_leakage_{name}.npz").write_bytes(
            (leakage_data / f"dsprites_leakage_{name}.npz").read_bytes()
        )
    rewritten(tmp_path / f"dsprites_leakage_{split}.npz", **changes)
    with pytest.raises(UserError, match=rf"leakage_{split}\.npz.*prepare_dsprites_leakage\.py"):
        load_data(options("dsprites_leakage", tmp_path))


def test_wrong_dsprites_files_are_refused(dsprites_file):
    folder, _ = dsprites_file
    path = folder / "dsprites" / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64_smaller.npz"
    rewritten(path, imgs=lambda x: x * 255)
    with pytest.raises(UserError, match="0 and 1 alone"):
        load_data(options("dsprites", folder, "--d_version", "smaller"))
    rewritten(path, imgs=lambda x: x // 255, latents_classes=put((0, 1), 3))
    with pytest.raises(UserError, match="latents_classes"):
        load_data(options("dsprites", folder, "--d_version", "smaller"))
