"""K latent flows around any encoder and decoder: `FlowField(K, D)` moves latents, and has the loss that trains it.

Axes: T steps, B samples, K flows, D latent units.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError
from common.given import as_tensor, floats, function, whole
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
        if not (isinstance(count, int) and isinstance(dim, int)) or count < 1 or dim < 4 or dim % 2:
            raise UserError(
                f"FlowField({count!r}, {dim!r}): expected at least 1 flow, and a latent size even and at least 4"
            )
        super().__init__(count, dim, rotation)

    def stacked(self, steps: int, only: list[int] | None = None) -> StackedFlows:
        """The flows ready for the times 0..`steps`."""
        return self(torch.arange(steps + 1, device=self._weight.device), only)

    def coefficients(self, k: int | Tensor, batch: int, steps: int) -> Tensor:
        """What a flow number, numbers (B,), or weights (K,) or (T, K) mean: (T, B, K) at every step and sample.

        Raises UserError for numbers that are not 0..K-1 and for other shapes.
        """
        weight = self._weight
        k = as_tensor(k, "k").to(weight.device)
        if k.is_floating_point():
            if k.shape not in ((self.count,), (steps, self.count)):
                raise UserError(f"weights of shape {tuple(k.shape)}: expected ({self.count},) or (steps, that) = "
                                f"({steps}, {self.count})")  # fmt: skip
            return floats(k, "weights", k.shape, weight).expand(steps, -1)[:, None].expand(-1, batch, -1)
        if k.is_complex() or k.dtype == torch.bool or k.ndim > 1 or (k.ndim == 1 and len(k) != batch):
            raise UserError(
                f"k of shape {tuple(k.shape)} ({k.dtype}): expected a flow's number, or one for each sample"
            )
        if k.numel() and not 0 <= int(k.min()) <= int(k.max()) < self.count:
            raise UserError(f"k={k.tolist()}: the flows are 0 to {self.count - 1}")
        return constant_coefficients(k.long().expand(batch), self.count, steps, weight.dtype)

    def rollout(self, z: Tensor, k: int | Tensor, T: int = 8) -> Tensor:
        """Latents z (B, D) along flow k, T steps: z_0..z_T, (T + 1, B, D), differentiable.

        k: a number of 0..K-1, or one for each sample (B,); or weights, floats (K,) the same at all times or (T, K) a
        row a step: several at once superpose, other rows at other times switch. z and k may be arrays, too; the path is
        of the flows' float type. Raises UserError for what does not fit or is not finite.
        """
        z, T = floats(z, "latents", ("B", self.dim), self._weight), whole(T, "T")
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
        Raises UserError for frames, k, latents or logits that do not fit or are not finite. Source: Song et al.
        2023.
        """
        function(encode, "encode"), function(decode, "decode")
        typed = isinstance(frames, Tensor) and frames.is_floating_point()  # as encode wants it
        frames = as_tensor(frames, "frames")
        if frames.ndim < 3 or len(frames) < 2 or not frames.shape[1]:
            raise UserError(f"frames of shape {tuple(frames.shape)}: expected (T + 1, B, ...), T and B at least 1")
        frames = floats(frames, "frames", frames.shape, frames if typed else self._weight, (0, 1))
        steps, batch = len(frames) - 1, frames.shape[1]
        code = encode(frames[0])
        mean, *log_var = code if isinstance(code, (tuple, list)) else (code,)
        if len(log_var) > 1:
            raise UserError(f"encode gave {len(code)} values: expected latents, or mean and log-variance")
        mean = floats(mean, "latents", ("B", self.dim), self._weight)
        if len(mean) != batch:
            raise UserError(f"encode gave {len(mean)} latents for {batch} sequences")
        log_var = floats(*log_var, "log-variances", mean.shape, self._weight) if log_var else None
        z = mean if log_var is None else reparameterize(mean, log_var)
        c = self.coefficients(k, batch, steps)
        coefficients, flows = Coefficients(c, None if self.rotation is None else c), self.stacked(steps)
        path = rollout(flows, z, c, coefficients.c2, "none")
        logits = decode(path.z.flatten(0, 1))
        wanted = (len(frames) * batch, *frames.shape[2:])
        if not isinstance(logits, Tensor) or logits.shape != wanted:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"decode gave {found} for {wanted[0]} latents: each needs {wanted[1:]}")
        flat = (len(frames), batch, 1, 1, -1)
        losses = {
            "loss_recon": objective.reconstruction(logits.reshape(flat), frames.reshape(flat).to(logits)),
            "loss_kl0": z.new_zeros(()) if log_var is None else objective.gaussian_kl(mean, log_var).mean(),
            "loss_pde": objective.pde_loss(path, flows, coefficients),
        }
        return {"loss_total": sum(losses.values()), **losses}

    @property
    def _weight(self) -> Tensor:
        return self.MLP_SET[0].layer_x.weight
