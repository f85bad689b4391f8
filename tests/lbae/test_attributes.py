"""lbae/attributes.py: how often an attribute shows once it is set."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from lbae import attributes, celeba, mnist
from lbae import folder as lbae_folder
from lbae.attributes import Config, Judge, Labelled, shares, train_judge
from lbae.sampler import HyperplaneSampler


class Pixels(SimpleNamespace):
    """An autoencoder of 1 x 4 x 4 images whose bits are their pixels."""

    def encode(self, images):
        return (images.flatten(1) - 0.5).sign()

    def decode(self, codes):
        return codes.float().view(-1, 1, 4, 4)


@pytest.mark.parametrize(("broken", "expected"), [(False, 100), (True, 0)])
def test_shares_of_a_code_that_is_the_image(broken, expected):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (400, 16), generator=generator) * 2 - 1
    has = (codes > 0).long()  # attribute k: pixel k is bright
    model = Pixels(codes=codes, sampler=HyperplaneSampler().fit(codes, has.roll(1, 1) if broken else has))
    test = Labelled((has * 255).to(torch.uint8).view(-1, 1, 4, 4), has)

    found = shares(model, lambda images: images.flatten(1) > 0, test, 3, Config(threshold=0.5))
    assert found == {"recall": 100, "before": 0, "set": pytest.approx(expected, abs=0)}


def test_a_judge_gives_one_of_a_group_and_yes_or_no():
    torch.manual_seed(0)
    says = Judge(1, 32, [3, 1, 2])(100 * torch.randn(50, 1, 32, 32))
    assert (says[:, :3].sum(1) == 1).all()
    assert (says[:, 4:].sum(1) == 1).all()
    assert says[:, 3].any() != says[:, 3].all()


def test_a_judge_learns(monkeypatch):
    """The quarter that is bright, of 4, and whether anything else is; its seed leaves the global numbers alone."""
    seen, loss = [], Judge.loss
    monkeypatch.setattr(Judge, "loss", lambda self, x, has: (seen.append(float(x.max())), loss(self, x, has))[1])
    generator = torch.Generator().manual_seed(1)
    where, also = (torch.randint(0, n, (600,), generator=generator) for n in (4, 2))
    images = 0.1 * torch.rand(600, 1, 32, 32, generator=generator)
    for k in range(4):
        images[where == k, :, 8 * k : 8 * k + 8, :16] = 1
    images[also == 1, :, :, 16:] = 0.8
    data = Labelled((images * 255).to(torch.uint8), torch.cat([torch.nn.functional.one_hot(where), also[:, None]], 1))
    state = torch.get_rng_state()
    judge = train_judge(data, [4, 1], epochs=5, seed=0, device=torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert max(seen) == 1  # as decoded images are
    assert (judge(data.images / 255) == data.has).double().mean() > 0.98


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attributes") / "exp"
    celeba.main([f"exp={folder}", "device=cpu", "dataset=sprites", "channels=1", "width=2", "zsize=8", "batch_size=32",
                 "epochs_max=1", "train_images=64", "test_images=20", "binary_reco_loss=1"])  # fmt: skip
    return folder


def test_every_attribute_of_a_run_is_judged(sprites, capsys):
    attributes.main([str(sprites), "--device", "cpu", "--epochs", "1", "--images", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("left out")
    assert [line.split(":")[0] for line in lines[1:]] == ["shape", "scale", "orientation", "posX", "posY"]
    found = json.loads((sprites / "attributes.json").read_text())
    assert 20 < len(found["attributes"]) < 3 + 6 + 40 + 32 + 32  # 84 images have few of them
    assert (found["images"], found["epochs"]) == (5, 1)
    assert all(0 <= share <= 100 for one in found["attributes"].values() for share in one.values())
    shapes = [found["attributes"][f"shape={k}"] for k in range(3)]
    for key, mean in found["mean"]["shape"].items():
        assert mean == pytest.approx(sum(shape[key] for shape in shapes) / 3)


def folder(root, colours=3, table=None):
    """Pictures in class sub-folders, and a CSV of `table`'s columns."""
    generator, lines = np.random.default_rng(0), []
    for k in range(colours):
        (root / f"c{k}").mkdir(parents=True)
        for i in range(20):
            pixels = generator.integers(0, 60, (32, 32), np.uint8) + 60 * k
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"c{k}" / f"{i}.png")
            lines.append(f"c{k}/{i}.png," + ",".join(str(value(k, i)) for value in (table or {}).values()))
    if table:
        (root / "labels.csv").write_text("\n".join([",".join(["file", *table]), *lines]) + "\n")
    return root


