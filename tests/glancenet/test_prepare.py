"""Preparation scripts: archives as mirrors have them, pickled clusters, one unpacked copy of MPI3D."""

import pickle
import sys
import types

import numpy as np
import pytest
from PIL import Image

from common.datasets import grids, load
from common.errors import UserError, run_command
from glancenet import labels, prepare_celeba, prepare_clusters, prepare_mpi3d
from glancenet.data import load_data
from glancenet.options import parse

SIZES = (2, 1, 2, 1, 1, 2, 3)


def options(name, folder, *words):
    base = ["--alg", "CBNM", "--encoder", "SimpleGaussianConv64", "--batch_size", "2"]
    return parse([*base, "--dset_name", name, "--dset_dir", str(folder), *words])


# ---- CelebA


def mirror(folder, values=(-1, 1)):
    """CelebA as Kaggle has it: csv lists that name their first column, images a folder deeper, further lists."""
    rng, names = np.random.default_rng(3), ["Young", *labels.CELEBA_ATTRIBUTES]
    files = [f"{i:06d}.jpg" for i in range(30)]
    table = rng.choice(values, (30, len(names)))
    images = folder / "img_align_celeba" / "img_align_celeba"
    images.mkdir(parents=True)
    for i, file in enumerate(files):
        Image.fromarray(np.full((218, 178, 3), 8 * i, np.uint8)).save(images / file)
    rows = [",".join([file, *map(str, row)]) for file, row in zip(files, table, strict=True)]
    (folder / "list_attr_celeba.csv").write_text("\n".join([",".join(["image_id", *names]), *rows]))
    parts = [f"{file},{0 if i < 20 else 1 if i < 25 else 2}" for i, file in enumerate(files)]
    (folder / "list_eval_partition.csv").write_text("\n".join(["image_id,partition", *parts]))
    return table[:, 1:]


def test_celeba_as_a_mirror_has_it(tmp_path):
    table = mirror(tmp_path / "download")
    prepare_celeba.main(["--in", str(tmp_path / "download"), "--out", str(tmp_path), "--n_classes", "2"])
    with np.load(tmp_path / "celebA" / "celebA64-full-10.npz") as made:
        kept = np.flatnonzero(labels.celeba_kept_rows((table > 0).astype(int)))
        assert np.array_equal(made["Y"], table[kept] > 0)
        assert np.abs(made["X"][:, 32, 32, 0].astype(int) - 8 * kept).max() <= 2


@pytest.mark.parametrize("values", [(0, 3), (-1, 0, 1), (1, 2)])
def test_attributes_of_other_values_are_refused(tmp_path, values):
    mirror(tmp_path / "download", values)
    with pytest.raises(UserError, match="attributes must be -1 and 1, or 0 and 1"):
        prepare_celeba.main(["--in", str(tmp_path / "download"), "--out", str(tmp_path)])
    assert not (tmp_path / "celebA").exists()


def test_another_part_is_refused(tmp_path):
    mirror(tmp_path)
    path = tmp_path / "list_eval_partition.csv"
    path.write_text(path.read_text().replace("000003.jpg,0", "000003.jpg,3"))
    with pytest.raises(UserError, match="parts must be 0, 1 or 2"):
        prepare_celeba.main(["--in", str(tmp_path), "--out", str(tmp_path / "out")])


# ---- MPI3D


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_mpi3d_is_unpacked_once(tmp_path, save):
    """One file holds the pixels for both: no copy beside the download, none for the other reader."""
    images = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    (tmp_path / "download").mkdir()
    save(tmp_path / "download" / "mpi3d_toy.npz", images=images)
    sizes = [str(size) for size in SIZES]
    source = str(tmp_path / "download" / "mpi3d_toy.npz")
    prepare_mpi3d.main(["--in", source, "--out", str(tmp_path), "--sizes", *sizes, "--small", "5"])
    assert [path.name for path in (tmp_path / "download").iterdir()] == ["mpi3d_toy.npz"]
    grid = load("mpi3d_toy", tmp_path, sizes=SIZES)
    assert np.array_equal(grid.arrays()[0], images.transpose(0, 3, 1, 2))
    with np.load(tmp_path / "mpi3d_toy" / "mpi3d_toy_small.npz") as small:
        rows = np.ravel_multi_index(tuple(small["Y"].T), SIZES)
        assert len(rows) == 5 and np.array_equal(small["X"], images[rows])


def test_what_prepare_unpacked_serves_glancenet(tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "MPI3D_FACTORS", dict(zip(grids.MPI3D_FACTORS, SIZES, strict=True)))
    images = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    (tmp_path / "mpi3d_toy").mkdir()
    np.savez_compressed(tmp_path / "mpi3d_toy" / "mpi3d_toy.npz", images=images)
    grids.unpack_mpi3d(tmp_path / "mpi3d_toy" / "mpi3d_toy.npz")
    data = load_data(options("mpi3d_toy", tmp_path))
    for part in (data.train, data.val, data.test):
        rows = np.ravel_multi_index(tuple(part.codes.numpy().T), SIZES)
        assert np.array_equal(part.images.fetch(part.rows), images[rows].transpose(0, 3, 1, 2))
    assert sum(map(len, (data.train, data.val, data.test))) == 24


