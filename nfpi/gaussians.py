"""Class Gaussians in the latent space: KL divergences, class log-densities, the flow's loss, Bayes' rule.

K diagonal Gaussians N(mu_i, diag v_i), d dimensions. `v` is always a variance. Every fast form has its plain `_ref`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from common.errors import UserError

LOG_2PI = math.log(2 * math.pi)
MIN_STD = 1e-8  # below this a standard deviation counts as this, inside logarithms only


class ClassGaussians(nn.Module):
    """Means and variances of the K classes, (K, d) buffers: they follow the fixed point iteration, not a gradient.

    `shared`: the one-Gaussian methods, where every sample belongs to Gaussian 0.
    """

    def __init__(self, mean: Tensor, var: Tensor, shared: bool = False):
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("var", var.clone())
        self.shared = shared

    @torch.no_grad()
    def set(self, mean: Tensor, var: Tensor) -> None:
        """Replace the means and variances, rounded to the stored type."""
        self.mean.copy_(mean)
        self.var.copy_(var)

    def _rows(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.zeros_like(y) if self.shared else y
        return self.mean[y], self.var[y]

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """log N(z; mu_y, diag v_y): z (B, d), y (B,) -> (B,)."""
        mean, var = self._rows(y)
        return -0.5 * ((z - mean) ** 2 / var + var.log() + LOG_2PI).sum(1)

    def logits(self, z: Tensor) -> Tensor:
        """Log-density of every class: (B, d) -> (B, K)."""
        return class_log_prob(z, self.mean, self.var)

    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """z ~ N(mu_y, temperature^2 diag v_y): y (B,) -> (B, d)."""
        mean, var = self._rows(y)
        device = mean.device if generator is None else generator.device
        eps = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
        return mean + temperature * var.sqrt() * eps.to(mean.device)


def double(x: Tensor) -> Tensor:
    """float64, on the CPU where the device has no float64."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def kl_matrix(mean: Tensor, var: Tensor) -> Tensor:
    """KL(N_i || N_j) of all pairs in float64: (K, d), (K, d) -> (K, K); rows are the first argument.

    KL_ij = 1/2 sum_d [v_i/v_j + (mu_j - mu_i)^2/v_j - 1 + ln v_j - ln v_i], as matrix products of (K, d) tensors.
    """
    mean, var = double(mean), double(var)
    mean = mean - mean.mean(0)  # the expanded square cancels less
    precision, log_var = 1 / var, 2 * var.sqrt().clamp_min(MIN_STD).log()
    scaled = mean * precision  # mu_j / v_j
    quadratic = (var + mean**2) @ precision.T - 2 * mean @ scaled.T + (mean * scaled).sum(1)
    kl = 0.5 * (quadratic - mean.shape[1] + log_var.sum(1) - log_var.sum(1)[:, None])
    return kl.clamp_min(0).fill_diagonal_(0)


def kl_matrix_ref(mean: Tensor, var: Tensor) -> Tensor:
    """`kl_matrix` by torch.distributions, one row at a time."""
    rows = [kl_divergence(Normal(m, v.sqrt()), Normal(mean, var.sqrt())).sum(1) for m, v in zip(mean, var, strict=True)]
    return torch.stack(rows)


def off_diagonal(matrix: Tensor) -> Tensor:
    """The K (K - 1) entries off the diagonal."""
    return matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)]


def class_log_prob(z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """log N(z_b; mu_k, diag v_k) in float64 by two matrix products: (B, d), (K, d), (K, d) -> (B, K).

    Centred on the mean of the class means: with |mu| ~ 100 the expanded square would cancel badly.
    """
    z, mean, var = double(z), double(mean), double(var)
    centre = mean.mean(0)
    z, mean, precision = z - centre, mean - centre, 1 / var
    square = z**2 @ precision.T - 2 * z @ (mean * precision).T + (mean**2 * precision).sum(1)
    return -0.5 * (square + var.log().sum(1) + z.shape[1] * LOG_2PI)


def class_log_prob_ref(z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """`class_log_prob` by torch.distributions."""
    return Normal(mean, var.sqrt()).log_prob(z[:, None]).sum(2)


def dequantisation_log_det(dim: int, bits: int = 8) -> float:
    """-D ln(2^b / 2): the log-determinant of the map from grey levels (0..2^b) to [-1, 1]."""
    return -dim * math.log(2**bits / 2)


def negative_log_likelihood(log_prior: Tensor, log_det: Tensor, log_p: Tensor, dim: int, bits: int = 8) -> Tensor:
    """-log p(x | y) in nats a sample (B,): the class Gaussian, the flow, the split priors, the dequantisation."""
    return -(log_prior + log_det + log_p + dequantisation_log_det(dim, bits))


def bits_per_dim(nll: Tensor, dim: int) -> Tensor:
    """Nats a sample -> bits a dimension; `dim` is the image's C H W in every level method."""
    return nll / (dim * math.log(2))


def marginal_log_prior(logits: Tensor) -> Tensor:
    """log 1/K sum_k p(z | k): (B, K) -> (B,): the class-free density under a uniform prior."""
    return torch.logsumexp(logits, 1) - math.log(logits.shape[1])


def top_k_correct(logits: Tensor, y: Tensor, k: int) -> Tensor:
    """Whether the true class is among the `k` most probable (all of them when there are fewer): (B,) bool."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == y[:, None]).any(1)


@dataclass
class ClassMoments:
    """Count, mean and sum of squared deviations of every class, updated batch by batch in float64.

    `merge` joins the moments of two parts of the data (Chan, Golub & LeVeque, 1983), so that no latent has to be kept
    and several processes agree on the statistics of the whole set.
    """

    count: Tensor  # (K,)
    mean: Tensor  # (K, d)
    square: Tensor  # (K, d)

    @classmethod
    def empty(cls, classes: int, dim: int, device: torch.device | str = "cpu") -> "ClassMoments":
        """No data yet."""
        device = "cpu" if str(device).startswith("mps") else device
        zeros = torch.zeros(classes, dim, dtype=torch.float64, device=device)
        return cls(torch.zeros(classes, dtype=torch.float64, device=device), zeros, zeros.clone())

    @classmethod
    def of(cls, z: Tensor, y: Tensor, classes: int) -> "ClassMoments":
        """Moments of one batch: z (B, d), y (B,)."""
        z = double(z)
        one_hot = torch.nn.functional.one_hot(y.to(z.device), classes).to(z)  # (B, K)
        count = one_hot.sum(0)
        mean = one_hot.T @ z / count.clamp_min(1)[:, None]
        square = one_hot.T @ (z - mean[y.to(z.device)]) ** 2
        return cls(count, mean, square)

    def merge(self, other: "ClassMoments") -> "ClassMoments":
        """The moments of both parts together."""
        count = self.count + other.count
        share = (other.count / count.clamp_min(1))[:, None]
        delta = other.mean - self.mean
        square = self.square + other.square + delta**2 * share * self.count[:, None]
        return ClassMoments(count, self.mean + delta * share, square)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Class means and unbiased variances, (K, d) each. Raises UserError for a class with fewer than two samples."""
        short = (self.count < 2).nonzero().flatten().tolist()
        if short:
            raise UserError(
                f"class {short[0]} has {int(self.count[short[0]])} training image(s), a variance needs two: raise "
                "dataset_info.items_per_class_val, or check the data set's labels"
            )
        return self.mean, self.square / (self.count - 1)[:, None]
