"""eval.py, fid.py, results.txt and eval.sh on small folders of images."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.metrics import Statistics, frechet_distance
from lbae import eval, fid, mnist, protocol
from lbae.results import Results, Section, read_epoch, read_line

ROOT = Path(mnist.__file__).resolve().parents[1]


def write_images(folder: Path, n: int, seed: int, level: int = 0, fmt: str = "png") -> np.ndarray:
    """n noisy 32x32 squares of random places; `level` makes them brighter."""
    folder.mkdir(parents=True)
    g = np.random.default_rng(seed)
    images = g.integers(0, 60, (n, 32, 32)).astype(np.uint8)
    for image in images:
        x, y = g.integers(0, 24, 2)
        image[x : x + 8, y : y + 8] += np.uint8(90 + level)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.{fmt}")
    return images


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METRICS_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "ref", 80, 0)
    write_images(tmp_path / "generated/samples_cov", 80, 1)
    write_images(tmp_path / "generated/samples_random", 60, 2, level=100)
    return tmp_path


RUN = ["s=ref", "t=generated/samples_cov/,generated/samples_random", "feat=pixel-pca5", "kid_subsets=10", "device=cpu"]


def test_scores_are_those_of_the_features(folders, capsys):
    (folders / "fid-epoch.txt").write_text("e:3 loss_eval:98.25")
    (folders / "models").mkdir()
    (folders / "models/weights-3.cp").write_bytes(b"weights of epoch 3")
    eval.main(RUN)
    results = read_line((folders / "results.txt").read_text())
    assert (results.epoch, results.loss_eval, results.nref, results.features) == (3, 98.25, 80, "pixel-pca5")
    near, far = results.sections
    assert (near.name, near.ntest, far.name, far.ntest) == ("samples_cov", 80, "samples_random", 60)
    assert near.fid < 0.5 * far.fid
    assert near.kid_mean < 0.2 * far.kid_mean
    assert sum(near.f8) > sum(far.f8)

    # the same distance from features computed here
    def pixels(name):
        return np.stack([np.asarray(Image.open(folders / name / f"{i}.png")).ravel() / 255 for i in range(80)])

    reference, samples = pixels("ref"), pixels("generated/samples_cov")
    from sklearn.decomposition import PCA

    pca = PCA(5, random_state=0).fit(reference)
    a, b = (Statistics.from_features(pca.transform(part)) for part in (reference, samples))
    assert near.fid == pytest.approx(frechet_distance(a.mu, a.sigma, b.mu, b.sigma), rel=1e-6)

    for name in ("PR.pdf", "PR.png", "ref/fid_stats.npz", "models/3.cp"):
        assert (folders / name).stat().st_size > 0
    assert float((folders / "fid-best-pixel-pca5.txt").read_text()) == near.fid
    assert "not comparable" in capsys.readouterr().out
    # a second line is appended, a worse first folder keeps the best
    eval.main(["s=ref", "t=generated/samples_random,generated/samples_cov", *RUN[2:], "prd=0"])
    lines = (folders / "results.txt").read_text().splitlines()
    assert len(lines) == 2
    assert read_line(lines[1]).sections[0].f8 is None
    assert read_line(lines[1]).sections[1].fid == near.fid
    assert float((folders / "fid-best-pixel-pca5.txt").read_text()) == near.fid


def test_eval_without_a_reference_prints_two_lines(folders, capsys):
    eval.main([])
    assert len(capsys.readouterr().out.splitlines()) == 2
    for tokens, message in (
        (["s=ref", "t="], "names no folder"),
        (["s=ref", "t=absent"], "no folder absent"),
        (["s=ref", "t=ref", "feet=raw"], "did you mean 'feat'"),
        (["s=ref", "t=ref", "feat=inception", "inception=none.pth"], "none.pth"),
        (["s=ref", "t=ref", "feat=inception"], "weights"),
    ):
        with pytest.raises(UserError, match=message):
            eval.main(tokens)
    assert not (folders / "results.txt").exists()


def test_auto_features_say_what_they_fall_back_to(folders, capsys, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(folders / "none"))
    eval.main(["s=ref", "t=generated/samples_cov", "kid_subsets=3", "prd=0", "device=cpu"])
    printed = capsys.readouterr()
    assert "without inception" in printed.err
    assert "without lenet" in printed.err
    assert read_line((folders / "results.txt").read_text()).features == "pixel-pca64"


def test_stand_alone_distance(folders, capsys):
    def distance(*arguments):
        fid.main([*map(str, arguments), "--features", "raw"])
        return float(capsys.readouterr().out.removeprefix("FID: "))

    for name in ("small_a", "small_b"):
        write_images(folders / name, 40, len(name) + ord(name[-1]), level=30 * (name == "small_b"))
        for path in (folders / name).iterdir():
            Image.open(path).resize((4, 4)).save(path)
    whole = distance("small_a", "small_b")
    assert whole > 0
    assert distance("small_a", "small_b", "--lowprofile") == pytest.approx(whole, rel=1e-9)
    for name in ("small_a", "small_b"):
        images = np.stack([np.asarray(Image.open(folders / name / f"{i}.png")).ravel() / 255 for i in range(40)])
        Statistics.from_features(images).save(folders / f"{name}.npz")
    assert distance("small_a.npz", "small_b.npz") == pytest.approx(whole, rel=1e-9)
    assert distance("small_a", "small_a") < 1e-8
    capsys.readouterr()
    for path in sorted((folders / "small_b").iterdir())[5:]:
        path.unlink()
    fid.main(["small_a", "small_b", "--features", "raw"])
    assert [line[:9] for line in capsys.readouterr().err.splitlines()] == ["warning: "]  # 5 images, 16 features
    with pytest.raises(UserError, match="no such file or folder: nowhere"):
        fid.main(["nowhere", "small_a"])


def test_results_round_trip_and_refuse_other_text():
    sections = [Section("samples_cov", 100, 11.5, 0.01, 0.001, (0.9, 0.8)), Section("reco", 90)]
    line = str(Results(-1, -1, 100, sections, "lenet"))
    assert line.endswith("f8/18:0.9/0.8 reco ntest:90 feat:lenet\n")
    assert str(read_line(line)).split() == str(line).replace("loss_eval:-1 ", "loss_eval:-1.0 ").split()
    for wrong in ("", "e:1 loss_eval:x nref:2", "e:1 loss_eval:1 nref:2 fid:3", "hello"):
        with pytest.raises(UserError, match="not a line"):
            read_line(wrong)
    assert read_epoch("") == (-1, -1.0)
    with pytest.raises(UserError, match="fid-epoch"):
        read_epoch("e:one")


def test_what_an_experiment_is(tmp_path):
    """A published folder without a configuration says by its name what it holds."""
    named = tmp_path / "celeba_vae_res64_ConvResBlock32-vae-z64-m173"
    named.mkdir()
    params = protocol.experiment_params(named, {"eval": True})
    assert (params.cfg, params.dataset, params.vae, params.zsize) == ("celeba_vae", "celeba", True, 64)
    (named / "config.json").write_text('{"cfg": "mnist_bae", "dataset": "digits", "img_crop_size": 20, "vae": false}')
    params = protocol.experiment_params(named, {"eval": True})
    assert (params.cfg, params.dataset, params.vae) == ("mnist_bae", "digits", False)
    (tmp_path / "exp").mkdir()
    with pytest.raises(UserError, match="no saved configuration"):
        protocol.experiment_params(tmp_path / "exp", {"eval": True})


def run_eval(folder: Path, *tokens: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "METRICS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(ROOT / "eval.sh"), *tokens], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_classifier_is_not_trained_on_a_folder_of_one_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = eval.ScoreOptions(feat="lenet", lenet_data="folder")
    with pytest.raises(UserError, match="lenet_data=mnist"):
        eval.pick_extractor(options)
    assert eval.pick_extractor(options.with_changes(feat="pixel-pca8")).name == "pixel-pca8"


def test_the_whole_evaluation_of_a_folder_of_experiments(tmp_path):
    exp = tmp_path / "exp"
    mnist.main(["dataset=digits", "width=2", "zsize=16", "batch_size=64", "epochs_max=1", f"exp={exp / 'first'}",
                "device=cpu", "train_images=256", "test_images=66", "tensorboard=0"])  # fmt: skip
    done = run_eval(exp, "device=cpu", "feat=pixel-pca8", "kid_subsets=5")
    assert done.returncode == 0, done.stderr
    results = read_line((exp / "first/results.txt").read_text())
    assert [section.name for section in results.sections] == ["samples_cov", "samples_int", "samples_random", "reco"]
    assert {section.ntest for section in results.sections} == {66} == {results.nref}
    assert {section.kid_std for section in results.sections} == {None}  # every subset is the whole set: said in a line
    assert [line for line in done.stderr.splitlines() if not line.startswith("warning: kernel distance: ")] == []
    assert (exp / "first/PR.pdf").exists()
    assert (exp / "digits_eval/65.png").exists()
    # a failing step ends it with the step's exit code, before anything is scored
    (exp / "first/models/last.cp").write_bytes(b"broken")
    before = (exp / "first/results.txt").read_text()
    failed = run_eval(exp / "first", "device=cpu")
    assert failed.returncode == 2
    assert failed.stderr.count("error:") == 1
    assert (exp / "first/results.txt").read_text() == before
    shutil.rmtree(exp / "first")
    empty = run_eval(exp)
    assert empty.returncode == 2
    assert "is no experiment" in empty.stderr
