"""The measuring instruments: of generated images, and of a representation's disentanglement.

The names below are loaded on first use, so that importing this package costs nothing:

    from common.metrics import score, frechet_distance, kernel_distance  # images or features against others
    from common.metrics import mig, dci, alignment_linear                # mig(codes, factors)
"""

import importlib

from common.errors import UserError

_HOME = {
    "Statistics": "frechet",
    "frechet_distance": "frechet",
    "kernel_distance": "kernel",
    "precision_recall_distribution": "precision_recall",
    "prd_from_histograms": "precision_recall",
    "f_beta_pair": "precision_recall",
    "improved_precision_recall": "precision_recall",
    "load_images": "inputs",
    "open_images": "inputs",
    "make_extractor": "features",
    "FeatureCache": "features",
    "score": "generation",
    "mig": "disentanglement",
    "modularity_explicitness": "disentanglement",
    "sap_score": "disentanglement",
    "irs": "disentanglement",
    "dci": "disentanglement",
    "dci_fast": "disentanglement",
    "alignment_linear": "disentanglement",
    "factor_vae_metric": "disentanglement",
    "beta_vae_sklearn": "disentanglement",
    "evaluate": "disentanglement",
    "Arrays": "disentanglement",
    "bin_factors": "disentanglement",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted(_HOME)


def paths_and_options(argv: list[str], names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The paths `names` that stand before or behind the options of a command line, and the options.

    With a call for help the paths may be missing. Raises UserError when they are not there.
    """
    flags = [i for i, word in enumerate(argv) if word.startswith("-")]
    before = argv[: flags[0]] if flags else argv
    behind = argv[-len(names) :]
    if len(before) == len(names):
        return before, argv[len(names) :]
    if not before and len(behind) == len(names) and not any(word.startswith("-") for word in behind):
        return behind, argv[: -len(names)]
    if "-h" in argv or "--help" in argv:
        return [""] * len(names), argv
    raise UserError(f"expected {' '.join(names)} before the options, found {' '.join(before) or 'nothing'}; see --help")
