"""Folders of images, whole evaluations, data sets of a user: nothing of others is removed, nothing is half there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError, run_command
from lbae import celeba, eval, mnist, protocol, reconstruct
from lbae.experiment import Latents, new_images
from lbae.results import read_line

ROOT = Path(mnist.__file__).resolve().parents[1]
TINY = ["dataset=digits", "width=2", "zsize=16", "batch_size=64", "epochs_max=1", "lr=1e-2", "device=cpu",
        "train_images=256", "test_images=30", "tensorboard=0"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "exp"
    mnist.main([*TINY, f"exp={folder}"])
    return folder


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "exp"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- images


def test_pictures_of_others_stay_and_are_not_scored(copy):
    reference = copy.parent / "digits_eval"
    reference.mkdir()
    Image.new("L", (9, 9)).save(reference / "000001.jpg")
    for words in (["eval"], ["eval", "gen"]):
        folder = reference if words == ["eval"] else copy / "generated/samples_cov"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9)).save(folder / "7.png")
        before = contents(folder)
        with pytest.raises(UserError, match=r"not written here .*move them away"):
            mnist.main([*words, f"exp={copy}", "device=cpu", "gen_imgs=9"])
        assert contents(folder) == before
        for path in folder.iterdir():
            path.unlink()
        (folder / "notes.txt").write_text("mine")
        mnist.main([*words, f"exp={copy}", "device=cpu", "gen_imgs=9"])
        assert (folder / "notes.txt").read_text() == "mine"
        assert len(list(folder.glob("*.png"))) == (30 if words == ["eval"] else 9)


@pytest.mark.parametrize(("file", "words"), [("generated", ["eval", "gen"]), ("reco", ["eval"]), ("log", ["eval"])])
def test_a_file_in_a_folder_s_place_is_one_line(copy, file, words):
    shutil.rmtree(copy / file, ignore_errors=True)
    (copy / file).write_text("mine")
    with pytest.raises(UserError, match=file):
        mnist.main([*words, f"exp={copy}", "device=cpu", "gen_imgs=2"])
    assert (copy / file).read_text() == "mine"


@pytest.mark.parametrize("words", [["eval"], ["eval", "gen", "gen_imgs=30", "sample_method=random"]])
def test_a_step_that_fails_leaves_the_images_of_the_last_one(copy, monkeypatch, words):
    run = [*words, f"exp={copy}", "device=cpu", "batch_size_test=10"]
    mnist.main(run)
    before = contents(copy.parent)
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return save(*arguments)

    module = sys.modules["lbae.reconstruct" if words == ["eval"] else "lbae.generate"]
    save = module.save_images
    monkeypatch.setattr(module, "save_images", full)
    with pytest.raises(KeyboardInterrupt):
        mnist.main([*run, "img_format=jpg"])
    after = contents(copy.parent)
    mosaics = {name for name in before if "/sample_" in name}
    assert {name: after[name] for name in before if name not in mosaics} == {
        name: before[name] for name in before if name not in mosaics
    }
    assert not list(copy.parent.rglob("*.new"))


def test_fewer_images_take_the_place_of_more_and_a_killed_call_leaves_no_litter(tmp_path):
    def write(count: int, fmt: str = "png"):
        with new_images(tmp_path / "reco", fmt) as new:
            for i in range(count):
                (new / f"{i}.{fmt}").write_bytes(b"x")

    write(5)
    write(3, "jpg")
    assert sorted(path.name for path in (tmp_path / "reco").iterdir()) == ["0.jpg", "1.jpg", "2.jpg", "written.json"]
    child = subprocess.run(
        [sys.executable, "-c", "import os, sys; from pathlib import Path; from lbae.experiment import new_images\n"
         "with new_images(Path(sys.argv[1]), 'png') as new: (new / '0.png').touch(); os._exit(1)", tmp_path / "reco"],
        cwd=ROOT, check=False,
    )  # fmt: skip
    assert child.returncode == 1
    assert len(list(tmp_path.glob(".reco.*.new"))) == 1
    write(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reco"]
    assert sorted(path.name for path in (tmp_path / "reco").iterdir()) == ["0.png", "written.json"]
    (tmp_path / "reco/written.json").write_text('{"images": "many"}')
    with pytest.raises(UserError, match=r"written\.json is damaged"):
        write(1)


def test_images_of_older_versions_are_known(copy):
    """They left no manifest in reco and generated, and reference.json beside reference images."""
    run = [f"exp={copy}", "device=cpu"]
    mnist.main(["eval", *run])
    mnist.main(["eval", "gen", *run, "gen_imgs=8"])
    reference = copy.parent / "digits_eval"
    note = json.loads((reference / "written.json").read_text())
    del note["formats"]
    (reference / "reference.json").write_text(json.dumps(note))
    for folder in (reference, copy / "reco", copy / "generated/samples_cov"):
        (folder / "written.json").unlink()
    marks = (reference / "0.png").stat().st_mtime_ns
    mnist.main(["eval", *run])
    assert (reference / "0.png").stat().st_mtime_ns == marks  # they show what is needed
    mnist.main(["eval", *run, "test_images=11"])
    mnist.main(["eval", "gen", *run, "gen_imgs=3"])
    counts = [len(list(folder.glob("*.png"))) for folder in (reference, copy / "reco", copy / "generated/samples_cov")]
    assert counts == [11, 11, 3]


def test_mosaics_of_a_call_with_more_batches_go(copy):
    run = ["eval", "gen", f"exp={copy}", "device=cpu", "gen_imgs=12"]
    mnist.main([*run, "batch_size_test=4"])
    (copy / "generated/sample_9_cov.jpg").write_bytes(b"mine")
    mnist.main([*run, "batch_size_test=12"])
    assert sorted(path.name for path in (copy / "generated").glob("*.jpg")) == ["sample_0_cov.jpg", "sample_9_cov.jpg"]


# ---- scores


def test_what_was_measured_is_kept_when_a_part_fails(copy, monkeypatch, capsys):
    mnist.main(["eval", f"exp={copy}", "device=cpu"])
    monkeypatch.chdir(copy)
    monkeypatch.setenv("METRICS_CACHE", str(copy / "cache"))
    few = copy / "few"
    few.mkdir()
    for i in range(6):
        shutil.copy(copy / f"reco/{i}.png", few)
    (copy / "broken").mkdir()
    (copy / "broken/0.png").write_bytes(b"no picture")
    words = ["s=../digits_eval", "t=broken,few,reco", "feat=pixel-pca4", "kid_subsets=5", "device=cpu"]
    assert run_command(lambda: eval.main(words)) == 2
    *said, error = capsys.readouterr().err.splitlines()
    assert "broken" in error and "what was measured is in results.txt" in error
    assert any("6 clusters instead of 20" in line for line in said)
    results = read_line((copy / "results.txt").read_text())
    few, reco = results.sections
    assert (few.name, few.ntest, few.kid_size, few.prd_n) == ("few", 6, 6, 6)
    assert few.fid > 0 and few.kid_std is not None and few.f8 is not None
    # subsets as large as both sets are one and the same: no deviation; the sizes are in the line
    assert (reco.name, reco.kid_size, reco.kid_std, reco.prd_n) == ("reco", 30, None, 30)
    assert reco.kid_mean is not None and reco.f8 is not None
    assert "kid_std" not in str(reco) and "kid_size:30 prd_n:30" in str(reco)
    assert str(read_line(str(results))) == str(results)


def whole(folder: Path, *words: str, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("METRICS_CACHE", str(folder / "cache"))
        protocol.main(["device=cpu", "feat=pixel-pca4", "kid_subsets=5", "prd=0", *words])


def test_the_whole_evaluation_of_another_folder_touches_that_one_alone(copy, trained, tmp_path, monkeypatch):
    other = Path(shutil.copytree(trained, tmp_path / "elsewhere/other"))
    whole(copy, "methods=random", monkeypatch=monkeypatch)
    before = contents(copy)
    whole(copy, "methods=random", "exp=../elsewhere/other", "gen_imgs=8", "data_root=.", monkeypatch=monkeypatch)
    assert {name: content for name, content in contents(copy).items() if not name.startswith("cache")} == {
        name: content for name, content in before.items() if not name.startswith("cache")
    }
    random, _ = read_line((other / "results.txt").read_text()).sections
    assert (random.name, random.ntest) == ("samples_random", 8)


def test_the_steps_of_interpolations_are_those_given(copy, monkeypatch):
    whole(copy, "methods=int", "gen_imgs=8", "interpolate_steps=2", "batch_size_test=1", monkeypatch=monkeypatch)
    with Image.open(copy / "generated/sample_1_int.jpg") as picture:  # a row of 2 steps and the ends: the second batch
        assert picture.size == (2 + 4 * 34, 2 + 34)
    whole(copy, "methods=int", "gen_imgs=24", monkeypatch=monkeypatch)
    with Image.open(copy / "generated/sample_0_int.jpg") as picture:
        assert picture.size == (2 + 12 * 34, 2 + 2 * 34)
    assert not (copy / "generated/sample_1_int.jpg").exists()


def test_help_of_eval_sh_runs_nothing(copy):
    before = contents(copy)
    done = subprocess.run([ROOT / "eval.sh", "help"], cwd=copy, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "methods" in done.stdout and "interpolate_steps=10" in done.stdout
    assert contents(copy) == before


def test_the_empty_folder_of_a_fresh_clone_evaluates_the_released_model(tmp_path, monkeypatch, capsys):
    assert (ROOT / "lbae/exp/.gitignore").is_file()  # so that a clone has the folder
    place = tmp_path / "exp"
    place.mkdir()
    shutil.copy(ROOT / "lbae/exp/.gitignore", place)
    monkeypatch.setattr(protocol, "EMPTY", place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "none"))
    with pytest.raises(UserError, match="prepare mnist"):  # it needs the test images
        protocol.main(["device=cpu", "feat=pixel-pca4"])
    (folder,) = place.glob("*-released")
    assert (folder / "models/last.cp").is_file()
    assert "using the released checkpoints/lbae/mnist_bae_w16" in capsys.readouterr().out
    monkeypatch.setattr(protocol, "EMPTY", tmp_path / "other")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="is no experiment and holds none"):
        protocol.main(["device=cpu"])


# ---- a folder of one's own images


def paint(folder: Path, n: int, mode: str = "RGB", size: tuple[int, int] = (40, 36)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    g = np.random.default_rng(n)
    for i in range(n):
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
        Image.fromarray(g.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{i}.png")


OWN = ["dataset=folder", "width=2", "zsize=8", "batch_size=8", "epochs_max=1", "device=cpu", "tensorboard=0"]


def test_a_flat_folder_holds_out_about_a_tenth(tmp_path, capsys):
    paint(tmp_path / "mine", 40)
    run = [*OWN, "channels=3", f"data_root={tmp_path / 'mine'}", f"exp={tmp_path / 'e'}"]
    mnist.main(run)
    assert "37 training and 3 test images" in capsys.readouterr().err
    train, test = (
        reconstruct.load_split(protocol.experiment_params(tmp_path / "e", {}), part) for part in ("train", "test")
    )
    assert len({path.name for part in (train, test) for path in part.parent.paths}) == 40
    mnist.main(["eval", f"exp={tmp_path / 'e'}", "device=cpu"])  # the folder comes from the saved configuration
    assert len(list((tmp_path / "folder_eval").glob("*.png"))) == 3


def test_grey_images_and_a_crop(tmp_path):
    for part, n in (("train", 16), ("test", 5)):
        paint(tmp_path / "grey" / part, n, "L", (60, 50))
    run = [*OWN, f"data_root={tmp_path / 'grey'}", f"exp={tmp_path / 'e'}"]
    mnist.main([*run, "channels=1", "img_crop_size=20"])
    mnist.main(["eval", f"exp={tmp_path / 'e'}", "device=cpu"])
    with Image.open(tmp_path / "grey/test/0.png") as source, Image.open(tmp_path / "folder_20_eval/0.png") as seen:
        expected = source.crop((20, 15, 40, 35)).resize((32, 32), Image.BILINEAR)
        assert seen.mode == "L"
        assert np.abs(np.asarray(seen, int) - np.asarray(expected, int)).max() <= 2
    celeba.main([*OWN, f"data_root={tmp_path / 'grey'}", f"exp={tmp_path / 'e64'}", "img_size=64", "channels=1",
                 "parallel=0"])  # fmt: skip
    assert Latents.load(tmp_path / "e64/latents-last.npz").codes.shape == (16, 8)
    shutil.rmtree(tmp_path / "grey/test")
    with pytest.raises(UserError, match="holds train/ alone"):
        mnist.main([*run, "overwrite=1"])