def test_a_download_that_is_no_mpi3d_is_refused(tmp_path, capsys):
    source = tmp_path / "mpi3d_toy.npz"
    for content, words in ((None, "is missing"), (b"<html>quota</html>", "is a web page"), (b"PK\3\4 cut", "npz")):
        if content is not None:
            source.write_bytes(content)
        assert run_command(lambda: prepare_mpi3d.main(["--in", str(source), "--out", str(tmp_path)])) == 2
        assert words in capsys.readouterr().err
    np.savez(source, images=np.zeros((2, 64, 64, 3), np.float32))
    assert run_command(lambda: prepare_mpi3d.main(["--in", str(source), "--out", str(tmp_path)])) == 2
    assert "float32" in capsys.readouterr().err and not (tmp_path / "mpi3d_toy").exists()


# ---- clusters


def pickled(path, centroids, values, monkeypatch, **more):
    """A pickle as kmodes 0.11 writes it: codes as an array of objects, a table from values to codes for each column."""
    modules = {name: types.ModuleType(name) for name in ("kmodes", "kmodes.kmodes", "kmodes.util.dissim")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    model = modules["kmodes.kmodes"].KModes = type("KModes", (), {"__module__": "kmodes.kmodes"})

    def matching_dissim():
        pass

    matching_dissim.__module__, matching_dissim.__qualname__ = "kmodes.util.dissim", "matching_dissim"
    modules["kmodes.util.dissim"].matching_dissim = matching_dissim
    fitted = model()
    codes = np.empty(centroids.shape, object)
    codes[:] = [[np.int32(np.flatnonzero(values == value)[0]) for value in row] for row in centroids]
    tables = [{np.float64(value): code for code, value in enumerate(values)} for _ in centroids.T]
    fitted.__dict__ |= {"n_clusters": len(centroids), "cat_dissim": matching_dissim, "init": "Huang", "cost_": 3.0}
    fitted.__dict__ |= {"_enc_cluster_centroids": codes, "_enc_map": tables, "labels_": np.zeros(9, np.uint16), **more}
    path.write_bytes(pickle.dumps(fitted, protocol=3))
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    return str(path)


def test_pickled_clusters_become_the_classes(tmp_path, monkeypatch):
    centroids = np.array([[0, 4, 0, 2, 1], [5, 1, 1, 0, 0], [3, 3, 0, 1, 2]])
    values = np.array([3, 0, 5, 1, 4, 2])  # kmodes numbers values as it meets them
    path = pickled(tmp_path / "km.pickle", centroids, values, monkeypatch)
    prepare_clusters.main(["--in", path, "--out", str(tmp_path)])
    images = np.full((24, 64, 64, 3), 200, np.uint8)
    np.savez(tmp_path / "mpi3d_toy.npz", images=images)
    sizes = [str(size) for size in SIZES]
    prepare_mpi3d.main(["--in", str(tmp_path / "mpi3d_toy.npz"), "--out", str(tmp_path), "--sizes", *sizes])
    data = load_data(options("mpi3d_toy", tmp_path, "--n_classes", "3"))
    assert np.array_equal(data.train.y, labels.nearest_mode(data.train.codes[:, :5].numpy(), centroids))


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_other_pickles_are_refused_unrun(tmp_path, monkeypatch):
    good, values = np.zeros((2, 5), int), np.arange(6)
    bad = {
        "evil": {"random_state": _Evil(tmp_path / "ran")},
        "half": {"_enc_map": [{0.5: 0}] * 5},
        "table": {"_enc_map": [{}] * 5},
        "short": {"_enc_map": [{0: 0}] * 4},
        "nan": {"_enc_map": [{float("nan"): 0}] * 5},
        "flat": {"_enc_cluster_centroids": np.zeros(5)},
    }
    for name, more in bad.items():
        path = pickled(tmp_path / name, good, values, monkeypatch, **more)
        (tmp_path / "ran").unlink(missing_ok=True)
        with pytest.raises(UserError, match=name):
            prepare_clusters.main(["--in", path, "--out", str(tmp_path / "out")])
    path = pickled(tmp_path / "wide", np.zeros((2, 32), int), values, monkeypatch)
    with pytest.raises(UserError, match="clusters 32 features"):
        prepare_clusters.main(["--in", path, "--out", str(tmp_path / "out")])
    path = pickled(tmp_path / "far", np.full((2, 10), 5), values, monkeypatch)
    with pytest.raises(UserError, match="centroids beyond"):
        prepare_clusters.main(["--in", path, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()
