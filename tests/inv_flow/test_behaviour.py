"""What a user sees change: every option of a training, which weights and which images each stage takes."""

import csv
import functools
import hashlib
import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mnist_files import write_mnist
from PIL import Image
from safetensors.torch import load_file

from inv_flow import data, inv_flow_mnist
from inv_flow.layers.inv_conv import InverseConv2d
from inv_flow.train.config import Config, parse
from inv_flow.train.launch import build

SMALL = ["--smoke", "--device", "cpu", "--block_size", "1", "--n_train", "100", "--n_test", "30", "--epochs", "1",
         "--n_samples", "4", "--warmup_epochs", "0"]  # fmt: skip


def arguments(folder, *more):
    return [*SMALL, "--out", str(folder), *map(str, more)]


def rows(folder, name="metrics.csv"):
    with open(Path(folder) / name, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(folder, name):
    return [float(row[name]) for row in rows(folder) if row.get(name)]


@functools.cache
def trained(*more):
    """What a run of two steps leaves, by its options: weights, rows, names of files, pictures."""
    folder = Path(tempfile.mkdtemp())
    try:
        inv_flow_mnist.main(arguments(folder / "run", *more))
        weights = load_file(folder / "run/checkpoints/best.safetensors")
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
        timing = folder / "run/timing.csv"
        return {
            "weights": {name: value.numpy().tobytes() for name, value in weights.items()},
            "rows": rows(folder / "run"),
            "files": {name for name in names if "events" not in name},
            "pictures": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
                         for name in sorted(names) if name.endswith(".png")},
            "timing": [row["what"] for row in rows(folder / "run", "timing.csv")] if timing.exists() else [],
        }  # fmt: skip
    finally:
        shutil.rmtree(folder)


# option: (another value, what it is on top of, the part of the outcome that changes). "rows", "files", "pictures" and
# "timing" mean that the trained weights stay the same.
SNF = ("--layer", "snf")
CHANGES = {
    "data_aug": ("true", ("--dataset", "mnist"), "data"),
    "resolution": ("12", (), "weights"),
    "n_train": ("60", (), "weights"),
    "n_test": ("17", (), "rows"),
    "test": ("true", (), "weights"),
    "image_size": ("1,12,12", ("--test",), "weights"),
    "padding": ("2", (), "weights"),
    "levels": ("16", (), "weights"),
    "alpha": ("0.01", (), "weights"),
    "num_blocks": ("3", (), "weights"),
    "block_size": ("2", (), "weights"),
    "num_layers": ("4", ("--coupling_width", "0"), "weights"),
    "coupling": ("snf", (), "weights"),
    "coupling_width": ("9", (), "weights"),
    "split_width": ("9", (), "weights"),
    "first_squeeze": ("false", ("--coupling_width", "0", "--split_prior", "false"), "weights"),
    "split_prior": ("false", (), "weights"),
    "actnorm": ("false", (), "weights"),
    "conv1x1": ("true", (), "weights"),
    "inv_conv": ("false", (), "weights"),
    "inv_conv_no_pad": ("true", (), "weights"),
    "inv_flow": ("true", (), "weights"),
    "ff": ("true", (), "weights"),
    "ff_units": ("2", ("--ff",), "weights"),
    "emerging": ("true", (), "weights"),
    "convexp": ("true", (), "weights"),
    "convexp_maps": ("true", ("--convexp",), "weights"),
    "snf": ("true", (), "weights"),
    "snf_kernel_size": ("3", SNF, "weights"),
    "fc": ("true", (), "weights"),
    "if_kernel_size": ("2", (), "weights"),
    "order": ("TR", (), "weights"),
    "groups": ("2", (), "weights"),
    "init_std": ("0.05", (), "weights"),
    "max_row_sum": ("0.01", (), "weights"),
    "activation": ("SLR", (), "weights"),
    "last_activation": ("false", (), "weights"),
    "n_bins": ("6", (), "weights"),
    "tail_bound": ("2", (), "weights"),
    "individual_weights": ("false", (), "weights"),
    "amp": ("true", (), "weights"),
    "epochs": ("2", (), "weights"),
    "batch_size": ("25", (), "weights"),
    "lr": ("0.01", (), "weights"),
    "lr_inv_conv": ("0.5", (), "weights"),
    "optimizer_name": ("Adamax", (), "weights"),
    "weight_decay": ("0.1", (), "weights"),
    "scheduler_name": ("Step", ("--scheduler_name", "Exponential", "--epochs", "2"), "weights"),
    "gamma": ("0.5", ("--epochs", "2", "--step_epochs", "1"), "weights"),
    "step_epochs": ("1", ("--epochs", "2"), "weights"),
    "milestones": ("1", ("--scheduler_name", "MultiStep", "--milestones", "9", "--epochs", "2"), "weights"),
    "warmup_epochs": ("3", (), "weights"),
    "grad_clip_norm": ("0.1", ("--optimizer_name", "SGD"), "weights"),
    "grad_clip": ("0.001", ("--optimizer_name", "SGD"), "weights"),
    "modified_grad": ("false", SNF, "weights"),
    "add_recon_grad": ("false", SNF, "weights"),
    "recon_loss_weight": ("50", (*SNF, "--optimizer_name", "SGD", "--lr", "0.0001"), "weights"),
    "sym_recon_grad": ("true", (*SNF, "--snf_kernel_size", "3"), "weights"),
    "only_R_recon": ("true", (*SNF, "--snf_kernel_size", "3"), "weights"),
    "recon_loss_lr": ("5", (*SNF, "--snf_kernel_size", "3", "--epochs", "2"), "weights"),
    "recon_alpha": ("0.1", (*SNF, "--snf_kernel_size", "3", "--epochs", "2", "--recon_loss_lr", "5"), "weights"),
    "eval_epochs": ("2", ("--epochs", "3"), "rows"),
    "eval_train": ("true", (), "rows"),
    "max_eval_ex": ("15", ("--batch_size", "10"), "rows"),
    "eval_draws": ("2", (), "rows"),
    "sample_epochs": ("5", ("--epochs", "6"), "files"),
    "n_samples": ("2", (), "pictures"),
    "temperature": ("0.3", (), "pictures"),
    "sample_true_inv": ("false", SNF, "files"),
    "plot_recon": ("false", (), "files"),
    "vis_epochs": ("1", ("--epochs", "2"), "files"),
    "log_interval": ("2", (), "rows"),
    "log_timing": ("false", (), "timing"),
    "verbose": ("true", (), "rows"),
    "sample_dir": ("grids", (), "files"),
    "checkpoint_path": (None, (), "below"),
    "out": (None, (), "below"),
    "name": (None, (), "below"),
    "seed": ("1", (), "weights"),
}
ELSEWHERE = {
    "dataset": "test_experiment: other data sets are files",
    "data_root": "test_experiment: MNIST's own files in another folder",
    "workers": "the same batches, whatever the number of workers, by design",
    "multi_gpu": "test_options: one process is refused",
    "notes": "text of the record; test below",
    "device": "one device here; test_experiment: meta, and the gpu tests",
    "cuda_graph": "the same step, in fewer launches: tests/front/test_cuda_graph.py",
    "tf32": "test_experiment: an emulated rounding",
    "deterministic": "a CPU's kernels are",
    "resume": "test_experiment", "overwrite": "test_experiment", "evaluate": "test_experiment, and below",
    "dry_run": "test_options", "smoke": "test_options",
    "wandb": "tests/test_wandb.py", "wandb_project": "tests/test_wandb.py", "wandb_entity": "read by wandb itself",
}  # fmt: skip


