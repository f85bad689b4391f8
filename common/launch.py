"""Device choice, seeding, data-parallel start, stop signals and the guard against non-finite losses."""

import ctypes
import datetime
import math
import os
import platform
import random
import signal
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from common.errors import NonFiniteError, UserError


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`: `auto` (CUDA, then MPS, then CPU), `cpu`, `cuda`, `cuda:<i>` or `mps`.

    Raises UserError for an unknown name and for a device that this machine does not have.
    """
    name = str(name).lower()
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not mps:
            raise UserError("device=mps: this machine has no MPS device; use device=cpu")
        return torch.device("mps")
    kind, _, index = name.partition(":")
    if kind == "cuda" and (not index or index.isdigit()):
        if not torch.cuda.is_available():
            raise UserError(f"device={name}: PyTorch sees no CUDA device; use device=cpu")
        if index and int(index) >= torch.cuda.device_count():
            raise UserError(f"device={name}: only {torch.cuda.device_count()} CUDA device(s) here, counted from 0")
        return torch.device(name)
    raise UserError(f"device={name}: expected auto, cpu, cuda, cuda:<index> or mps")


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed python, numpy and torch (all devices); `deterministic` forbids kernels whose result varies between runs."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS reads this variable when its handle is made, hence here and not in the shell
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


def full_precision(tf32: bool = False) -> None:
    """Let a GPU compute convolutions and matrix products of float32 tensors in float32, or in TF32 (10 bits mantissa).

    PyTorch's own default is TF32 for convolutions: likelihoods and inverses then err a thousand times more.
    """
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32


def autocast(device: torch.device, amp: bool) -> AbstractContextManager:
    """bfloat16 convolutions and matrix products where `amp` says so; without it nothing changes."""
    return torch.autocast(device.type, torch.bfloat16) if amp else nullcontext()


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next allocation; False where the C library is another one.

    By default every large tensor is given back to the kernel when it dies and fetched again page by page in the next
    step, up to a quarter of a training step on a CPU. The price: the process holds its peak until it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


class Distributed:
    """Data-parallel training under `torchrun`; with a single process every method is the identity.

    `Distributed.start(device)` reads RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them and joins the process group
    (nccl on CUDA, gloo elsewhere). Without those variables it is one process on `device`.
    """

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1, local_rank: int = 0):
        self.device, self.rank, self.world, self.local_rank = device, rank, world, local_rank
        self._wrapped: list[nn.parallel.DistributedDataParallel] = []

    def __deepcopy__(self, memo: dict) -> "Distributed":
        return self  # a copy of a model that draws its noise by this belongs to the same processes

    @classmethod
    def start(cls, device: str = "auto") -> "Distributed":
        """Join the group that torchrun describes, or stay alone. Raises UserError for a bad device."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        picked = pick_device(device)
        if world == 1:
            return cls(picked)
        rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        own = None
        if picked.type == "cuda":
            if picked.index is not None:
                raise UserError(f"device={device}: torchrun gives every process a GPU of its own; write device=cuda")
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"local rank {local_rank} has no CUDA device of its own ({torch.cuda.device_count()} here): "
                    "lower --nproc_per_node, or run on the CPU"
                )
            picked = own = torch.device("cuda", local_rank)
            torch.cuda.set_device(picked)
        if not torch_dist.is_initialized():
            backend = "nccl" if picked.type == "cuda" else "gloo"
            torch_dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30), device_id=own)
        return cls(picked, rank, world, local_rank)

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files."""
        return self.rank == 0

    def wrap(self, module: nn.Module, **options) -> nn.Module:
        """`module` on this rank's device, inside DistributedDataParallel when there are several processes."""
        module = module.to(self.device)
        if self.world == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        ids = [self.local_rank] if self.device.type == "cuda" else None
        self._wrapped.append(nn.parallel.DistributedDataParallel(module, device_ids=ids, **options))
        return self._wrapped[-1]

    def sum(self, value: Tensor | float) -> Tensor:
        """Elementwise sum over the processes (a float becomes a float64 scalar, float32 where float64 is missing)."""
        if not isinstance(value, Tensor):
            dtype = torch.float32 if self.device.type == "mps" else torch.float64
            value = torch.tensor(value, dtype=dtype, device=self.device)
        if self.world == 1:
            return value
        value = value.detach().clone()
        torch_dist.all_reduce(value)
        return value

    def mean(self, value: Tensor | float) -> Tensor:
        """Elementwise mean over the processes."""
        return self.sum(value) / self.world

    def gather(self, value: Tensor, equal: bool = False) -> Tensor:
        """The rows of all processes, rank after rank: (n_0 + n_1 + ..., ...); their numbers may differ; with `equal`
        they do not, and nobody waits to be told.
        """
        if self.world == 1:
            return value
        if equal:
            return _gathered(value, self.world)
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        torch_dist.all_gather(counts, torch.tensor([len(value)], dtype=torch.int64, device=self.device))
        rows = [int(count) for count in counts]
        padded = value.new_zeros((max(rows), *value.shape[1:]))
        padded[: len(value)] = value
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        torch_dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])

    def randn_like(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal noise for this process's rows of a batch: the numbers that one process would draw.

        x (B, ...): every process holds the same number of rows and the same random state.
        """
        noise = torch.randn((self.world * len(x), *x.shape[1:]), generator=generator, dtype=x.dtype, device=x.device)
        return noise[self.rank * len(x) : (self.rank + 1) * len(x)]

    def rand_like(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform noise in [0, 1) for this process's rows; otherwise as `randn_like`."""
        noise = torch.rand((self.world * len(x), *x.shape[1:]), generator=generator, dtype=x.dtype, device=x.device)
        return noise[self.rank * len(x) : (self.rank + 1) * len(x)]

    def over_rows(self, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        """`function(x)` for a function that treats each row alone: every process works on its share of the rows.

        Each is given all rows and receives all results (a tensor or a tuple of tensors, rows first), so that what
        follows sees the whole batch. The gradient of x is complete; that of the function's own parameters is this
        process's part, until `sum_gradients`. Raises UserError when the rows cannot be shared evenly.
        """
        if self.world == 1:
            return function(x)
        if len(x) % self.world:
            raise UserError(f"batch size {len(x)} must be a multiple of the {self.world} processes")
        out = function(_OwnRows.apply(x, self.rank, self.world))
        if isinstance(out, Tensor):
            return _AllRows.apply(out, self.rank, self.world)
        return tuple(_AllRows.apply(part, self.rank, self.world) for part in out)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients over the processes, in place."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            flat = torch.cat([g.flatten() for g in gradients])
            torch_dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view(gradient.shape))

    def any(self, flag: "bool | StopSignal") -> bool:
        """True on every process when it is true on one: ranks leave a loop together."""
        return bool(flag) if self.world == 1 else bool(self.sum(float(bool(flag))) > 0)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            torch_dist.barrier()

    def close(self) -> None:
        """Leave the process group and end its threads; what `wrap` returned is of no use then."""
        if self.world > 1 and torch_dist.is_initialized():
            # these hold the group: its threads would live on while the interpreter ends, which aborts now and then
            for module in self._wrapped:
                module.reducer = module.logger = module.process_group = None
            self._wrapped.clear()
            torch_dist.destroy_process_group()


def _gathered(x: Tensor, world: int) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    torch_dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _OwnRows(torch.autograd.Function):
    """This process's share of the rows; the gradient is put together from all processes."""

    @staticmethod
    def forward(ctx, x: Tensor, rank: int, world: int) -> Tensor:
        ctx.world, share = world, len(x) // world
        return x[rank * share : (rank + 1) * share].clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(gradient, ctx.world), None, None


class _AllRows(torch.autograd.Function):
    """The rows of all processes; each of them computes the same loss from them, so its gradient is its own share."""

    @staticmethod
    def forward(ctx, x: Tensor, rank: int, world: int) -> Tensor:
        ctx.place = rank * len(x), (rank + 1) * len(x)
        return _gathered(x, world)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        start, stop = ctx.place
        return gradient[start:stop].contiguous(), None, None


class _BatchNormOverProcesses(nn.BatchNorm2d):
    """Batch normalisation whose statistics are those of the batch over all processes, on any backend.

    PyTorch's SyncBatchNorm needs CUDA. Same names and state as nn.BatchNorm2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W), B this process's share."""
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * torch_dist.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]


def normalise_over_processes(module: nn.Module, dist: Distributed) -> nn.Module:
    """Let every BatchNorm2d of `module` see the whole batch, of which each process holds an equal share."""
    if dist.world == 1:
        return module
    if dist.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = _BatchNormOverProcesses
    return module


class StopSignal:
    """Truthy after SIGTERM or Ctrl-C, so that a loop can save and leave; a second Ctrl-C interrupts at once.

    Used as `with StopSignal() as stop: ... if stop: save(); break`. Restores the earlier handlers on leaving.
    Signals reach only the main thread; elsewhere it never becomes true.
    """

    def __init__(self):
        self.received: int | None = None
        self._earlier: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._earlier[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame):
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_):
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier.clear()


def non_finite_layer(module: nn.Module) -> str | None:
    """The first parameter, gradient or buffer of `module` with a non-finite entry, in words, or None."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name}"
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"gradient of {name}"
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and not torch.isfinite(buffer).all():
            return f"buffer {name}"
    return None


def check_finite(loss: Tensor | float, step: int, module: nn.Module | Iterable[nn.Module] = ()) -> float:
    """The loss as a float; raises NonFiniteError naming the step and the first bad layer when it is not finite.

    Reading the value waits for the device: call it where the loop reads the loss anyway (every logged step).
    """
    value = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
    if math.isfinite(value):
        return value
    modules = [module] if isinstance(module, nn.Module) else list(module)
    found = next((text for part in modules if (text := non_finite_layer(part))), None)
    where = f"first non-finite: {found}" if found else "all parameters and gradients are still finite"
    raise NonFiniteError(
        f"loss is {value} at step {step} ({where}); lower the learning rate or resume from the last checkpoint"
    )
