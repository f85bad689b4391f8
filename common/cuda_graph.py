"""A training step as a CUDA graph: one launch instead of thousands, where a GPU waits for the host.

    step = CudaGraph(gradients, model.parameters(), dist, options.cuda_graph, run.info)
    for x in batches:
        loss = step(x)  # networks, objective, gradients
        training.check(loss, model)
        optimizer.step()

The optimiser stays outside: the host queues its few launches while the graph runs. So a loss is looked at before it
counts, schedules are plain numbers, and checkpoints are those of a run without graphs.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from common.errors import UserError
from common.launch import Distributed

WARM_UP = 3  # calls of a kind before its capture: libraries choose their kernels and take their memory
MOST = 8  # kinds that are kept; their graphs share memory


@dataclass
class _Kind:
    """Calls that are alike, and their graph: what it reads, what it returns, the gradients that it leaves."""

    calls: int = 0
    graph: Any = None
    inputs: list[Tensor] = field(default_factory=list)
    outputs: Any = None
    gradients: list[Tensor | None] = field(default_factory=list)


class CudaGraph:
    """`step(*inputs)`, which leaves its gradients in `parameters`, replayed as a graph on one GPU.

    Tensors among the inputs (also inside tuples, lists and dicts) are copied into the graph's own; everything else is
    part of it and hashable. Calls that agree in that, and in the shapes, are of a kind: the first WARM_UP of a kind run
    as they are, the next is captured. What is returned is detached and the caller's own. The step reads nothing on the
    host, changes tensors that live longer in place, and draws from the device's default generator, whose numbers are
    those of a run without graphs. Without `wanted`, on other devices and in several processes the step runs as it is;
    `say` is told so.
    """

    def __init__(
        self, step: Callable[..., Any], parameters: Iterable[nn.Parameter], dist: Distributed, wanted: bool = True,
        say: Callable[[str], object] = lambda text: None,
    ):  # fmt: skip
        self.step, self.parameters = step, list(parameters)
        self._kinds: OrderedDict[Any, _Kind] = OrderedDict()
        self._pool: Any = None
        self._stream: Any = None
        alone = dist.world == 1
        self.active = wanted and alone and dist.device.type == "cuda"
        if wanted and not self.active:
            say(f"CUDA graph: no effect {f'on {dist.device.type}' if alone else 'in several processes'}")

    def __call__(self, *inputs: Any) -> Any:
        if not self.active:
            return self.step(*inputs)
        leaves, tree = tree_flatten(inputs)
        key = tree, tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        if len(self._kinds) > MOST:
            self._kinds.popitem(last=False)
        kind.calls += 1
        if kind.calls <= WARM_UP:
            return self._aside(lambda: self.step(*inputs))
        if kind.graph is None:
            static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            kind.inputs = [leaf for leaf in static if isinstance(leaf, Tensor)]
            kind.graph, kind.outputs = self._captured(lambda: self.step(*tree_unflatten(static, tree)))
            kind.gradients = [parameter.grad for parameter in self.parameters]
        for own, given in zip(kind.inputs, (leaf for leaf in leaves if isinstance(leaf, Tensor)), strict=True):
            own.copy_(given, non_blocking=True)
        kind.graph.replay()
        for parameter, gradient in zip(self.parameters, kind.gradients, strict=True):
            parameter.grad = gradient  # a call of another kind has put its own there
        return tree_map(lambda out: out.detach().clone() if isinstance(out, Tensor) else out, kind.outputs)

    def _aside(self, call: Callable[[], Any]) -> Any:
        """`call()` on the stream that is captured later."""
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            out = call()
        torch.cuda.current_stream().wait_stream(self._stream)
        return out

    def _captured(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        """The graph of `call()`, and what it will return; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may load images meanwhile
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                out = call()
        except RuntimeError as error:
            line = str(error).partition("\n")[0]
            raise UserError(f"this step cannot be a CUDA graph ({line}): leave the option out") from error
        self._pool = self._pool or graph.pool()
        return graph, out


def detached(tree: Any) -> Any:
    """The same tuples and dicts, of tensors without gradients."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)
