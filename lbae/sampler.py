"""Random hyperplanes for Bernoulli latents: from the moments of the training codes to new codes, paths and attributes.

Every bit of the code is the side of a hyperplane on which a random direction falls; the normals are the rows of a
factor of the repaired, arcsine-inverted moment matrix. Everything here is float64 and batched.
Letters: N rows of codes, D bits, B batch, R columns of the factor (D + 1 or fewer), T steps of a path.
Plain transcriptions of the published routines are in `lbae.reference`; the tests hold the two against each other.
"""

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.given import as_tensor, classes, number, whole
from lbae.model import quantise

SPLITS = ("mean", "margin")
ATTR_MODES = ("conditional", "contrast")
RIDGE = 1e-3  # of the regression of a code on the unit normals
STEP, ROUNDS = 1.9, 100  # of its targets: the share of the excess that is added, below 2
NEGATIVE_ROUNDS = 10  # the published refinement of the negative group stops here
FLAT = 1e-7  # a smaller sine of the angle means (anti)parallel directions


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1, as int8."""
    return torch.where(x >= 0, 1, -1).to(torch.int8)


def moments(codes: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Mean (D,) and uncentred second moment (D, D) of codes (N, D) in {-1, +1}, float64, on their device.

    Codes in {0, 1} are mapped to 2z - 1. Sums of a chunk are exact integers, and float64 adds the chunks.
    Raises UserError when the codes are not binary (VAE latents, rounded latents).
    """
    zero_one, valid = False, codes.numel() > 0
    if valid:  # passes that make no tensor as large as the codes
        zero_one = int(torch.count_nonzero(codes)) < codes.numel()
        low, high = torch.aminmax(codes)
        whole = not codes.is_floating_point() or bool((codes == codes.round()).all())
        valid = whole and bool(low >= (0 if zero_one else -1)) and bool(high <= 1)
    if not valid:
        raise UserError("these codes are not bits (each -1 or +1, or each 0 or 1): hyperplanes sample nothing else")
    n, d = codes.shape
    total = torch.zeros(d, dtype=torch.float64, device=codes.device)
    product = torch.zeros(d, d, dtype=torch.float64, device=codes.device)
    for part in codes.split(chunk):
        z = part.to(torch.int8) * 2 - 1 if zero_one else part.to(torch.int8)
        total += z.float().sum(0)
        product += _gram(z)
    return total / n, product / n


def _gram(z: Tensor) -> Tensor:
    """z^T z of int8 codes, exact. A CPU multiplies bytes up to four times as fast as floats."""
    return torch._int_mm(z.T, z) if z.device.type == "cpu" else z.T.float() @ z.float()


def moment_matrix(mean: Tensor, second: Tensor) -> Tensor:
    """G (D+1, D+1): second moments of the code extended by a constant +1; the last row is (mean, 1)."""
    column = mean[:, None]
    one = torch.ones(1, 1, dtype=second.dtype, device=second.device)
    return torch.cat([torch.cat([second, column], 1), torch.cat([column.T, one], 1)])


