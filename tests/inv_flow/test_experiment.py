"""The training loop and every script, by the users' own calls, on tiny flows and scikit-learn's digits."""

import contextlib
import csv
import importlib
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from front import children
from mnist_files import write_mnist
from same_state import same
from torch.utils.data import DataLoader, TensorDataset

from common.checkpoint import load_state, save_state
from common.errors import EXIT_NON_FINITE, NonFiniteError, UserError, run_command
from common.launch import Distributed
from inv_flow import benchmark, classify_mnist, data, inv_flow_mnist, timing, toy_2d
from inv_flow.layers.conv1x1 import Conv1x1
from inv_flow.layers.selfnorm import SelfNormConv
from inv_flow.model import create_model
from inv_flow.train import evaluation, launch
from inv_flow.train.config import Config, layer_choice, parse
from inv_flow.train.evaluation import integer_images, layer_values, own_rng
from inv_flow.train.experiment import KIND, Experiment, clip_gradients, scaled_rates
from inv_flow.train.launch import build
from inv_flow.train.optim import make_optimizer
from inv_flow.train.recon import ReconstructionLoss

ROOT = Path(__file__).parents[2]
SCRIPTS = [path.stem for path in sorted((ROOT / "inv_flow").glob("inv_flow_*.py"))]
SCRIPTS += [f"experiments.{p.stem}" for p in sorted((ROOT / "inv_flow/experiments").glob("*.py")) if p.stem[0] != "_"]
FILES = ["config.json", "metrics.csv", "log.txt", "timing.csv", "samples/1.png", "recon/1.png"]
FILES += [f"checkpoints/{name}" for name in ("last.pt", "best.pt", "best.safetensors", "best.json")]
COLUMNS = ["step", "epoch", "batch_nll", "grad_norm", "lr", "train_nll", "train_bpd"]
COLUMNS += ["val_nll", "val_bpd", "test_nll", "test_bpd"]


def configure(**values):
    return Config.build(values)


def arguments(folder, *more):
    """A smoke run of six steps, three an epoch."""
    return ["--smoke", "--device", "cpu", "--out", str(folder), "--n_train", "150", "--n_test", "40", *map(str, more)]


def configured(folder, *more):
    return parse(arguments(folder, *more), "", inv_flow_mnist.PRESET)


def initialise(experiment):
    """The data-dependent initialisation that a run begins with."""
    with torch.no_grad(), own_rng(experiment.dist.device, experiment.config.seed):
        experiment.model.encode(integer_images(next(experiment.loaders["train"].epoch(0)), experiment.model, "cpu"))


