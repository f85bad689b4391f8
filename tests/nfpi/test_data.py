"""The pickle contract, subsets, class codes, and the extraction command."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from nfpi import data, extract_dataset
from nfpi.config import config_place, resolve
from nfpi.label_encoder import DistancedPixels


def content(classes=3, count=12, shape=(3, 4, 4)):
    rng = torch.Generator().manual_seed(0)
    part = {
        "data": torch.randint(0, 256, (count, *shape), generator=rng, dtype=torch.uint8),
        "targets": torch.arange(count) % classes,
    }
    return {"train": part, "test": part, "classes": [f"c{k}" for k in range(classes)]}


def test_pickles_of_plain_torch_and_numpy_are_read(tmp_path):
    made = content()
    path = tmp_path / "toy" / "toy.pickle"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(made))
    images = data.load_split("toy", str(tmp_path), "train")
    assert torch.equal(images.images, made["train"]["data"]) and images.classes == ("c0", "c1", "c2")
    numpy = {s: {k: v.numpy() for k, v in made[s].items()} for s in ("train", "test")}
    path.write_bytes(pickle.dumps({**numpy, "classes": torch.arange(3)}))
    assert torch.equal(data.load_split("toy", str(tmp_path), "test").targets, made["test"]["targets"])
    path.chmod(0o444)  # read-only data folders are fine
    assert len(data.load_split("toy", str(tmp_path), "train")) == 12


def test_grey_images_get_their_channel(tmp_path):
    made = content(shape=(5, 5))
    data.write_pickle(tmp_path / "grey" / "grey.pickle", made)
    assert data.load_split("grey", str(tmp_path), "train").images.shape == (12, 1, 5, 5)


class Evil:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


def test_a_pickle_cannot_run_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "toy" / "toy.pickle"
    path.parent.mkdir()
    for payload in ({"train": Evil()}, {"train": {"data": torch.nn.Linear(1, 1)}}):
        path.write_bytes(pickle.dumps(payload))
        with pytest.raises(UserError, match=r"toy\.pickle"):
            data.load_split("toy", str(tmp_path), "train")
    assert not (tmp_path / "PWNED").exists()
    path.write_bytes(pickle.dumps(content())[:-40])
    with pytest.raises(UserError, match="damaged"):
        data.load_split("toy", str(tmp_path), "train")


def test_wrong_contents_are_named(tmp_path):
    with pytest.raises(UserError, match="no pickled data set"):
        data.read_pickle(tmp_path / "none.pickle")
    with pytest.raises(UserError, match="uint8"):
        data.from_arrays({"data": torch.zeros(2, 3, 4, 4), "targets": torch.zeros(2)}, (), "here")
    with pytest.raises(UserError, match="'data' and 'targets'"):
        data.from_arrays({"x": 1}, (), "here")
    images = data.from_arrays(content()["train"], (), "here")
    with pytest.raises(UserError, match="configuration says"):
        images.check((1, 4, 4), 3, "here")
    with pytest.raises(UserError, match="classes"):
        images.check((3, 4, 4), 2, "here")


def test_subsets_are_seeded_equal_and_balanced():
    targets = torch.arange(90) % 3
    images = data.Images(torch.arange(90, dtype=torch.uint8).view(90, 1, 1, 1), targets, ())

    def sets(count, *more):
        few = [f"dataset_info.items_per_class_{part}={count}" for part in ("train", "val")]
        return data.flow_sets(images, resolve(*config_place("___configs/digits", "smoke"), [*few, *more]))

    train, fit, merged = sets(5)
    assert torch.equal(train.images, fit.images) and torch.bincount(train.targets).tolist() == [5, 5, 5]
    assert merged is None
    assert not torch.equal(train.images, sets(5, "seed=7").train.images)
    train, fit, merged = sets(0, "val.gmm.use_train_dataset=0")
    assert len(train) == 81 and torch.bincount(fit.targets).tolist() == [3, 3, 3]
    parts = [set(part.images.flatten().tolist()) for part in (train, fit, merged)]
    assert not parts[0] & parts[1] and parts[2] == parts[0] | parts[1]


def test_generators_depend_on_every_part_of_their_place():
    draws = [
        float(torch.rand((), generator=data.generator(*place)))
        for place in (
            (1, data.Use.TRAIN, 0, 0),
            (1, data.Use.TRAIN, 0, 1),
            (1, data.Use.TRAIN, 1, 0),
            (2, data.Use.TRAIN, 0, 0),
            (1, data.Use.LATENTS, 0, 0),
        )
    ]
    assert len(set(draws)) == 5
    assert draws[0] == float(torch.rand((), generator=data.generator(1, data.Use.TRAIN, 0, 0)))


def test_class_codes_are_far_apart_and_decoded_under_noise():
    rng = torch.Generator().manual_seed(0)
    near = DistancedPixels.make(10, 1, 2, 8, 0, torch.Generator().manual_seed(0))
    far = DistancedPixels.make(10, 1, 2, 8, 100, torch.Generator().manual_seed(0))
    assert (
        torch.pdist(far.codes.flatten(1)).min() / far.codes.std()
        > torch.pdist(near.codes.flatten(1)).min() / near.codes.std()
    )
    x, y = torch.rand(50, 1, 6, 8, generator=rng), torch.arange(50) % 10
    encoded = far.encode(x, y)
    assert encoded.shape == (50, 1, 8, 8)
    noisy = encoded + 0.02 * torch.randn(encoded.shape, generator=rng)
    assert torch.equal(far.decode(noisy), y)
    assert torch.equal(far.remove(encoded), x)  # also for images that are not square
    with pytest.raises(UserError):
        DistancedPixels.make(1, 1, 2, 8, 1, rng)


def test_extraction_writes_the_contract(tmp_path, capsys):
    extract_dataset.main(["digits", "--root", str(tmp_path)])
    assert "wrote" in capsys.readouterr().out
    raw = data.read_pickle(tmp_path / "digits" / "digits.pickle")
    assert raw["train"]["data"].ndim == 3 and raw["train"]["data"].dtype == torch.uint8
    assert len(raw["classes"]) == 10 and raw["test"]["targets"].dtype == torch.int64
    assert len(data.load_split("digits", str(tmp_path), "train")) == len(raw["train"]["data"])


def write_images(folder, name, count, value, side=6):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(folder / name / f"{i}.png")


def test_extraction_from_folders(tmp_path):
    source = tmp_path / "pictures"
    for split, count in (("train", 3), ("test", 2)):
        write_images(source / split, "ant", count, 10)
        write_images(source / split, "bee", count, 200)
    (source / "train" / ".hidden").mkdir()
    extract_dataset.main(["insects", "--root", str(tmp_path), "--folder", str(source), "--size", "4"])
    train = data.load_split("insects", str(tmp_path), "train")
    assert train.images.shape == (6, 3, 4, 4) and train.classes == ("ant", "bee")
    assert train.images[train.targets == 1].float().mean() == 200
    # TinyImageNet's layout
    tiny = tmp_path / "tiny"
    for label, value in (("n01", 10), ("n02", 200)):
        write_images(tiny / "train" / label, "images", 2, value)
    write_images(tiny / "val", "images", 2, 200)
    (tiny / "val" / "val_annotations.txt").write_text("0.png\tn02\t0\t0\t1\t1\n1.png\tn01\t0\t0\t1\t1\n")
    extract_dataset.main(["tiny", "--root", str(tmp_path), "--folder", str(tiny)])
    assert data.load_split("tiny", str(tmp_path), "test").targets.tolist() == [1, 0]
    (source / "train" / "ant" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0\.png"):
        extract_dataset.main(["damaged", "--root", str(tmp_path), "--folder", str(source)])
    write_images(source / "train", "ant", 1, 10)
    write_images(source / "test", "wasp", 1, 10)
    with pytest.raises(UserError, match="wasp: no such class"):
        extract_dataset.main(["wasps", "--root", str(tmp_path), "--folder", str(source)])
    with pytest.raises(UserError, match="train/<class>"):
        extract_dataset.main(["none", "--root", str(tmp_path), "--folder", str(tmp_path / "none")])


def test_extraction_takes_every_kind_of_picture_in_natural_order(tmp_path):
    """Classes and files 2 before 10; grey sets stay grey; every ending that the other papers read."""
    for split in ("train", "test"):
        for label in ("2", "10"):
            for name, value in (("2.bmp", 20), ("10.tif", 100), ("B.JPEG", 200), (".0.png", 0)):
                path = tmp_path / "grey" / split / label / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((4, 4), value + int(label), np.uint8)).save(path)
    extract_dataset.main(["grey", "--root", str(tmp_path), "--folder", str(tmp_path / "grey")])
    train = data.load_split("grey", str(tmp_path), "train")
    assert train.classes == ("2", "10") and train.images.shape == (6, 1, 4, 4)
    levels = train.images[:, 0, 0, 0].int()
    assert (levels - torch.tensor([22, 102, 202, 30, 110, 210])).abs().max() <= 2  # lossy pictures
    (tmp_path / "grey/test/10/B.JPEG").unlink()
    write_images(tmp_path / "grey/test", "10", 1, 9, side=4)
    extract_dataset.main(["mixed", "--root", str(tmp_path), "--folder", str(tmp_path / "grey")])
    assert data.load_split("mixed", str(tmp_path), "train").images.shape == (6, 3, 4, 4)
    write_images(tmp_path / "grey/test", "10", 1, 9, side=5)
    with pytest.raises(UserError, match="--size"):
        extract_dataset.main(["sizes", "--root", str(tmp_path), "--folder", str(tmp_path / "grey")])


@pytest.mark.parametrize("name", ["digits", ".."])
def test_extraction_overwrites_nothing(name, tmp_path):
    root = tmp_path / "sets"
    root.mkdir()
    there = root / name / f"{name}.pickle"
    there.parent.mkdir(exist_ok=True)
    there.write_bytes(b"mine")
    with pytest.raises(UserError, match="is there already" if name == "digits" else "name"):
        extract_dataset.main([name, "--root", str(root)])
    assert there.read_bytes() == b"mine"