@dataclass
class Hyperplanes:
    """Normals L (D+1, R); row D is the mean hyperplane. `eigenvalues` (D+1,) are those of the matrix before repair."""

    L: Tensor
    mean: Tensor | None = None  # (D,)
    eigenvalues: Tensor | None = None
    G: Tensor | None = field(default=None, repr=False)  # the moments aimed at

    @cached_property
    def H(self) -> Tensor:
        """The repaired matrix L L^T (D+1, D+1)."""
        return self.L @ self.L.T

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of the normals without the mean hyperplane (D, D)."""
        return self.H[:-1, :-1].contiguous()

    @cached_property
    def lengths(self) -> Tensor:
        """Lengths of the normals (D,)."""
        return self.L[:-1].norm(dim=1).clamp_min(1e-150)

    @cached_property
    def unit_gram(self) -> Tensor:
        """Inner products of the unit normals (D, D)."""
        return self.gram / (self.lengths[:, None] * self.lengths)

    @cached_property
    def ridge(self) -> Tensor:
        """Cholesky factor of `unit_gram` + RIDGE (D, D)."""
        diagonal = torch.full_like(self.lengths, RIDGE).diag()
        return torch.linalg.cholesky(self.unit_gram + diagonal)

    def moment_errors(self) -> tuple[float, float]:
        """Mean |error| of bit means and of second moments that the repair of H causes (0 when H needed none)."""
        scale = self.H.diagonal().clamp_min(1e-300).rsqrt()
        implied = 2 / torch.pi * torch.asin((scale[:, None] * self.H * scale).clamp(-1, 1))
        error = (implied - self.G).abs()
        return float(error[-1, :-1].mean()), float(error[:-1, :-1].mean())


def hyperplanes(mean: Tensor, second: Tensor) -> Hyperplanes:
    """Hyperplane normals from the moments of the codes: H = sin(pi/2 G) = L L^T.

    E[sign a sign b] = 2/pi asin(rho) for Gaussians, so H holds the correlations that give the moments G. H is rarely
    positive semi-definite for trained codes: negative eigenvalues are clipped. L is V sqrt(w) without the null space,
    not the published triangular factor: samples and paths depend on L L^T alone.
    """
    G = moment_matrix(mean.double(), second.double())
    L, eigenvalues = eigen_factor(torch.sin(torch.pi / 2 * G))
    return Hyperplanes(L, mean, eigenvalues, G)


def eigen_factor(A: Tensor) -> tuple[Tensor, Tensor]:
    """V sqrt(max(w, 0)) of the symmetric part of A (n, n), without its null columns, and the eigenvalues w (n,).

    L L^T is the nearest positive semi-definite matrix in the Frobenius norm (Higham 1988).
    """
    symmetric = (A + A.T) / 2
    if A.device.type == "cpu":  # numpy's LAPACK is the faster one here
        w, V = map(torch.from_numpy, np.linalg.eigh(symmetric.numpy()))
    else:
        w, V = torch.linalg.eigh(symmetric)
    keep = w > w.abs().max() * 1e-15
    return V[:, keep] * w[keep].sqrt(), w


def sample_cov(planes: Hyperplanes, normals: Tensor) -> Tensor:
    """Codes (B, D) int8 of Gaussian directions `normals` (B, R): the sides of all hyperplanes at once, each row flipped
    so that it lies on the positive side of the mean hyperplane.
    """
    b = sign(normals.to(planes.L) @ planes.L.T)  # (B, D+1)
    return (b * b[:, -1:])[:, :-1]


def unit(x: Tensor) -> Tensor:
    """`x` divided by its length along the last axis; a zero vector stays zero."""
    length = x.norm(dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1.0)


def slerp_weights(t: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (B, T) of both ends in a spherical interpolation at `t` (T,), from the cosine (B,) of their angle;
    linear for (anti)parallel ends.
    """
    omega = torch.arccos(cosine.clamp(-1, 1))[:, None]  # (B, 1)
    sine = torch.sin(omega)
    flat = sine.abs() < FLAT
    safe = torch.where(flat, 1.0, sine)
    low = torch.where(flat, 1 - t, torch.sin((1 - t) * omega) / safe)
    high = torch.where(flat, t.expand_as(low), torch.sin(t * omega) / safe)
    return low, high


def directions(planes: Hyperplanes, codes: Tensor, split: str = "margin") -> Tensor:
    """A unit direction (B, R) whose sides of the hyperplanes are close to each of `codes` (B, D) in {-1, +1}.

    `split="mean"` is the published rule: the difference of the mean normals of both groups of bits, each refined by
    giving its misplaced rows more weight. `split="margin"` is the ridge regression of the code on the unit normals,
    with targets that grow where they are exceeded. Both work on the Gram matrix: a round costs one product or solution.
    """
    if split not in SPLITS:
        raise UserError(f"split={split}: expected {' or '.join(SPLITS)}")
    codes, rows = codes.to(planes.L), planes.L[:-1]
    if split == "mean":
        return unit(_mean_split(planes, codes) @ rows)
    return unit(_margin_split(planes, codes) / planes.lengths @ rows)


