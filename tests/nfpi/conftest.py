"""For tests of many tiny runs: figures that are built and not drawn, and a CNN of few channels."""

import numpy as np
import pytest
import torch
from torch import nn

from nfpi import cnn, pictures

RENDER = pictures.render


@pytest.fixture(scope="module")
def undrawn():
    """A figure's drawing takes half as long as a tiny run's training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pictures, "render", lambda figure: np.zeros((*figure.canvas.get_width_height()[::-1], 3), np.uint8)
        )
        yield


@pytest.fixture
def drawn(monkeypatch):
    """Figures are drawn in this test, whatever its module says."""
    monkeypatch.setattr(pictures, "render", RENDER)


@pytest.fixture(scope="module")
def narrow_cnn():
    """The ResNets with an eighth of their channels."""
    make = cnn.resnet

    def narrow(version, channels, classes, stem="small"):
        with torch.device("meta"):
            net = make(version, channels, classes, stem)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                inputs = channels if module is net.conv1 else module.in_channels // 8
                module.__init__(inputs, module.out_channels // 8, module.kernel_size, module.stride, module.padding,
                                bias=False)  # fmt: skip
            elif isinstance(module, nn.BatchNorm2d):
                module.__init__(module.num_features // 8)
            elif isinstance(module, nn.Linear):
                module.__init__(module.in_features // 8, module.out_features)
        return net

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cnn, "resnet", narrow)
        yield
