"""Inception-v3 as the FID literature uses it: the TensorFlow network of 2015-12-05, in PyTorch.

It differs from torchvision's Inception-v3 in four places: the average pools leave the padding out of the mean, the last
block pools by the maximum, there are 1008 outputs, and the weights are those of the TensorFlow graph.
Layer names are those of the converted state dicts in circulation (pytorch-fid, torch-fidelity: one and the same file).
Architecture: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import load_into

# One block = its branches, side by side; one branch = its steps in order. A step is a pool, a convolution
# (name, channels, kernel[, stride]) or a fork: a list of convolutions of one input. Stride 2 comes without padding.


def _block_a(pooled: int):
    return (
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["average", ("branch_pool", pooled, 1)],
    )


def _block_c(c: int):
    double = [(1, c), ((7, 1), c), ((1, 7), c), ((7, 1), c), ((1, 7), 192)]
    return (
        [("branch1x1", 192, 1)],
        [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [(f"branch7x7dbl_{i}", channels, kernel) for i, (kernel, channels) in enumerate(double, 1)],
        ["average", ("branch_pool", 192, 1)],
    )


def _block_e(pool: str):
    return (
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
        ],
        [pool, ("branch_pool", 192, 1)],
    )


_BLOCKS = {
    "Mixed_5b": (192, _block_a(32)),
    "Mixed_5c": (256, _block_a(64)),
    "Mixed_5d": (288, _block_a(64)),
    "Mixed_6a": (
        288,
        (
            [("branch3x3", 384, 3, 2)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
            ["halve"],
        ),
    ),
    "Mixed_6b": (768, _block_c(128)),
    "Mixed_6c": (768, _block_c(160)),
    "Mixed_6d": (768, _block_c(160)),
    "Mixed_6e": (768, _block_c(192)),
    "Mixed_7a": (
        768,
        (
            [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
            [
                ("branch7x7x3_1", 192, 1),
                ("branch7x7x3_2", 192, (1, 7)),
                ("branch7x7x3_3", 192, (7, 1)),
                ("branch7x7x3_4", 192, 3, 2),
            ],
            ["halve"],
        ),
    ),
    "Mixed_7b": (1280, _block_e("average")),
    "Mixed_7c": (2048, _block_e("maximum")),
}


class FidInception(nn.Module):
    """Images (N, 3, 299, 299) scaled as (x - 128) / 128 -> pooled features (N, 2048)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, padding=0)
        for name, (channels, branches) in _BLOCKS.items():
            self.add_module(name, _Block(channels, branches))
        self.fc = nn.Linear(2048, 1008)  # not used by the features; kept so that a weights file is loaded whole

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)  # (N, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)  # (N, 192, 35, 35)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((2, 3))  # (N, 2048, 8, 8) -> (N, 2048)


class _Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; padded to keep the size unless told otherwise."""

    def __init__(self, inputs: int, outputs: int, kernel, stride: int = 1, padding=None):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padding is None else padding
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Block(nn.Module):
    """Parallel branches, concatenated along the channels."""

    def __init__(self, channels: int, branches):
        super().__init__()
        self.branches = branches
        for branch in branches:
            width = channels
            for step in branch:
                parts = step if isinstance(step, list) else [] if isinstance(step, str) else [step]
                for name, outputs, kernel, *stride in parts:
                    self.add_module(name, _Convolution(width, outputs, kernel, *(stride and (2, 0))))
                width = sum(part[1] for part in parts) or width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(branch, x) for branch in self.branches], 1)

    def _run(self, branch, x: Tensor) -> Tensor:
        for step in branch:
            if isinstance(step, str):
                x = _POOLS[step](x)
            elif isinstance(step, list):
                x = torch.cat([getattr(self, name)(x) for name, *_ in step], 1)
            else:
                x = getattr(self, step[0])(x)
        return x


_POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, 1, 1),
    "halve": lambda x: F.max_pool2d(x, 3, 2),
}


def fid_inception(state: dict[str, Tensor], source: str) -> FidInception:
    """The network with the weights `state`. Raises UserError, naming `source`, when they are of another network."""
    with torch.device("meta"):  # no random initialisation of 24 million weights that are replaced at once
        model = FidInception()
    model = model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):  # a counter that some files leave out and evaluation never reads
            state = {**state, name: torch.zeros_like(buffer)}
    load_into(model, state, source)
    return model.eval().requires_grad_(False)
