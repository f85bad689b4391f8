"""The weights that ship: whole, small, and used by the literal commands where there is no run yet. About 15 CPU s.

No data set is needed: DATA_ROOT points at an empty folder, as on a machine just set up.
"""

import json
import shutil
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from safetensors.numpy import load_file

from common import released
from common.errors import UserError, run_command
from glancenet import traverse
from inv_flow import inv_flow_mnist
from latent_flow import sample_vae, show_flows, traverse_latent_space_vae
from lbae import command as lbae_command
from lbae import mnist
from nfpi import sample

ROOT = Path(released.__file__).resolve().parents[1]
SHIPPED = released.FOLDER
PAPERS = {"lbae", "glancenet", "latent_flow", "inv_flow", "nfpi"}


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A working folder without data and without runs; `lbae.mnist` writes below it too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "no_data"))
    return tmp_path


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of checkpoints/ to damage, which `common.released` reads in its place."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(SHIPPED, folder)
    monkeypatch.setattr(released, "FOLDER", folder)
    return folder


def lbae(folder, *tokens):
    """`python lbae/mnist.py TOKENS` of a clone at `folder`."""
    lbae_command.main(mnist.CONFIGS, str(folder / "lbae" / "mnist.py"), "", list(tokens))


def pixels(path: Path) -> np.ndarray:
    """The picture, or all frames of a GIF; it must show something: many grey levels, neither black nor white."""
    values = imageio.imread(path, index=...) if path.suffix == ".gif" else imageio.imread(path)
    assert values.dtype == np.uint8 and len(np.unique(values)) > 20 and values.std() > 10, path
    return values


# ---- the manifest -------------------------------------------------------------------------------------------------


def test_manifest_matches_the_files():
    assert released.problems() == []
    manifest = json.loads((SHIPPED / "MANIFEST.json").read_text())
    assert {name.split("/")[0] for name in manifest} == PAPERS
    assert {file for entry in manifest.values() for file in entry["files"]} == {
        f"{name}{suffix}" for name in manifest for suffix in (".safetensors", ".json", ".log")
    }
    sizes = [path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()]
    assert max(sizes) <= 8 * 2**20 and sum(sizes) <= 25 * 2**20


def test_releases_are_trained_finite_and_tell_no_paths():
    for name, entry in released._manifest().items():
        release = released.released(*name.split("/"))
        assert release.path == SHIPPED / f"{name}.safetensors" and release.what == entry["what"]
        tensors = load_file(release.path)
        assert tensors and all(np.isfinite(values).all() for values in tensors.values() if values.dtype.kind == "f")
        texts = [(SHIPPED / f"{name}{suffix}").read_text() for suffix in (".json", ".log")]
        assert not any(place in text for text in texts for place in ("/tmp/", "/home/", "/work/", "/root/")), name
        assert len(texts[1].splitlines()) >= 3, f"{name}: that is no log of a training"


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x55"), "sha256"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        (lambda p: p.unlink(), "git checkout"),
    ],
    ids=["truncated", "one byte", "pointer", "missing"],
)
def test_a_damaged_file_is_refused_in_one_line(bare, copy, capsys, damage, expected):
    damage(copy / "nfpi" / released.released("nfpi", sample.RELEASE).path.name)
    assert run_command(lambda: sample.main([])) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and expected in captured.err and sample.RELEASE in captured.err
    assert captured.out == "" and not (bare / "runs").exists()
    assert run_command(lambda: released.main(["--check"])) == 2


def test_check_names_extra_undescribed_and_large_files_and_update_mends_them(copy, capsys, monkeypatch):
    extra = copy / "nfpi" / "other.safetensors"
    extra.write_bytes(b"x")
    assert released.problems() == ["checkpoints/nfpi/other.safetensors is in no release"]
    assert run_command(lambda: released.main(["--update"])) == 2  # written, but nobody has said what it is
    error = capsys.readouterr().err
    assert "nfpi/other has no what" in error and "nfpi/other has no command" in error and "other.log" in error
    extra.unlink()
    released.main(["--update"])
    assert (copy / "MANIFEST.json").read_text() == (SHIPPED / "MANIFEST.json").read_text()
    monkeypatch.setattr(released, "LIMIT", 1_000_000)
    assert any("mnist_bae_w16.safetensors has" in line for line in released.problems())
    with pytest.raises(UserError, match=r"no release nfpi/mnist_smal \(did you mean 'nfpi/mnist_small'"):
        released.released("nfpi", "mnist_smal")


# ---- the commands -------------------------------------------------------------------------------------------------


def test_lbae_generates_at_once_and_says_from_what(bare, capsys):
    lbae(bare, "eval", "gen", "sample_method=cov", "gen_imgs=40")
    out = capsys.readouterr().out
    assert "no experiment at" in out and "width 16" in out and "python lbae/mnist.py" in out
    (folder,) = (bare / "lbae").iterdir()
    assert folder.name == "mnist_bae_res32_ConvResBlock32-qae-z200-m169-released"
    images = np.stack([imageio.imread(path) for path in (folder / "generated" / "samples_cov").glob("*.png")])
    assert images.shape[0] == 40 and images.std(0).mean() > 20  # the images differ from each other
    pixels(folder / "generated" / "sample_0_cov.jpg")
    unpacked = (folder / "models" / "last.cp").stat().st_mtime_ns
    lbae(bare, "eval", "gen", "sample_method=int", "gen_imgs=12", "batch_size_test=1")
    pixels(folder / "generated" / "sample_0_int.jpg")
    assert (folder / "models" / "last.cp").stat().st_mtime_ns == unpacked  # made once


