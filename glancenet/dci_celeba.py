"""The linear DCI that GlanceNets report on CelebA: alignment, completeness and explicitness of latents and attributes.

The published recipe. Its input is what a run saves in eval_results/latents_obtained.npy: sigmoids of latents sampled
from the posterior, not means.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import Lasso, LogisticRegression

from common.errors import UserError
from common.metrics.disentanglement import GUESSING_MSE, Arrays, completeness_of, disentanglement_of
from common.metrics.disentanglement_points import check_varies
from glancenet.labels import CELEBA_HAIR


def celeba_categories(values: np.ndarray, hair: Sequence[int] = CELEBA_HAIR) -> np.ndarray:
    """(n, k) -> (n, k - 4): the five hair columns become one, their argmax 0..4, in front of all others in order."""
    hair = list(hair)
    return np.column_stack([values[:, hair].argmax(axis=1), np.delete(values, hair, axis=1)]).astype(np.float64)


def _l1_logistic() -> LogisticRegression:
    # `penalty` is deprecated since scikit-learn 1.8, and `l1_ratio` means nothing to liblinear before it
    new = LogisticRegression().get_params()["penalty"] == "deprecated"
    lasso = {"l1_ratio": 1.0} if new else {"penalty": "l1"}
    # the usual tolerance, 1e-4, leaves weights that move by 1e-3 of the largest with the solver's seed
    return LogisticRegression(C=100, solver="liblinear", tol=1e-6, max_iter=10_000, random_state=0, **lasso)


def dci_celeba(
    codes: np.ndarray, concepts: np.ndarray, hair: Sequence[int] = CELEBA_HAIR
) -> dict[str, float | np.ndarray]:
    """Alignment, completeness (0..1) and explicitness (<= 1) of codes (n, D) and concepts (n, k) in {0, 1}, D >= k.

    codes: sigmoids of sampled latents, the first k of them supervised by the concepts; all D count, the free ones too.
    Rows without exactly one hair colour are dropped. Lasso (0.01) for the hair index, l1 logistic regression (C = 100)
    for the other concepts; importance = |coefficient| + 1e-7; explicitness = 1 - 6 MSE of the predictions on the same
    rows. Also returns `importance` (D - 4, k - 4). Raises UserError for shapes that do not fit and constant concepts.
    """
    points = Arrays(codes, concepts)
    if points.codes.shape[1] < points.num_factors:
        raise UserError(f"codes has {points.codes.shape[1]} columns, fewer than the {points.num_factors} concepts")
    if max(hair) >= points.num_factors:
        raise UserError(f"hair columns {list(hair)} do not fit {points.num_factors} concepts")
    one_colour = points.factors[:, list(hair)].sum(axis=1) == 1
    if not one_colour.any():
        raise UserError(f"no row has exactly one of the hair concepts {list(hair)}")
    z, g = celeba_categories(points.codes[one_colour], hair), celeba_categories(points.factors[one_colour], hair)
    check_varies(g, " among the rows with one hair colour")
    weights, errors = [], []
    for factor, target in enumerate(g.T):
        model = (Lasso(alpha=0.01) if factor == 0 else _l1_logistic()).fit(z, target)
        weights.append(np.abs(model.coef_).ravel() + 1e-7)
        errors.append(np.mean((model.predict(z) - target) ** 2))
    importance = np.stack(weights, axis=1)
    return {
        "alignment": disentanglement_of(importance)[0],
        "completeness": completeness_of(importance)[0],
        "explicitness": float(1 - np.mean(errors) / GUESSING_MSE),
        "importance": importance,
    }