def test_every_option_is_tried_or_named():
    assert set(CHANGES) | set(ELSEWHERE) == set(Config.model_fields) and not set(CHANGES) & set(ELSEWHERE)


@pytest.mark.parametrize("name", [name for name, (_, _, part) in CHANGES.items() if part not in ("below", "data")])
def test_an_option_changes_what_it_says(name):
    value, before, part = CHANGES[name]
    if f"--{name}" in before:  # in another value than the default
        place = before.index(f"--{name}") + 1
        changed = (*before[:place], value, *before[place + 1 :])
    else:
        changed = (*before, f"--{name}", value)
    plain, other = trained(*before), trained(*changed)
    assert plain[part] != other[part]
    if part != "weights":  # it judges or draws, and moves no weight
        assert plain["weights"] == other["weights"]


def test_the_same_call_leaves_the_same():
    trained.cache_clear()
    first = trained()
    trained.cache_clear()
    again = trained()
    assert {name: first[name] for name in ("weights", "rows", "files", "pictures")} == {
        name: again[name] for name in ("weights", "rows", "files", "pictures")
    }


def test_where_a_run_lands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*SMALL, "--name", "mine", "--checkpoint_path", "weights of mine", "--notes", "a note"]
    inv_flow_mnist.main(argv)
    folder = tmp_path / "runs/inv_flow/mine"
    assert (folder / "metrics.csv").is_file() and (tmp_path / "weights of mine/last.pt").is_file()
    assert json.loads((folder / "config.json").read_text())["notes"] == "a note"
    assert not (folder / "checkpoints").exists()


# -------------------------------------------------------------------------------------- which weights, which images


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """Four epochs whose learning rate grows tenfold each: the validation likelihood is best before the last."""
    folder = tmp_path_factory.mktemp("spoilt")
    more = ("--epochs", 4, "--lr", 0.003, "--scheduler_name", "Exponential", "--gamma", 10, "--log_interval", 9)
    inv_flow_mnist.main(arguments(folder, *more, "--grad_clip_norm", "none"))
    return folder


def test_test_figures_and_best_weights_are_those_of_the_best_validation(spoilt, tmp_path):
    validation, test = column(spoilt, "val_nll"), column(spoilt, "test_nll")
    best = validation.index(min(validation))
    assert 0 <= best < 3 and len(test) == 4
    assert test[best:] == [test[best]] * (4 - best)  # later epochs were worse: their test images were not looked at
    copy = tmp_path / "copy"
    shutil.copytree(spoilt, copy)
    inv_flow_mnist.main(["--evaluate", "--device", "cpu", "--out", str(copy), "--n_test", "30", "--n_samples", "4"])
    stored = json.loads((copy / "evaluation.json").read_text())
    assert stored["val_nll"] == pytest.approx(validation[best], rel=1e-6) != pytest.approx(validation[-1], rel=1e-6)
    assert stored["test_nll"] == pytest.approx(test[best], rel=1e-6)


