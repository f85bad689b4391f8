"""Every set is read from a tiny fake in its real on-disk layout, written here."""

import gzip
import io
import pickle
import struct
import zipfile
from typing import ClassVar

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from common.batches import Batches
from common.datasets import load, names, split, subset
from common.datasets.files import fit
from common.errors import UserError
from common.images import natural_sorted

RNG = np.random.default_rng(7)


def pictures(n, side=32, channels=3):
    return RNG.integers(0, 256, (n, channels, side, side), dtype=np.uint8)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, n_train=30, n_test=10, end=""):
    made = {}
    for stem, n in (("train", n_train), ("t10k", n_test)):
        images, labels = pictures(n, 28, 1)[:, 0], np.arange(n, dtype=np.uint8) % 10
        write_idx(folder / f"{stem}-images-idx3-ubyte{end}", images)
        write_idx(folder / f"{stem}-labels-idx1-ubyte{end}", labels)
        made[stem] = images, labels
    return made


def write_png(path, chw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(chw[0] if len(chw) == 1 else chw.transpose(1, 2, 0)).save(path)


@pytest.mark.parametrize(
    ("name", "folder", "end"), [("mnist", "MNIST/raw", ""), ("fashion_mnist", "FashionMNIST/raw", ".gz")]
)
def test_idx_files_plain_or_compressed(tmp_path, name, folder, end):
    made = write_mnist(tmp_path / folder, end=end)
    data = load(name, tmp_path, "test")
    np.testing.assert_array_equal(data.arrays()[0][:, 0], made["t10k"][0])
    np.testing.assert_array_equal(data.targets, made["t10k"][1])
    assert (data.channels, data.image_size, len(data.classes)) == (1, 28, 10)
    image, target = load(name, tmp_path, "train")[4]
    assert image.dtype == torch.uint8 and target.dtype == torch.int64 and int(target) == 4
    padded = load(name, tmp_path, "train", pad=2)[4][0]
    assert padded.shape == (1, 32, 32) and torch.equal(padded[:, 2:-2, 2:-2], image)
    assert int(padded.sum()) == int(image.sum())  # the frame is black


def python2_pickle(content):
    """The bytes that Python 2 and its numpy wrote: protocol 2, strings as bytes of latin-1."""
    stream = io.BytesIO()

    class OldPickler(pickle._Pickler):
        dispatch: ClassVar = dict(pickle._Pickler.dispatch)

        def save_str_old(self, text):
            raw = text.encode("latin1") if isinstance(text, str) else bytes(text)
            self.write(b"T" + struct.pack("<i", len(raw)) + raw)
            self.memoize(text)

        dispatch[str] = save_str_old
        dispatch[bytes] = save_str_old

    OldPickler(stream, protocol=2).dump(content)
    return stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.mark.parametrize("dump", [python2_pickle, lambda content: pickle.dumps(content, protocol=4)])
def test_cifar_python_batches(tmp_path, dump):
    images = pictures(24)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, rows in enumerate(np.split(np.arange(20), 5), start=1):
        content = {"data": images[rows].reshape(4, -1), "labels": (rows % 10).tolist(), "filenames": ["a.png"] * 4}
        (folder / f"data_batch_{i}").write_bytes(dump(content))
    (folder / "test_batch").write_bytes(dump({"data": images[20:].reshape(4, -1), "labels": [3, 2, 1, 0]}))
    train, test = load("cifar10", tmp_path), load("cifar10", tmp_path, "test")
    np.testing.assert_array_equal(train.arrays()[0], images[:20])
    assert train.targets.tolist() == [i % 10 for i in range(20)] and test.targets.tolist() == [3, 2, 1, 0]
    np.testing.assert_array_equal(test.images_at([3, 0]), images[[23, 20]])
    assert train.classes[:2] == ["airplane", "automobile"]

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for part, rows in (("train", slice(0, 20)), ("test", slice(20, 24))):
        fine = list(range(80, 80 + len(images[rows])))
        content = {"data": images[rows].reshape(-1, 3072), "fine_labels": fine, "coarse_labels": [0] * len(fine)}
        (folder / part).write_bytes(dump(content))
    (folder / "meta").write_bytes(dump({"fine_label_names": [f"class {i}" for i in range(100)]}))
    hundred = load("cifar100", tmp_path, "test")
    assert hundred.targets.tolist() == [80, 81, 82, 83] and hundred.classes[99] == "class 99"


def test_cifar_class_folders(tmp_path):
    images = pictures(6)
    for row, image in enumerate(images):
        write_png(tmp_path / "cifar10" / "train" / ("airplane", "cat")[row % 2] / f"{row:04}.png", image)
    data = load("cifar10", tmp_path)
    np.testing.assert_array_equal(data.arrays()[0], images[[0, 2, 4, 1, 3, 5]])
    assert data.targets.tolist() == [0, 0, 0, 1, 1, 1] and data.classes == ["airplane", "cat"]


def test_svhn_writes_zero_as_ten(tmp_path):
    images = pictures(3)
    (tmp_path / "SVHN").mkdir()
    savemat(tmp_path / "SVHN" / "test_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": np.array([[10], [1], [9]])})
    data = load("svhn", tmp_path, "test")
    np.testing.assert_array_equal(data.arrays()[0], images)
    assert data.targets.tolist() == [0, 1, 9]


