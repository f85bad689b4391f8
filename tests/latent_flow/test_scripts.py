"""The users' commands, tiny, in a temporary folder: train, resume, evaluate, sample, traverse, the minimal example."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import torch

from common.checkpoint import load_state, save_state
from common.errors import UserError, run_command
from latent_flow import (
    evaluate,
    minimal_example,
    release,
    sample_vae,
    show_flows,
    train_falcol_isaac,
    train_vae_scratch,
    train_vae_scratch_unsuper,
    train_vae_scratch_weakly,
    traverse_latent_space_vae,
)
from latent_flow.data import DigitSequences
from latent_flow.fields import Flows
from latent_flow.metrics import trivial_baselines
from latent_flow.model import Config, LatentFlow
from latent_flow.options import DeepOptions, SparseOptions, SupervisedOptions, WeakOptions, parse
from latent_flow.runs import load_run

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
    assert {*LOSSES, "temperature", "active_units"} <= set(table.columns) and "sec_per_iter" not in table.columns
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
        for name in ("model", "one_sample", "unmoved", "identity", "black", "linear"):
            assert abs(sum(entry[name]["per_step"]) - entry[name]["mean"]) < 1e-6 * entry[name]["mean"]
            assert (
                abs(sum(entry[name]["per_step"][:-1]) - entry[name]["upstream_protocol"]) < 1e-6 * entry[name]["mean"]
            )
    units = result["active_units"]
    assert units["units"] == 8 == len(units["kl"]) and 0 <= units["active"] <= 8 and units["threshold"] == 0.05
    assert result["lines"][0].startswith(f"active latent units: {units['active']} of 8")
    likelihood = result["likelihood"]
    for kind in ("bernoulli", "gaussian"):
        bounds = [likelihood[f"{kind}_iw_{s}"] for s in (1, 10, 100)]
        assert bounds[0] <= bounds[1] + 0.5 and bounds[1] <= bounds[2] + 0.5  # tighter with more samples, up to noise
    assert likelihood["gaussian_iw_100"] < likelihood["gaussian_maximum"]


@pytest.mark.parametrize("transition", ["linear", "free"])
def test_a_baseline_is_trained_resumed_and_judged_as_the_flows_are(transition, tmp_path, capsys):
    folder = tmp_path / transition
    argv = ["--smoke", "--out", str(folder), "--transition", transition, "--support-set-lr", "0.01", *CPU]
    train_vae_scratch.main([*argv, "--max-steps", "4"])
    train_vae_scratch.main(["--resume", "--out", str(folder), *CPU])
    model, _, iteration = load_run(folder, torch.device("cpu"))
    assert iteration == 6 and model.config.transition == transition
    assert all(parameter.any() for parameter in model.support_sets.parameters())  # all of it was trained
    table = pd.read_csv(folder / "metrics.csv")
    assert len(table) == 6 and not table["loss_pde"].any()
    result = json.loads((folder / "eval.json").read_text())
    for entry in result["equivariance"].values():
        assert entry["model"]["mean"] != entry["unmoved"]["mean"]
    assert "failed" not in result and result["diagnostics"]["scale"]["hamilton_jacobi_residual"] is None
    evaluate.main(["--exp", str(folder), "--vp-pairs", "100", *CPU])
    assert "VP score" in capsys.readouterr().out
    show_flows.main(["--exp", str(folder), *CPU])
    with pytest.raises(UserError, match=r"baseline .* without flows"):
        traverse_latent_space_vae.main(["--exp", str(folder), *CPU])


def test_the_command_itself_runs(tmp_path, capsys):
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
    assert run_command(lambda: train_vae_scratch.main(["--batchsize", "3"])) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: unknown option --batchsize (did you mean 'batch_size'?); help lists all"
    ]


RESUMED = {
    "supervised": (train_vae_scratch, []),
    "weakly": (train_vae_scratch_weakly, ["--decode-frames", "2", "--output-bias=-3"]),
    "marginal": (train_vae_scratch, ["--path-kl", "marginal"]),
    "double": (train_vae_scratch_unsuper, ["--field", "divfree", "--path-kl", "marginal", "--logdet", "exact"]),
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
    model, _, _ = load_run(trained, torch.device("cpu"))
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


def test_evaluations_and_pictures_hang_on_the_stored_weights_alone(trained, tmp_path):
    """The same commands twice, and on a run that was stopped and resumed: the same files."""
    found = []
    for name in ("a", "b", "resumed"):
        folder = tmp_path / name
        if name == "resumed":
            train_vae_scratch.main(["--smoke", "--out", str(folder), "--max-steps", "4", *CPU])
            train_vae_scratch.main(["--smoke", "--out", str(folder), "--resume", *CPU])
        else:
            shutil.copytree(trained, folder)
        torch.manual_seed(len(found))  # whatever ran before in the process
        exp = ["--exp", str(folder), *CPU]
        evaluate.main([*exp, "--images", "20", "--vp-pairs", "200"])
        sample_vae.main([*exp, "--num-samples", "2", "--pool", "p"])
        traverse_latent_space_vae.main([*exp, "--pool", "p", "--shift-steps", "4", "--gif", "--gif-size", "32"])
        show_flows.main([*exp, "--samples", "2"])
        own = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
               if path.suffix in (".jpg", ".png", ".gif", ".txt")}  # fmt: skip
        own.pop("log.txt")
        found.append((json.loads((folder / "eval.json").read_text()), own))
    assert len(found[0][1]) > 30 and "vp_score" in found[0][0]
    assert found[0] == found[1]
    assert found[0][1] == found[2][1] and found[0][0] | {"exp": 0} == found[2][0] | {"exp": 0}


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


def test_a_leap_keeps_the_code_itself(trained):
    words = [
        "--exp",
        str(trained),
        "--codes",
        "1",
        "--shift-steps",
        "8",
        "--shift-leap",
        "3",
        "--img-quality",
        "95",
        *CPU,
    ]
    traverse_latent_space_vae.main(words)
    out = trained / "results" / "encoded" / "16_1_16"
    code = next(out.glob("*/paths_images")).parent
    shown = [iio.imread(path) for path in sorted((code / "paths_images" / "path_001").glob("*.jpg"))]
    assert len(shown) == 3  # places 1, 4 and 7 of 9
    np.testing.assert_array_equal(shown[1], iio.imread(code / "original_image.jpg"))
    assert [traverse_latent_space_vae.kept_places(9, leap) for leap in (1, 2, 4, 5)] == [
        list(range(9)), [0, 2, 4, 6, 8], [0, 4, 8], [4],
    ]  # fmt: skip


def test_pictures_of_the_call_before_go_and_the_users_stay(trained, tmp_path):
    words = ["--exp", str(trained), "--codes", "2", "--shift-steps", "6", "--gif", "--gif-size", "16", *CPU]
    traverse_latent_space_vae.main([*words, "--compose"])
    out = trained / "results" / "encoded" / "12_1_12"
    mine = next(out.glob("*/paths_images")) / "path_000" / "000099.jpg"
    mine.write_bytes(b"the user's")
    traverse_latent_space_vae.main([*words, "--shift-leap", "3"])
    kept = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert sorted(kept - {mine.relative_to(out).as_posix(), "written.json"}) == json.loads(
        (out / "written.json").read_text()
    )
    assert len(list(out.rglob("*.gif"))) == 3 and len(list(mine.parent.glob("0000??.jpg"))) == 3 + 1
    # a record that names files elsewhere removes none of them
    outside = trained / "results" / "precious.txt"
    outside.write_text("stays")
    (out / "written.json").write_text(json.dumps(["../../precious.txt", str(outside), 3]))
    traverse_latent_space_vae.main(words)
    assert outside.read_text() == "stays"


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


# ---- clips ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Six clips of twelve pictures: a bar that moves."""
    folder = tmp_path_factory.mktemp("clips")
    for c in range(6):
        (folder / f"clip{c}").mkdir()
        for i in range(12):
            picture = np.zeros((16, 16, 3), np.uint8)
            picture[:, (c + i) % 16] = 255
            iio.imwrite(folder / f"clip{c}" / f"{i + 1}.png", picture)
    return folder


