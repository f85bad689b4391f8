"""CUDA graphs without a GPU: `stand_in()` lets `CudaGraph` record calls as a graph would, and run them at a replay."""

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from common.cuda_graph import CudaGraph


class Replayed:
    """A captured call, run again at `replay` with the same inputs, into the same outputs and gradients.

    As at a real capture nothing has happened after the first call: weights, buffers and random numbers are put back.
    """

    def __init__(self, call, parameters, modules=()):
        self.call, self.parameters, self.replays = call, parameters, 0
        before = [copy.deepcopy(module.state_dict()) for module in modules]
        with torch.random.fork_rng(devices=[]):
            self.out = call()
        for module, state in zip(modules, before, strict=True):
            module.load_state_dict(state)
        self.gradients = [p.grad for p in parameters]

    def replay(self):
        self.replays += 1
        for own, new in zip(tree_leaves(self.out), tree_leaves(self.call()), strict=True):
            if isinstance(own, Tensor):
                own.copy_(new)
        for own, parameter in zip(self.gradients, self.parameters, strict=True):
            if own is not None:
                own.copy_(parameter.grad)
                parameter.grad = torch.full_like(own, torch.nan)  # a graph leaves `.grad` as Python last set it


def modules_of(step) -> list[nn.Module]:
    """The networks that a step changes: among the arguments of a partial function."""
    found = [argument for argument in getattr(step, "args", ()) if isinstance(argument, nn.Module)]
    return found or [part for part in (getattr(argument, "flow", None) for argument in getattr(step, "args", ()))
                     if isinstance(part, nn.Module)]  # fmt: skip


class StandIn(CudaGraph):
    """A `CudaGraph` on the CPU; `order` is what it did, `made` what it captured."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.active, self.made, self.order = len(arguments) < 4 or arguments[3], [], []

    def _aside(self, call):
        self.order.append("aside")
        return call()

    def _captured(self, call):
        self.order.append("captured")
        self.made.append(Replayed(call, self.parameters, modules_of(self.step)))
        return self.made[-1], self.made[-1].out
