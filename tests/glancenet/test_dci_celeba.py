"""The CelebA recipe against the published function's values and against codes whose score is known."""

import numpy as np
import pytest
from golden_cases import load
from sklearn.linear_model import Lasso, LogisticRegression

from common.errors import UserError
from common.metrics import disentanglement as dis
from glancenet.dci_celeba import celeba_categories, dci_celeba
from glancenet.labels import CELEBA_HAIR as HAIR


def planted(rng, rows=800):
    """Concepts (rows, 10) with one hair colour a row, and codes that are the concepts with a little noise."""
    concepts = rng.integers(0, 2, size=(rows, 10))
    concepts[:, HAIR] = np.eye(5, dtype=int)[rng.integers(0, 5, size=rows)]
    return concepts, np.clip(concepts + 0.05 * rng.normal(size=concepts.shape), 0, 1)


def test_the_published_values():
    golden = load("glancenet", "metric_dci_linear")
    hair = golden["hair_columns"]
    one_colour = golden["g"][:, hair].sum(axis=1) == 1
    np.testing.assert_array_equal(celeba_categories(golden["z"][one_colour], hair), golden["z_cat"])
    np.testing.assert_array_equal(celeba_categories(golden["g"][one_colour], hair), golden["g_cat"])
    scores = dci_celeba(golden["z"], golden["g"], hair)
    # the stored weights come from a solver that stops early: up to 0.007 from the optimum, where the largest weight is
    # about 13, so the tolerance is relative to the largest
    largest = golden["importance"].max()
    np.testing.assert_allclose(scores["importance"], golden["importance"], rtol=0, atol=1e-3 * largest)
    for key in ("alignment", "completeness", "explicitness"):
        assert scores[key] == pytest.approx(float(golden[key]), abs=1e-3)
    per_latent = dis.disentanglement_of(scores["importance"])[1]
    np.testing.assert_allclose(per_latent, golden["alignment_per_latent"], rtol=0, atol=1e-3)
    per_factor = dis.completeness_of(scores["importance"])[1]
    np.testing.assert_allclose(per_factor, golden["completeness_per_factor"], rtol=0, atol=1e-3)


def published_recipe(z, g):
    """(alignment, completeness, explicitness), step by step."""
    z, g = z[g[:, HAIR].sum(1) == 1], g[g[:, HAIR].sum(1) == 1]
    others = [column for column in range(z.shape[1]) if column not in HAIR]
    z = np.column_stack([z[:, HAIR].argmax(1), z[:, others]])
    g = np.column_stack([g[:, HAIR].argmax(1), g[:, [column for column in others if column < g.shape[1]]]])
    weights, errors = np.zeros((z.shape[1], g.shape[1])), []
    for j in range(g.shape[1]):
        l1 = LogisticRegression(C=100, l1_ratio=1, solver="liblinear", tol=1e-6, max_iter=10_000, random_state=0)
        model = (Lasso(alpha=0.01) if j == 0 else l1).fit(z, g[:, j])
        weights[:, j] = np.abs(model.coef_)
        errors.append(np.mean((model.predict(z) - g[:, j]) ** 2))
    weights += 1e-7
    values = []
    for matrix in (weights, weights.T):
        shares = matrix / matrix.sum(1, keepdims=True)
        entropy = -(shares * np.log(shares)).sum(1) / np.log(matrix.shape[1])
        values.append(matrix.sum(1) / matrix.sum() @ (1 - entropy))
    return *values, 1 - 6 * np.mean(errors)


def test_free_latents_count():
    """64 latents, 54 of them free and full of concepts: the published recipe sees every one of them."""
    rng = np.random.default_rng(0)
    concepts, codes = planted(rng, 600)
    codes = np.clip(codes + 0.5 * rng.normal(size=codes.shape), 0, 1)
    free = concepts @ rng.normal(size=(10, 54)) / 6 + 0.5 + 0.2 * rng.normal(size=(600, 54))
    scores = dci_celeba(np.hstack([codes, free]), concepts)
    assert scores["importance"].shape == (60, 6)
    expected = published_recipe(np.hstack([codes, free]), concepts)
    for key, value in zip(("alignment", "completeness", "explicitness"), expected, strict=True):
        assert scores[key] == pytest.approx(value, abs=1e-3), key
    assert dci_celeba(codes, concepts)["alignment"] > scores["alignment"] + 0.1  # leaving them out flatters


def test_planted_codes():
    """Codes that are the concepts: aligned up to the weights that Lasso and the l1 penalty leave elsewhere."""
    rng = np.random.default_rng(0)
    concepts, codes = planted(rng)
    good = dci_celeba(codes, concepts)
    assert good["alignment"] > 0.9
    assert good["explicitness"] > 0.95  # Lasso shrinks the hair index a little
    np.testing.assert_array_equal(good["importance"].argmax(axis=0), np.arange(6))
    bald_too = concepts.copy()
    bald_too[:100, HAIR[0]] = bald_too[:100, HAIR[1]] = 1  # two hair colours: dropped
    noisy = codes.copy()
    noisy[:100] = rng.random((100, 10))
    kept, dropped = dci_celeba(codes[100:], concepts[100:]), dci_celeba(noisy, bald_too)
    assert dropped["alignment"] == pytest.approx(kept["alignment"], abs=1e-12)


def test_what_is_refused():
    concepts = np.random.default_rng(0).integers(0, 2, size=(200, 10))
    with pytest.raises(UserError, match="fewer than the 10 concepts"):
        dci_celeba(np.random.rand(200, 9), concepts)
    concepts[:, HAIR] = [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]] * 100
    concepts[0, HAIR[4]] = 1  # lest that column be constant
    with pytest.raises(UserError, match="no row has exactly one"):
        dci_celeba(np.random.rand(200, 10), concepts)