@pytest.mark.parametrize(
    "script", [train_vae_scratch_weakly, train_vae_scratch_unsuper], ids=["weakly", "unsupervised"]
)
def test_clips_are_trained_on_and_judged_by_their_later_frames(script, clips, tmp_path, capsys):
    out = tmp_path / "run"
    data = ["--dataset", "frames", "--data-dir", str(clips), "--image-size", "16", "--frame-stride", "2"]
    script.main([*data, "--smoke", "--num-timesteps", "6", "--max-iter", "2", "--out", str(out), *CPU])
    for split, name in (("valid", "eval"), ("test", "eval_test")):
        evaluate.main(["--exp", str(out), "--split", split, "--vp-pairs", "120", *CPU])
        result = json.loads((out / f"{name}.json").read_text())
        frames = result["equivariance"]["frames"]
        assert frames["images"] == 3 * 6  # three held-out clips, six sequences of seven pictures in each
        assert len(frames["model"]["per_step"]) == 3
        bar = 3 * 16 * 2  # a bar where there was none, and the one that is gone
        assert abs(frames["identity"]["mean"] - 3 * bar) < 1e-2 and abs(frames["black"]["mean"] - 3 * bar / 2) < 1e-2
        assert frames["linear"]["mean"] > 0 and ("linear model" in "".join(result["lines"])) == (
            frames["model"]["mean"] >= frames["linear"]["mean"]
        )
        assert result["vp_score"]["pairs"] == 120
        assert result["sequence_bounds"]["frames"]["marginal"] <= result["sequence_bounds"]["frames"]["shared"]
    assert "VP score" in capsys.readouterr().out
    show_flows.main(["--exp", str(out), "--samples", "2", *CPU])
    assert iio.imread(out / "pictures" / "frames.gif").shape == (4, 2 * 32, 2 * 32, 3)