def _lengths(coefficients: Tensor, products: Tensor) -> Tensor:
    """Lengths (B, 1) of coefficients @ rows, given products = coefficients @ Gram; 1 where they vanish."""
    lengths = torch.einsum("bd,bd->b", coefficients, products).clamp_min(0).sqrt()[:, None]
    return torch.where(lengths > 0, lengths, 1.0)


def _mean_split(planes: Hyperplanes, codes: Tensor) -> Tensor:
    """Coefficients (B, D) of unit(mean of the + rows, refined) - unit(mean of the - rows, refined)."""
    gram, positive = planes.gram, codes > 0
    products = positive.to(gram) @ gram
    products = torch.cat([products, gram.sum(0) - products])  # (2B, D): rows i and B + i belong to code i
    lenient = torch.arange(2 * len(codes), device=codes.device) >= len(codes)
    p, n = _refine(gram, torch.cat([positive, ~positive]), products, lenient).chunk(2)
    return p - n  # an empty group has weight 0, which leaves +- the mean of all rows


def _refine(gram: Tensor, groups: Tensor, products: Tensor, lenient: Tensor) -> Tensor:
    """Coefficients (M, D) of the best unit direction of each group of rows (M, D); products = groups @ gram.

    While a mean has rows on its wrong side, these rows are appended once more (their weight doubles) and the mean is
    taken anew; the number of misplaced rows, copies counted, must fall. A `lenient` group may also keep it, for
    `NEGATIVE_ROUNDS` rounds.
    """
    weights = groups.to(gram.dtype)
    best = torch.zeros_like(weights)
    lowest = torch.full((len(groups),), torch.inf, dtype=gram.dtype, device=gram.device)
    active = torch.arange(len(groups), device=gram.device)
    for rounds in itertools.count(1):
        extra = ((products < 0) & groups[active]) * weights  # the rows to append
        misplaced, slack = extra.sum(1), lenient[active]
        better = (misplaced < lowest[active]) | (slack & (misplaced == lowest[active]))
        lowest[active[better]] = misplaced[better]
        best[active[better]] = weights[better] / _lengths(weights[better], products[better])
        on = better & (misplaced > 0)
        if rounds >= NEGATIVE_ROUNDS:
            on &= ~slack
        if not on.any():
            return best
        active, extra = active[on], extra[on]
        weights, products = weights[on] + extra, torch.addmm(products[on], extra, gram)


def _margin_split(planes: Hyperplanes, codes: Tensor) -> Tensor:
    """Coefficients (B, D) on the unit rows of a direction on the side `codes` (B, D) of every row, where there is one.

    Ho and Kashyap (1965): the ridge regression of the code, whose targets, margins of 1 at first, grow to whatever the
    fit exceeds them by, so that rows which are right no longer hold back those which are not. The targets with the
    fewest wrong signs win; a code leaves as soon as every sign is right, or after ROUNDS rounds.
    """
    margins, best = torch.ones_like(codes), torch.zeros_like(codes)
    fewest = torch.full((len(codes),), torch.inf, dtype=codes.dtype, device=codes.device)
    active = torch.arange(len(codes), device=codes.device)
    for _ in range(ROUNDS):
        target = margins * codes[active]
        solved = torch.cholesky_solve(target.T, planes.ridge).T
        fit = codes[active] * (target - RIDGE * solved)  # = solved @ unit_gram
        wrong = (fit <= 0).sum(1).to(codes.dtype)
        better = wrong < fewest[active]
        fewest[active[better]], best[active[better]] = wrong[better], solved[better]
        on = wrong > 0
        if not on.any():
            break
        active, margins = active[on], (margins + STEP * (fit - margins).clamp_min(0))[on]
    return best


