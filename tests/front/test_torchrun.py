"""Every trainer in two gloo processes reproduces the losses of one; the batch size is the total.

The processes get what torchrun gives them; torchrun itself starts those of tests/common/test_launch.py.
Here are GlanceNet and latent-flow. The others are with their papers:
tests/lbae/test_distributed.py, tests/inv_flow/test_experiment.py::test_two_processes_equal_one and
tests/nfpi/test_main.py::test_two_processes_equal_one. GlanceNet, latent-flow and NFPI draw the noise of the whole batch
on every process; Inverse-Flow's processes dequantise each with its own (switched off there); LBAE's bits need none.
"""

import csv
import multiprocessing
from pathlib import Path

import pytest
import torch
from front import children
from torch import nn

from common.checkpoint import load_state
from common.errors import UserError
from common.launch import Distributed, normalise_over_processes
from glancenet import main as glancenet
from latent_flow import train, train_vae_scratch_weakly
from latent_flow.options import WeakOptions, parse


def columns(path: Path) -> dict[str, list[float]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def close(one: dict[str, list[float]], two: dict[str, list[float]], rel: float) -> None:
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=rel, abs=1e-6), name


def test_glancenet(tmp_path):
    """Every loss of every step, and the validation, within 1e-4; one process writes, the other leaves nothing.

    The terms that compare the rows of a batch (FactorVAE's critic, DIP-VAE's covariance) and the concepts of a few
    supervised rows would differ at once if each process judged its own half.
    """
    small = ["--dset_name", "sprites", "--sprites_sizes", "3", "2", "2", "4", "4", "--z_dim", "7", "--batch_size", "8"]
    small += ["--encoder", "PadlessGaussianConv64", "--decoder", "ShallowLinear", "--alg", "GlanceNet"]
    small += ["--conditional_prior", "true", "--masking_fact", "50", "--loss_terms", "FACTORVAE", "DIPVAEI"]
    small += ["--size_layer_disc", "8", "--max_iter", "4", "--warmup_epochs", "0", "--lr_G", "0.001"]
    small += ["--float_iter", "1", "--test_iter", "3", "--file_save", "false", "--device", "cpu", "--name", "x"]

    def words(name: str) -> list[str]:
        folder = tmp_path / name
        places = ["--log_dir", folder / "logs", "--ckpt_dir", folder / "ckpt", "--train_output_dir", folder / "out"]
        return [*small, "--dset_dir", str(tmp_path), "--out_path", "x", *map(str, places)]

    log = glancenet.main(words("one"))
    children.train_together("glancenet", words("two"), tmp_path)
    other = tmp_path / "two" / log.relative_to(tmp_path / "one")
    close(columns(log / "run/metrics.csv"), columns(other / "run/metrics.csv"), 1e-4)
    for name in ("train_runs/metrics.csv", "train_runs/val_metrics.csv", "eval_results/test_metrics.csv"):
        close(columns(log / name), columns(other / name), 1e-4)
    states = [load_state(tmp_path / name / "ckpt/x/final", "glancenet") for name in ("one", "two")]
    assert states[0]["iter"] == states[1]["iter"] == 4
    for name, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], value, rtol=1e-3, atol=2e-4, msg=name)
    # a batch that cannot be shared is refused before anything is made
    words_odd = words("odd")
    words_odd[words_odd.index("--batch_size") + 1] = "7"
    with pytest.raises(UserError, match="multiple of the 2 processes"):
        glancenet.set_up(glancenet.parse(words_odd), Distributed(torch.device("cpu"), 0, 2))


def test_latent_flow(tmp_path):
    """The weakly supervised loop: encoder, decoder, index encoder and flows; the index loss compares all sequences."""
    argv = ["--smoke", "--max-iter", "4", "--device", "cpu", "--eval-images", "4"]
    train_vae_scratch_weakly.main([*argv, "--out", str(tmp_path / "one")])
    children.train_together("latent_flow.train_vae_scratch_weakly", [*argv, "--out", tmp_path / "two"], tmp_path)
    one, two = (columns(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    close(one, two, 1e-4)
    assert len(two["iteration"]) == 4 and (tmp_path / "two/eval.json").is_file()
    options = parse(WeakOptions, [*argv, "--batch-size", "7", "--out", str(tmp_path / "odd")], "")
    with pytest.raises(UserError, match="multiple of the 2 processes"):
        train._train(options, Distributed(torch.device("cpu"), 0, 2))


def layers() -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    return net, nn.Linear(2, 2), torch.randn(6, 2, 4, 4, requires_grad=True), torch.randn(6, 2)


def loss_and_gradients(dist: Distributed) -> list[torch.Tensor]:
    net, head, x, y = layers()
    normalise_over_processes(net, dist)
    out = head(dist.over_rows(net, x))
    loss = ((out - out.mean(0)) ** 2 - out * y).sum() + (x**3).sum()  # rows are compared: no sum over shares
    loss.backward()
    dist.sum_gradients(net.parameters())
    return [loss.detach(), *(p.grad for p in [*net.parameters(), *head.parameters(), x]), *net.buffers()]


def one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(loss_and_gradients(Distributed(torch.device("cpu"), rank, 2)), f"{folder}/{rank}.pt")


def test_rows_shared_by_processes_give_the_whole_batch_s_gradients(tmp_path):
    """`over_rows` with batch normalisation: loss, gradients of weights and input, running statistics of one process.

    Fails when a gradient is counted once a process, or the normalisation sees a share of the batch.
    """
    context = multiprocessing.get_context("fork")  # imports nothing anew
    children = [context.Process(target=one_of_two, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    expected = loss_and_gradients(Distributed(torch.device("cpu")))
    for rank in (0, 1):
        for a, b in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