def test_evaluation_is_a_function_of_the_stored_weights(spoilt, tmp_path):
    found = []
    for name, seed in (("a", 1), ("b", 2)):
        copy = tmp_path / name
        shutil.copytree(spoilt, copy)
        (copy / "checkpoints/last.pt").unlink()
        torch.manual_seed(seed)
        inv_flow_mnist.main(["--evaluate", "--device", "cpu", "--out", str(copy), "--n_test", "30", "--n_samples", "4"])
        figures = json.loads((copy / "evaluation.json").read_text())
        pictures = [(copy / f"{kind}/evaluation.png").read_bytes() for kind in ("samples", "recon")]
        found.append(({key: value for key, value in figures.items() if not key.endswith("_ms")}, pictures))
    assert found[0] == found[1]


def test_the_pictures_show_what_they_say(tmp_path):
    """Test images, their reconstructions, their differences, a row each."""
    inv_flow_mnist.main(arguments(tmp_path))
    picture = torch.as_tensor(np.array(Image.open(tmp_path / "recon/1.png")))[..., 0].float()
    test = data.datasets(parse(arguments("x"), "", inv_flow_mnist.PRESET))[2]
    images, gap, side = torch.stack([torch.as_tensor(test[i][0])[0] for i in range(10)]), 2, 8
    shown = (images.float() * 17 / 256).floor() / 16 * 255

    def tile(row, n):
        top, left = gap + row * (side + gap), gap + n * (side + gap)
        return picture[top : top + side, left : left + side]

    for n in range(10):
        assert (tile(0, n) - shown[n]).abs().max() <= 1, n
        assert (tile(1, n) - shown[n]).abs().max() <= 2, n
        assert tile(2, n).max() <= 2, n


def test_augmentation_touches_training_images_alone(tmp_path):
    write_mnist(tmp_path, 24)
    plain, moved = (
        data.datasets(Config.build({"dataset": "mnist", "data_root": str(tmp_path), "data_aug": aug}))
        for aug in (False, True)
    )

    def images(part):
        return torch.stack([torch.as_tensor(part[i][0]) for i in range(len(part))])

    torch.manual_seed(0)
    train, again = images(moved[0]), images(moved[0])
    assert not torch.equal(train, images(plain[0])) and not torch.equal(train, again)
    for split in (1, 2):
        assert torch.equal(images(moved[split]), images(plain[split])), split
    assert [int(moved[0][i][1]) for i in range(20)] == [int(plain[0][i][1]) for i in range(20)]


# ------------------------------------------------------------------------------------------------------------ the step


def kernels(experiment):
    return [m.weight.detach().clone() for m in experiment.model.modules() if isinstance(m, InverseConv2d)]


@pytest.mark.parametrize("factor", [0, 0.25])
def test_the_inverse_layers_have_a_learning_rate_of_their_own(factor, tmp_path):
    moves = []
    for name, more in (("plain", ()), ("own", ("--lr_inv_conv", factor))):
        config = ("--optimizer_name", "SGD", "--grad_clip_norm", "none", "--lr", 1e-6, "--n_train", 50, *more)
        experiment = build(parse(arguments(tmp_path / name, *config), "", inv_flow_mnist.PRESET))
        before, others = kernels(experiment), experiment.model.layers[-1].net[4].weight.detach().clone()
        experiment.run()
        moves.append([after - start for after, start in zip(kernels(experiment), before, strict=True)])
    for plain, own in zip(*moves, strict=True):
        assert plain.abs().max() > 0
        assert torch.allclose(own, factor * plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    assert not torch.equal(experiment.model.layers[-1].net[4].weight, others)  # the others train all the same


def test_weight_decay_pulls_towards_zero(tmp_path):
    sums = []
    for decay in (0, 1):
        config = ("--optimizer_name", "SGD", "--lr", 1e-4, "--n_train", 50, "--weight_decay", decay)
        experiment = build(parse(arguments(tmp_path / str(decay), *config), "", inv_flow_mnist.PRESET))
        start = {n: p.detach().clone() for n, p in experiment.model.named_parameters() if "net.0" in n}
        experiment.run()
        sums.append({n: p.detach() for n, p in experiment.model.named_parameters() if n in start})
    for name, value in start.items():
        assert torch.allclose(sums[1][name] - sums[0][name], -1e-4 * value, atol=1e-6), name


def test_draws_average_in_probability_units(tmp_path):
    """The figure of several draws is the mean of log p, between the smallest and the largest single draw."""
    inv_flow_mnist.main(arguments(tmp_path / "one"))
    inv_flow_mnist.main(arguments(tmp_path / "many", "--eval_draws", 8))
    one, many = (column(tmp_path / name, "test_nll")[0] for name in ("one", "many"))
    assert one != many and math.isclose(one, many, rel_tol=0.05)
