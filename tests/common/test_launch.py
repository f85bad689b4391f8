import os
import platform
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from front import children

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


def test_two_processes_as_torchrun_starts_them(tmp_path):
    children.train_together("two_processes", [], tmp_path)
    for rank in (0, 1):
        assert f"rank {rank} fine" in (tmp_path / f"output{rank}.txt").read_text()


def test_single_process_is_the_identity():
    dist = Distributed.start("cpu")
    x = torch.randn(3, 2)
    assert dist.gather(x) is x and dist.sum(x) is x and dist.world == 1
    model = torch.nn.Linear(2, 2)
    assert dist.wrap(model) is model
