import os
import platform
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from common.errors import NonFiniteError, UserError, run_command, suggest
from common.launch import (
    Distributed,
    StopSignal,
    check_finite,
    keep_freed_memory,
    pick_device,
    seed_everything,
)


def test_pick_device():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="expected auto, cpu"):
        pick_device("gpu")
    with pytest.raises(UserError, match="expected auto, cpu"):
        pick_device("cuda:x")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            pick_device("cuda:0")


@pytest.mark.gpu
def test_cuda_index_out_of_range():
    with pytest.raises(UserError, match="counted from 0"):
        pick_device("cuda:99")


def test_seed_everything_repeats():
    seed_everything(5)
    first = torch.rand(2).tolist(), np.random.rand(2).tolist()
    seed_everything(5)
    assert first == (torch.rand(2).tolist(), np.random.rand(2).tolist())


def test_run_command_exit_codes(capsys):
    def fail(error):
        raise error

    assert run_command(lambda: None) == 0
    assert run_command(lambda: fail(UserError("no such\nkey"))) == 2
    assert capsys.readouterr().err == "error: no such key\n"
    assert run_command(lambda: fail(NonFiniteError("loss is nan"))) == 3
    assert run_command(lambda: fail(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_suggest():
    assert suggest("sampel_method", ["sample_method", "zsize"]) == " (did you mean 'sample_method'?)"
    assert suggest("qqq", ["sample_method"]) == ""


def test_check_finite_names_step_and_layer():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert check_finite(torch.tensor(1.5), 3, model) == 1.5
    with pytest.raises(NonFiniteError, match="still finite"):
        check_finite(float("nan"), 3, model)
    model[1].weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"loss is inf at step 12 .*parameter 1\.weight"):
        check_finite(torch.tensor(float("inf")), 12, model)


def test_stop_signal_is_set_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
    assert signal.getsignal(signal.SIGTERM) is before
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        os.kill(os.getpid(), signal.SIGINT)


_MEMORY = """
import resource, torch
from common.launch import keep_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def again():
    for _ in range(20):
        torch.ones(1 << 24)  # 64 MiB; the first ones may not fit into the holes left between small objects
    before = faults()
    torch.ones(1 << 24)
    return faults() - before
print(again(), keep_freed_memory(), again())
"""


def test_keep_freed_memory():
    if platform.libc_ver()[0] != "glibc":
        assert not keep_freed_memory()
        return
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    before, kept, after = done.stdout.split()
    assert kept == "True"
    assert int(after) < 100
    # where the kernel gives huge pages by itself there are few page faults to save
    assert int(before) > 10 * int(after)


_TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from common.launch import Distributed, StopSignal, normalise_over_processes
dist = Distributed.start("cpu")
assert dist.world == 2 and dist.is_main == (dist.rank == 0)
rows = torch.full((dist.rank + 1, 2), float(dist.rank))
together = dist.gather(rows)
assert together.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]], together
assert float(dist.sum(float(dist.rank + 1))) == 3.0
assert float(dist.mean(torch.tensor(2.0 * dist.rank))) == 1.0
assert dist.any(dist.rank == 1) and not dist.any(False) and not dist.any(StopSignal())
torch.manual_seed(0)
model = dist.wrap(torch.nn.Linear(2, 1))
x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
model(x[dist.rank : dist.rank + 1]).sum().backward()
assert torch.allclose(model.module.weight.grad, x.mean(0, keepdim=True))
images, share, whole = torch.rand(4, 3, 2, 2), torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
mine = slice(2 * dist.rank, 2 * dist.rank + 2)
assert torch.allclose(normalise_over_processes(share, dist)(images[mine]), whole(images)[mine], atol=1e-6)
for name, value in whole.state_dict().items():  # the statistics of evaluation too: of the whole batch, unbiased
    assert torch.allclose(share.state_dict()[name], value, atol=1e-6), name
dist.barrier()
dist.close()
threads = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads  # they would run on while the interpreter ends
sys.stdout.write(f"rank {dist.rank} fine\\n")  # one write: the two processes share the pipe
"""


def test_two_processes_under_torchrun(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(_TWO_PROCESSES)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rank 0 fine" in done.stdout and "rank 1 fine" in done.stdout


def test_single_process_is_the_identity():
    dist = Distributed.start("cpu")
    x = torch.randn(3, 2)
    assert dist.gather(x) is x and dist.sum(x) is x and dist.world == 1
    model = torch.nn.Linear(2, 2)
    assert dist.wrap(model) is model