ATTRIBUTES = [f"Attribute_{i}" for i in range(40)]


def write_celeba(root, form, images, nested=False):
    folder = root / "celeba" / "img_align_celeba" / ("img_align_celeba" if nested else "")
    values = RNG.choice([-1, 1], (len(images), 40))
    files = [f"{i + 1:06}.png" for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        write_png(folder / file, image)
    named = [file.replace(".png", ".jpg") for file in files]  # a user converted the images, not the lists
    parts = [0] * (len(images) - 2) + [1, 2]
    base = root / "celeba"
    if form == "txt":
        rows = [f"{file}  " + " ".join(f"{v:2}" for v in row) for file, row in zip(named, values, strict=True)]
        (base / "list_attr_celeba.txt").write_text("\n".join([str(len(named)), " ".join(ATTRIBUTES), *rows, ""]))
        lines = [f"{file} {part}" for file, part in zip(named, parts, strict=True)]
        (base / "list_eval_partition.txt").write_text("\r\n".join([*lines, ""]))
    else:
        rows = [",".join([file, *map(str, row)]) for file, row in zip(named, values, strict=True)]
        (base / "list_attr_celeba.csv").write_text("\n".join(["image_id," + ",".join(ATTRIBUTES), *rows]))
        lines = [f"{file},{part}" for file, part in zip(named, parts, strict=True)]
        (base / "list_eval_partition.csv").write_text("\ufeff" + "\n".join(["image_id,partition", *lines]))
    return values


@pytest.mark.parametrize(("form", "nested"), [("txt", False), ("csv", True)])
def test_celeba_lists_in_both_forms(tmp_path, form, nested):
    images = RNG.integers(0, 256, (6, 3, 218, 178), dtype=np.uint8)
    values = write_celeba(tmp_path, form, images, nested)
    train = load("celeba", tmp_path, image_size=64)
    assert len(train) == 4 and [len(load("celeba", tmp_path, s)) for s in ("val", "test", "all")] == [1, 1, 6]
    assert train.classes == ATTRIBUTES and train.image_size == 64
    np.testing.assert_array_equal(train.targets, values[:4] > 0)
    np.testing.assert_array_equal(load("celeba", tmp_path, "test").targets, values[5:] > 0)
    # shorter edge 178 -> 64 gives 78 rows; the centre keeps rows 7..70
    picture = Image.fromarray(images[2].transpose(1, 2, 0))
    small = np.asarray(picture.resize((64, 78), Image.Resampling.BILINEAR)).transpose(2, 0, 1)[:, 7:71]
    np.testing.assert_array_equal(train[2][0], small)
    cropped = load("celeba", tmp_path, image_size=64, crop=108)[2][0]
    window = picture.crop((35, 55, 143, 163)).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(cropped, np.asarray(window).transpose(2, 0, 1))
    cached = load("celeba", tmp_path, image_size=64, cache=True)
    assert isinstance(cached.images, np.memmap)
    np.testing.assert_array_equal(cached.arrays()[0], train.arrays()[0])
    assert cached.fingerprint() == train.fingerprint()


def test_celeba_says_what_is_missing(tmp_path):
    write_celeba(tmp_path, "txt", pictures(6, 40))
    (tmp_path / "celeba" / "img_align_celeba" / "000002.png").unlink()
    with pytest.raises(UserError, match=r"lacks 000002\.jpg"):
        load("celeba", tmp_path)
    assert len(load("celeba", tmp_path, "test")) == 1
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("000001.jpg 0\n")
    with pytest.raises(UserError, match=r"does not list 000002\.jpg"):
        load("celeba", tmp_path)
    (tmp_path / "celeba" / "list_attr_celeba.txt").write_text("a b c\n000001.jpg 1 -1 x\n")
    with pytest.raises(UserError, match=r"list_attr_celeba\.txt, line 2"):
        load("celeba", tmp_path)


def test_folder_orders_frames_by_number_and_names_classes(tmp_path):
    frames = pictures(12, 8)
    for i, frame in enumerate(frames):
        write_png(tmp_path / "flat" / f"frame{i}.png", frame)
    flat = load("folder", tmp_path / "flat")
    np.testing.assert_array_equal(flat.arrays()[0], frames)  # frame10 comes after frame9
    assert flat.classes is None and flat.targets.tolist() == [0] * 12
    for i in range(4):
        write_png(tmp_path / "sorted" / "train" / ("b", "a")[i % 2] / "x" / f"{i}.png", frames[i])
    classes = load("folder", tmp_path / "sorted", image_size=4, channels=1)
    assert classes.classes == ["a", "b"] and classes.targets.tolist() == [0, 0, 1, 1]
    grey = Image.fromarray(frames[1].transpose(1, 2, 0)).convert("L")
    np.testing.assert_array_equal(classes[0][0], fit(grey, 4))
    with pytest.raises(UserError, match="no sub-folder 'test'"):
        load("folder", tmp_path / "sorted", "test")
    write_png(tmp_path / "flat" / "frame3.png", pictures(1, 9)[0])
    with pytest.raises(UserError, match=r"frame3\.png is 9x9, the first image 8x8"):
        load("folder", tmp_path / "flat").arrays()
    write_png(tmp_path / "flat" / "sub" / "0.png", frames[0])
    with pytest.raises(UserError, match="beside sub-folders"):
        load("folder", tmp_path / "flat")
    assert natural_sorted(["f10", "f9", "f1"]) == ["f1", "f9", "f10"]


def test_a_changed_folder_is_decoded_anew(tmp_path):
    frames = pictures(3, 8)
    for i, frame in enumerate(frames):
        write_png(tmp_path / f"{i}.png", frame)
    np.testing.assert_array_equal(load("folder", tmp_path, cache=True).arrays()[0], frames)
    write_png(tmp_path / "1.png", 255 - frames[1])
    np.testing.assert_array_equal(load("folder", tmp_path, cache=True)[1][0], 255 - frames[1])


def test_tiny_imagenet(tmp_path):
    base, images = tmp_path / "tiny-imagenet-200", pictures(6, 64)
    for i in range(4):
        wnid = ("n02", "n01")[i % 2]
        write_png(base / "train" / wnid / "images" / f"{wnid}_{i}.png", images[i])
    for i in (4, 5):
        write_png(base / "val" / "images" / f"val_{i}.png", images[i])
    notes = base / "val" / "val_annotations.txt"
    notes.write_text("val_5.png\tn02\t0\t0\t9\t9\nval_4.png\tn01\t0\t0\t9\t9\n")
    train, valid = load("tiny_imagenet", tmp_path), load("tiny_imagenet", tmp_path, "valid")
    assert train.classes == valid.classes == ["n01", "n02"]
    np.testing.assert_array_equal(train.arrays()[0], images[[1, 3, 0, 2]])
    np.testing.assert_array_equal(valid.arrays()[0], images[[5, 4]])
    assert valid.targets.tolist() == [1, 0]
    notes.write_text("val_5.png\tn77\n")
    with pytest.raises(UserError, match="line 1"):
        load("tiny_imagenet", tmp_path, "test")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_downsampled_imagenet_batches(tmp_path, save):
    images, labels = pictures(25), RNG.integers(1, 1001, 25)
    for i, rows in enumerate(np.array_split(np.arange(22), 11), start=1):  # 10 and 11 follow 9
        place = tmp_path / "imagenet32" / f"train_data_batch_{i}.npz"
        place.parent.mkdir(exist_ok=True)
        save(place, data=images[rows].reshape(len(rows), -1), labels=labels[rows], mean=np.zeros(3072))
    save(tmp_path / "imagenet32" / "val_data.npz", data=images[22:].reshape(3, -1), labels=labels[22:])
    train = load("imagenet32", tmp_path)
    rows = np.array([21, 0, 5, 20, 5])
    np.testing.assert_array_equal(train.images_at(rows), images[rows])
    np.testing.assert_array_equal(train.targets, labels[:22] - 1)
    np.testing.assert_array_equal(load("imagenet32", tmp_path, "test").arrays()[0], images[22:])


def test_downsampled_imagenet_folders(tmp_path):
    images = pictures(5, 64)
    for i, image in enumerate(images):
        write_png(tmp_path / "train_64x64" / f"images{i // 3}" / f"{i}.png", image)
    data = load("imagenet64", tmp_path)
    np.testing.assert_array_equal(data.arrays()[0], images)
    assert data.classes is None and data.targets.tolist() == [0] * 5


def test_digits_split_is_stratified_and_seeded():
    train, test, whole = (load("digits", split=s) for s in ("train", "test", "all"))
    assert (len(train), len(test), len(whole)) == (1437, 360, 1797)
    counts = np.bincount(whole.targets.numpy())
    assert np.abs(np.bincount(test.targets.numpy()) - 0.2 * counts).max() < 1
    every = np.concatenate([train.arrays()[0], test.arrays()[0]]).reshape(1797, -1)
    assert sorted(map(bytes, every)) == sorted(map(bytes, whole.arrays()[0].numpy().reshape(1797, -1)))
    assert int(whole.arrays()[0].max()) == 255 and set(np.unique(whole.images[:, 0])) <= {
        int(255 / 16 * level + 0.5) for level in range(17)
    }
    other = load("digits", split="test", seed=1)
    assert not torch.equal(other.targets, test.targets) and other.fingerprint() != test.fingerprint()
    assert load("digits", image_size=28)[0][0].shape == (1, 28, 28)


def grid_images(sizes, shape):
    return RNG.integers(0, 256, (int(np.prod(sizes)), *shape), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_dsprites_file(tmp_path, save):
    sizes = (2, 2, 3, 4, 5)
    images = (grid_images(sizes, (64, 64)) > 127).astype(np.uint8)
    codes = np.stack([np.zeros(240, int), *np.unravel_index(np.arange(240), sizes)], axis=1)
    (tmp_path / "dsprites").mkdir()
    path = tmp_path / "dsprites" / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    metadata = np.array({"latents_sizes": [1, *sizes]}, dtype=object)  # pickled in the published file: left alone
    save(path, imgs=images, latents_classes=codes, metadata=metadata)
    grid = load("dsprites", tmp_path, sizes=sizes)
    np.testing.assert_array_equal(grid.arrays()[0][:, 0], images * 255)
    np.testing.assert_array_equal(grid.latents_classes([7, 239]), codes[[7, 239]])
    assert grid.targets[239].tolist() == [1, 1, 2, 3, 4]
    save(path, imgs=images, latents_classes=codes[::-1])
    with pytest.raises(UserError, match="order"):
        load("dsprites", tmp_path, sizes=sizes)
    with pytest.raises(UserError, match="737280, 64, 64"):
        load("dsprites", tmp_path)


def test_shapes3d_reads_rows_in_any_order(tmp_path):
    sizes = (2, 1, 2, 3, 1, 2)
    images = grid_images(sizes, (64, 64, 3))
    with h5py.File(tmp_path / "3dshapes.h5", "w") as file:
        file.create_dataset("images", data=images, chunks=(1, 64, 64, 3), compression="gzip")
    grid = load("shapes3d", tmp_path, sizes=sizes)
    rows = [23, 0, 5, 23, 11]  # h5py itself wants them increasing, without repeats
    np.testing.assert_array_equal(grid.images_at(rows), images[rows].transpose(0, 3, 1, 2))
    again = pickle.loads(pickle.dumps(grid))  # as a worker process gets it
    np.testing.assert_array_equal(again[4][0], images[4].transpose(2, 0, 1))
    assert grid.factor_names[-1] == "orientation" and grid[1][1].tolist() == [0, 0, 0, 0, 0, 1]


def test_mpi3d_toy_stored_or_unpacked(tmp_path):
    sizes = (2, 1, 2, 1, 1, 2, 3)
    images = grid_images(sizes, (64, 64, 3))
    np.savez(tmp_path / "mpi3d_toy.npz", images=images)
    grid = load("mpi3d_toy", tmp_path, sizes=sizes)
    np.testing.assert_array_equal(grid.arrays()[0], images.transpose(0, 3, 1, 2))
    np.savez_compressed(tmp_path / "mpi3d_toy.npz", images=images)
    with pytest.raises(UserError, match="prepare mpi3d_toy"):
        load("mpi3d_toy", tmp_path, sizes=sizes)
    np.save(tmp_path / "mpi3d_toy_images.npy", images)
    np.testing.assert_array_equal(load("mpi3d_toy", tmp_path, sizes=sizes)[5][0], images[5].transpose(2, 0, 1))


# ---------------------------------------------------------------- the interface


def test_images_at_and_errors_beyond_the_set():
    data = load("digits")
    batch = data.images_at(torch.tensor([5, -1, 5]))
    assert (
        torch.equal(batch[0], data[5][0]) and torch.equal(batch[1], data[1436][0]) and torch.equal(batch[0], batch[2])
    )
    assert data.images_at([]).shape == (0, 1, 8, 8)
    with pytest.raises(IndexError, match="1437"):
        data[1437]
    with pytest.raises(TypeError, match="whole numbers"):
        data.images_at([0.5])
    assert sum(1 for _ in data) == 1437  # iteration ends


def test_arrays_refuse_what_does_not_fit():
    sprites = load("sprites")
    with pytest.raises(UserError, match="3,019,898,880 bytes"):
        sprites.arrays(max_bytes=10**9)


def test_random_transforms_are_marked_and_draw_by_item():
    def noisy(image):
        return image.float() + torch.rand(1)

    def twice(image):
        return image * 2

    twice.is_random = False
    data = load("digits", transform=noisy)
    assert data.is_random and not load("digits", transform=twice).is_random and not load("digits").is_random
    with pytest.raises(UserError, match="random transform"):
        data.arrays()
    plain = load("digits").arrays()[0]
    assert torch.equal(load("digits", transform=twice).arrays()[0], plain * 2)
    few = subset(data, n=20)
    assert few.is_random
    first, again = (torch.cat([x for x, _ in Batches(few, 10, seed=3).epoch(2)]) for _ in range(2))
    other = torch.cat([x for x, _ in Batches(few, 10, seed=3).epoch(3)])
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_batches_read_a_set_directly():
    data = subset(load("digits"), n=100, seed=1)
    for images, targets in Batches(data, 32, seed=0, drop_last=False).epoch(0):
        assert images.dtype == torch.uint8 and len(images) == len(targets)
    order = Batches(data, 32, seed=0, drop_last=False).order(0)
    images, targets = next(iter(Batches(data, 32, seed=0).epoch(0)))
    assert torch.equal(images, data.arrays()[0][order[:32]]) and torch.equal(targets, data.targets[order[:32]])


def test_subsets_are_seeded_and_nested():
    data = load("digits")
    small, large = (subset(data, n=k, seed=4) for k in (10, 50))
    assert set(small.indices) <= set(large.indices) and (np.diff(large.indices) > 0).all()
    assert torch.equal(large.arrays()[0], data.arrays()[0][large.indices])
    assert torch.equal(large.targets, data.targets[large.indices]) and large.classes == data.classes
    assert set(subset(data, n=10, seed=5).indices) != set(small.indices)
    nested = subset(large, indices=[3, 1])
    assert torch.equal(nested[0][0], data[large.indices[3]][0]) and nested.fingerprint() != large.fingerprint()
    for wrong in ({"n": 0}, {"n": 5000}, {}, {"n": 1, "indices": [1]}):
        with pytest.raises(UserError):
            subset(data, **wrong)


def test_splits_are_disjoint_and_seeded():
    data = load("digits")
    a, b = split(data, [1000, 437], seed=3)
    assert sorted(np.concatenate([a.indices, b.indices])) == list(range(1437)) and [len(a), len(b)] == [1000, 437]
    assert split(data, [700, 700], 1)[0].fingerprint() != split(data, [700, 700], 2)[0].fingerprint()
    for wrong in ([1437, 1], [2000], [], [-1]):
        with pytest.raises(UserError):
            split(data, wrong)


def test_a_part_of_a_grid_keeps_its_factors():
    grid = load("sprites", sizes=(3, 2, 1, 4, 4))
    part = subset(grid, indices=[90, 3])
    assert part.factors_of([0, 1]).tolist() == grid.factors_of([90, 3]).tolist() == part.targets.tolist()
    assert part.factor_sizes == grid.factor_sizes and torch.equal(part[1][0], grid[3][0])


def test_wrong_names_and_absent_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'fashion_mnist'"):
        load("fashionmnist")
    with pytest.raises(UserError, match="did you mean 'test'"):
        load("mnist", split="tets")
    with pytest.raises(UserError, match="did you mean 'image_size'"):
        load("digits", imagesize=3)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    for name in set(names()) - {"digits", "sprites", "folder"}:
        with pytest.raises(UserError) as caught:
            load(name)
        assert str(tmp_path) in str(caught.value)
        assert f"python -m common.datasets.prepare {name}" in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("DATA_ROOT", "elsewhere")
    write_mnist(tmp_path / "MNIST" / "raw")
    assert len(load("mnist", tmp_path)) == 30  # the argument wins


@pytest.mark.data
def test_real_mnist():
    train, test = load("mnist"), load("mnist", split="test")
    assert (len(train), len(test)) == (60000, 10000)
    assert train.targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert abs(float(train.arrays()[0].float().mean()) / 255 - 0.1307) < 1e-4  # the mean that everybody normalises by
    assert np.bincount(test.targets.numpy()).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


# ---------------------------------------------------------------- damaged and foreign files


class Attack:
    """Pickles as a call of `os.system`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def refused(load_it, path):
    with pytest.raises(UserError) as caught:
        load_it()
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_damaged_idx_files(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder)
    path = folder / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    huge = bytes([0, 0, 8, 3]) + struct.pack(">3I", 10**9, 1000, 1)
    for content in (b"", whole[:10], whole[:-1], whole + b"x", b"<html>" + whole, huge, huge[:4] + b"\xff" * 12):
        path.write_bytes(content)
        refused(lambda: load("mnist", tmp_path), path)
    path.unlink()
    packed = folder / "train-images-idx3-ubyte.gz"
    bomb = gzip.compress(huge + bytes(10**6))
    for content in (gzip.compress(whole)[:-20], gzip.compress(whole + b"x"), b"plain", bomb):
        packed.write_bytes(content)
        refused(lambda: load("mnist", tmp_path), packed)
    packed.write_bytes(gzip.compress(whole))
    write_idx(folder / "train-labels-idx1-ubyte", np.full(30, 10, np.uint8))
    assert "10 classes" in refused(lambda: load("mnist", tmp_path), packed)


def test_pickles_run_nothing(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    path = folder / "test_batch"
    good = pickle.dumps({"data": pictures(2).reshape(2, -1), "labels": [0, 1]}, protocol=2)
    lying = {"data": np.zeros((10, 3072), np.uint8), "labels": list(range(10))}
    shape_lie = pickle.dumps(lying, protocol=2).replace(b"K\nM\x00\x0c\x86", b"J\xff\xff\xff\x7fM\x00\x0c\x86")
    assert shape_lie != pickle.dumps(lying, protocol=2)
    contents = {
        "call": pickle.dumps({"data": Attack(tmp_path / "ran"), "labels": []}),
        "truncated": good[:-30],
        "not a dict": pickle.dumps([1, 2]),
        "objects": pickle.dumps({"data": np.array([{}], dtype=object), "labels": [0]}),
        "other shape": pickle.dumps({"data": np.zeros((2, 9), np.uint8), "labels": [0, 1]}),
        "claims 2**31 rows": shape_lie,
        "allocates": b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.",
        "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
        "text": b"<html>not here</html>",
        "empty": b"",
    }
    for content in contents.values():
        path.write_bytes(content)
        refused(lambda: load("cifar10", tmp_path, "test"), path)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(good)
    assert len(load("cifar10", tmp_path, "test")) == 2


def npy_header(shape):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_npz_claims_are_checked_before_memory_is_taken(tmp_path):
    path = tmp_path / "mpi3d_toy.npz"
    np.savez(path, images=np.zeros((2, 64, 64, 3), np.uint8))
    whole = path.read_bytes()
    sizes = (1, 1, 1, 1, 1, 1, 2)
    assert len(load("mpi3d_toy", tmp_path, sizes=sizes)) == 2
    for content in (whole[:-100], whole[:200], b"", b"<html>", whole.replace(b"PK\x01\x02", b"PK\x09\x09")):
        path.write_bytes(content)
        refused(lambda: load("mpi3d_toy", tmp_path, sizes=sizes), path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images.npy", npy_header((10**12,)) + bytes(100))
    assert "1,000,000,000,000" in refused(lambda: load("mpi3d_toy", tmp_path), path)
    np.savez(path, images=np.array([{}], dtype=object))
    refused(lambda: load("mpi3d_toy", tmp_path), path)
    np.savez(path, pictures=np.zeros(3))
    assert "no array 'images'" in refused(lambda: load("mpi3d_toy", tmp_path), path)


def test_damaged_h5_mat_and_images(tmp_path):
    path = tmp_path / "3dshapes.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((4, 64, 64, 3), np.uint8)
    whole = path.read_bytes()
    with h5py.File(path, "w") as file:
        file.create_dataset("images", (10**9, 64, 64, 3), np.uint8, chunks=(1, 64, 64, 3))  # nothing is stored
    refused(lambda: load("shapes3d", tmp_path), path)
    for content in (whole[:1000], b"", b"\x89HDF\r\n"):
        path.write_bytes(content)
        refused(lambda: load("shapes3d", tmp_path), path)
    with h5py.File(path, "w") as file:
        file["pictures"] = np.zeros(3)
    refused(lambda: load("shapes3d", tmp_path), path)

    mat = tmp_path / "test_32x32.mat"
    savemat(mat, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((2, 1))})
    assert len(load("svhn", tmp_path, "test")) == 2
    whole = mat.read_bytes()
    for content in (whole[:300], b"", b"x" * 500):
        mat.write_bytes(content)
        refused(lambda: load("svhn", tmp_path, "test"), mat)
    savemat(mat, {"X": np.zeros((28, 28, 3, 2), np.uint8), "y": np.ones((2, 1))})
    refused(lambda: load("svhn", tmp_path, "test"), mat)

    picture = tmp_path / "pictures" / "0.png"
    write_png(picture, pictures(1)[0])
    write_png(picture.with_name("1.png"), pictures(1)[0])
    broken = picture.with_name("1.png")
    broken.write_bytes(broken.read_bytes()[:200])
    refused(lambda: load("folder", tmp_path / "pictures").arrays(), broken)
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 10**6, 10**6) + b"\x08\x02\0\0\0"
    import zlib

    broken.write_bytes(header + struct.pack(">I", zlib.crc32(header[12:])) + bytes(100))
    refused(lambda: load("folder", tmp_path / "pictures").arrays(), broken)


def test_a_cifar_folder_with_one_class_is_refused(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "cifar10" / part / "cat").mkdir(parents=True)
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "cifar10" / part / "cat" / "0.png")
    with pytest.raises(UserError, match="holds 1 class folder"):
        load("cifar10", tmp_path, "train")


def test_a_class_that_training_lacks_is_refused(tmp_path):
    for name in ("train/a", "train/b", "train/c", "test/a", "test/c"):
        write_png(tmp_path / name / "0.png", pictures(1)[0])
    test = load("folder", tmp_path, "test")
    assert test.classes == ["a", "b", "c"] and test.targets.tolist() == [0, 2]  # the codes of the training images
    write_png(tmp_path / "test" / "d" / "0.png", pictures(1)[0])
    with pytest.raises(UserError, match="the classes of both must be the same"):
        load("folder", tmp_path, "test")
    write_png(tmp_path / "valid" / "0.png", pictures(1)[0])
    with pytest.raises(UserError, match="images without a class"):
        load("folder", tmp_path, "valid")
    for name in ("a", "b"):
        write_png(tmp_path / "cifar10" / "train" / name / "0.png", pictures(1)[0])
    write_png(tmp_path / "cifar10" / "test" / "b" / "0.png", pictures(1)[0])
    assert load("cifar10", tmp_path, "test").targets.tolist() == [1]


def test_grey_and_flat_folders(tmp_path):
    grey = pictures(3, 20, 1)
    for i, image in enumerate(grey):
        write_png(tmp_path / "train" / f"{i}.png", image)
        write_png(tmp_path / "test" / f"{i}.png", 255 - image)
    for part, expected in (("train", grey), ("test", 255 - grey)):
        data = load("folder", tmp_path, part, channels=1)
        np.testing.assert_array_equal(data.arrays()[0], expected)
        assert data.classes is None
    colour = load("folder", tmp_path, channels=3, crop=10, image_size=5)
    assert colour[0][0].shape == (3, 5, 5)
    np.testing.assert_array_equal(colour[1][0][2], fit(Image.fromarray(grey[1, 0]), 5, 10)[0])


def test_links_in_a_circle_end(tmp_path):
    write_png(tmp_path / "a" / "0.png", pictures(1)[0])
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "b")  # a link to itself
    assert len(load("folder", tmp_path)) == 1


def test_names_of_any_characters(tmp_path):
    images = pictures(3)
    for name, image in zip(("a b.png", "x\ny.png", "ünïcøde²3.png"), images, strict=True):
        write_png(tmp_path / "cl ass" / name, image)
    raw = bytes(tmp_path / "cl ass") + b"/\xff.png"  # no text in any encoding
    write_png(tmp_path / "y.png", images[0])
    (tmp_path / "y.png").rename(raw.decode(errors="surrogateescape"))
    data = load("folder", tmp_path, cache=True)
    assert len(data.arrays()[0]) == 4 and len(load("folder", tmp_path, cache=True)) == 4


def test_a_damaged_cache_is_made_again(tmp_path):
    images = pictures(3)
    for i, image in enumerate(images):
        write_png(tmp_path / f"{i}.png", image)
    for content in (b"", b"cut off", npy_header((3, 3, 32, 32)), npy_header((1, 3, 32, 32)) + bytes(3072)):
        load("folder", tmp_path, cache=True)
        (cache,) = (tmp_path / ".cache").iterdir()
        cache.write_bytes(content)
        np.testing.assert_array_equal(load("folder", tmp_path, cache=True).arrays()[0], images)


@pytest.mark.parametrize("labels", [[[11], [1]], [[1.5], [2]], [[np.nan], [2]], [[np.inf], [2]], [[-1], [2]], [[1]]])
def test_labels_of_svhn_are_its_digits(tmp_path, labels):
    savemat(tmp_path / "test_32x32.mat", {"X": pictures(2).transpose(2, 3, 1, 0), "y": np.array(labels)})
    with pytest.raises(UserError, match=r"test_32x32\.mat"):
        load("svhn", tmp_path, "test")


@pytest.mark.parametrize(
    "labels", [[0, None], [0, 0.5], [0, "1"], [[0], [1, 2]], [0, float("nan")], [0, 10], [0, -1], [0], 3, {0: 1},
               [0, 10**30], [[0, 1], [2, 3]]],
)  # fmt: skip
def test_labels_of_cifar_are_its_classes(tmp_path, labels):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(pickle.dumps({"data": pictures(2).reshape(2, -1), "labels": labels}))
    with pytest.raises(UserError, match="cifar-10-batches-py"):
        load("cifar10", tmp_path, "test")


@pytest.mark.parametrize("labels", [[0, 1], [1, 1001], [1.5, 2], [np.nan, 1], [True, False], [1, 2, 3]])
def test_labels_of_imagenet_go_from_1_to_1000(tmp_path, labels):
    np.savez(tmp_path / "val_data.npz", data=pictures(2).reshape(2, -1), labels=np.array(labels))
    with pytest.raises(UserError, match=r"val_data\.npz"):
        load("imagenet32", tmp_path, "test")


@pytest.mark.parametrize(
    "images", [np.zeros((2, 3, 32, 32)), np.zeros((2, 3072), np.float32), np.zeros((2, 3072), np.int8), np.zeros(2)]
)
def test_images_of_other_numbers_are_refused(tmp_path, images):
    np.savez(tmp_path / "val_data.npz", data=images, labels=np.array([1, 2]))
    with pytest.raises(UserError, match=r"val_data\.npz does not hold 32x32 images"):
        load("imagenet32", tmp_path, "test")


def test_mnist_of_another_size_is_refused(tmp_path):
    write_idx(tmp_path / "MNIST/raw/t10k-images-idx3-ubyte", pictures(2, 32, 1)[:, 0])
    write_idx(tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte", np.array([1, 2], np.uint8))
    with pytest.raises(UserError, match="32x32, not mnist's 28x28"):
        load("mnist", tmp_path, "test")


@pytest.mark.parametrize(("old", "new"), [("-1", "3"), (" 1", " 0"), (" 1", " nan"), (" 1", f" {10**30}")])
def test_attributes_of_celeba_are_two_values(tmp_path, old, new):
    write_celeba(tmp_path, "txt", pictures(6, 40))
    path = tmp_path / "celeba" / "list_attr_celeba.txt"
    path.write_text(path.read_text().replace(old, new, 1) if old != " 1" else path.read_text().replace(old, new, 3))
    with pytest.raises(UserError, match=r"list_attr_celeba\.txt"):
        load("celeba", tmp_path)


def test_parts_of_celeba_are_three(tmp_path):
    write_celeba(tmp_path, "txt", pictures(6, 40))
    path = tmp_path / "celeba" / "list_eval_partition.txt"
    path.write_text(path.read_text().replace("000002.jpg 0", "000002.jpg 5"))
    with pytest.raises(UserError, match=r"list_eval_partition\.txt: parts must be 0, 1 or 2"):
        load("celeba", tmp_path)


PAGES = (
    "<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title>",
    "<?xml version='1.0'?><Error>AccessDenied",
)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(
    ("name", "file", "split"),
    [("mnist", "MNIST/raw/train-images-idx3-ubyte", "train"), ("svhn", "SVHN/train_32x32.mat", "train"),
     ("cifar10", "cifar-10-batches-py/test_batch", "test"), ("shapes3d", "3dshapes.h5", "train"),
     ("celeba", "celeba/list_attr_celeba.txt", "train"), ("imagenet32", "imagenet32/val_data.npz", "test"),
     ("imagenet32", "imagenet32/val_data", "test"), ("mpi3d_toy", "mpi3d_toy/mpi3d_toy.npz", "train"),
     ("mpi3d_toy", "mpi3d_toy/mpi3d_toy_images.npy", "train"), ("folder", "a.jpg", "train"),
     ("dsprites", "dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", "train")],
)  # fmt: skip
def test_a_web_page_in_the_place_of_a_file_is_called_one(tmp_path, name, file, split, page):
    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    write_idx(tmp_path / "MNIST/raw/train-labels-idx1-ubyte", np.zeros(2, np.uint8))
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    with pytest.raises(UserError, match="is a web page"):
        load(name, tmp_path, split)


@pytest.mark.parametrize(
    ("name", "file"),
    [("mnist", "MNIST/raw/train-images-idx3-ubyte"), ("svhn", "SVHN/train_32x32.mat"), ("shapes3d", "3dshapes.h5"),
     ("cifar10", "cifar-10-batches-py/data_batch_1"), ("celeba", "celeba/list_attr_celeba.txt"),
     ("mpi3d_toy", "mpi3d_toy/mpi3d_toy.npz"), ("mpi3d_toy", "mpi3d_toy/mpi3d_toy_images.npy"), ("folder", "0.png/x"),
     ("dsprites", "dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"), ("tiny_imagenet", "tiny-imagenet-200"),
     ("imagenet32", "imagenet32/train_data_batch_1.npz"), ("imagenet32", "train_32x32"), ("cifar10", "cifar10/train")],
)  # fmt: skip
def test_a_folder_where_a_file_is_expected_and_empty_folders(tmp_path, name, file):
    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    write_idx(tmp_path / "MNIST/raw/train-labels-idx1-ubyte", np.zeros(2, np.uint8))
    (tmp_path / file).mkdir(parents=True)
    with pytest.raises(UserError):
        load(name, tmp_path)


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    write_png(tmp_path / "a" / "0.png", pictures(1)[0])

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", forbidden)
    with pytest.raises(UserError, match=r"cannot read .* \(Permission denied\)"):
        load("folder", tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="File name too long"):
        load("folder", tmp_path / ("x" * 300))


def test_sizes_beyond_memory_are_refused(tmp_path):
    Image.new("L", (60_000, 1)).save(tmp_path / "long.jpg")
    with pytest.raises(UserError, match=r"long\.jpg is 60000x1, too long to be resized to 64"):
        load("folder", tmp_path, image_size=64)
    assert load("folder", tmp_path, image_size=64, crop=8)[0][0].shape == (3, 64, 64)
    for options in ({"image_size": 10**6}, {"crop": 10**9}, {"image_size": 0}, {"crop": -1}):
        with pytest.raises(UserError, match=r"must lie in 1\.\.8192"):
            load("folder", tmp_path, **options)
    for options in ({"image_size": 10**5}, {"pad": 10**5}, {"pad": -1}, {"image_size": -4}):
        with pytest.raises(UserError, match="digits: pad="):
            load("digits", **options)
    for options in ({"image_size": 10**6}, {"sizes": (3, 10**9, 10**9, 10**9, 10**9)}):
        with pytest.raises(UserError, match="sprites: "):
            load("sprites", **options)
    for options in ({"test_fraction": 1e-6}, {"test_fraction": 1}, {"test_fraction": -1}, {"seed": -1}):
        with pytest.raises(UserError, match="digits: test_fraction="):
            load("digits", **options)
