"""bfloat16 in the nets, float32 in everything else; the benchmark's published form has our losses."""

import json
from pathlib import Path

import pytest
import torch
from option_table import run_inside
from torch.utils._python_dispatch import TorchDispatchMode

from common.checkpoint import load_weights
from nfpi import benchmark, main
from nfpi.conditional import ConditionalFlow
from nfpi.gaussians import ClassGaussians
from nfpi.model import FlowConfig, MultiScaleFlow

DIGITS = [
    "--config-path=___configs/digits", "--config-name=smoke", "device=cpu", "hidden_channels=[8,8]",
    "train.batch_size=100", "train.epochs=2", "save_every_n_epochs=0", "temperature_sampling_for_results=0", "only_T=1",
    "num_imgs_scale=0.05", "classification.stem=imagenet", "classification.digits.epochs=1",
    "classification.digits.batch_size=20",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("undrawn", "narrow_cnn")


class Types(TorchDispatchMode):
    """The types of numbers that each operation saw."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.seen.setdefault(name, set()).update(x.dtype for x in args if isinstance(x, torch.Tensor))
        return function(*args, **(kwargs or {}))


def tiny():
    torch.manual_seed(0)
    config = FlowConfig(channels=1, height=8, width=8, flows=(1, 1), blocks=(1, 1), hidden=(8, 8), attention=True)
    flow = MultiScaleFlow(config)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return ConditionalFlow(flow, ClassGaussians(torch.zeros(3, 64), torch.ones(3, 64)))


def test_the_nets_alone_are_in_bfloat16():
    model, x, y = tiny(), torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    exact = model.nll(x, y, 0.5)[0]
    with Types() as plain:
        model.nll(x, y, 0.5)
    assert torch.bfloat16 not in set().union(*plain.seen.values())  # the default
    model.flow.use_amp(True)
    with Types() as mixed:
        nll, z = model.nll(x, y, 0.5)
    assert torch.bfloat16 in mixed.seen["convolution"] and torch.float32 not in mixed.seen["convolution"]
    for name in ("tanh", "exp", "log", "softplus", "trace", "mm", "abs", "cat"):  # maps, exponentials, likelihood
        assert torch.bfloat16 not in mixed.seen.get(name, ()), name
    assert nll.dtype == z.dtype == torch.float32 and 0 < float(((nll - exact).abs() / exact).detach().max()) < 0.02
    nll.mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.flow.parameters())
    with model.evaluating():
        assert torch.equal(model.nll(x, y, 0.5)[0], exact)  # figures, statistics and pictures


def test_a_run_in_bfloat16_is_near_the_plain_one_and_tested_in_float32(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results, flows, nets = {}, {}, {}
    for amp in (0, 1):
        assert run_inside(main.main, [*DIGITS, f"amp={amp}", f"extra={amp}"]).code == 0
        folder = Path(f"outputs/digits/smoke/1000_1000/{amp}/version_0")
        results[amp] = json.loads((folder / "results.json").read_text())
        flows[amp] = load_weights(folder / "checkpoints/flow.safetensors")[0]
        nets[amp] = load_weights(next(folder.rglob("cnn.safetensors")))[0]
    for made in (flows, nets):
        assert {v.dtype for v in made[1].values() if v.is_floating_point()} == {torch.float32}
        assert any(not torch.equal(made[0][key], made[1][key]) for key in made[0])
    assert results[1]["nf"]["bpd"] == pytest.approx(results[0]["nf"]["bpd"], rel=0.02)
    weights = folder / "checkpoints/flow.safetensors"
    assert run_inside(main.main, [*DIGITS, "train_nf=0", f"nf_load_path={weights}", "train_classifier=0"]).code == 0
    again = json.loads(Path("outputs/digits/smoke/1000_1000/_/version_0/results.json").read_text())
    assert again["nf"] == results[1]["nf"]


def test_the_benchmark_times_both_forms_with_equal_losses(tmp_path):
    small = ["--flows", "1", "--batch-size", "2", "--threads", "1", "--repeat", "1", "--classes", "5", "--dim", "20"]
    found = run_inside(benchmark.main, [*small, "--json", str(tmp_path / "a.json")])
    assert found.code == 0, found.err
    rows = {row["case"]: row for row in json.loads((tmp_path / "a.json").read_text())["cases"]}
    assert {name.split(",")[0].split(":")[0] for name in rows} == {"mnist", "cifar10", "iteration"} and len(rows) == 7
    for name, row in rows.items():
        assert row["seconds"] > 0 and (row["ratio"] is None) == ("transforms" in name)
    assert rows["mnist, training step of 2 images"]["gigaflop"] > 1


def test_the_published_form_is_compared_with_ours(monkeypatch):
    monkeypatch.setattr(benchmark.reference, "dequantisation_log_det", lambda *_: 0.0)
    with pytest.raises(ArithmeticError, match="training step"):
        benchmark.main(["--cases", "mnist", "--flows", "1", "--batch-size", "2", "--threads", "1", "--repeat", "1"])