def test_minimal_example_on_clips_and_unmoving_sets(clips, tmp_path):
    sizes = ["--image-size", "16", "--latent-size", "8", "--width", "8", "--batch-size", "4", "--steps", "3"]
    out = tmp_path / "m"
    minimal_example.main(
        [*sizes, "--dataset", "frames", "--data-dir", str(clips), "--max-iter", "2", "--out", str(out)]
    )
    assert "true unknown" in (out / "spikes.txt").read_text() and "active" not in (out / "metrics.csv").read_text()


# ---- what may go wrong in an evaluation ------------------------------------------------------------------------------


def tiny_model(**options):
    torch.manual_seed(0)
    return LatentFlow(Config(latent_size=4, index_width=4, image_size=8, steps=2, **options)).eval()


def test_sequences_that_do_not_move_have_no_ratio():
    source = DigitSequences(torch.zeros(12, 1, 8, 8, dtype=torch.uint8), 2)
    result = evaluate.evaluate(tiny_model(), source, np.arange(12))
    for entry in result["equivariance"].values():
        assert entry["ratio_to_identity"] is None and entry["best_trivial"] == 0 and entry["model"]["mean"] > 0
    json.dumps(result, allow_nan=False)


class NoSwitch(DigitSequences):
    """A source whose switched sequences cannot be made."""

    def chosen(self, rows, steps_labels):
        raise RuntimeError("no switching today")


def test_a_failing_part_leaves_the_others():
    source, seen = NoSwitch(torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8), 2), []
    with pytest.raises(RuntimeError, match="no switching today"):
        evaluate.evaluate(tiny_model(), source, np.arange(12), write=lambda result, whole: seen.append((result, whole)))
    [(result, whole)] = seen
    assert whole and {"equivariance", "likelihood", "sequence_bounds", "diagnostics"} <= result.keys()
    assert result["failed"] == {"composition": "RuntimeError: no switching today"}
    assert "not measured: composition (RuntimeError: no switching today)" in result["lines"]


class Stopped(DigitSequences):
    """A source at whose switched sequences the user presses Ctrl-C."""

    def chosen(self, rows, steps_labels):
        raise KeyboardInterrupt


def test_an_interrupted_evaluation_keeps_what_it_measured():
    source, seen = Stopped(torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8), 2), []
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(tiny_model(), source, np.arange(12), write=lambda result, whole: seen.append((result, whole)))
    [(result, whole)] = seen
    assert not whole and "equivariance" in result and "likelihood" not in result


# ---- published checkpoints -------------------------------------------------------------------------------------------

PUBLISHED_FORMS = {
    "supervised": {},
    "parallel": {},
    "weakly": {"variant": "weakly", "index_width": 5},
    "single": {"variant": "unsupervised", "index_width": 5, "single_control": True},
    "double": {"variant": "unsupervised", "index_width": 5},
    "deep": {"deep": True, "image_size": 32, "flows": 7, "dataset": "falcor3d"},
}


