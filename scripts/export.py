r"""A trained model as ONNX: an encoder and a decoder that take any number of images.

    python scripts/export.py lbae mnist_bae_w16 --onnx OUT       # writes OUT/encoder.onnx and OUT/decoder.onnx
    python scripts/export.py glancenet RUN/model.safetensors --onnx OUT

PAPER is one of glancenet, inv_flow, latent_flow, lbae, nfpi; NAME is what its `load` takes: a name of checkpoints/, a
file, a run's folder. The encoder takes images (B, C, H, W) in [0, 1] and gives latents, the decoder takes these back to
images; float32. Each graph is compared at two batch sizes in onnxruntime with the model in float64, and written only
where they agree to 1e-5 (of the largest value, where that is above 1). inv_flow's graphs compute in float64 but for the
networks of the couplings: in float32 the flow itself rounds more coarsely. Two decoders are not quite the models' own:
inv_flow's and nfpi's images are not cut to whole grey levels, and halves that nfpi's flow has split off are at their
mean (temperature 0). It needs onnx, onnxruntime and onnxscript: pip install -e .[parts]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import argparse
import importlib
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import atomic_write
from common.errors import UserError, run_command

PAPERS = ("glancenet", "inv_flow", "latent_flow", "lbae", "nfpi")
TOLERANCE = 1e-5
TRACED, CHECKED = 4, (1, 3)  # images while a graph is recorded, and in the two checks
LARGEST = 2**20  # images in a batch at most
BLOCK = 256  # numbers of an image that an inverse convolution solves at once

Function = Callable[..., Tensor | list[Tensor]]


class Call(nn.Module):
    """A function of a model as a module that owns the model's weights."""

    def __init__(self, model: nn.Module, function: Function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor) -> Tensor | list[Tensor]:
        """What the function returns."""
        return self.function(*inputs)


class Single(nn.Module):
    """A network in float32 between float64 tensors: onnxruntime convolves in float32 alone."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.float()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) float64 -> the network's result, float64."""
        return self.network(x.float()).double()


