"""The measuring instruments: generation metrics here, disentanglement metrics in `common.metrics.disentanglement`.

The names below are loaded on first use, so that importing this package costs nothing:

    from common.metrics import Statistics, frechet_distance, kernel_distance, load_images, make_extractor
"""

import importlib

_HOME = {
    "Statistics": "frechet",
    "frechet_distance": "frechet",
    "kernel_distance": "kernel",
    "mmd2": "kernel",
    "mmd2_and_variance": "kernel",
    "precision_recall_distribution": "precision_recall",
    "prd_from_histograms": "precision_recall",
    "f_beta_pair": "precision_recall",
    "improved_precision_recall": "precision_recall",
    "load_images": "inputs",
    "make_extractor": "features",
    "FeatureCache": "features",
    "score": "generation",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted(_HOME)