def interpolate(
    planes: Hyperplanes, begin: Tensor, end: Tensor, steps: int, split: str = "margin"
) -> tuple[Tensor, Tensor]:
    """Paths (B, steps + 2, D) int8 from `begin` to `end` (B, D): begin, `steps` codes of the slerp, end.

    Also Hamming distances (B, steps, 2) of each step to the codes of both end directions. No mean flip. The first and
    last step are the end directions' own codes; one step alone is the middle. Raises UserError for steps < 1.
    """
    if steps < 1:
        raise UserError(f"interpolate_steps={steps}: at least one step is needed")
    ends = directions(planes, torch.cat([begin, end]), split)
    bm, em = ends.chunk(2)  # (B, R)
    rows = planes.L[:-1]
    at_begin, at_end = bm @ rows.T, em @ rows.T  # (B, D)
    spaced = torch.linspace(0, 1, steps, dtype=bm.dtype, device=bm.device)
    t = spaced if steps > 1 else torch.full_like(spaced, 0.5)
    a, b = slerp_weights(t, (bm * em).sum(-1))
    # a slerp is a combination of its ends, and so are its projections on the normals: no product with L a step
    path = sign(a[..., None] * at_begin[:, None] + b[..., None] * at_end[:, None])  # (B, T, D)
    hamming = torch.stack([(path != sign(side)[:, None]).sum(-1) for side in (at_begin, at_end)], -1)
    codes = torch.cat([begin[:, None].to(torch.int8), path, end[:, None].to(torch.int8)], 1)
    return codes, hamming


def choose_pairs(rng: np.random.Generator | np.random.RandomState, n: int, pairs: int) -> np.ndarray:
    """(pairs, 2) distinct rows of n. Raises UserError when 2 pairs > n."""
    if 2 * pairs > n:
        raise UserError(f"{pairs} pairs need {2 * pairs} latent rows, there are {n}; lower batch_size_test")
    return rng.choice(n, (pairs, 2), replace=False)


def attribute_mean(codes: Tensor, labels: Tensor, attribute: int, mode: str = "conditional") -> Tensor:
    """Mean code (D,) float64 of the rows with the attribute; minus the mean of all rows in mode "contrast".

    labels: (N, 40) of 0/1, of which column `attribute` counts, or (N,) / (N, 1) classes, equal to `attribute`.
    Raises UserError when no row has the attribute or the index does not exist.
    """
    if mode not in ATTR_MODES:
        raise UserError(f"attr_mode={mode}: expected {' or '.join(ATTR_MODES)}")
    labels = labels.reshape(len(labels), -1)
    if labels.shape[1] > 1:
        if not 0 <= attribute < labels.shape[1]:
            raise UserError(f"no attribute {attribute}: there are {labels.shape[1]}, counted from 0")
        rows = labels[:, attribute] == 1
    else:
        rows = labels[:, 0] == attribute
    if not bool(rows.any()):
        raise UserError(f"no training latent has the attribute or class {attribute}; take another one")
    chosen = codes[rows.to(codes.device)].double().mean(0)
    return chosen - codes.double().mean(0) if mode == "contrast" else chosen


def set_attribute(codes: Tensor, mean: Tensor, threshold: float = 0.12) -> Tensor:
    """`codes` (B, D) with the bits forced to +1 where `mean` (D,) > threshold and to -1 where it is < -threshold."""
    forced = (mean > threshold).to(codes.dtype) - (mean < -threshold).to(codes.dtype)
    return torch.where(forced == 0, codes, forced)


def fair_bits(shape: tuple[int, int], generator: torch.Generator, low: float = -1, high: float = 1, decimals: int = -1):
    """Codes (B, D) float32 from uniform draws in [-1, 1), clamped to [low, high] and rounded as the model's quantiser
    does: fair coins by default.
    """
    return quantise((torch.rand(shape, generator=generator) * 2 - 1).clamp(low, high), decimals)


