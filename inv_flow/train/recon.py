"""The reconstruction loss that teaches self-normalising layers their inverse (Keller et al., 2021), with GECO."""

from typing import Any

import torch
from torch import Tensor

from common.launch import Distributed
from inv_flow.layers.selfnorm import SelfNormConv
from inv_flow.train.config import Config


class ReconstructionLoss:
    """sum over `layers` of lambda mean_B ||x - R W x||^2 on the inputs x of their last training pass.

    lambda is `recon_loss_weight`; with `recon_loss_lr` > 0 each layer's lambda grows by GECO:
    lambda <- lambda exp(recon_loss_lr * average), `average` the loss's moving average with decay `recon_alpha`.
    Nothing here waits for the device.
    """

    def __init__(self, layers: list[SelfNormConv], config: Config, dist: Distributed):
        self.config, self.dist = config, dist
        self.layers = layers if config.add_recon_grad else []
        self.weight = torch.full((len(self.layers),), config.recon_loss_weight, device=dist.device)
        self.average = torch.zeros(len(self.layers), device=dist.device)
        self._inputs: dict[SelfNormConv, Tensor] = {}
        for layer in self.layers:
            layer.register_forward_pre_hook(self._remember)
        if not config.add_recon_grad and not config.modified_grad:
            for layer in layers:  # nothing trains R then, and data-parallel training wants a gradient in all it trains
                layer.inverse.requires_grad_(False)

    def _remember(self, layer: SelfNormConv, inputs: tuple) -> None:
        if layer.training and torch.is_grad_enabled():
            self._inputs[layer] = inputs[0].detach()

    def __call__(self) -> Tensor | float:
        """The loss of the last training pass (a scalar), with GECO's update of lambda after it."""
        if not self.layers:
            return 0.0
        config = self.config
        losses = torch.stack(
            [
                layer.reconstruction_loss(self._inputs.pop(layer), config.sym_recon_grad, config.only_R_recon)
                for layer in self.layers
            ]
        )
        total = (self.weight.clone() * losses).sum()  # changed in its place below
        if config.recon_loss_lr > 0:
            mean = self.dist.mean(losses.detach())
            self.average.copy_(config.recon_alpha * self.average + (1 - config.recon_alpha) * mean)
            self.weight.mul_(torch.exp(config.recon_loss_lr * self.average))
        return total

    def state_dict(self) -> dict[str, Any]:
        """GECO's state."""
        return {"weight": self.weight, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.weight.copy_(state["weight"])
        self.average.copy_(state["average"])
