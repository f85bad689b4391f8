"""K latent flows around any encoder and decoder: `FlowField(K, D)` moves latents, and has the loss that trains it.

Axes: T steps, B samples, K flows, D latent units.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError
from latent_flow import objective
from latent_flow.encoders import reparameterize
from latent_flow.fields import Flows, StackedFlows
from latent_flow.objective import Coefficients
from latent_flow.rollout import constant_coefficients, rollout


class FlowField(Flows):
    """K flows of latents of size D, even and at least 4: each the gradient of a potential u^k(z, t), learned.

    A step is z_t = z_{t-1} + grad u^k(z_{t-1}, t), t = 1..T. `rotation`: None, or "soft" or "divfree", which adds a
    rotational field to each. Raises UserError for other numbers. Source: Song et al., Flow Factorized Representation
    Learning, 2023, and Sparse Transformation Analysis, 2024 (the rotational fields).

        FlowField(3, 32).rollout(z, k=1, T=8)  # z (B, 32) -> (9, B, 32)
    """

    def __init__(self, count: int, dim: int, rotation: str | None = None):
        if count < 1 or dim < 4 or dim % 2:
            raise UserError(
                f"FlowField({count}, {dim}): expected at least 1 flow, and a latent size even and at least 4"
            )
        super().__init__(count, dim, rotation)

    def stacked(self, steps: int, only: list[int] | None = None) -> StackedFlows:
        """The flows ready for the times 0..`steps`."""
        return self(torch.arange(steps + 1, device=self.MLP_SET[0].layer_x.weight.device), only)

    def coefficients(self, k: int | Tensor, batch: int, steps: int) -> Tensor:
        """What a flow number, numbers (B,), or weights (K,) or (T, K) mean: (T, B, K) at every step and sample.

        Raises UserError for numbers that are not 0..K-1 and for other shapes.
        """
        weight = self.MLP_SET[0].layer_x.weight
        k = torch.as_tensor(k, device=weight.device)
        if k.is_floating_point():
            k = k.expand(steps, -1) if k.ndim == 1 else k
            if k.shape != (steps, self.count):
                raise UserError(f"weights {tuple(k.shape)}: expected ({self.count},) or (steps, that) = "
                                f"({steps}, {self.count})")  # fmt: skip
            return k.to(weight.dtype)[:, None].expand(-1, batch, -1)
        if k.dtype == torch.bool or k.ndim > 1 or (k.ndim == 1 and len(k) != batch):
            raise UserError(
                f"k of shape {tuple(k.shape)} ({k.dtype}): expected a flow's number, or one for each sample"
            )
        if not 0 <= int(k.min()) <= int(k.max()) < self.count:
            raise UserError(f"k={k.tolist()}: the flows are 0 to {self.count - 1}")
        return constant_coefficients(k.long().expand(batch), self.count, steps, weight.dtype)

    def rollout(self, z: Tensor, k: int | Tensor, T: int = 8) -> Tensor:
        """Latents z (B, D) along flow k, T steps: z_0..z_T, (T + 1, B, D), differentiable.

        k: a number of 0..K-1, or one for each sample (B,); or weights, floats (K,) the same at all times or (T, K) a
        row a step: several at once superpose, other rows at other times switch. Raises UserError for what does not fit.
        """
        self._check_latents(z)
        if T < 1:
            raise UserError(f"T={T}: at least one step")
        c = self.coefficients(k, len(z), T)
        return rollout(self.stacked(T), z, c, None if self.rotation is None else c, "none").z

    def loss(
        self, encode: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]], decode: Callable[[Tensor], Tensor],
        frames: Tensor, k: int | Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Losses of sequences frames (T + 1, B, ...) in [0, 1] that flow k moves; scalars, `loss_total` their sum.

        encode: the first frames (B, ...) -> z (B, D), or mean and log-variance of a posterior, (B, D) each, from which
        z is drawn; decode: latents (N, D) -> logits (N, ...). k: as in `rollout`. `loss_recon`: binary cross-entropy of
        all frames in nats, summed over a sequence; `loss_kl0`: KL from N(0, I), 0 without a posterior; `loss_pde`: the
        Hamilton-Jacobi residual, which makes the paths those of optimal transport. Means over the B sequences.
        Raises UserError for frames, k, latents or logits that do not fit. Source: Song et al. 2023.
        """
        if frames.ndim < 3 or len(frames) < 2 or not frames.is_floating_point():
            raise UserError(f"frames {tuple(frames.shape)} ({frames.dtype}): expected floats (T + 1, B, ...), T >= 1")
        if not bool(((frames >= 0) & (frames <= 1)).all()):
            raise UserError("frames must lie in [0, 1]; divide grey levels by 255")
        steps, batch = len(frames) - 1, frames.shape[1]
        code = encode(frames[0])
        mean, log_var = (code, None) if isinstance(code, Tensor) else code
        z = mean if log_var is None else reparameterize(mean, log_var)
        self._check_latents(z, batch)
        c = self.coefficients(k, batch, steps)
        coefficients, flows = Coefficients(c, None if self.rotation is None else c), self.stacked(steps)
        path = rollout(flows, z, c, coefficients.c2, "none")
        logits = decode(path.z.flatten(0, 1))
        if logits.shape != (frames.shape[0] * batch, *frames.shape[2:]):
            wanted = tuple(frames[0].shape[1:])
            raise UserError(f"decode gave {tuple(logits.shape)} for {len(frames) * batch} latents: each needs {wanted}")
        flat = (len(frames), batch, 1, 1, -1)
        losses = {
            "loss_recon": objective.reconstruction(logits.reshape(flat), frames.reshape(flat)),
            "loss_kl0": z.new_zeros(()) if log_var is None else objective.gaussian_kl(mean, log_var).mean(),
            "loss_pde": objective.pde_loss(path, flows, coefficients),
        }
        return {"loss_total": sum(losses.values()), **losses}

    def _check_latents(self, z: Tensor, batch: int | None = None) -> None:
        if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim != 2 or z.shape[1] != self.dim:
            found = f"{tuple(z.shape)} ({z.dtype})" if isinstance(z, Tensor) else type(z).__name__
            raise UserError(f"latents {found}: expected a tensor of floats (B, {self.dim})")
        if batch is not None and len(z) != batch:
            raise UserError(f"encode gave {len(z)} latents for {batch} sequences")
