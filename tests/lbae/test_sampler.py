"""The sampler beyond the golden vectors: its moments, its symmetries, its batched paths against plain ones."""

import numpy as np
import pytest
import torch

import lbae
from common.errors import UserError
from lbae import reference, sampler

D = 30


def slerp(t: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Points (B, T, n) between unit vectors low and high (B, n) at t (T,)."""
    a, b = sampler.slerp_weights(t, (low * high).sum(-1))
    return a[..., None] * low[:, None] + b[..., None] * high[:, None]


@pytest.fixture(scope="module")
def trained():
    """Codes whose matrix H is indefinite, as those of trained encoders: half-spaces of three hidden variables."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(3000, 3, generator=g)
    codes = sampler.sign(hidden @ torch.randn(3, D, generator=g) + 0.8 * torch.randn(D, generator=g))
    planes = sampler.hyperplanes(*sampler.moments(codes))
    assert int((planes.eigenvalues < -1e-6).sum()) > 2
    return codes, planes


def realizable(n: int = 20000) -> torch.Tensor:
    """Codes that hyperplanes with a mean plane can make exactly, so that H is positive definite."""
    g = torch.Generator().manual_seed(3)
    normals = torch.randn(D + 1, 6, generator=g) * 0.5
    bits = sampler.sign(torch.randn(n, D + 1, generator=g) + torch.randn(n, 6, generator=g) @ normals.T)
    return bits[:, :-1] * bits[:, -1:]


def test_samples_have_the_moments_of_realizable_codes():
    mean, second = sampler.moments(realizable())
    planes = sampler.hyperplanes(mean, second)
    assert float(planes.eigenvalues.min()) > 0
    assert max(planes.moment_errors()) < 1e-12
    n = 40000
    normals = torch.randn(n, planes.L.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got_mean, got_second = sampler.moments(sampler.sample_cov(planes, normals))
    for got, wanted in ((got_mean, mean), (got_second, second)):
        sigma = ((1 - wanted**2).clamp_min(0) / n).sqrt()
        assert bool(((got - wanted).abs() <= 4.5 * sigma + 1e-12).all())


def test_moment_errors_name_what_the_repair_does(trained):
    codes, planes = trained
    n = 200_000
    normals = torch.randn(n, planes.L.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, second = sampler.moments(sampler.sample_cov(planes, normals))
    wanted_mean, wanted_second = sampler.moments(codes)
    means, seconds = planes.moment_errors()
    assert means > 1e-3
    assert abs(float((mean - wanted_mean).abs().mean()) - means) < 2e-3
    assert abs(float((second - wanted_second).abs().mean()) - seconds) < 2e-3


def test_symmetries(trained):
    codes, planes = trained
    order = torch.randperm(D, generator=torch.Generator().manual_seed(0))
    flip = torch.ones(D, dtype=torch.int8)
    flip[[2, 5]] = -1
    permuted = sampler.hyperplanes(*sampler.moments(codes[:, order]))
    flipped = sampler.hyperplanes(*sampler.moments(codes * flip))
    place = torch.cat([order, torch.tensor([D])])
    signs = torch.cat([flip, torch.ones(1, dtype=torch.int8)]).double()
    torch.testing.assert_close(permuted.H, planes.H[place][:, place], atol=1e-9, rtol=0)
    torch.testing.assert_close(flipped.H, planes.H * signs[:, None] * signs, atol=1e-9, rtol=0)
    # any factor of H gives the same paths
    q, _ = torch.linalg.qr(torch.randn(planes.L.shape[1], planes.L.shape[1], dtype=torch.float64))
    rotated = sampler.Hyperplanes(planes.L @ q)
    for split in sampler.SPLITS:
        ours, theirs = (sampler.interpolate(p, codes[:20], codes[20:40], 7, split)[0] for p in (planes, rotated))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("split", sampler.SPLITS)
def test_batched_directions_are_the_plain_ones(trained, split):
    codes, planes = trained
    L = planes.L.numpy()
    if split == "margin":
        plain = [reference.margin_ref(L, code) for code in codes[:60].numpy()]
    else:
        plain = [reference.direction_ref(L, code)[0] for code in codes[:60].numpy()]
    np.testing.assert_allclose(sampler.directions(planes, codes[:60], split).numpy(), np.stack(plain), atol=1e-9)


def test_margin_split_reproduces_the_codes_of_a_trained_model():
    """Every bit of the model that ships, for 300 images; the published rule leaves some wrong in each."""
    codes = lbae.load("mnist_bae_w16").codes
    planes = sampler.hyperplanes(*sampler.moments(codes))
    wrong = {
        split: (sampler.sign(sampler.directions(planes, codes[:300], split) @ planes.L[:-1].T) != codes[:300]).sum(1)
        for split in sampler.SPLITS
    }
    assert wrong["margin"].max() == 0
    assert wrong["mean"].double().mean() > 5


def test_margin_split_closes_the_gap(trained):
    codes, planes = trained
    gaps = {
        split: (sampler.sign(sampler.directions(planes, codes[:200], split) @ planes.L[:-1].T) != codes[:200])
        for split in sampler.SPLITS
    }
    mean, margin = (float(gaps[split].sum(1).double().mean()) for split in ("mean", "margin"))
    assert margin < 0.1 * mean
    start = torch.cholesky_solve(codes[:200].double().T, planes.ridge).T / planes.lengths @ planes.L[:-1]
    assert margin < 0.5 * float((sampler.sign(start @ planes.L[:-1].T) != codes[:200]).sum(1).double().mean())


def test_paths_are_signs_of_the_slerp(trained):
    codes, planes = trained
    path, hamming = sampler.interpolate(planes, codes[:5], codes[5:10], 6)
    bm, em = (sampler.directions(planes, part) for part in (codes[:5], codes[5:10]))
    v = slerp(torch.linspace(0, 1, 6).double(), bm, em)
    assert torch.equal(path[:, 1:-1], sampler.sign(v @ planes.L[:-1].T))
    assert torch.equal(path[:, 0], codes[:5])
    assert torch.equal(path[:, -1], codes[5:10])
    assert bool((hamming[:, 0, 0] == 0).all())
    assert bool((hamming[:, -1, 1] == 0).all())
    middle, _ = sampler.interpolate(planes, codes[:5], codes[5:10], 1)
    half = slerp(torch.tensor([0.5]).double(), bm, em)
    assert torch.equal(middle[:, 1], sampler.sign(half @ planes.L[:-1].T)[:, 0])
    with pytest.raises(UserError, match="interpolate_steps=0"):
        sampler.interpolate(planes, codes[:5], codes[5:10], 0)


def test_degenerate_inputs(trained):
    _, planes = trained
    same = torch.ones(2, D, dtype=torch.int8)
    same[1] = -1
    rows = planes.L[:-1].numpy()
    m = sampler.directions(planes, same, "mean").numpy()
    # an empty group leaves the refined mean of all rows, towards or away
    np.testing.assert_allclose(m[0], reference.direction_ref(planes.L.numpy(), np.ones(D))[0], atol=1e-9)
    assert np.count_nonzero(rows @ m[0] < 0) < D / 2 < np.count_nonzero(rows @ m[1] < 0)
    # antipodal directions: finite, one end in the first half and the other in the second
    low = sampler.unit(torch.randn(1, 9, dtype=torch.float64))
    line = slerp(torch.tensor([0.0, 0.25, 0.75, 1.0]).double(), low, -low)[0]
    torch.testing.assert_close(line, torch.tensor([1, 0.5, -0.5, -1]).double()[:, None] * low)


def test_zero_one_codes_and_refused_ones():
    codes = realizable(500)
    for ours, theirs in zip(sampler.moments(codes), sampler.moments((codes + 1) // 2), strict=True):
        assert torch.equal(ours, theirs)
    for wrong in (torch.randn(20, 4), torch.zeros(0, 4), torch.tensor([[1.0, -1.0, 0.0]])):
        with pytest.raises(UserError, match="not bits"):
            sampler.moments(wrong)


def test_baselines():
    g = torch.Generator().manual_seed(0)
    mean = torch.tensor([-0.9, 0.0, 0.5])
    codes = sampler.independent_bits(mean, 20000, g)
    assert float((codes.double().mean(0) - mean).abs().max()) < 0.03
    assert float(torch.corrcoef(codes.double().T)[0, 1].abs()) < 0.03
    fair = sampler.fair_bits((20000, 3), g)
    assert set(fair.unique().tolist()) == {-1.0, 1.0}
    assert float(fair.mean(0).abs().max()) < 0.03
    rounded = sampler.fair_bits((1000, 3), g, -0.5, 0.25, decimals=1)
    assert float(rounded.min()) == -0.5
    assert float(rounded.max()) == pytest.approx(0.2)  # 0.25 rounds half to even


def test_attributes():
    codes = realizable(400)
    labels = (codes[:, 4] > 0).long()
    mean = sampler.attribute_mean(codes, labels, 1)
    assert float(mean[4]) == 1
    end = sampler.set_attribute(codes[:10], mean, 0.3)
    forced = mean.abs() > 0.3
    assert torch.equal(end[:, forced], sampler.sign(mean[forced]).expand(10, -1))
    assert torch.equal(end[:, ~forced], codes[:10][:, ~forced])
    contrast = sampler.attribute_mean(codes, labels, 1, "contrast")
    torch.testing.assert_close(contrast, mean - codes.double().mean(0))
    many = torch.stack([labels, 1 - labels], 1)
    assert torch.equal(sampler.attribute_mean(codes, many, 0), mean)
    for wrong, message in ((7, "no training latent"), (2, "counted from 0")):
        with pytest.raises(UserError, match=message):
            sampler.attribute_mean(codes, labels if wrong == 7 else many, wrong)


def test_pairs_never_share_a_row():
    pairs = sampler.choose_pairs(np.random.default_rng(0), 20, 10)
    assert sorted(pairs.flatten()) == list(range(20))
    with pytest.raises(UserError, match="22 latent rows"):
        sampler.choose_pairs(np.random.default_rng(0), 20, 11)
