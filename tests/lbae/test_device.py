"""One step of training, evaluation and generation on a device other than the CPU, PyTorch's "meta": tensors without
content, which refuse to be read (`.item()`, `.cpu()`) and to be mixed with those of the CPU.

What it cannot show: kernels, and the copies that a real device waits for.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.checkpoint import load_optimizer
from common.launch import Distributed, autocast
from lbae import mnist, sampler
from lbae.data import as_input, attributes
from lbae.model import LBAE, losses
from lbae.train import LbaeTraining

ROOT = Path(mnist.__file__).resolve().parents[1]
DEVICE = torch.device("meta")


def pretended(vae: bool = False) -> LBAE:
    with DEVICE:
        return LBAE(32, 1, 12, width=2, vae=vae)


@pytest.mark.parametrize("vae", [False, True])
def test_a_training_step_reads_nothing_and_stays_on_its_device(vae):
    dist = Distributed(DEVICE)
    training = object.__new__(LbaeTraining)
    training.params = SimpleNamespace(batch_size=4, has_bits=not vae, print_every_batch=100)
    training.dist, training.step, training.epoch_ends, training.iter = dist, 1, False, 0
    training.codes, training.labels, training._unread = [], [], []
    model = pretended(vae)
    model.randn_like = dist.randn_like
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    for _ in range(2):
        training.step += 1
        images = torch.zeros(4, 1, 32, 32, dtype=torch.uint8, device=DEVICE)
        x = as_input(images)
        with autocast(DEVICE, False):
            xr, encoded = model(x)
        terms = losses(xr, x, encoded, binary=True, kl_weight=1.0)
        loss = terms["loss"].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        training.check(loss, model)
        optimizer.step()
        data = SimpleNamespace(factor_sizes=(3, 2)) if vae else SimpleNamespace()
        targets = torch.zeros((4, 2) if vae else (4,), dtype=torch.int64, device=DEVICE)
        training.remember(terms, encoded, attributes(data, targets))
    assert {part.device.type for part in (*training.codes, *training.labels, loss)} == {"meta"}
    assert len(training._unread) == 2
    training.step = 100  # only now are the losses read
    with pytest.raises(RuntimeError, match="meta tensor"):
        training.remember(terms, encoded, attributes(data, targets))


def test_codes_are_drawn_and_decoded_on_the_device():
    planes = sampler.Hyperplanes(torch.zeros(13, 13, dtype=torch.float64, device=DEVICE))
    codes = sampler.sample_cov(planes, torch.randn(5, 13, dtype=torch.float64))  # a generator of the CPU
    assert (codes.device.type, codes.shape) == ("meta", (5, 12))
    images = pretended().eval().gen(codes.to(DEVICE, torch.float32))
    assert (images.device.type, images.shape) == ("meta", (5, 1, 32, 32))


def test_adam_of_a_cpu_checkpoint_goes_on_in_a_fused_kernel():
    """A GPU's fused kernel reads the step counter on its own device, the CPU's checkpoint has it on the CPU."""
    model = torch.nn.Linear(2, 2)
    plain = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    plain.step()
    fused = torch.optim.Adam(model.parameters(), fused=True)
    load_optimizer(fused, plain.state_dict(), "last.cp")
    fused.step()
    assert fused.param_groups[0]["fused"]
    assert {float(state["step"]) for state in fused.state.values()} == {2.0}


SCRIPTS = ["mnist.py", "cifar10.py", "celeba.py", "eval.py", "fid.py", "protocol.py", "release.py", "download.py",
           "benchmark.py"]  # fmt: skip
START = f"""
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
outside = [place for place in sys.path if place not in ("", {str(ROOT)!r})]
for name in {SCRIPTS!r}:
    for module in [one for one in sys.modules if one.split(".")[0] in ("common", "lbae")]:
        del sys.modules[module]
    sys.path[:], sys.argv = [{str(ROOT / "lbae")!r}, *outside], [name, "--help"]
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as leave:
        print("exit", name, leave.code)
"""


def test_every_script_starts_in_its_own_folder_without_an_installation():
    """Nothing but the script itself says where the repository lies."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", START], cwd=ROOT / "lbae", env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("exit")] == [
        f"exit {name} 0" for name in SCRIPTS
    ]
