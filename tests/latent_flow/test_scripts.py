"""The users' commands, tiny, in a temporary folder: train, resume, evaluate, sample, traverse, the minimal example."""

import json
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import torch

from common.checkpoint import load_state, save_state
from common.errors import UserError
from latent_flow import (
    evaluate,
    minimal_example,
    sample_vae,
    show_flows,
    train_falcol_isaac,
    train_vae_scratch,
    train_vae_scratch_unsuper,
    train_vae_scratch_weakly,
    traverse_latent_space_vae,
)
from latent_flow.fields import Flows
from latent_flow.metrics import trivial_baselines
from latent_flow.options import resolve, training_parser

CPU = ["--device", "cpu"]
LOSSES = {"loss_total", "loss_recon", "loss_kl0", "loss_kl_path", "loss_pde", "loss_index", "loss_spike", "loss_slab"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One smoke run of the supervised script."""
    folder = tmp_path_factory.mktemp("run") / "supervised"
    train_vae_scratch.main(["--smoke", "--out", str(folder), *CPU])
    return folder


def test_training_writes_its_contract(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"args.json", "config.json", "metrics.csv", "log.txt", "checkpoint.pt", "final.pt", "eval.json"} <= names
    table = pd.read_csv(trained / "metrics.csv")
    assert table["iteration"].tolist() == [1, 2, 3, 4, 5, 6]
    assert {*LOSSES, "temperature"} <= set(table.columns) and "sec_per_iter" not in table.columns
    timing = pd.read_csv(trained / "timing.csv")  # apart, so that equal runs have equal metrics
    assert timing["iteration"].tolist() == [1, 2, 3, 4, 5, 6] and (timing["sec_per_iter"] > 0).all()
    parts = table[sorted(LOSSES - {"loss_total"})].sum(axis=1)
    np.testing.assert_allclose(parts, table["loss_total"], rtol=1e-5)
    args = json.loads((trained / "args.json").read_text())
    assert args["dataset"] == "digits" and args["latent_size"] == 8 and args["num_support_sets"] == 3
    result = json.loads((trained / "eval.json").read_text())
    assert set(result["equivariance"]) == {"scale", "rotation", "hue"}
    for entry in result["equivariance"].values():
        assert entry["images"] == 20 and entry["steps"] == 4
        for name in ("model", "one_sample", "unmoved", "identity", "black"):
            assert abs(sum(entry[name]["per_step"]) - entry[name]["mean"]) < 1e-6 * entry[name]["mean"]
            assert (
                abs(sum(entry[name]["per_step"][:-1]) - entry[name]["upstream_protocol"]) < 1e-6 * entry[name]["mean"]
            )
    likelihood = result["likelihood"]
    for kind in ("bernoulli", "gaussian"):
        bounds = [likelihood[f"{kind}_iw_{s}"] for s in (1, 10, 100)]
        assert bounds[0] <= bounds[1] + 0.5 and bounds[1] <= bounds[2] + 0.5  # tighter with more samples, up to noise
    assert likelihood["gaussian_iw_100"] < likelihood["gaussian_maximum"]


def test_the_command_itself_runs(tmp_path):
    command = [
        sys.executable,
        "-m",
        "latent_flow.train_vae_scratch",
        "--smoke",
        "--max-steps",
        "1",
        "--out",
        "run",
        *CPU,
    ]
    root = str(Path(train_vae_scratch.__file__).parents[1])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "run" / "checkpoint.pt").is_file()
    wrong = [sys.executable, "-m", "latent_flow.train_vae_scratch", "--batchsize", "3"]
    done = subprocess.run(wrong, cwd=tmp_path, env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"}, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.decode().strip().splitlines() == [
        "error: unknown option --batchsize (did you mean '--batch-size'?); see --help"
    ]


RESUMED = {
    "supervised": (train_vae_scratch, []),
    "weakly": (train_vae_scratch_weakly, []),
    "double": (train_vae_scratch_unsuper, ["--field", "divfree", "--logdet", "exact"]),
    "single-upstream": (train_vae_scratch_unsuper, ["--single-control", "--objective", "upstream"]),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bit_exact(name, tmp_path):
    script, extra = RESUMED[name]
    extra = [*extra, "--eval-images", "8"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    script.main(["--smoke", *extra, "--out", str(straight), *CPU])
    script.main(["--smoke", *extra, "--out", str(broken), "--max-steps", "3", *CPU])
    assert not (broken / "final.pt").exists()
    script.main(["--smoke", *extra, "--out", str(broken), "--resume", *CPU])
    one, two = (load_state(folder / "checkpoint.pt", "latent_flow") for folder in (straight, broken))
    assert one["iteration"] == two["iteration"] == 6
    for key, value in one["model"].items():
        assert torch.equal(value, two["model"][key]), key
    for key, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(value, two["optimizer"]["state"][key][part]) for part, value in moments.items())
    losses = sorted(LOSSES)
    tables = [pd.read_csv(folder / "metrics.csv")[["iteration", *losses]] for folder in (straight, broken)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert tables[0].loc[5, "loss_total"] != tables[0].loc[0, "loss_total"]
    if name in ("double", "single-upstream"):  # speeds join at iteration 4
        assert (tables[0]["loss_slab"][:3] == 0).all() and (tables[0]["loss_slab"][3:] > 0).all()


def test_weak_evaluation_counts_every_sequence(tmp_path):
    train_vae_scratch_weakly.main(["--smoke", "--index-labels", "--k-per", "batch", "--out", str(tmp_path / "w"), *CPU])
    result = json.loads((tmp_path / "w" / "eval.json").read_text())
    confusion = np.array(result["index"]["confusion"])
    assert (confusion.sum(1) == 20).all() and result["index"]["sequences"] == 60
    best = confusion[range(3), result["index"]["matching"]].sum() / 60
    assert abs(result["index"]["accuracy"] - best) < 1e-12


def test_unsupervised_sprites(tmp_path):
    out = tmp_path / "u"
    train_vae_scratch_unsuper.main(
        ["--smoke", "--dataset", "sprites", "--image-size", "16", "--eval-images", "10", "--out", str(out), *CPU]
    )
    sparse = json.loads((out / "eval.json").read_text())["sparsity"]
    assert set(sparse["transformations"]) == {"posX", "posY", "orientation"}
    assert sparse["pairs"] == 40 and 1 <= sparse["true_active"] <= 3
    both = np.array(sparse["co_occurrence"])
    for k, entry in enumerate(sparse["transformations"].values()):
        on = sparse["inferred_fraction"]
        assert entry["recall"] * entry["precision"] == 0 or both[k, entry["flow"]] > 0
        assert 0 <= on <= 1


def test_falcol_isaac(tmp_path):
    out = tmp_path / "f"
    train_falcol_isaac.main(["--smoke", "--max-iter", "2", "--eval-images", "6", "--out", str(out), *CPU])
    args, config = (json.loads((out / name).read_text()) for name in ("args.json", "config.json"))
    assert args["dataset"] == "sprites" and config["deep"] and config["steps"] == args["num_timesteps"] // 2 - 1


def test_evaluate_reads_the_run(trained, capsys):
    before = json.loads((trained / "eval.json").read_text())
    evaluate.main(["--exp", str(trained), "--images", "20", "--vp-pairs", "200", "--device", "cpu"])
    after = json.loads((trained / "eval.json").read_text())
    assert after["equivariance"] == before["equivariance"]  # the same rows, the same weights
    vp = after["vp_score"]
    assert vp["pairs"] == 200 and abs(vp["chance"] - 1 / 3) < 1e-9 and 0 <= vp["share_0.1"]["mean"] <= 1
    assert "VP score" in capsys.readouterr().out
    evaluate.main(["--exp", str(trained), "--split", "test", "--images", "16", "--vp-pairs", "0", "--device", "cpu"])
    assert json.loads((trained / "eval_test.json").read_text())["split"] == "test"


def test_sample_and_traverse(trained, capsys):
    exp = ["--exp", str(trained), "--device", "cpu"]
    sample_vae.main([*exp, "--num-samples", "2", "--pool", "p", "-g", "VAE_MNIST"])
    pool = trained / "latent_codes" / "p"
    folders = sorted(path for path in pool.iterdir() if path.is_dir())
    assert len(folders) == 2 and (pool / "args.json").is_file()
    z = torch.load(folders[0] / "latent_code.pt", weights_only=True)
    assert z.shape == (1, 8) and folders[0].name == traverse_latent_space_vae.code_name(z)
    traverse_latent_space_vae.main(
        [*exp, "--pool", "p", "--shift-steps", "4", "--gif", "--gif-size", "32", "--gif-fps", "5", "--compose"]
    )
    out = trained / "results" / "p" / "8_1_8"
    code = out / folders[0].name
    codes = torch.load(code / "paths_latent_codes.pt", weights_only=True)
    assert codes.shape == (3, 5, 8)
    torch.testing.assert_close(codes[:, 2], z.expand(3, -1))
    model, _, _ = evaluate.load_run(trained, torch.device("cpu"))
    waves = np.loadtxt(code / "paths_images" / "wave_001.txt")
    shifts = np.loadtxt(code / "paths_images" / "shift_001.txt")
    assert waves.shape == (2,) and shifts.shape == (3 * 8,)
    np.testing.assert_allclose(shifts[:8], z[0], rtol=1e-6)
    np.testing.assert_allclose(shifts[:8] + shifts[8:16] + shifts[16:], codes[1, 4], atol=1e-5)
    with torch.no_grad():
        start = model.stacked(4).at(z, 1).potential
        np.testing.assert_allclose(waves[0], start.u[1, 0], rtol=1e-5)
        np.testing.assert_allclose(codes[1, 3] - codes[1, 2], start.grad[1, 0], atol=1e-6)
    assert len(list((code / "paths_images" / "path_002").glob("*.jpg"))) == 5
    gif = iio.imread(out / "paths_gifs" / "path_000.gif")
    assert gif.shape == (5, 2 * 32 + 7, 64, 3)
    assert gif[0, 7:].max() > 0  # the published GIFs begin with a black frame
    assert (gif[-1, 3, :, 0] > 200).all() and (gif[0, 3, -5:, 0] == 0).all()  # the progress bar
    assert {path.name for path in (out / "paths_gifs").glob("s*.gif")} >= {
        "switch_000_001.gif",
        "superpose_000_001.gif",
    }
    assert str(out) in capsys.readouterr().out


def test_show_flows(trained):
    show_flows.main(["--exp", str(trained), "--samples", "2", "--zoom", "3", "--device", "cpu"])
    out = trained / "pictures"
    names = {path.stem for path in out.glob("*.gif")}
    assert names == {path.stem for path in out.glob("*.png")}
    assert {"scale", "rotation", "hue", "scale_then_hue", "hue_then_scale", "scale_and_hue"} <= names and len(
        names
    ) == 12
    gif, grid = iio.imread(out / "hue.gif"), iio.imread(out / "hue.png")
    assert gif.shape == (5, 2 * 24, 2 * 24, 3) and grid.shape == (4 * 24, 5 * 24, 3)
    # the true first frame is red, the true fourth one (60 degrees on) yellow
    assert grid[:24, :24, 1].max() == 0 and grid[:24, 72:96, 1].max() > 200
    with pytest.raises(UserError, match="fewer than"):
        show_flows.main(["--exp", str(trained), "--first", "100000", "--device", "cpu"])


def test_true_inverse_traversal():
    torch.manual_seed(0)
    flows = Flows(2, 6).double()(torch.arange(4))
    z = torch.randn(1, 6, dtype=torch.float64)
    there = traverse_latent_space_vae.traverse(flows, z, 1, 6, 1.0)
    back = traverse_latent_space_vae.traverse(flows, there.codes[-1:], 1, 6, 1.0, inverse=True)
    torch.testing.assert_close(back.codes[:4], there.codes[3:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("fields", ["mlp", "constant"])
def test_minimal_example(fields, tmp_path):
    sizes = ["--image-size", "16", "--latent-size", "8", "--width", "8", "--batch-size", "8", "--log-freq", "1"]
    out = tmp_path / "m"
    minimal_example.main([*sizes, "--steps", "3", "--max-iter", "4", "--fields", fields, "--out", str(out)])
    table = pd.read_csv(out / "metrics.csv")
    assert len(table) == 4 and np.isfinite(table.to_numpy()).all()
    assert len((out / "spikes.txt").read_text().splitlines()) == 3
    assert len(Path(minimal_example.__file__).read_text().splitlines()) < 200


def test_minimal_example_spike_loss_has_a_gradient():
    torch.manual_seed(0)
    model = minimal_example.Model(
        minimal_example.ConvVAE(1, 8, 8), minimal_example.MLPFields(3, 8), minimal_example.SpikeEncoder(2, 8, 8, 3)
    )
    frames = torch.rand(4, 5, 1, 8, 8)
    for upstream in (False, True):
        out = minimal_example.step(model, frames, 0.5, 0.3, 0.7, upstream=upstream)
        assert out["loss_spike"].requires_grad is not upstream
    out = minimal_example.step(model, frames, 0.5, 0.3, 0.7)
    gradient = torch.autograd.grad(out["loss_spike"], model.encoder.linear_y.weight)[0]
    assert gradient.abs().max() > 0


# ---- bad input ------------------------------------------------------------------------------------------------------

WRONG = [
    (train_vae_scratch, ["--dataset", "mnits"], "did you mean 'mnist'"),
    (train_vae_scratch, ["--latent-size", "7"], "even and at least 4"),
    (train_vae_scratch, ["--batch-size", "0"], "whole number above 0"),
    (train_vae_scratch, ["--amp=perhaps"], "true or false"),
    (train_vae_scratch, ["--shapes3d", "--dsprites"], "one data set at a time"),
    (train_vae_scratch, ["--cuda", "--device", "cpu"], "say the same thing"),
    (train_vae_scratch, ["--smoke", "-K", "4"], "has 3 transformations"),
    (train_vae_scratch, ["--smoke", "--logdet", "rowsum"], "no determinant"),
    (train_vae_scratch, ["--lr-vae", "-1"], "must be above 0"),
    (train_vae_scratch, ["--seed", "-1"], "must not be negative"),
    (train_vae_scratch, ["--dataset", "digits", "--image-size", "10"], "multiple of 4"),
    (train_vae_scratch_unsuper, ["--spike-prior", "0.1"], "p_on,p_stay"),
    (train_vae_scratch_unsuper, ["--spike-prior", "0,1"], "strictly between"),
    (train_vae_scratch_weakly, ["--dataset", "frames", "--data-dir", "nowhere"], "no folder of frames"),
    (train_falcol_isaac, ["--isaac", "--data-dir", "nowhere"], "no Isaac3D pictures"),
    (train_vae_scratch, ["--shapes3d", "--data-dir", "nowhere"], "3dshapes.h5"),
    (evaluate, [], "--exp"),
    (evaluate, ["--exp", "nowhere"], "no checkpoint"),
    (sample_vae, ["--exp", "nowhere", "-g", "VAE_CARS"], "invalid choice"),
]


@pytest.mark.parametrize(("script", "argv", "message"), WRONG, ids=lambda value: str(value)[-30:])
def test_wrong_input_is_one_clear_line(script, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        script.main(argv)
    assert message in str(error.value)


def test_absent_mnist_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=r"common\.datasets\.prepare"):
        train_vae_scratch.main(["--out", str(tmp_path / "run"), *CPU])


def test_resume_refuses_other_settings_and_foreign_files(trained, tmp_path):
    smoke = ["--smoke", "--resume", *CPU]
    with pytest.raises(UserError, match="other settings \\(logdet\\)"):
        train_vae_scratch.main([*smoke, "--out", str(trained), "--logdet", "exact"])
    with pytest.raises(UserError, match="already holds a run"):
        train_vae_scratch.main(["--smoke", "--out", str(trained), *CPU])
    out = tmp_path / "foreign"
    out.mkdir()
    save_state(out / "checkpoint.pt", "lbae", weights=torch.zeros(2))
    with pytest.raises(UserError, match="checkpoint of 'lbae'"):
        train_vae_scratch.main([*smoke, "--out", str(out)])
    whole = (trained / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"truncated|damaged"):
        train_vae_scratch.main([*smoke, "--out", str(out)])


def test_published_spellings_are_accepted(tmp_path):
    out = tmp_path / "run"
    argv = ["--smoke", "--tensorboard", "--generator_lr=0.001", "--no-cuda", "--shapes3d=false", "--out", str(out)]
    train_vae_scratch.main([*argv, "--max-steps", "1"])
    args = json.loads((out / "args.json").read_text())
    assert args["lr_vae"] == 0.001 and args["device"] == "cpu" and args["dataset"] == "digits"
    assert list((out / "tb").iterdir())
    argv = ["--smoke", "--single_control=false", "--no-cuda", "--max-steps", "1", "--out", str(tmp_path / "u")]
    train_vae_scratch_unsuper.main(argv)
    assert not json.loads((tmp_path / "u" / "config.json").read_text())["single_control"]


# ---- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_trivial_baselines_of_mnist():
    """The known figures of the published protocol (2,000 training digits from number 48,000 on)."""
    from latent_flow.data import open_source

    source = open_source("mnist", 8)
    table = trivial_baselines(source, np.arange(48_000, 50_000), 8)
    expected = {"scale": (1356.1, 1082.3), "rotation": (730.5, 760.3), "hue": (1078.7, 974.3)}
    for name, (black, identity) in expected.items():
        assert abs(table[name]["black_upstream"] - black) < 0.1
        assert abs(table[name]["identity_upstream"] - identity) < 0.1


# ---- shell scripts --------------------------------------------------------------------------------------------------

SCRIPTS = Path(train_vae_scratch.__file__).parents[1] / "scripts"
PUBLISHED = {  # script: variant, data set, K, steps, iterations, latent size
    "mnist": ("supervised", "mnist", 3, 8, 90_000, 324),
    "mnist_weakly": ("weakly", "mnist", 3, 8, 90_000, 324),
    "mnist_unsuper_double_control": ("unsupervised", "mnist", 3, 8, 90_000, 324),
    "mnist_unsuper_single_control": ("unsupervised", "mnist", 3, 8, 90_000, 324),
    "shapes": ("supervised", "shapes3d", 5, 7, 100_000, 226),
    "shapes_weakly": ("weakly", "shapes3d", 5, 7, 100_000, 226),
    "falcol": ("supervised", "falcor3d", 7, 4, 100_000, 324),
    "isaac": ("supervised", "isaac3d", 8, 3, 100_000, 324),
    "dsprites": ("supervised", "dsprites", 5, 6, 100_000, 226),
    "sprites_unsuper": ("unsupervised", "sprites", 3, 8, 20_000, 64),
}
VARIANTS = {
    train_vae_scratch: "supervised",
    train_vae_scratch_weakly: "weakly",
    train_vae_scratch_unsuper: "unsupervised",
    train_falcol_isaac: "supervised",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_scripts_say_the_published_settings(name):
    echoed = subprocess.run(
        ["bash", str(SCRIPTS / f"latent_flow_{name}.sh"), "--device", "cpu"],
        env={"PYTHON": "echo", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    path, *argv = echoed.stdout.split()
    script = next(module for module in VARIANTS if Path(module.__file__) == Path(path))
    args = training_parser(VARIANTS[script], "", script.DATASETS).parse(argv)
    config = resolve(args, VARIANTS[script], script.DATASETS)
    assert (config.variant, config.dataset, config.flows, config.steps, args.max_iter, config.latent_size) == PUBLISHED[
        name
    ]
    assert args.batch_size == 128 and args.support_set_lr == args.lr_vae == 1e-4 and config.objective == "paper"
    assert config.single_control is name.endswith("single_control")
    assert {file.stem.removeprefix("latent_flow_") for file in SCRIPTS.glob("latent_flow_*.sh")} == {
        *PUBLISHED,
        "traverse",
        "evaluate",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_scripts_run(name, tmp_path):
    env = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS.parent)}
    script = ["bash", str(SCRIPTS / f"latent_flow_{name}.sh")]
    subprocess.run([*script, "--smoke", "--out", "run", *CPU], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "run" / "eval.json").is_file()
    traverse = ["bash", str(SCRIPTS / "latent_flow_traverse.sh"), "run", "--gif-size", "32", *CPU]
    subprocess.run(traverse, cwd=tmp_path, env=env, check=True)
    assert list((tmp_path / "run" / "results").rglob("*.gif"))