def independent_bits(mean: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Codes (count, D) int8 whose bits are independent with the given means (D,): a baseline without correlations."""
    draws = torch.rand((count, len(mean)), generator=generator, dtype=torch.float64)
    return torch.where(draws < (1 + mean.double().cpu()) / 2, 1, -1).to(torch.int8)


class HyperplaneSampler:
    """Random hyperplanes fitted to binary codes: new codes, paths between codes, attributes.

    Codes are (N, D) with entries -1 and +1, or 0 and 1 (bool, too), as numpy arrays or tensors. What comes back is like
    the codes of `fit`: array or tensor, entries, dtype, device. `split`: how a direction is found for a code, "margin"
    or "mean" (published), see `directions`. `mean` (D,) and `planes` (a `Hyperplanes`) are what was fitted.
    Every method raises UserError for codes that are not bits or of another width, and before `fit`.
    Source: Fajtl et al., ICML 2020.

        HyperplaneSampler().fit(codes).sample(16, rng=0)  # (16, D)
    """

    def __init__(self, split: str = "margin"):
        if split not in SPLITS:
            raise UserError(f"split={split}: expected {' or '.join(SPLITS)}")
        self.split, self.planes = split, None

    def fit(self, codes: np.ndarray | Tensor, labels: Any = None) -> Self:
        """Fit the hyperplanes to the moments of codes (N, D); the work grows with N D^2 + D^3.

        labels, for `set_attribute`: a class of each code (N,), numbers or text, or a table of 0/1 (N, A), a column an
        attribute.
        """
        self._numpy = not isinstance(codes, Tensor)
        tensor = _numbers(codes)
        if tensor.ndim != 2 or not tensor.numel():
            raise UserError(f"codes of shape {tuple(tensor.shape)}: expected (N, D), at least one of each")
        self._dtype, self._zero = tensor.dtype, -1
        if bool((tensor == 0).any()):
            self._zero = 0
        tensor = tensor.to(torch.int8) if tensor.dtype == torch.bool else tensor
        self.mean, second = moments(tensor)
        self.planes = hyperplanes(self.mean, second)
        self._codes = self._labels = self._classes = None
        self._means: dict[tuple[Any, str], Tensor] = {}
        if labels is not None:
            self._take_labels(tensor, labels)
        return self

    def _take_labels(self, codes: Tensor, labels: Any) -> None:
        table = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if table.ndim not in (1, 2) or len(table) != len(codes) or not table.size:
            raise UserError(f"labels of shape {table.shape} for {len(codes)} codes: expected (N,) or (N, A)")
        if table.ndim == 1 or table.shape[1] == 1:
            self._classes, table, _ = classes(table.reshape(-1))
        elif not np.isin(table, (0, 1)).all():
            raise UserError("a table of attributes holds 0 and 1 only; give classes as (N,)")
        self._codes, self._labels = codes, torch.from_numpy(table.astype(np.int64))

    def sample(self, n: int, rng: Any = None) -> np.ndarray | Tensor:
        """n new codes (n, D) with the first and second moments of the fitted ones, as far as their repair allows
        (`planes.moment_errors()`). rng: a seed, a numpy or a torch generator; None: fresh random numbers.
        """
        planes = self._fitted()
        shape = whole(n, "n"), planes.L.shape[1]
        if isinstance(rng, torch.Generator):
            normals = torch.randn(shape, generator=rng, dtype=torch.float64, device=rng.device)
        else:
            try:
                generator = np.random.default_rng(rng)
            except (TypeError, ValueError) as error:
                raise UserError(f"rng {rng!r}: expected a seed, a numpy or a torch generator") from error
            normals = torch.from_numpy(generator.standard_normal(shape))
        return self._back(sample_cov(planes, normals))

    def interpolate(self, begin: np.ndarray | Tensor, end: np.ndarray | Tensor, steps: int = 8) -> np.ndarray | Tensor:
        """Paths (B, steps + 2, D) of codes from each of `begin` to each of `end` (B, D), both included; without B for
        two single codes (D,).
        """
        first, last, steps = self._signs(begin, "begin"), self._signs(end, "end"), whole(steps, "steps")
        if first.shape != last.shape:
            raise UserError(f"begin {tuple(first.shape)} and end {tuple(last.shape)} differ in shape")
        single = first.ndim == 1
        path = interpolate(self._fitted(), first.view(-1, len(self.mean)), last.view(-1, len(self.mean)), steps,
                           self.split)[0]  # fmt: skip
        return self._back(path[0] if single else path)

    def attribute_mean(self, attribute: Any, mode: str = "conditional") -> Tensor:
        """Mean code (D,) float64, in [-1, 1], of the fitted codes with an attribute: a label of `fit`, or the number of
        a column; in mode "contrast" minus the mean of all, in [-2, 2]. Raises UserError for one that no code has.
        """
        self._fitted()
        if self._codes is None:
            raise UserError("attributes need labels: fit(codes, labels)")
        if self._classes is not None:
            known = self._classes.tolist()
            if attribute not in known:
                few = ", ".join(map(str, known[:10]))
                raise UserError(f"no training latent has the attribute or class {attribute!r}; known: {few}")
            attribute = known.index(attribute)
        elif not isinstance(attribute, Integral):
            raise UserError(f"no attribute {attribute!r}: there are {self._labels.shape[1]}, counted from 0")
        if (attribute, mode) not in self._means:
            mean = attribute_mean(self._codes, self._labels, attribute, mode)
            # the mean of bits 0 and 1 is that of -1 and +1 halved and moved
            self._means[attribute, mode] = mean if self._zero == -1 else 2 * mean - float(mode == "conditional")
        return self._means[attribute, mode]

    def set_attribute(
        self, codes: np.ndarray | Tensor, attribute: Any, threshold: float = 0.12, mode: str = "conditional"
    ) -> np.ndarray | Tensor:
        """`codes` (B, D) with the bits that go with an attribute forced: to +1 where its mean code exceeds `threshold`,
        to -1 (0) below -threshold. attribute, mode: as in `attribute_mean`.
        """
        mean, threshold = self.attribute_mean(attribute, mode), number(threshold, "threshold")
        return self._back(set_attribute(self._signs(codes, "codes"), mean, threshold))

    def _fitted(self) -> Hyperplanes:
        if self.planes is None:
            raise UserError("this sampler is not fitted: call fit(codes) first")
        return self.planes

    def _signs(self, codes: np.ndarray | Tensor, name: str) -> Tensor:
        """Codes (..., D) as -1 and +1, int8, where the hyperplanes are."""
        planes, tensor = self._fitted(), _numbers(codes)
        if tensor.ndim not in (1, 2) or tensor.shape[-1] != len(self.mean):
            raise UserError(f"{name} of shape {tuple(tensor.shape)}: expected (B, {len(self.mean)}), the fitted width")
        if not bool(((tensor == 1) | (tensor == self._zero)).all()):
            raise UserError(f"{name}: expected bits {self._zero} and 1, as those of fit")
        return torch.where(tensor == 1, 1, -1).to(planes.L.device, torch.int8)

    def _back(self, signs: Tensor) -> np.ndarray | Tensor:
        """Codes -1 and +1 in the form of those of `fit`."""
        codes = (signs if self._zero == -1 else signs > 0).to(self._dtype)
        return codes.cpu().numpy() if self._numpy else codes


def _numbers(codes: Any) -> Tensor:
    """Codes as a tensor. Raises UserError for what holds no numbers."""
    tensor = as_tensor(codes, "codes").detach()
    if tensor.is_complex() or tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise UserError(f"codes of {tensor.dtype}: expected bool, uint8, signed integers or floats")
    return tensor
