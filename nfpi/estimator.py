"""The fixed point iteration as a scikit-learn classifier: a Gaussian a class, moved apart, for any labelled latents."""

import warnings
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from common.errors import UserError
from common.given import number, whole
from nfpi.fpi import FixedPoint, solve
from nfpi.gaussians import ClassGaussians, ClassMoments


class BadInput(UserError, ValueError):
    """A `UserError` that is the ValueError which scikit-learn's users expect."""


class FixedPointGaussians(ClassifierMixin, BaseEstimator):
    """Diagonal Gaussians, one a class, at the fixed point of likelihood and mutual divergence; Bayes' rule; samples.

    `fit` starts at the class means and unbiased variances of z and iterates `nfpi.fpi.solve`. strength: lambda, how
    hard classes push each other away; 0 leaves the class statistics (Gaussian naive Bayes with equal priors). It has
    z's scale: 10 is for standardised z, the published 500,000 for a flow's latents with means of hundreds. The other
    arguments are those of `nfpi.fpi.FixedPoint`, but start_variance: variance to start from, else the classes' own; and
    min_variance: a class's own variances count as this at least (a feature may be constant in a class).

    After `fit`, in the type of z (float32, else float64): classes_ (K,), means_ and variances_ (K, d), n_iter_,
    converged_, and history_, a dictionary of changes and KL divergences an iteration.
    Raises ValueError for z that is not a finite (n, d) table or hardly varies (standardise it), for one class, and for
    a class with one sample; warns (ConvergenceWarning) when max_iters end the iteration. Source: Enescu & Sahbi, BMVC
    2024.

        FixedPointGaussians().fit(z, y).predict(z)  # labels (n,)
    """

    def __init__(
        self, strength: float = 10.0, *, means: bool = True, variances: bool = False, isotropic: bool = True,
        sum_trick: bool = True, exp_den_update: bool = True, alpha: float = 10.0, variance_update: str = "upstream",
        damping: float = 0.5, max_iters: int = 1000, epsilon: float = 1e-3, start_variance: float | None = None,
        min_variance: float = 1e-3,
    ):  # fmt: skip
        self.strength, self.means, self.variances = strength, means, variances
        self.isotropic, self.sum_trick, self.exp_den_update = isotropic, sum_trick, exp_den_update
        self.alpha, self.variance_update, self.damping = alpha, variance_update, damping
        self.max_iters, self.epsilon = max_iters, epsilon
        self.start_variance, self.min_variance = start_variance, min_variance

    def _settings(self) -> FixedPoint:
        names = set(FixedPoint.__dataclass_fields__)
        try:
            for name in ("strength", "epsilon", "damping"):
                number(getattr(self, name), name)
            for name in ["alpha", "min_variance"] + ["start_variance"] * (self.start_variance is not None):
                number(getattr(self, name), name, above=True)
            whole(self.max_iters, "max_iters")
            return FixedPoint(**{name: value for name, value in self.get_params().items() if name in names})
        except UserError as error:
            raise BadInput(str(error)) from error

    def fit(self, X: Any, y: Any) -> Self:
        """Place the Gaussians for latents X (n, d) with labels y (n,), numbers or text; at least two of each class."""
        settings = self._settings()
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.classes_, index, counts = np.unique(y, return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise BadInput(f"only one class ({self.classes_[0]}) in y: the iteration separates classes, it needs two")
        if counts.min() < 2:
            lonely = self.classes_[counts.argmin()]
            raise BadInput(f"class {lonely} has 1 sample, a variance needs two: leave it out or add samples")
        z = _tensor(X)
        spread = float(z.double().var(0).max())
        if not max(self.min_variance, self.epsilon**2) < spread < torch.finfo(z.dtype).max:
            raise BadInput(f"the variances of z are {spread:.3g} at most, beyond what min_variance={self.min_variance} "
                           f"and epsilon={self.epsilon} resolve: standardise z")  # fmt: skip
        mean, var = ClassMoments.of(z, torch.from_numpy(index), len(counts)).statistics()
        var = var.clamp_min(self.min_variance)
        start = var if self.start_variance is None else torch.full_like(var, self.start_variance)
        result = solve(mean, var, mean.to(z), start.to(z), settings)
        if not result.converged:
            why = "the next iterate is not finite" if result.non_finite else f"after {result.iterations} iterations"
            warnings.warn(
                f"the fixed point iteration has not converged ({why}); lower strength={self.strength:g}, raise "
                "max_iters, or standardise the latents", ConvergenceWarning, stacklevel=2,
            )  # fmt: skip
        self.means_, self.variances_ = result.mean.numpy(), result.var.numpy()
        self.n_iter_, self.converged_, self.history_ = result.iterations, result.converged, result.history
        self.non_finite_ = result.non_finite
        return self

    @property
    def gaussians(self) -> ClassGaussians:
        """The fitted Gaussians as tensors."""
        check_is_fitted(self)
        return ClassGaussians(torch.from_numpy(self.means_), torch.from_numpy(self.variances_))

    def log_likelihood(self, X: Any) -> np.ndarray:
        """log p(x | class) in nats, (n, K) float64, of X (n, d). Raises ValueError where it is beyond float64."""
        gaussians = self.gaussians
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        found = gaussians.logits(_tensor(X)).numpy()
        if not np.isfinite(found).all():
            raise BadInput(f"z reaches {np.abs(X).max():.3g}, too far from the Gaussians: its density is 0")
        return found

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class (n,) of X (n, d), classes equally likely before."""
        best = self.log_likelihood(X).argmax(1)
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """p(class | x), (n, K) float64, by Bayes' rule; columns in the order of classes_."""
        return torch.softmax(torch.from_numpy(self.log_likelihood(X)), 1).numpy()

    def sample(self, y: Any, temperature: float = 1.0, random_state: Any = None) -> np.ndarray:
        """Latents (n, d) of the classes y (n,): z ~ N(mu_y, temperature^2 diag v_y). random_state: a seed or None.

        Raises ValueError for a label that `fit` has not seen, and for a temperature that is not finite or below 0.
        """
        gaussians, y = self.gaussians, np.atleast_1d(np.asarray(y))
        try:
            temperature = number(temperature, "temperature")
        except UserError as error:
            raise BadInput(str(error)) from error
        unknown = ~np.isin(y, self.classes_)
        if y.ndim != 1 or not len(y) or unknown.any():
            found = y[unknown][:3].tolist() if y.ndim == 1 else f"shape {y.shape}"
            raise BadInput(f"y: expected labels (n,) of {self.classes_.tolist()[:10]}, found {found}")
        generator = torch.Generator().manual_seed(int(check_random_state(random_state).randint(2**31 - 1)))
        rows = torch.from_numpy(np.searchsorted(self.classes_, y))
        return gaussians.sample(rows, temperature, generator).numpy()


def _tensor(X: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.require(X, requirements=["C", "W"]))  # a read-only array is copied