@pytest.mark.parametrize("name", PUBLISHED_FORMS)
def test_published_checkpoints_are_read(name, tmp_path, capsys):
    """{iter, support_sets, prior, vae[, reconstructor]} as the published trainers write it, DataParallel's keys too."""
    torch.manual_seed(0)
    form = {"latent_size": 6, "image_size": 28, "steps": 3, "objective": "upstream"} | PUBLISHED_FORMS[name]
    model = LatentFlow(Config(**form)).eval()
    prior = model.prior.state_dict()
    if name == "deep":  # the published prior has a step more than its loop takes
        prior = {key: torch.cat([value, torch.full((1, 1), 9.0)]) for key, value in prior.items()}
    prefix = "module." if name == "parallel" else ""
    state = {
        "iter": 1200,
        "support_sets": model.support_sets.state_dict(),
        "prior": prior,
        "vae": {prefix + key: value for key, value in model.vae.state_dict().items()},
    }
    if model.reconstructor is not None:
        state["reconstructor"] = model.reconstructor.state_dict()
    torch.save(state, tmp_path / "checkpoint.pt")
    for exp in (tmp_path / "checkpoint.pt", tmp_path):
        loaded, options, iteration = load_run(exp, torch.device("cpu"))
        assert loaded.config == model.config and iteration == 1200 and options["warp_centre"] == "upstream"
        x = torch.rand(2, 3, form["image_size"], form["image_size"])
        with torch.no_grad():
            for ours, theirs in zip(loaded.vae.encode(x), model.vae.encode(x), strict=True):
                torch.testing.assert_close(ours, theirs)
    sample_vae.main(["--exp", str(tmp_path / "checkpoint.pt"), "--num-samples", "2", "--pool", "p", *CPU])
    traverse_latent_space_vae.main(
        ["--exp", str(tmp_path / "checkpoint.pt"), "--pool", "p", "--shift-steps", "4", *CPU]
    )
    assert len(list((tmp_path / "results").rglob("path_000/*.jpg"))) == 2 * 5
    release.main([str(tmp_path / "checkpoint.pt"), str(tmp_path / "small.safetensors")])
    assert load_run(tmp_path / "small.safetensors", torch.device("cpu"))[0].config == model.config


def test_a_damaged_published_checkpoint_is_one_line(tmp_path):
    torch.save({"iter": 1, "support_sets": {}, "prior": {}, "vae": {"encoder": 3}}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="looks like a published checkpoint"):
        load_run(tmp_path, torch.device("cpu"))


# ---- bad input ------------------------------------------------------------------------------------------------------

WRONG = [
    (train_vae_scratch, ["--dataset", "mnits"], "did you mean 'mnist'"),
    (train_vae_scratch, ["--latent-size", "7"], "even number of at least 4"),
    (train_vae_scratch, ["--transition", "linear", "--path-kl", "marginal"], "--path-kl marginal need flows"),
    (train_vae_scratch, ["--batch-size", "0"], "a whole number of at least 1"),
    (train_vae_scratch, ["--amp=perhaps"], "true or false"),
    (train_vae_scratch, ["--shapes3d", "--dsprites"], "one data set at a time"),
    (train_vae_scratch, ["--cuda", "--device", "cpu"], "say the same thing"),
    (train_vae_scratch, ["--smoke", "-K", "4"], "has 3 transformations"),
    (train_vae_scratch, ["--smoke", "--logdet", "rowsum"], "no determinant"),
    (train_vae_scratch, ["--lr-vae", "-1"], "a number above 0"),
    (train_vae_scratch, ["--seed", "-1"], "a whole number of at least 0"),
    (train_vae_scratch, ["--dataset", "digits", "--image-size", "10"], "multiple of 4"),
    (train_vae_scratch, ["--smoke", "--batch-size", "2000"], "exceeds the 1149 training items"),
    (train_vae_scratch_unsuper, ["--spike-prior", "0.1"], "p_on,p_stay"),
    (train_vae_scratch_unsuper, ["--spike-prior", "0,1"], "p_on,p_stay"),
    (train_vae_scratch_weakly, ["--dataset", "frames", "--data-dir", "nowhere"], "no folder of frames"),
    (train_falcol_isaac, ["--isaac", "--data-dir", "nowhere"], "no Isaac3D pictures"),
    (train_vae_scratch, ["--shapes3d", "--data-dir", "nowhere"], "3dshapes.h5"),
    (evaluate, [], "--exp"),
    (evaluate, ["--exp", "nowhere"], "no checkpoint"),
    (evaluate, ["--exp", "nowhere", "--vp-pairs", "50"], "at least 100 pairs"),
    (sample_vae, ["--exp", "nowhere", "-g", "VAE_CARS"], "one of VAE_MNIST"),
    (minimal_example, ["--dataset", "isaac3d", "--data-dir", "nowhere"], "no Isaac3D pictures"),
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
    with pytest.raises(UserError, match=r"other settings: path_kl \(shared there, marginal here\)"):
        train_vae_scratch.main([*smoke, "--out", str(trained), "--path-kl", "marginal"])
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
OPTIONS = {
    train_vae_scratch: SupervisedOptions,
    train_vae_scratch_weakly: WeakOptions,
    train_vae_scratch_unsuper: SparseOptions,
    train_falcol_isaac: DeepOptions,
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
    args = parse(next(kind for module, kind in OPTIONS.items() if Path(module.__file__) == Path(path)), argv, "")
    config = args.config
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
