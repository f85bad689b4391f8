"""Frechet distance, kernel distance and PRD against the reference implementations' numbers."""

import re
import warnings

import numpy as np
import pytest
import torch
from golden_cases import check_complete, load
from metric_definitions import mmd2, mmd2_and_variance

from common.metrics.frechet import Statistics, frechet_distance
from common.metrics.kernel import draw_subsets, kernel_distance, subset_mmd2
from common.metrics.precision_recall import f_beta, f_beta_pair, prd_from_histograms, precision_recall_distribution

FID, KID, PRD = (load("lbae", name) for name in ("fid", "kid", "prd"))


def _cases(arrays, ending):
    return [key.removesuffix(ending) for key in arrays if key.endswith(ending)]


def test_every_file_is_covered():
    check_complete("lbae", {"fid.npz", "kid.npz", "prd.npz"}, only=("fid*.npz", "kid*.npz", "prd*.npz"))


@pytest.mark.parametrize("case", _cases(FID, "_fid_eig"))
def test_frechet_distance(case):
    a, b = FID[f"{case}_a"], FID[f"{case}_b"]
    moments = [FID[f"{case}_{name}"] for name in ("mu_a", "sigma_a", "mu_b", "sigma_b")]
    first, second = Statistics.from_features(a), Statistics.from_features(b)
    for ours, theirs in zip((first.mu, first.sigma, second.mu, second.sigma), moments, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)

    full_rank = min(len(a), len(b)) > a.shape[1]
    tolerance = 1e-7 if full_rank else 1e-6
    expected = float(FID[f"{case}_fid_eig"])
    assert frechet_distance(*moments) == pytest.approx(expected, rel=tolerance)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert first.distance(second) == pytest.approx(expected, rel=tolerance)
    assert bool(seen) == (not full_rank)
    if full_rank:
        assert frechet_distance(*moments) == pytest.approx(float(FID[f"{case}_fid_upstream"]), rel=tolerance)


@pytest.mark.parametrize("case", _cases(FID, "_self_fid_upstream"))
def test_frechet_distance_to_itself(case):
    mu, sigma = FID[f"{case}_mu_a"], FID[f"{case}_sigma_a"]
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-8


def test_mmd2_estimators():
    m = int(KID["m"])
    x, y = KID["X"][:m], KID["Y"][:m]
    with pytest.warns(UserWarning, match="no standard deviation"):
        assert kernel_distance(x, y, 1, m)[0] == pytest.approx(float(KID["mmd2_unbiased"]), abs=1e-9)
    for estimator, key in (("unbiased", "unbiased"), ("u-statistic", "ustat"), ("biased", "biased")):
        assert mmd2(x, y, estimator) == pytest.approx(float(KID[f"mmd2_{key}"]), abs=1e-9)
    for key in (name for name in KID if name.startswith("mmd2_deg")):
        degree, gamma, coef0 = re.fullmatch(r"mmd2_deg(\d+)_gamma(\d+)_coef(\d+)", key).groups()
        decimals = [int(text) / 10 ** (len(text) - 1) for text in (gamma, coef0)]  # "03" is 0.3
        value = mmd2(x, y, degree=int(degree), gamma=decimals[0], coef0=decimals[1])
        assert value == pytest.approx(float(KID[key]), abs=1e-9)


def test_mmd2_variance():
    m = int(KID["m"])
    x, y = KID["X"][:m], KID["Y"][:m]
    value, variance = mmd2_and_variance(x, y, int(KID["var_at_m"]))
    assert value == pytest.approx(float(KID["mmd2_unbiased"]), abs=1e-9)
    assert variance == pytest.approx(float(KID["var"]), abs=1e-9)
    assert mmd2_and_variance(x, y)[1] == pytest.approx(float(KID["var_default"]), abs=1e-9)


def test_kernel_distance_in_the_legacy_protocol():
    rows_x, rows_y = KID["avg_idx_g"], KID["avg_idx_r"]
    subsets, size = rows_x.shape
    assert size == int(KID["avg_subset_size"])
    seed, x, y = int(KID["avg_np_seed"]), KID["X"], KID["Y"]
    drawn = draw_subsets(len(x), len(y), subsets, size, seed, legacy=True)
    np.testing.assert_array_equal(drawn[0], rows_x)
    np.testing.assert_array_equal(drawn[1], rows_y)
    expected = pytest.approx((float(KID["avg_mean"]), float(KID["avg_std"])), abs=1e-9)
    assert kernel_distance(x, y, subsets, size, seed, legacy=True) == expected
    values = subset_mmd2(torch.from_numpy(x), torch.from_numpy(y), rows_x, rows_y)
    np.testing.assert_allclose(values, KID["avg_mmds"], rtol=0, atol=1e-9)
    at = min(len(x), len(y))
    for value, variance, a, b in zip(KID["avg_mmds"], KID["avg_vars"], rows_x, rows_y, strict=True):
        assert mmd2_and_variance(x[a], y[b], at) == pytest.approx((value, variance), abs=1e-9)


@pytest.mark.parametrize("case", [key for key in _cases(PRD, "_precision") if not key.startswith("emb")])
def test_prd_curve(case):
    source = case if f"{case}_eval" in PRD else re.sub(r"\d+$", "", case)  # generic11: generic with 11 angles
    expected = PRD[f"{case}_precision"], PRD[f"{case}_recall"]
    precision, recall = prd_from_histograms(PRD[f"{source}_eval"], PRD[f"{source}_ref"], len(expected[0]))
    np.testing.assert_allclose(precision, expected[0], atol=1e-9)
    np.testing.assert_allclose(recall, expected[1], atol=1e-9)
    if f"{case}_f8" in PRD:
        pair = float(PRD[f"{case}_f8"]), float(PRD[f"{case}_f18"])
        assert f_beta_pair(precision, recall) == pytest.approx(pair, abs=1e-9)
    if f"{case}_f1_curve" in PRD:
        np.testing.assert_allclose(f_beta(precision, recall), PRD[f"{case}_f1_curve"], atol=1e-9)


@pytest.mark.parametrize("case", [key for key in _cases(PRD, "_precision") if key.startswith("emb")])
def test_prd_of_features(case):
    angles = len(PRD[f"{case}_precision"])
    curve = precision_recall_distribution(PRD[f"{case}_eval"], PRD[f"{case}_ref"], angles=angles)
    assert f_beta_pair(*curve) == pytest.approx(tuple(PRD[f"{case}_f_mean"]), abs=0.03)