def rows(folder):
    with open(Path(folder) / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(folder, name):
    return [float(row[name]) for row in rows(folder) if row[name]]


# ------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_trains(name, tmp_path):
    main = importlib.import_module(f"inv_flow.{name}").main
    main(arguments(tmp_path, "--epochs", 1, "--n_train", 100, "--n_samples", 4))
    assert [name for name in FILES if not (tmp_path / name).is_file()] == []
    assert (tmp_path / "tb").is_dir()
    assert list(rows(tmp_path)[0]) == COLUMNS
    assert all(math.isfinite(float(value)) for row in rows(tmp_path) for value in row.values() if value)


def test_a_run_learns_and_is_evaluated_from_its_folder(tmp_path, capsys):
    inv_flow_mnist.main(arguments(tmp_path, "--epochs", 3, "--lr", 0.003, "--vis_epochs", 1, "--eval_train"))
    train, test = column(tmp_path, "train_nll"), column(tmp_path, "test_nll")
    assert train[2] < train[1] < train[0] and test[-1] < test[0] - 1
    assert column(tmp_path, "test_bpd")[-1] == pytest.approx(test[-1] / (64 * math.log(2)))
    assert column(tmp_path, "train_eval_nll")[-1] < train[-1]
    assert (tmp_path / "kernels/3.png").is_file()
    # neither --smoke nor the architecture is asked for again, and the figures are those of training
    inv_flow_mnist.main(["--evaluate", "--device", "cpu", "--out", str(tmp_path), "--n_test", "40"])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert float(printed["test_nll"]) == pytest.approx(test[-1], rel=1e-5)
    assert stored["val_nll"] == pytest.approx(column(tmp_path, "val_nll")[-1], rel=1e-6)
    assert stored["recon_max_grey"] < 1e-3 and stored["float64_relative_error"] < 1e-5
    assert (tmp_path / "samples/evaluation.png").is_file() and (tmp_path / "recon/evaluation.png").is_file()


# ------------------------------------------------------------------------------------------------------- resume


class StopAfter:
    """A loader that sends the process a stop signal while it hands out batch `n` of the first epoch."""

    def __init__(self, loader, n):
        self.loader, self.n, self.batch_size = loader, n, loader.batch_size

    def __len__(self):
        return len(self.loader)

    def epoch(self, epoch, start=0):
        for index, batch in enumerate(self.loader.epoch(epoch, start), start + 1):
            if index == self.n:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        (2, ("--log_interval", 4)),  # in the middle of an epoch and of a logging interval
        (3, ("--log_interval", 2, "--scheduler_name", "Exponential", "--gamma", 0.5)),  # at the end of an epoch
        (2, ("--layer", "snf", "--recon_loss_lr", 0.01, "--log_interval", 3)),  # with GECO's state
    ],
)
def test_resume_is_exact(steps, more, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    inv_flow_mnist.main(arguments(whole, *more))
    experiment = build(configured(parts, *more))
    experiment.loaders["train"] = StopAfter(experiment.loaders["train"], steps)
    with pytest.raises(KeyboardInterrupt):
        experiment.run()
    torch.manual_seed(99)  # a new process knows nothing of the old one's generators
    inv_flow_mnist.main(arguments(parts, *more, "--resume"))
    assert (parts / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    a, b = (load_state(folder / "checkpoints/last.pt", KIND) for folder in (whole, parts))
    for state in (a, b):
        state["options"] = {key: value for key, value in state["options"].items() if key not in ("out", "resume")}
    same(a, b)
    assert a["place"] == {"step": 6, "epoch": 2, "images": 0} and len(a["optimizer"]["state"]) > 0


def test_resume_refuses_what_would_not_be_the_same_run(tmp_path):
    inv_flow_mnist.main(arguments(tmp_path, "--epochs", 1))
    before = (tmp_path / "metrics.csv").read_bytes()
    for named, value in (("block_size", 3), ("batch_size", 25), ("seed", 4)):
        with pytest.raises(UserError, match=named):
            inv_flow_mnist.main(arguments(tmp_path, f"--{named}", value, "--resume"))
    last = tmp_path / "checkpoints/last.pt"
    save_state(last, "lbae", step=1)
    with pytest.raises(UserError, match="lbae"):
        inv_flow_mnist.main(arguments(tmp_path, "--resume"))
    last.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"last\.pt"):
        inv_flow_mnist.main(arguments(tmp_path, "--resume"))
    last.unlink()
    with pytest.raises(UserError, match=r"no .*last\.pt|no checkpoint"):
        inv_flow_mnist.main(arguments(tmp_path, "--resume"))
    with pytest.raises(UserError, match="already holds a run"):
        inv_flow_mnist.main(arguments(tmp_path))
    assert (tmp_path / "metrics.csv").read_bytes() == before
    inv_flow_mnist.main(arguments(tmp_path, "--overwrite", "--epochs", 2))
    assert column(tmp_path, "step")[-1] == 6


def earlier_layout(path, batch=None):
    """Rewrite a checkpoint as versions before `Training` wrote it; `batch` batches of its epoch are done."""
    state = load_state(path, KIND)
    place, extra, options = state["place"], state["extra"], dict(state["options"])
    options["autocast"] = options.pop("amp")
    for later in ("num_layers", "verbose", "tf32", "cuda_graph", "dry_run"):
        del options[later]
    own = {"rng": state["rng"], "loss_sum": torch.as_tensor(extra["loss_sum"]), "loss_count": extra["loss_count"]}
    kept = {name: state.get(name) for name in ("model", "optimizer", "scheduler", "reconstruction")}
    epoch = place["epoch"] if batch is None else place["epoch"] - 1
    place = {"epoch": epoch, "step": place["step"], "batch": place["images"] // 50 if batch is None else batch}
    rest = {name: extra[name] for name in ("best", "metrics", "epoch_loss", "epoch_count")}
    second = own | {"rng": None, "loss_sum": torch.zeros(()), "loss_count": 0}  # of a second process, without images
    save_state(path, KIND, processes=[own, second], config=options, **kept, **place, **rest)


def stopped(folder, step, *more):
    """A run that a signal stopped after `step` steps."""
    experiment = build(configured(folder, *more))
    experiment.loaders["train"] = StopAfter(experiment.loaders["train"], step)
    with pytest.raises(KeyboardInterrupt):
        experiment.run()


@pytest.mark.filterwarnings("error:.*lr_scheduler:UserWarning")
def test_a_checkpoint_of_an_earlier_version_goes_on_exactly(tmp_path):
    more = ("--log_interval", 4, "--scheduler_name", "Exponential", "--gamma", 0.5)
    inv_flow_mnist.main(arguments(tmp_path / "whole", *more))
    stopped(tmp_path / "parts", 2, *more)
    earlier_layout(tmp_path / "parts/checkpoints/last.pt")
    inv_flow_mnist.main(arguments(tmp_path / "parts", *more, "--resume"))
    assert (tmp_path / "parts/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()
    # those versions could stop between the last step of an epoch and its evaluation
    inv_flow_mnist.main(arguments(tmp_path / "end", *more, "--epochs", 1))
    path = tmp_path / "end/checkpoints/last.pt"
    before = load_state(path, KIND)
    rows_before = rows(tmp_path / "end")
    state = dict(before)
    step = int(before["place"]["step"])
    state["extra"] = before["extra"] | {"best": math.inf, "metrics": {}, "epoch_count": 150,
                                        "epoch_loss": 150 * float(rows_before[-1]["train_nll"])}  # fmt: skip
    state["scheduler"]["last_epoch"], state["scheduler"]["_step_count"] = 0, 1
    for group in state["optimizer"]["param_groups"]:
        group["lr"] = group["initial_lr"]
    save_state(path, KIND, **state)
    earlier_layout(path, batch=3)
    (tmp_path / "end/metrics.csv").write_text(
        "".join((tmp_path / "end/metrics.csv").read_text().splitlines(keepends=True)[:-1])
    )
    inv_flow_mnist.main(arguments(tmp_path / "end", *more, "--resume"))
    assert step == 3
    for name in ("train_nll", "val_nll", "test_nll", "lr"):
        assert column(tmp_path / "end", name) == column(tmp_path / "whole", name), name


def test_a_damaged_checkpoint_of_an_earlier_version_is_one_line(tmp_path):
    stopped(tmp_path, 2)
    path = tmp_path / "checkpoints/last.pt"
    earlier_layout(path)
    state = load_state(path, KIND)
    for name in ("processes", "epoch", "best"):
        save_state(path, KIND, **{key: value for key, value in state.items() if key != name})
        with pytest.raises(UserError, match=r"last\.pt is damaged"):
            inv_flow_mnist.main(arguments(tmp_path, "--resume"))
    save_state(path, KIND, **state | {"processes": []})
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        inv_flow_mnist.main(arguments(tmp_path, "--resume"))


def test_resume_auto_starts_or_goes_on(tmp_path, capsys):
    inv_flow_mnist.main(arguments(tmp_path, "--epochs", 1, "--resume", "auto"))
    inv_flow_mnist.main(arguments(tmp_path, "--resume", "auto"))
    assert column(tmp_path, "step")[-1] == 6
    before = (tmp_path / "metrics.csv").read_bytes()
    inv_flow_mnist.main(arguments(tmp_path, "--resume=auto"))  # finished: nothing is left to do
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_changed_learning_rate_takes_effect_and_keeps_its_schedule(tmp_path, capfd):
    more = ("--scheduler_name", "Exponential", "--gamma", 0.5, "--lr", 0.002, "--lr_inv_conv", 0.1)
    inv_flow_mnist.main(arguments(tmp_path, *more))
    capfd.readouterr()
    more = (*more[:4], "--lr", 0.004, "--lr_inv_conv", 0.2)
    inv_flow_mnist.main(arguments(tmp_path, *more, "--epochs", 3, "--resume"))
    said = capfd.readouterr().err
    assert "changed lr: 0.002 -> 0.004" in said and "changed epochs: 2 -> 3" in said
    assert column(tmp_path, "lr")[-1] == pytest.approx(0.004 * 0.5**2)
    groups = load_state(tmp_path / "checkpoints/last.pt", KIND)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.004 * 0.5**3, 0.0008 * 0.5**3])


def test_a_refused_call_writes_nothing(tmp_path):
    inv_flow_mnist.main(arguments(tmp_path, "--epochs", 1))
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for more in (
        ("--resume", "--batch_size", 25),
        ("--resume", "--layer", "finc"),
        ("--resume", "auto", "--seed", 7),
        (),
    ):
        with pytest.raises(UserError):
            inv_flow_mnist.main(arguments(tmp_path, *more))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


# ------------------------------------------------------------------------------------------------------- the step


def test_warm_up_and_schedule_in_closed_form(tmp_path):
    schedule = ("--scheduler_name", "Step", "--step_epochs", 3, "--gamma", 0.1, "--warmup_epochs", 2, "--epochs", 4)
    inv_flow_mnist.main(arguments(tmp_path, *schedule, "--lr", 0.002, "--eval_epochs", 9, "--plot_recon", "false"))
    expected = [0.002 * min(1, (step + 1) / (2 * 3)) * (0.1 if step // 3 >= 3 else 1) for step in range(12)]
    assert column(tmp_path, "lr") == pytest.approx(expected, rel=1e-12)


def test_gradients_are_clipped_not_weights(tmp_path):
    more = ("--optimizer_name", "SGD", "--lr", 1.0, "--warmup_epochs", 0, "--epochs", 1, "--n_train", 50)
    experiment = build(configured(tmp_path, *more, "--grad_clip_norm", 0.001))
    initialise(experiment)
    before = [p.detach().clone() for p in experiment.model.parameters()]
    experiment.run()
    moves = torch.cat([(p.detach() - q).flatten() for p, q in zip(experiment.model.parameters(), before, strict=True)])
    assert column(tmp_path, "grad_norm")[0] > 1  # logged as it was before clipping
    assert moves.norm() == pytest.approx(0.001, rel=1e-3)
    # by value: no entry of the gradient moves a weight by more than that, large weights stay
    experiment = build(configured(tmp_path / "value", *more, "--grad_clip", 1e-4, "--grad_clip_norm", "none"))
    initialise(experiment)
    before = [p.detach().clone() for p in experiment.model.parameters()]
    experiment.run()
    moves = torch.cat([(p.detach() - q).flatten() for p, q in zip(experiment.model.parameters(), before, strict=True)])
    assert moves.abs().max() == pytest.approx(1e-4, rel=1e-2)
    assert max(float(p.detach().abs().max()) for p in experiment.model.parameters()) > 0.1


def test_non_finite_loss_names_the_layer_and_keeps_a_state(tmp_path, capsys):
    experiment = build(configured(tmp_path))
    index = next(i for i, layer in enumerate(experiment.model.layers) if type(layer).__name__ == "Coupling")
    with torch.no_grad():
        experiment.model.layers[index].net[4].bias.fill_(math.nan)
    assert run_command(experiment.run) == EXIT_NON_FINITE
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"layers.{index} (Coupling)" in line and "crash.pt" in line
    assert load_state(tmp_path / "checkpoints/crash.pt", KIND)["place"]["step"] == 0


def test_a_diverging_run_ends_with_exit_code_three(tmp_path):
    argv = arguments(tmp_path, "--lr", 1e6, "--warmup_epochs", 0, "--grad_clip_norm", "none", "--epochs", 20)
    assert run_command(lambda: inv_flow_mnist.main(argv)) == EXIT_NON_FINITE
    state = load_state(tmp_path / "checkpoints/crash.pt", KIND)
    assert all(torch.isfinite(value).all() for value in state["model"].values())  # the weights before the bad step


def test_reconstruction_loss_and_geco_in_closed_form():
    torch.manual_seed(0)
    layers = [SelfNormConv(2, 3), SelfNormConv(2, 1)]
    config = configure(recon_loss_weight=5.0, recon_loss_lr=0.1, recon_alpha=0.8, device="cpu")
    experiment_like = Experiment.__init__.__globals__["Distributed"].start("cpu")
    loss = ReconstructionLoss(layers, config, experiment_like)
    x = torch.randn(4, 2, 5, 5)
    plain = []
    for layer in layers:
        with torch.no_grad():
            layer.inverse.mul_(0.9)
        back = torch.nn.functional.conv2d(
            torch.nn.functional.conv2d(x, layer.weight, padding=layer.padding), layer.inverse, padding=layer.padding
        )
        plain.append(float((x - back).square().sum().detach() / 4))
    weights, averages = [5.0, 5.0], [0.0, 0.0]
    for _ in range(3):
        for layer in layers:
            layer(x)
        total = float(loss().detach())
        assert total == pytest.approx(sum(w * p for w, p in zip(weights, plain, strict=True)), rel=1e-5)
        averages = [0.8 * a + 0.2 * p for a, p in zip(averages, plain, strict=True)]
        weights = [w * math.exp(0.1 * a) for w, a in zip(weights, averages, strict=True)]


def test_pictures_of_samples_are_made_by_the_learned_and_the_exact_inverse(tmp_path, monkeypatch):
    experiment, seen = build(configured(tmp_path, "--layer", "snf")), []
    initialise(experiment)
    monkeypatch.setattr(experiment.model, "set_exact", seen.append)
    made = evaluation.sample_pictures(experiment.model, experiment.config, tmp_path, "x")[1]
    assert list(made) == ["", "_trueinv"]
    assert seen == [False, True, not experiment.config.modified_grad], "then as the training wants it"


def test_pictures_are_drawn_often_at_first_and_then_at_the_interval(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Experiment, "_pictures", lambda self, training, epoch: drawn.append(epoch))
    monkeypatch.setattr(Experiment, "evaluate", lambda self, split, *rest, **more: {f"{split}_nll": 0.0})
    more = ("--n_train", 50, "--n_test", 8, "--epochs", 16, "--sample_epochs", 7)
    inv_flow_mnist.main(arguments(tmp_path, *more))
    assert drawn == [1, 2, 3, 4, 7, 10, 14, 16]


@pytest.mark.parametrize("modified", [True, False])
def test_self_normalising_flow_learns_its_inverse(modified, tmp_path):
    more = ("--layer", "snf", "--modified_grad", modified, "--recon_loss_weight", 10, "--epochs", 3, "--lr", 0.003)
    inv_flow_mnist.main(arguments(tmp_path, *more))
    bits = column(tmp_path, "test_bpd")
    assert bits[-1] < bits[0]
    assert (tmp_path / "samples/3_trueinv.png").is_file()
    model = load_state(tmp_path / "checkpoints/last.pt", KIND)["model"]
    for name in (key for key in model if key.endswith(".inverse")):
        weight = model[name.replace("inverse", "weight")][:, :, 0, 0]
        assert (model[name][:, :, 0, 0] @ weight - torch.eye(len(weight))).abs().max() < 0.1


def test_experiment_takes_ordinary_loaders(tmp_path):
    torch.manual_seed(0)
    sets = TensorDataset(torch.randint(0, 256, (40, 1, 8, 8)).float(), torch.zeros(40))
    loaders = [DataLoader(sets, batch_size=20) for _ in range(3)]
    keys = {"block_size": 1, "coupling_width": 8, "split_width": 8, "epochs": 2, "log_interval": 1, "device": "cpu"}
    config = configure(image_size=(1, 8, 8), out=str(tmp_path), n_samples=4, **keys)
    model = create_model(config)
    metrics = Experiment(model, *loaders, make_optimizer(model, config), None, **config.as_dict()).run()
    assert set(metrics) == {"test_nll", "test_bpd"}
    assert len(column(tmp_path, "batch_nll")) == 4


# ------------------------------------------------------------------------------------------------------- evaluation


def test_the_weights_that_ship_are_evaluated_where_mnist_is(tmp_path, monkeypatch, capsys):
    write_mnist(tmp_path, 12)
    monkeypatch.chdir(tmp_path)
    argv = ["--evaluate", "--device", "cpu", "--data_root", str(tmp_path), "--batch_size", "4", "--n_samples", "4"]
    inv_flow_mnist.main([*argv, "--n_test", "10"])
    folder = tmp_path / "runs/inv_flow/mnist_released"
    stored, out = json.loads((folder / "evaluation.json").read_text()), capsys.readouterr().out
    assert stored["recon_images"] == 10  # all of them, not the first batch
    assert stored["recon_max_grey"] < 0.1 and stored["sample_ms"] > 0 and "sample_std_ms" in stored
    assert all(f"{name} " in out for name in ("val_nll", "test_bpd", "recon_max_grey", "float64_relative_error"))
    assert (folder / "samples/evaluation.png").is_file() and (folder / "recon/evaluation.png").is_file()
    for name in ("--num_blocks", "--coupling_width"):
        with pytest.raises(UserError, match="contradicts"):
            inv_flow_mnist.main([*argv, name, "3"])


def test_evaluation_refuses_another_model_than_the_run_has(tmp_path):
    inv_flow_mnist.main(arguments(tmp_path, "--epochs", 1))
    argv = ["--evaluate", "--device", "cpu", "--out", str(tmp_path)]
    for more in (["--num_blocks", "3"], ["--layer", "finc"], ["--dataset", "mnist"], ["--seed", "5"]):
        with pytest.raises(UserError, match=r"was trained with .*leave --"):
            inv_flow_mnist.main([*argv, *more])
    inv_flow_mnist.main([*argv, "--layer", "inverse", "--n_test", "20"])  # what it has is no contradiction


def test_what_was_measured_is_kept_when_a_later_part_fails(tmp_path, monkeypatch, capsys):
    inv_flow_mnist.main(arguments(tmp_path, "--epochs", 1))
    monkeypatch.setattr(launch, "reconstruction_errors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inv_flow_mnist.main(["--evaluate", "--device", "cpu", "--out", str(tmp_path)])
    assert set(json.loads((tmp_path / "evaluation.json").read_text())) == {"val_nll", "val_bpd", "test_nll", "test_bpd"}


def test_timing_table_names_the_epoch_and_the_spread(tmp_path):
    inv_flow_mnist.main(arguments(tmp_path))
    with open(tmp_path / "timing.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["epoch"] for row in table if row["what"] == "train_step_ms"] == ["1", "2"]
    values = {row["what"]: float(row["value"]) for row in table}
    assert values["train_step_ms"] > values["train_step_std_ms"] > 0
    assert values["sample_ms"] > 0 and values["sample_std_ms"] > 0


def test_verbose_logs_every_layer(tmp_path):
    more = ("--epochs", 1, "--layer", "snf", "--verbose")
    inv_flow_mnist.main(arguments(tmp_path / "said", *more))
    model = build(configured(tmp_path / "x", *more)).model
    with open(tmp_path / "said/metrics.csv", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    shares = [float(value) for name, value in row.items() if name.startswith("log_det/")]
    assert len(shares) == len(model.layers) and sum(share != 0 for share in shares) > 4
    recon = [float(value) for name, value in row.items() if name.startswith("recon/")]
    assert len(recon) == len(model.self_norm_layers()) > 0 and all(value >= 0 for value in recon)
    inv_flow_mnist.main(arguments(tmp_path / "silent", *more[:-1]))  # and it changes nothing
    for name in ("batch_nll", "val_nll"):
        assert column(tmp_path / "said", name) == column(tmp_path / "silent", name)


def test_log_determinants_of_the_layers_add_up_to_log_p():
    torch.manual_seed(0)
    model = create_model(configure(image_size=(1, 8, 8), block_size=2, coupling_width=8, split_width=8))
    x = torch.randint(0, 256, (6, 1, 8, 8)).float()
    model.encode(x)
    values = layer_values(model.eval(), x, seed=3)
    with own_rng(x.device, 3):
        log_det = float(model.encode(x)[1].mean().detach())
    assert sum(values.values()) == pytest.approx(log_det, rel=1e-5)


def test_pictures_do_not_move_the_training(tmp_path):
    for name, more in (("with", ()), ("without", ("--plot_recon", "false", "--n_samples", 1))):
        inv_flow_mnist.main(arguments(tmp_path / name, *more))
    assert column(tmp_path / "with", "batch_nll") == column(tmp_path / "without", "batch_nll")


@pytest.fixture
def rounded_convolutions(monkeypatch):
    """Convolutions that round as a GPU does with TF32, wherever the flag allows it; what the flags were comes back."""
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    plain = torch.nn.functional.conv2d

    def round_mantissa(x):
        return ((x.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def conv2d(x, weight, *args, **options):
        if torch.backends.cudnn.allow_tf32 and x.dtype == torch.float32 and not torch.is_grad_enabled():
            x, weight = round_mantissa(x), round_mantissa(weight)
        return plain(x, weight, *args, **options)

    torch.backends.cudnn.allow_tf32 = True  # what PyTorch starts with
    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


def test_likelihoods_and_inverses_are_full_float32_unless_tf32_is_asked_for(tmp_path, rounded_convolutions):
    inv_flow_mnist.main(arguments(tmp_path, "--conv1x1", "--lr", 0.003))
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    errors = {}
    for more in ((), ("--tf32",)):
        torch.backends.cudnn.allow_tf32 = True
        inv_flow_mnist.main(["--evaluate", "--device", "cpu", "--out", str(tmp_path), *more])
        errors[more] = json.loads((tmp_path / "evaluation.json").read_text())["recon_max_grey"]
    assert errors[()] < 1e-3 and errors[("--tf32",)] > 100 * errors[()]


# ------------------------------------------------------------------------------------------------------- other devices


@pytest.mark.parametrize("layer", ["inverse", "unit", "finc", "emerging", "convexp", "snf", "glow"])
def test_a_step_and_samples_stay_on_the_device_and_read_nothing(layer, monkeypatch):
    """The device `meta` refuses both: numbers read by the host, and operands that lie elsewhere."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no meta
    config = configure(**layer_choice(layer), image_size=(1, 8, 8), block_size=1, coupling_width=8, split_width=8)
    model = create_model(config)
    model.encode(torch.zeros(2, 1, 8, 8))  # sets the flag that ActNorm keeps on the host
    model, dist = model.to("meta"), Distributed(torch.device("meta"))
    reconstruction, optimizer = (
        ReconstructionLoss(model.self_norm_layers(), config, dist),
        make_optimizer(model, config),
    )
    x = integer_images(torch.zeros(4, 1, 8, 8, dtype=torch.uint8, device="meta"), model, dist.device)
    loss = -model(x, dist.rand_like)[1].mean() + reconstruction()
    loss.backward()
    norm = clip_gradients(model, config)
    with scaled_rates(optimizer, 0.5):
        optimizer.step()
    assert {loss.device.type, norm.device.type} == {"meta"}
    assert all(p.grad is None or p.grad.device.type == "meta" for p in model.parameters())
    for module in model.modules():  # the inverse of a 1x1 is checked once, and kept
        if isinstance(module, Conv1x1):
            weight = module.weight
            key = (weight._version, weight.device, weight.dtype, weight.data_ptr())
            module._inverse = key, torch.empty_like(weight, requires_grad=False)
    with torch.no_grad():
        assert model.eval().sample_images(3).shape == (3, 1, 8, 8)
        assert model.reconstruct(x).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_goes_on_on_another_device(first, second, tmp_path):
    stopped(tmp_path, 2, "--device", first)
    inv_flow_mnist.main(arguments(tmp_path, "--device", second, "--resume"))
    assert column(tmp_path, "step")[-1] == 6


# ------------------------------------------------------------------------------------------------------- data


def test_splits_and_augmentations(tmp_path):
    config = configure(dataset="digits", seed=3)
    train, val, test = data.datasets(config)
    assert len(train) + len(val) == 1797 * 4 // 5 and len(test) == 360
    assert not set(train.indices) & set(val.indices)
    again = data.datasets(config)
    assert (again[0].indices == train.indices).all()
    image = torch.arange(3 * 32 * 32).remainder(256).to(torch.uint8).view(3, 32, 32)
    torch.manual_seed(0)
    shifted = [data.ShiftAndFlip()(image) for _ in range(20)]
    assert all(x.shape == image.shape and x.dtype == torch.uint8 for x in shifted)
    inner = slice(2, -2)  # a shift of up to two pixels: the centre is found again at one of 25 places, flipped or not
    for x in shifted:
        places = [
            torch.equal(x[:, inner, inner], y[:, 2 + dy : 30 + dy, 2 + dx : 30 + dx])
            for y in (image, image.flip(2)) for dy in range(-2, 3) for dx in range(-2, 3)
        ]  # fmt: skip
        assert any(places)
    assert len({x.numpy().tobytes() for x in shifted}) > 10
    assert data.RandomCrop()(image[:1]).shape == (1, 32, 32)


def test_celeba_and_imagenet_are_read_at_the_asked_resolution(tmp_path):
    from common.images import save_image

    folder, rng = tmp_path / "celeba", np.random.default_rng(0)
    names = [f"{i:06d}.png" for i in range(6)]
    for name in names:
        save_image(folder / "img_align_celeba" / name, rng.integers(0, 256, (40, 36, 3), dtype=np.uint8))
    (folder / "list_attr_celeba.txt").write_text("6\nSmiling Young\n" + "".join(f"{n} 1 -1\n" for n in names))
    (folder / "list_eval_partition.txt").write_text("".join(f"{n} {i // 2}\n" for i, n in enumerate(names)))
    parts = data.datasets(configure(dataset="celeba", data_root=str(tmp_path), resolution=32))
    assert [len(part) for part in parts] == [2, 2, 2]
    assert parts[0][0][0].shape == (3, 32, 32)
    for stem, n in (("train_data_batch_1", 10), ("val_data", 4)):
        (tmp_path / "imagenet64").mkdir(exist_ok=True)
        flat = rng.integers(0, 256, (n, 3 * 64 * 64), dtype=np.uint8)
        np.savez(tmp_path / "imagenet64" / f"{stem}.npz", data=flat, labels=np.arange(1, n + 1))
    parts = data.datasets(configure(dataset="imagenet", data_root=str(tmp_path), resolution=64))
    assert [len(part) for part in parts] == [8, 2, 4]
    assert parts[1][0][0].shape == (3, 64, 64)
    with pytest.raises(UserError, match="resolution=48"):
        data.datasets(configure(dataset="imagenet", data_root=str(tmp_path), resolution=48))
    with pytest.raises(UserError, match="prepare"):
        data.datasets(configure(dataset="mnist", data_root=str(tmp_path)))


def test_random_images_for_timing(tmp_path):
    inv_flow_mnist.main(
        ["--test", "--device", "cpu", "--out", str(tmp_path), "--resolution", "8", "--n_train", "60", "--n_test", "20",
         "--batch_size", "30", "--block_size", "1", "--coupling_width", "8", "--split_width", "8", "--epochs", "1",
         "--n_samples", "4"]
    )  # fmt: skip
    assert math.isfinite(column(tmp_path, "test_bpd")[0])


# ------------------------------------------------------------------------------------------------------- processes


def two_processes(folder, *argv):
    return children.train_together("inv_flow", argv, folder)


def test_two_processes_equal_one(tmp_path):
    """The same run: each draws the noise that one process would give its rows. One goes on where two stopped."""
    # plain gradient descent: Adam would turn the rounding of a gradient near 0 into a whole step
    more = ("--optimizer_name", "SGD", "--lr", 1e-4, "--log_interval", 2, "--layer", "snf", "--inv_conv", "true")
    more += ("--n_test", 45)  # the last batch of an evaluation is not shared evenly
    two, one = tmp_path / "two", tmp_path / "one"
    two_processes(tmp_path, *arguments(two, *more))
    inv_flow_mnist.main(arguments(one, *more))
    for name in ("batch_nll", "grad_norm", "train_nll", "val_nll", "test_nll"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-6), name
    a, b = (load_state(folder / "checkpoints/last.pt", KIND) for folder in (one, two))
    for name, value in a["model"].items():
        assert torch.allclose(b["model"][name], value, rtol=1e-5, atol=1e-6), name
    same(a["rng"]["torch"], b["rng"]["torch"])  # drawing pictures, on one process, moved no stream
    argv = ["--smoke", "--evaluate", "--device", "cpu", "--out", str(two), "--n_test", "45"]
    printed = dict(
        line.split() for line in two_processes(tmp_path, *argv).splitlines() if line.startswith(("val", "recon"))
    )
    inv_flow_mnist.main(argv)
    stored = json.loads((two / "evaluation.json").read_text())
    assert float(printed["val_nll"]) == pytest.approx(stored["val_nll"], rel=1e-5)
    assert stored["recon_images"] == int(printed["recon_images"]) == 45
    for folder in (one, two):
        inv_flow_mnist.main(arguments(folder, *more, "--epochs", 3, "--resume"))
    assert column(two, "batch_nll") == pytest.approx(column(one, "batch_nll"), rel=1e-6)


# ------------------------------------------------------------------------------------------------------- other scripts


def test_timing_writes_rows_once_and_a_plot(tmp_path, capsys):
    size = ["--num_blocks", "2", "--block_size", "1", "--coupling_width", "8", "--batch", "4", "--repeats", "2"]
    argv = [*size, "--device", "cpu", "--out", str(tmp_path)]
    timing.main([*argv, "--table", "7", "--layers", "inverse", "finc", "--sizes", "8", "16"])
    timing.main([*argv, "--table", "10", "--layers", "inverse", "--sizes", "8", "--kernels", "2", "5"])
    with open(tmp_path / "timing_table7.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(row["layer"], row["size"]) for row in table] == [
        ("inverse", "8"), ("inverse", "16"), ("finc", "8"), ("finc", "16")
    ]  # fmt: skip
    assert all(float(row[f"{name}_ms"]) > 0 for row in table for name in timing.TIMES)
    assert (tmp_path / "timing_table7.png").is_file() and (tmp_path / "timing_table10.png").is_file()
    before = (tmp_path / "timing_table7.csv").read_bytes()
    capsys.readouterr()
    timing.main([*argv, "--table", "7", "--layers", "inverse", "--sizes", "8"])  # measured already
    assert (tmp_path / "timing_table7.csv").read_bytes() == before
    timing.main([*argv, "--table", "7", "--layers", "inverse", "--sizes", "8", "--conv1x1"])  # another flow: measured
    with open(tmp_path / "timing_table7.csv", encoding="utf-8") as file:
        again = list(csv.DictReader(file))
    assert again[:-1] == table and (again[-1]["conv1x1"], again[0]["conv1x1"]) == ("1", "0")
    assert int(again[-1]["parameters"]) > int(again[0]["parameters"])
    with pytest.raises(UserError, match="sizes=0: expected"):
        timing.main([*argv, "--sizes", "0"])
    with pytest.raises(UserError, match="nope"):  # before it measures anything
        timing.main([*argv, "--table", "10", "--layers", "none", "nope"])
    assert (tmp_path / "timing_table10.csv").read_text().count("none") == 0


def test_the_published_form_and_ours_have_equal_losses(tmp_path, capsys):
    argv = ["--block_size", "1", "--coupling_width", "8", "--batch_size", "4", "--threads", "1", "--repeat", "1"]
    benchmark.main([*argv, "--json", str(tmp_path / "figures.json")])  # it compares them before it times them
    cases = json.loads((tmp_path / "figures.json").read_text())["cases"]
    assert [case["ratio"] is None for case in cases] == [False, False, True, True]
    assert all(case["seconds"] > 0 for case in cases) and "step, batch 4" in capsys.readouterr().out


def test_share_of_the_inverse_layers_in_a_step(tmp_path):
    argv = [
        "--share",
        "--coupling_width",
        "8",
        "--batch",
        "2",
        "--repeats",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    timing.main(argv)
    with open(tmp_path / "timing_share.csv", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert int(row["count"]) == 32  # L = 2 levels of K = 16 steps
    assert float(row["share"]) == pytest.approx(float(row["layers_ms"]) / float(row["step_ms"]), abs=1e-4)
    assert 0 < float(row["share"]) < 1
    with pytest.raises(UserError, match="no inverse convolution"):
        timing.main([*argv, "--layers", "none"])


@pytest.mark.parametrize("name", toy_2d.DENSITIES)
def test_toy_densities_lie_in_the_picture(name):
    points = toy_2d.sample_density(name, 2000, np.random.default_rng(0))
    assert points.shape == (2000, 2) and points.dtype == np.float32
    assert np.mean(np.abs(points).max(1) < toy_2d.LIMIT) > 0.98
    assert 0.5 < points.std() < 2.6


def test_toy_flow_learns_and_draws(tmp_path, capsys):
    argv = ["--steps", "60", "--batch", "200", "--depth", "3", "--width", "16", "--lr", "0.01", "--device", "cpu"]
    toy_2d.main([*argv, "--density", "8gaussians", "--out", str(tmp_path)])
    held_out = float(capsys.readouterr().out.split("NLL")[1].split()[0])
    assert held_out < 2 * math.log(2 * toy_2d.LIMIT) - 0.2  # better than the uniform density on the picture
    assert (tmp_path / "8gaussians.png").is_file() and (tmp_path / "8gaussians.csv").is_file()
    with pytest.raises(UserError, match="did you mean 'rings'"):
        toy_2d.main(["--density", "ring", "--out", str(tmp_path)])


def test_classifier_beats_chance_and_counts_sixteen_parameters(tmp_path, capsys):
    argv = ["--dataset", "digits", "--epochs", "4", "--lr", "0.01", "--device", "cpu", "--out", str(tmp_path)]
    classify_mnist.main(argv)
    assert capsys.readouterr().out.startswith("16 free kernel entries")
    with open(tmp_path / "digits.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 and float(table[-1]["test_accuracy"]) > 0.8
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])


def test_classifier_takes_its_options():
    model = classify_mnist.Classifier(8, 10, ("TL", "TR"), None, "abs", padding=3, random_taps=0.1)
    first, second = model.convs
    assert (first.order, second.order, model.linear.in_features) == ("TL", "TR", 14 * 14)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["linear.weight", "linear.bias"]
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.nn.functional.pad(x, (3, 3, 3, 3))
    once = first.solve(y).abs()
    torch.testing.assert_close(model(x), model.linear(second.solve(once).abs().flatten(1)))
    assert float(first.free().abs().sum()) > 0.1  # a control with taps, not the identity


def test_classifier_validates_on_training_images_that_it_did_not_see(tmp_path, monkeypatch):
    used = []
    real = classify_mnist.Batches
    monkeypatch.setattr(classify_mnist, "Batches", lambda part, *a, **kw: used.append(part) or real(part, *a, **kw))
    argv = ["--dataset", "digits", "--epochs", "1", "--device", "cpu", "--no_inverse", "--out", str(tmp_path)]
    classify_mnist.main([*argv, "--validation", "300"])
    train, held = used
    assert (len(train), len(held), train.parent.split, held.parent.split) == (1137, 300, "train", "train")
    assert not set(train.indices) & set(held.indices)
    with pytest.raises(UserError, match="1437 training images; hold out fewer"):
        classify_mnist.main([*argv, "--validation", "1437"])


def test_nonfinite_evaluation_is_refused(tmp_path):
    experiment = build(configured(tmp_path))
    initialise(experiment)
    with torch.no_grad():
        experiment.model.layers[-1].net[4].bias.fill_(math.inf)
    with pytest.raises(NonFiniteError, match="val NLL"):
        experiment.evaluate("val")


def test_reconstruction_errors_weigh_every_image_alike(monkeypatch):
    errors = iter([(4.0, 1.0), (2.0, 5.0)])
    monkeypatch.setattr(evaluation, "reconstruction_error", lambda *_: next(errors))
    config = configure(image_size=(1, 8, 8), block_size=2, coupling_width=8, split_width=8)
    batches = [torch.zeros(3, 1, 8, 8), torch.zeros(1, 1, 8, 8)]
    found = evaluation.reconstruction_errors(create_model(config), batches, config, Distributed(torch.device("cpu")))
    assert found == {"recon_max_grey": 4.0, "recon_mean_grey": 2.0, "recon_images": 4}