def train(exp, *words):
    lbae_folder.main([f"exp={exp}", "device=cpu", "channels=1", "img_size=32", "width=2", "zsize=8", "epochs_max=1",
                      "batch_size=16", *words])  # fmt: skip
    return str(exp)


def test_groups_are_columns_and_factors(tmp_path):
    """Not what stands before "=": columns whose names look alike are no group."""
    table = {"hat=red": lambda k, i: i % 2, "shoe": lambda k, i: i % 2 == 0, "hat=blue": lambda k, i: k == 1,
             "size": lambda k, i: ["small", "large"][i % 2]}  # fmt: skip
    root = folder(tmp_path / "images", table={name: (lambda k, i, f=f: int(v) if isinstance(v := f(k, i), bool) else v)
                                              for name, f in table.items()})  # fmt: skip
    exp = train(tmp_path / "exp", f"data_root={root}", f"labels={root / 'labels.csv'}")
    attributes.main([exp, "--device", "cpu", "--epochs", "1"])  # the images are where they were
    found = json.loads((tmp_path / "exp/attributes.json").read_text())
    assert list(found["mean"]) == ["hat=blue", "hat=red", "shoe", "size"]
    assert {"size=small", "size=large", "hat=red"} < set(found["attributes"])


def test_other_images_than_the_trainings_are_refused(tmp_path, monkeypatch):
    exp = train(tmp_path / "exp", f"data_root={folder(tmp_path / 'images')}")
    attributes.main([exp, "--device", "cpu", "--epochs", "1"])
    before = (tmp_path / "exp/attributes.json").read_bytes()
    assert list(json.loads(before)["mean"]) == ["class"]
    monkeypatch.setattr(attributes, "train_judge", lambda *_: pytest.fail("worked first"))
    for other, colours in (("more", 4), ("one", 1)):
        with pytest.raises(UserError, match=r"attributes c0.*c0, c1, c2.*--data_root"):
            attributes.main([exp, "--device", "cpu", "--data_root", str(folder(tmp_path / other, colours))])
    assert (tmp_path / "exp/attributes.json").read_bytes() == before
    single = train(tmp_path / "single", f"data_root={tmp_path / 'one'}")
    with pytest.raises(UserError, match="no attributes to set"):
        attributes.main([single, "--device", "cpu"])


def test_what_cannot_be_judged_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(attributes, "load_split", lambda *_: pytest.fail("read the images first"))
    for name in (str(tmp_path / "nowhere"), "mnist_bae_w16", "checkpoints/lbae/mnist_bae_w16.safetensors"):
        with pytest.raises(UserError, match=rf"{name} is no folder of an experiment.*lbae.release unpack"):
            attributes.main([name, "--device", "cpu", "--dry_run"])
    vae = tmp_path / "vae"
    mnist.main([f"exp={vae}", "cfg=mnist_vae", "dataset=digits", "device=cpu", "width=2", "zsize=8", "epochs_max=1",
                "batch_size=32", "train_images=64", "test_images=20"])  # fmt: skip
    with pytest.raises(UserError, match="is a VAE"):
        attributes.main([str(vae), "--device", "cpu", "--epochs", "1"])
