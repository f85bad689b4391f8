"""Trainers as processes of their own, which a test may kill: forked from a server that has imported PyTorch once.

A fork of the test's own process would inherit its CUDA context and autograd threads; a fresh interpreter costs seconds.
"""

import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAINERS = {
    "lbae": "lbae.mnist",
    "glancenet": "glancenet.main",
    "latent_flow": "latent_flow.train_vae_scratch",
    "inv_flow": "inv_flow.inv_flow_mnist",
    "nfpi": "nfpi.main",
}

_context = multiprocessing.get_context("forkserver")
# torch._dynamo: an optimiser imports it
_context.set_forkserver_preload(["front.children", "common.run", "torch._dynamo", *TRAINERS.values()])


def start(target, *arguments) -> BaseProcess:
    """Call `target(*arguments)`, a function of a module that can be imported by name, in a new process."""
    child = _context.Process(target=target, args=arguments)
    child.start()
    return child


def finish(child: BaseProcess, seconds: float = 300) -> int:
    """The exit code; minus the signal's number when one ended the process."""
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise TimeoutError(f"the process did not end within {seconds:g} s")
    return child.exitcode


def train_together(paper: str, argv: list[str], folder: Path, seconds: float = 300) -> str:
    """The paper's command (or a module's) in two processes with the environment that torchrun gives them: what the
    first wrote.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pair = [start(_one_of_two, rank, port, paper, [str(word) for word in argv], str(folder)) for rank in (0, 1)]
    codes = [finish(child, seconds) for child in pair]
    written = [(Path(folder) / f"output{rank}.txt").read_text() for rank in (0, 1)]
    assert codes == [0, 0], written
    return written[0]


def _one_of_two(rank: int, port: int, paper: str, argv: list[str], folder: str):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    train(paper, argv, folder, output=f"output{rank}.txt")


def train(
    paper: str, argv: list[str], folder: str, stop: tuple[int, int] | None = None, limit: int | None = None,
    output: str = "output.txt",
):  # fmt: skip
    """The paper's command in `folder`, what it says in `output`; ends with the command's exit code.

    stop = (step, signal): the process gets the signal when that step has been logged. limit: the largest size that a
    file may take, which gives the error of a full disk (EFBIG, which the code treats as ENOSPC).
    """
    import torch

    from common.errors import run_command
    from common.run import Run

    torch.set_num_threads(1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    if stop is not None:
        log, pending = Run.log, [stop]

        def log_and_stop(self, step, **values):
            log(self, step, **values)
            if pending and step >= pending[0][0]:
                os.kill(os.getpid(), pending.pop()[1])

        Run.log = log_and_stop
    if limit is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main = importlib.import_module(TRAINERS.get(paper, paper)).main
    code = run_command(lambda: main(argv))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def command(file: str, words: list[str], folder: str, environment: dict[str, str]):
    """`python file words` with that environment, what it says in output.txt; ends with the command's exit code."""
    os.environ.clear()
    os.environ.update(environment)
    written = os.open(f"{folder}/output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1), os.dup2(written, 2)
    os.chdir(Path(file).parent)
    sys.argv = [file, *words]
    runpy.run_path(file, run_name="__main__")


def save_for_ever(folder: str, i: int):
    """Write a state, weights and a picture again and again, each with one number all over."""
    import numpy as np
    import torch

    from common.checkpoint import save_state, save_weights
    from common.images import save_image

    while True:
        save_weights(f"{folder}/weights.safetensors", {"x": torch.full((50_000,), float(i))}, {"width": 4})
        save_image(f"{folder}/picture.png", np.full((64, 64), i % 256, np.uint8))
        save_state(f"{folder}/state.pt", "test", x=torch.full((50_000,), float(i)), i=i)
        i += 1
