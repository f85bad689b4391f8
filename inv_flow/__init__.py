"""`load(NAME)`: a trained model as a module, from `checkpoints/` or a file of one's own.

`InverseConv2d`: an inverse convolution; see docs/use_the_parts.md.
"""

import importlib

_HOME = {"load": "pretrained", "InverseConv2d": "layers.inv_conv", "MaskedConv2d": "layers.inv_conv"}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)  # on first use: importing is cheap


def __dir__():
    return sorted([*globals(), *_HOME])
