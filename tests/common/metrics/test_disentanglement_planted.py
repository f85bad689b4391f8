"""Codes whose score is known beforehand: perfect, permuted, duplicated, constant and random ones, for every metric.

The planted factors are a full grid, so every factor is uniform and independent of the others without sampling error.
A code that copies a factor then has the best score a metric can give.
"""

from itertools import pairwise

import numpy as np
import pytest

from common.metrics import disentanglement as dis
from common.metrics.disentanglement import Arrays, evaluate

VOTES = {"num_train": 600, "num_test": 600}  # of FactorVAE and BetaVAE
CHANCE_ERROR = 5 * np.sqrt(0.25 / 600)  # five standard deviations of an accuracy on 600 votes


def grid(sizes, repeats):
    """All combinations of factors of these sizes, `repeats` times: int64 (n, F)."""
    return np.tile(np.indices(sizes).reshape(len(sizes), -1).T, (repeats, 1))


def scores(name, codes, factors, held_out=False, **options):
    """The results of one metric; `held_out`: the same points are the test set, so no split disturbs the balance."""
    points = Arrays(codes, factors, codes, factors) if held_out else Arrays(codes, factors)
    return evaluate(points, [name], **options)[name]


def planted(factors, seed=0):
    """The planted codes by name, for factors (n, F)."""
    rng = np.random.default_rng(seed)
    codes = factors.astype(np.float64)
    order = [*range(1, factors.shape[1]), 0]
    return {
        "perfect": codes,
        "permuted": codes[:, order],
        "moved": 3.0 - 2.0 * codes,  # every code by an invertible affine map
        "duplicated": np.hstack([codes, codes]),
        "constant": np.hstack([codes, np.full_like(codes, 0.3)]),
        "collapsed": np.full_like(codes, 0.3),
        "random": rng.normal(size=codes.shape),
    }


def test_mig():
    factors = grid((4, 3, 5), 200)
    result = {name: scores("mig", codes, factors)["discrete_mig"] for name, codes in planted(factors).items()}
    for name in ("perfect", "permuted", "moved", "constant"):
        assert result[name] == pytest.approx(1, abs=1e-9), name
    assert result["duplicated"] == pytest.approx(0, abs=1e-9)  # the second best code is as good
    assert result["collapsed"] == 0
    # independent columns: 2 n I is chi-squared with 19 (K - 1) degrees of freedom, here at most 76; H is at least ln 3
    freedom = 19 * 4
    assert result["random"] < (freedom + 5 * np.sqrt(2 * freedom)) / (2 * len(factors)) / np.log(3)


def test_mig_cannot_reach_1_with_more_values_than_bins():
    """40 values share 20 bins: the code tells the bin, so the best score is H(bin) / H(value) = ln 20 / ln 40."""
    factors = grid((40, 3), 10)
    # the other factor has 3 values and reaches 1
    assert scores("mig", factors.astype(float), factors)["discrete_mig"] == pytest.approx(
        (np.log(20) / np.log(40) + 1) / 2, abs=1e-9
    )


def test_sap():
    """Two balanced values: the copy predicts them all, any other code half of them, so 1/2 is the maximum."""
    factors = grid((2, 2, 2), 150)
    result = {n: scores("sap_score", c, factors, held_out=True)["SAP_score"] for n, c in planted(factors).items()}
    for name in ("perfect", "permuted", "moved", "constant"):
        assert result[name] == pytest.approx(0.5, abs=1e-9), name
    assert result["duplicated"] == 0
    assert result["collapsed"] == 0
    # three accuracies around 1/2, each with standard deviation <= 1 / (2 sqrt n); fitting moves them by about as much
    assert result["random"] < 10 * 0.5 / np.sqrt(len(factors))


def test_irs():
    factors = grid((4, 3, 5), 200)
    codes = planted(factors)
    result = {name: scores("irs", c, factors)["IRS"] for name, c in codes.items()}
    for name in ("perfect", "permuted", "moved", "constant", "duplicated"):
        assert result[name] == pytest.approx(1, abs=1e-9), name
    assert result["collapsed"] == 0
    assert scores("irs", codes["constant"], factors)["num_active_dims"] == 3
    assert scores("irs", codes["duplicated"], factors)["num_active_dims"] == 6
    # a random code keeps its spread inside every group: the score compares the 99 % quantile with the maximum.
    # Uniform on [0, 1]: 1 - 0.495 / 0.5 = 0.01, found in groups of 2400 to within 5 sqrt(0.01 * 0.99 / 2400) = 0.01
    uniform = np.random.default_rng(1).random(factors.shape)
    assert 0 < scores("irs", uniform, factors)["IRS"] < 0.01 + 0.01
    # normal: 1 - 2.576 / max|z|, which is about 0.35 at 12000 points. It is NOT zero, by the metric's definition
    largest = np.abs(codes["random"] - codes["random"].mean(axis=0)).max(axis=0)
    expected = np.average(1 - 2.576 / largest, weights=largest)
    assert result["random"] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("name", ["dci", "dci_fast"])