class PlainConvolution:
    """A masked convolution and its inverse as matrix products; takes the place of those of `layer`.

    The solve goes by blocks of rows: the rows before are convolved, and the block's own part is one matrix, made by the
    layer's own solve when the model is run once before.
    """

    def __init__(self, layer: nn.Module):
        if not isinstance(layer.order, str):
            raise UserError("an inverse convolution with an order for each group cannot be exported")
        self.layer, self.solve_block = layer, layer.solve
        kernel = layer.kernel()  # (C, C / groups, kh, kw)
        places = itertools.product(*map(range, kernel.shape[2:]))
        taps = {(i, j): torch.block_diag(*kernel[:, :, i, j].chunk(layer.groups)) for i, j in places}
        self.taps = {place: tap for place, tap in taps.items() if tap.any()}
        self.inverses: dict[int, Tensor] = {}  # of blocks of so many rows
        layer.convolve, layer.solve = self.convolve, self.solve

    def convolve(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        from inv_flow.utils.inv_conv_cuda.geometry import ORDER_CODES, padding

        _, _, height, width = x.shape
        around = F.pad(x, padding(ORDER_CODES[self.layer.order], *self.layer.kernel_size))
        seen = ((tap, around[:, :, i : i + height, j : j + width]) for (i, j), tap in self.taps.items())
        return sum(tap @ pixels.flatten(2) for tap, pixels in seen).view_as(x)

    def solve(self, y: Tensor) -> Tensor:
        """y (B, C, H, W) -> x with convolve(x) = y."""
        _, channels, height, width = y.shape
        upwards = self.layer.order.startswith("B")
        rows = max(1, BLOCK // (channels * width))
        starts = range(0, height, rows)
        done: list[Tensor] = []
        for start in starts:
            first, last = start, min(start + rows, height)
            if upwards:
                first, last = height - last, height - first
            block = y[:, :, first:last]
            if done:
                empty = torch.zeros_like(block)
                seen = torch.cat([empty, *done] if upwards else [*done, empty], 2)
                mixed = self.convolve(seen)
                block = block - (mixed[:, :, : last - first] if upwards else mixed[:, :, first - last :])
            if last - first not in self.inverses:
                basis = torch.eye(channels * (last - first) * width, dtype=y.dtype)
                basis = basis.view(-1, channels, last - first, width)
                self.inverses[last - first] = self.solve_block(basis).flatten(1)
            block = (block.flatten(1) @ self.inverses[last - first]).view_as(block)
            done = [block, *done] if upwards else [*done, block]
        return torch.cat(done, 2)


class PlainConv1x1:
    """A 1x1 convolution with a constant inverse and without log-determinant; takes the place of that of `layer`."""

    def __init__(self, layer: nn.Module):
        from inv_flow.layers.conv1x1 import inverse_matrix

        self.matrix = layer.weight.detach()
        self.inverse = inverse_matrix(self.matrix)
        layer.forward, layer.reverse = self.forward, self.reverse

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) -> the same shape, and zeros (B,)."""
        return (self.matrix @ x.flatten(2)).view_as(x), x.new_zeros(x.shape[0])

    def reverse(self, z: Tensor) -> Tensor:
        """The inverse of `forward`."""
        return (self.inverse @ z.flatten(2)).view_as(z)


def functions(paper: str, model: nn.Module) -> tuple[Function, Function | None]:
    """Encoder and decoder (None: the model has none) of a loaded model, made exportable in place."""
    encode: Function = model.encode
    decode: Function | None = model.decode
    if paper == "glancenet" and getattr(model.model, "decoder", None) is None:
        decode = None
    if paper == "inv_flow":
        from inv_flow.layers.conv1x1 import Conv1x1
        from inv_flow.layers.coupling import Coupling
        from inv_flow.layers.inv_conv import _TriangularConv2d

        for layer in model.double().modules():
            if isinstance(layer, _TriangularConv2d):
                PlainConvolution(layer)
            if isinstance(layer, Conv1x1):
                PlainConv1x1(layer)
        for layer in [layer for layer in model.modules() if isinstance(layer, Coupling)]:
            layer.net = Single(layer.net)

        def encode(images: Tensor) -> list[Tensor]:
            return [z.float() for z in model.encode(images.double())]

        def decode(*latents: Tensor) -> Tensor:
            return ungraded(model.flow, [z.double() for z in latents]).float()

    if paper == "nfpi":
        flow, conditional = model.flow, model.conditional
        bounds = flow.bounds()
        flow.bounds = lambda: bounds  # numbers, not read from the weights in the graph

        def decode(latents: Tensor) -> Tensor:
            means = [torch.zeros(1)] * flow.config.conditional_splits
            z = flow.inverse(latents, 0.0, eps=means)
            if conditional.codes:
                z = conditional.codes.remove(z)
            levels = 2**conditional.bits
            return (((z * 0.5 + 0.5) * levels - 0.5) * (256 // levels)).clamp(0, 255) / 255

    return encode, decode


def ungraded(flow: nn.Module, latents: list[Tensor]) -> Tensor:
    """inv_flow's decoder without the cut to whole grey levels: images (B, C, H, W) in [0, 1]."""
    image = flow.density().decode(latents)
    for layer in reversed(flow.layers[: flow.continuous - 1]):  # all before the dequantisation
        image = layer.reverse(image)
    return (image - 0.5).clamp(0, flow.levels - 1) / (flow.levels - 1)


def examples(paper: str, model: nn.Module) -> Tensor:
    """Images (TRACED, C, H, W) to compare on: what a flow itself draws, since rounding grows where it has no mass."""
    generator = torch.Generator().manual_seed(0)
    if paper == "nfpi":
        return model.sample(torch.arange(TRACED) % model.conditional.classes, 0.7, generator)
    if paper == "inv_flow":
        noise = [0.7 * torch.randn(TRACED, *shape, generator=generator) for shape in model.flow.latent_sizes]
        return model.decode(noise)
    return torch.rand(TRACED, *model.image_shape, generator=generator)


def listed(values: Tensor | list[Tensor]) -> list[Tensor]:
    """One tensor or several as a list."""
    return list(values) if isinstance(values, (list, tuple)) else [values]


def softplus(x, beta: float = 1.0, threshold: float = 20.0):
    """F.softplus of an ONNX value in operators that onnxruntime has in float64, too."""
    from onnxscript import opset18 as op

    scaled = op.Mul(x, op.CastLike(beta, x))
    soft = op.Div(op.Log(op.Add(op.Exp(scaled), op.CastLike(1.0, x))), op.CastLike(beta, x))
    return op.Where(op.Greater(scaled, op.CastLike(threshold, x)), x, soft)


def to_onnx(model: nn.Module, function: Function, inputs: list[Tensor], names: tuple[str, str]) -> bytes:
    """The graph of `function` of `model`, any number of rows in `inputs` (B, ...); names: of inputs and outputs."""
    batch = torch.export.Dim("batch", min=1, max=LARGEST)
    outputs = listed(function(*inputs))
    named = [
        [name if len(values) == 1 else f"{name}_{i}" for i in range(len(values))]
        for name, values in zip(names, (inputs, outputs), strict=True)
    ]
    shapes = (tuple({0: batch} for _ in inputs),)
    program = torch.export.export(Call(model, function).eval(), tuple(inputs), dynamic_shapes=shapes)
    program.graph_module.graph.eliminate_dead_code()  # the log-determinants
    program.graph_module.recompile()
    # not optimised: that drops a division by 1.000002, which decides the logit of a bright pixel
    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        optimize=False,
        input_names=named[0],
        output_names=named[1],
        custom_translation_table={torch.ops.aten.softplus.default: softplus},
    )
    return made.model_proto.SerializeToString()


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value where that is above 1."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs)