@pytest.mark.parametrize("option", ["width=64", "zsize=64", "dataset=digits", "vae=1"])
def test_lbae_refuses_an_option_of_another_model(bare, option):
    with pytest.raises(UserError, match=f"{option.split('=')[0]}=.* contradicts the released"):
        lbae(bare, "eval", "gen", option)
    assert not (bare / "lbae").exists()


def test_lbae_takes_the_release_for_nothing_else(bare, capsys):
    for tokens in (["eval", "exp=elsewhere"], ["eval", "reload=3"], ["l"], ["eval", "cfg=mnist_vae"]):
        with pytest.raises(UserError, match="no experiment at"):
            lbae(bare, *tokens)
    with pytest.raises(UserError, match="prepare mnist"):  # reconstructions need images: one line, the remedy in it
        lbae(bare, "eval")
    lbae(bare, "eval", "gen", "width=16", "gen_imgs=1")  # the release's own value is no contradiction
    assert "using the released" in capsys.readouterr().out


def test_inverse_flow_samples_at_once(bare, capsys):
    inv_flow_mnist.main(["--evaluate", "--n_samples", "25", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "no run in" in out and "mnist_inverse_w64" in out and "samples only, since mnist is not there" in out
    pixels(bare / "runs/inv_flow/mnist_released/samples/evaluation.png")
    assert not (bare / "runs/inv_flow/mnist").exists()  # the place of one's own run stays free
    for options in (["--coupling_width", "512"], ["--layer", "finc"], ["--dataset", "digits"]):
        with pytest.raises(UserError, match="contradicts the released"):
            inv_flow_mnist.main(["--evaluate", *options])
    for options in (["--name", "mine"], ["--out", "runs/mine"]):
        with pytest.raises(UserError, match=r"no weights at runs/.*mine"):
            inv_flow_mnist.main(["--evaluate", *options])


def test_latent_flow_draws_gifs_at_once(bare, capsys):
    sample_vae.main(["--num-samples", "2", "--pool", "P", "--device", "cpu"])
    small = ["--gif", "--gif-size", "56", "--shift-steps", "8", "--device", "cpu"]
    traverse_latent_space_vae.main(["--pool", "P", *small])
    traverse_latent_space_vae.main(["--codes", "2", *small])
    show_flows.main(["--samples", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    assert out.count("no --exp: using the released checkpoints/latent_flow/") == 4
    assert out.count("since mnist is not there") == 2
    folder = bare / "runs/latent_flow/released"
    gifs = sorted(folder.glob("results/*/16_1_16/paths_gifs/*.gif"))
    assert len(gifs) == 6
    for name in ("scale", "rotation", "hue", "rotation_then_hue", "scale_and_hue"):
        gifs.append(folder / "pictures" / f"{name}.gif")
    for gif in gifs:
        frames = pixels(gif).astype(float)
        assert np.abs(frames[-1] - frames[0]).max() > 60, f"nothing moves in {gif}"


def test_glancenet_traverses_at_once(bare, capsys):
    folder = traverse.main(["--device", "cpu"])
    assert "no --weights: using the released checkpoints/glancenet/" in capsys.readouterr().out
    assert folder == Path("runs/glancenet/released")
    picture = pixels(folder / "traverse_4.png")[..., 0].astype(float)
    tile = picture.shape[0] // 11
    first, last = picture[tile:, :tile], picture[tile:, -tile:]
    assert np.abs(last - first).reshape(-1, tile).max() > 60  # the ends of the traversals differ
    frames = pixels(folder / "gif_5.gif").astype(float)
    assert len(frames) == 13 and np.abs(frames[-1] - frames[0]).max() > 60
    prototypes = pixels(folder / "prototypes.png").astype(float)
    half = prototypes.shape[1] // 2
    assert np.abs(prototypes[:, :half] - prototypes[:, -half:]).max() > 60  # a 4 is no 5
    with pytest.raises(UserError, match="latents 0 to 9"):
        traverse.main(["--latents", "10"])


def test_nfpi_draws_its_classes_at_once(bare, capsys):
    sample.main(["--per-class", "12", "--device", "cpu"])
    assert "no --weights: using the released checkpoints/nfpi/" in capsys.readouterr().out
    folder = bare / "runs/nfpi/released"
    pixels(folder / "classes.png")
    means = np.stack([pixels(folder / f"samples_{k}.png").astype(float) for k in range(10)])
    assert np.abs(means[0] - means[1]).mean() > 5  # class 0 is drawn differently from class 1
    with pytest.raises(UserError, match="classes 0 to 9"):
        sample.main(["--classes", "10"])