def test_dci(name):
    factors = grid((2, 3, 2), 40)
    codes = planted(factors)
    result = {case: scores(name, codes[case], factors, held_out=True) for case in codes}
    for case in ("perfect", "permuted", "moved", "constant"):
        assert result[case] == pytest.approx(
            {"informativeness_train": 1, "informativeness_test": 1, "disentanglement": 1, "completeness": 1}, abs=1e-6
        ), case
    # the copies share the importance of their factor in some proportion: at worst half and half
    twice = result["duplicated"]
    assert twice["disentanglement"] == pytest.approx(1, abs=1e-6)
    assert 1 - np.log(2) / np.log(6) - 1e-6 <= twice["completeness"] <= 1 + 1e-9
    assert twice["informativeness_test"] == 1
    # nothing is informative: uniform importances by definition, and the most frequent class is guessed
    for key in ("disentanglement", "completeness"):
        assert result["collapsed"][key] == pytest.approx(0, abs=1e-9)
    assert result["collapsed"]["informativeness_test"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3, abs=1e-9)


@pytest.mark.parametrize("name", ["dci", "dci_fast"])
def test_dci_of_random_codes(name):
    """Trees fit noise with every code alike: shares scattered by r (relative) leave 1 - H of about r^2 / (2 ln F)."""
    factors = grid((2, 3, 2), 60)
    rng = np.random.default_rng(3)
    train, test = rng.normal(size=(2, *factors.shape))
    result = evaluate(Arrays(train, factors, test, factors), [name])[name]
    assert 0 <= result["disentanglement"] < 0.3**2 / (2 * np.log(3)), "r = 0.3"
    assert 0 <= result["completeness"] < 0.3**2 / (2 * np.log(3))
    chance = (1 / 2 + 1 / 3 + 1 / 2) / 3
    assert result["informativeness_test"] == pytest.approx(chance, abs=5 * np.sqrt(0.25 / len(factors) / 3))


def test_the_fast_dci_is_another_number():
    """Half mixed codes: permutations call them far less entangled than gains do, so the two must not share a table."""
    factors = grid((3, 4, 6), 1)
    rng = np.random.default_rng(1)
    mixing = np.eye(3, 5) + 0.6 * rng.normal(size=(3, 5))
    codes = factors / np.array([3, 4, 6]) @ mixing + 0.03 * rng.normal(size=(len(factors), 5))
    rows = np.random.default_rng(2).integers(0, len(factors), size=(2, 400))
    points = Arrays(codes[rows[0]], factors[rows[0]], codes[rows[1]], factors[rows[1]])
    result = evaluate(points, ["dci", "dci_fast"])
    assert result["dci_fast"]["disentanglement"] - result["dci"]["disentanglement"] > 0.1


def test_factor_vae():
    factors = grid((4, 3, 5), 20)
    result = {
        name: scores("factor_vae_metric", codes, factors, **VOTES)["eval_accuracy"]
        for name, codes in planted(factors).items()
    }
    for name in ("perfect", "permuted", "moved", "constant", "duplicated"):
        assert result[name] == 1, name
    assert result["collapsed"] == 0  # no active code
    assert result["random"] == pytest.approx(1 / 3, abs=CHANCE_ERROR)  # chance: one factor in three


def test_factor_vae_prunes_codes_that_hardly_move():
    factors = grid((4, 3, 5), 20)
    still = 0.01 * np.random.default_rng(0).normal(size=factors.shape)  # standard deviation below 0.05
    result = scores("factor_vae_metric", np.hstack([still, factors]), factors, **VOTES)
    assert result["num_active_dims"] == 3
    assert result["eval_accuracy"] == 1


def test_beta_vae():
    factors = grid((4, 3, 5), 20)
    result = {
        name: scores("beta_vae_sklearn", codes, factors, **VOTES)["eval_accuracy"]
        for name, codes in planted(factors).items()
    }
    # the shared factor has mean difference 0, the others at least 0.5: linearly separable
    for name in ("perfect", "permuted", "moved", "constant", "duplicated"):
        assert result[name] == 1, name
    for name in ("random", "collapsed"):  # chance: one factor in three
        assert result[name] == pytest.approx(1 / 3, abs=CHANCE_ERROR), name


