"""NFPI's invertible layers for the repository's one contract (tests/test_invertible_layers.py)."""

from collections.abc import Callable

from torch import Tensor, nn

from nfpi.layers import CONV_TYPES, FLOW_TYPES, ActNorm, Conv1x1, CouplingLayer
from nfpi.model import FlowConfig, FlowStep, MultiScaleFlow


class ImageToImage(nn.Module):
    """An `all_levels` flow as one invertible layer: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, **options):
        super().__init__()
        small = {"channels": 1, "height": 8, "width": 8, "flows": (1, 1), "blocks": (1, 1), "hidden": (4, 4)}
        self.flow = MultiScaleFlow(FlowConfig(**{**small, **options}))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det, _, _ = self.flow(x)
        return z.view_as(x), log_det

    def inverse(self, y: Tensor) -> Tensor:
        return self.flow.inverse(y.flatten(1))


def contract_cases() -> list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """(name, factory, input shape with the batch) of every invertible layer."""
    affine = {"conv_type": "decomposition", "flow_type": "affine", "channels": 3, "width": 4}
    return [
        ("nfpi.ActNorm", lambda: ActNorm((3, 4, 4)), (5, 3, 4, 4)),
        *((f"nfpi.Conv1x1.{t}", lambda t=t: Conv1x1(4, t), (3, 4, 3, 2)) for t in CONV_TYPES),
        *((f"nfpi.CouplingLayer.{t}", lambda t=t: CouplingLayer(5, 6, 1, t), (2, 5, 3, 2)) for t in FLOW_TYPES),
        ("nfpi.CouplingLayer.attention", lambda: CouplingLayer(4, 6, 1, attention=True), (2, 4, 3, 2)),
        ("nfpi.CouplingLayer.lowrank", lambda: CouplingLayer(52, 4, 1), (2, 52, 2, 1)),
        ("nfpi.FlowStep", lambda: FlowStep((4, 2, 2), 4, 1, FlowConfig()), (2, 4, 2, 2)),
        ("nfpi.MultiScaleFlow.matrixexp", ImageToImage, (2, 1, 8, 8)),
        ("nfpi.MultiScaleFlow.affine", lambda: ImageToImage(**affine), (2, 3, 8, 4)),
    ]