def check(graph: bytes, inputs: list[Tensor], wanted: Function, part: str) -> str:
    """A line on the largest difference of graph and model, over CHECKED batch sizes; wanted: the model in float64.

    Raises UserError when it is above TOLERANCE.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in CHECKED:
        rows = [values[:count] for values in inputs]
        given = {one.name: values.numpy() for one, values in zip(session.get_inputs(), rows, strict=True)}
        found = [torch.from_numpy(values) for values in session.run(None, given)]
        worst = max(worst, distance(found, listed(wanted(*(values.double() for values in rows)))))
    if not worst <= TOLERANCE:
        raise UserError(f"the {part} differs from the model by {worst:.1e} in onnxruntime, more than {TOLERANCE:g}")
    return f"differs from the model by {worst:.1e}"


@torch.no_grad()
def export(paper: str, name: str, folder: Path) -> dict[str, str]:
    """Write encoder.onnx and decoder.onnx of a model to `folder`; returns a line on the check of each."""
    if paper not in PAPERS:
        raise UserError(f"PAPER {paper}: one of {', '.join(PAPERS)}")
    try:
        importlib.import_module("onnxruntime"), importlib.import_module("onnxscript")
    except ImportError as error:
        raise UserError(f"the export needs the package {error.name}: pip install -e .[parts]") from error
    load = importlib.import_module(paper).load
    original, exact, model = load(name), load(name).double(), load(name)
    encode, decode = functions(paper, model)
    images = examples(paper, original)
    latents = [z.float() for z in listed(original.encode(images))]
    parts = {"encoder": (encode, [images], ("images", "latents"), exact.encode)}
    if decode is not None:
        wanted = exact.decode
        if paper == "inv_flow":  # the model itself cuts to grey levels
            wanted = lambda *z: ungraded(exact.flow, list(z))  # noqa: E731
        elif paper == "nfpi":
            wanted = functions(paper, load(name).double())[1]
        parts["decoder"] = (decode, latents, ("latents", "images"), wanted)
    lines = {}
    for part, (function, inputs, names, wanted) in parts.items():
        graph = to_onnx(model, function, inputs, names)
        lines[part] = check(graph, inputs, wanted, part)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / f"{part}.onnx") as file:
            file.write(graph)
    return lines


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python scripts/export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paper", metavar="PAPER", choices=PAPERS)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--onnx", metavar="FOLDER", type=Path, required=True, help="where the two files are written")
    args = parser.parse_args(argv)
    for part, line in export(args.paper, args.name, args.onnx).items():
        print(f"{args.onnx / part}.onnx: {line}")


if __name__ == "__main__":
    sys.exit(run_command(main))