def test_modularity_explicitness():
    factors = grid((4, 3, 5), 20)
    codes = planted(factors)
    result = {name: scores("modularity_explicitness", c, factors, held_out=True) for name, c in codes.items()}
    for name in ("perfect", "permuted", "moved", "duplicated"):
        assert result[name]["modularity_score"] == pytest.approx(1, abs=1e-9), name
    assert result["constant"]["modularity_score"] == pytest.approx(3 / 6, abs=1e-9)  # dead codes score 0
    assert result["collapsed"]["modularity_score"] == 0
    assert result["collapsed"]["explicitness_score_test"] == 0.5
    for name in ("perfect", "permuted", "moved", "duplicated", "constant"):
        assert result[name]["explicitness_score_test"] == 1, name
    rng = np.random.default_rng(2)
    train, test = rng.normal(size=(2, *factors.shape))
    random = evaluate(Arrays(train, factors, test, factors), ["modularity_explicitness"])["modularity_explicitness"]
    # an AUC of n points has a standard deviation of about 1 / sqrt(12 * 240) = 0.02 with a fifth of 1200 in the class
    assert random["explicitness_score_test"] == pytest.approx(0.5, abs=5 * 0.02)


def test_explicitness_does_not_depend_on_the_units_of_the_codes():
    factors = grid((3, 3), 30)
    codes = factors + np.random.default_rng(4).normal(size=factors.shape)
    first, second = (scores("modularity_explicitness", c, factors, held_out=True)["explicitness_score_test"]
                     for c in (codes, [1e-3, 1e3] * codes + 5.0))  # fmt: skip
    assert 0.7 < first < 0.99 and second == pytest.approx(first, abs=1e-6)


def test_modularity_of_random_codes_falls_to_0_with_equal_biases():
    """Estimated informations of independent columns differ by sqrt(2 / df) only, so each code informs of all alike."""
    factors = np.random.default_rng(0).integers(0, 32, size=(20_000, 3))
    codes = np.random.default_rng(1).normal(size=(20_000, 3))
    scatter = 5 * np.sqrt(2 / (19 * 31))
    information = dis.mutual_information(dis.discretize(codes), factors)
    assert 0 <= dis.modularity_score(information) < 1 - (1 - scatter) ** 2


def test_alignment():
    factors = grid((4, 3, 5), 20)
    result = {name: scores("alignment_linear", codes, factors) for name, codes in planted(factors).items()}
    for name in ("perfect", "permuted", "moved", "constant"):
        assert result[name] == pytest.approx({"alignment": 1, "completeness": 1, "explicitness": 1}, abs=1e-6), name
    # the smallest norm halves the weight between two copies
    halved = {"alignment": 1, "completeness": 1 - np.log(2) / np.log(6), "explicitness": 1}
    assert result["duplicated"] == pytest.approx(halved, abs=1e-6)
    # the mean is predicted: K equal steps on [0, 1] have variance (K + 1) / (12 (K - 1)), not the 1/6 of guessing
    mean_only = 1 - 6 * np.mean([(k + 1) / (12 * (k - 1)) for k in (4, 3, 5)])
    assert result["collapsed"]["alignment"] == pytest.approx(0, abs=1e-9)
    assert result["collapsed"]["explicitness"] == pytest.approx(mean_only, abs=0.05)
    assert result["random"]["explicitness"] == pytest.approx(mean_only, abs=0.05)


def test_alignment_holds_out_half():
    """The explicitness is that of the held-out half: noise on those rows alone shows in full."""
    factors = grid((4, 3, 5), 20)
    half = len(factors) // 2
    tested = np.random.RandomState(0).permutation(len(factors))[:half]
    codes = factors.astype(float)
    codes[tested] = np.roll(codes[tested], 1, axis=0)  # the right values on the wrong rows
    spoilt = scores("alignment_linear", codes, factors)
    assert spoilt["alignment"] == pytest.approx(1, abs=1e-6)  # fitted on the others
    error = np.mean(((codes - factors)[tested] / (np.array([4, 3, 5]) - 1)) ** 2)
    assert spoilt["explicitness"] == pytest.approx(1 - 6 * error, abs=1e-6)


def test_alignment_of_random_codes_is_that_of_random_weights():
    """Weights of random codes are normal: with many codes alignment is the expectation over half-normal shares."""
    factors = grid((4, 4, 4), 20)
    rng = np.random.default_rng(0)
    codes = rng.random((len(factors), 60))
    expected = dis.disentanglement_of(np.abs(rng.normal(size=(100_000, 3))))[0]
    assert 0.1 < expected < 0.25  # far from 0: the metric's own chance level for three factors
    assert scores("alignment_linear", codes, factors)["alignment"] == pytest.approx(expected, abs=0.06)


def test_better_codes_score_higher():
    """Mixing the codes by a growing rotation lowers every score that looks at axes."""
    factors = grid((20, 20), 1)
    centred = factors - factors.mean(axis=0)
    for name in ("mig", "irs", "alignment_linear"):
        values = []
        for angle in (0.0, 0.1, 0.3, 0.6):
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            values.append(dis.headline(name, scores(name, centred @ turn, factors)))
        assert all(first > second for first, second in pairwise(values)), (name, values)
