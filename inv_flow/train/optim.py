"""Optimisers and learning-rate schedules by the names of the configuration."""

from typing import Any

import torch
from torch import nn

from inv_flow.layers.inv_conv import InverseConv2d
from inv_flow.train.config import Config


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimiser that `config` names; inverse-convolution kernels take `lr_inv_conv` times the learning rate."""
    kernels = [m.weight for m in model.modules() if isinstance(m, InverseConv2d)]
    taken = {id(p) for p in kernels}
    groups = [{"params": [p for p in model.parameters() if id(p) not in taken], "lr": config.lr}]
    if kernels:
        groups.append({"params": kernels, "lr": config.lr * config.lr_inv_conv})
    kinds = {"Adam": torch.optim.Adam, "Adamax": torch.optim.Adamax, "SGD": torch.optim.SGD}
    options: dict[str, Any] = {"momentum": 0.95} if config.optimizer_name == "SGD" else {}
    if config.optimizer_name != "Adamax" and {p.device.type for p in model.parameters()} <= {"cpu", "cuda"}:
        options["fused"] = True  # one pass over all weights instead of one an operation
    groups = [group for group in groups if group["params"]]
    return kinds[config.optimizer_name](groups, lr=config.lr, weight_decay=config.weight_decay, **options)


def make_scheduler(optimizer: torch.optim.Optimizer, config: Config) -> Any:
    """The learning-rate schedule that `config` names (a step an epoch), or None."""
    schedulers = torch.optim.lr_scheduler
    if config.scheduler_name == "Step":
        return schedulers.StepLR(optimizer, config.step_epochs, config.gamma)
    if config.scheduler_name == "Exponential":
        return schedulers.ExponentialLR(optimizer, config.gamma)
    if config.scheduler_name == "MultiStep":
        return schedulers.MultiStepLR(optimizer, list(config.milestones), config.gamma)
    return None
