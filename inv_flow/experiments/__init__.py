"""What the published experiments share; each file of this folder is its difference from one of these."""

from typing import Any

SNF: dict[str, Any] = {"scheduler_name": "none", "epochs": 10_000}  # as Self Normalizing Flows trained
GLOW = SNF | {"activation": "Identity", "inv_conv": False, "warmup_epochs": 10}
NO_COUPLING = {
    "coupling_width": 0, "actnorm": False, "first_squeeze": False, "split_prior": False, "last_activation": False,
}  # fmt: skip
CNN = SNF | NO_COUPLING
INVERSE = {"order": "TL", "lr": 1e-5, "scheduler_name": "Exponential", "gamma": 0.9997}
COLOUR = INVERSE | {
    "lr": 1e-4, "epochs": 10_000, "n_bins": 10, "individual_weights": False, "actnorm": False, "last_activation": False,
}  # fmt: skip
FINC = {
    "ff": True, "inv_conv": False, "lr": 1e-5, "scheduler_name": "Exponential", "gamma": 0.9997, "epochs": 10_000,
    "last_activation": False,
}  # fmt: skip
CIFAR = {"dataset": "cifar10", "data_aug": True}
IMAGENET = {"dataset": "imagenet32"}
