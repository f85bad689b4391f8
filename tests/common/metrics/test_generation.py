"""Frechet distance, kernel distance, PRD and k-NN precision/recall against closed forms and plain loops."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from metric_definitions import improved_precision_recall_ref, mmd2

from common.errors import UserError
from common.metrics import frechet, kernel, precision_recall
from common.metrics.frechet import Statistics, frechet_distance
from common.metrics.generation import _balance, score
from common.metrics.kernel import kernel_distance
from common.metrics.precision_recall import (
    f_beta_pair,
    improved_precision_recall,
    prd_from_histograms,
    precision_recall_distribution,
)


def _spd(rng, d):
    a = rng.standard_normal((d, d))
    return a @ a.T / d + 0.05 * np.eye(d)


# ---- Frechet distance ----------------------------------------------------------------------------------------------


def test_frechet_of_commuting_covariances_has_a_closed_form():
    rng = np.random.default_rng(1)
    d = 12
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
    a, b = rng.random(d) + 0.1, rng.random(d) + 0.1
    mu = rng.standard_normal((2, d))
    expected = ((mu[0] - mu[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    sigmas = [rotation @ np.diag(part) @ rotation.T for part in (a, b)]
    assert frechet_distance(mu[0], sigmas[0], mu[1], sigmas[1]) == pytest.approx(expected, rel=1e-12)


def test_frechet_equals_the_square_root_definition_and_is_symmetric():
    rng = np.random.default_rng(2)
    s1, s2, zero = _spd(rng, 24), _spd(rng, 24), np.zeros(24)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = np.trace(s1) + np.trace(s2) - 2 * np.trace(root)
    assert frechet_distance(zero, s1, zero, s2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(zero, s2, zero, s1) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_frechet_of_singular_covariances(rank):
    """Factors of low rank: tr (F F' G G')^(1/2) is the nuclear norm of F' G."""
    rng = np.random.default_rng(3)
    f, g = rng.standard_normal((40, rank)), rng.standard_normal((40, 7))
    nuclear = np.linalg.svd(f.T @ g, compute_uv=False).sum() if rank else 0.0
    expected = (f**2).sum() + (g**2).sum() - 2 * nuclear
    zero = np.zeros(40)
    assert frechet_distance(zero, f @ f.T, zero, g @ g.T) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(zero, f @ f.T, zero, f @ f.T) == pytest.approx(0, abs=1e-8)


def test_frechet_keeps_what_is_small_in_a_singular_covariance():
    """Spectrum 1, 1e-10, 0 against 1, 1, 1: dropping the middle one would cost 2e-5."""
    a, zero = np.array([1, 1e-10, 0]), np.zeros(3)
    expected = np.square(np.sqrt(a) - 1).sum()
    assert frechet_distance(zero, np.diag(a), zero, np.eye(3)) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_an_ill_conditioned_covariance():
    """Spectra over nine decades, as wide as those of network features: both routes agree with the closed form."""
    d = 60
    rotation = np.linalg.qr(np.random.default_rng(4).standard_normal((d, d)))[0]
    a, b = np.logspace(2, -7, d), np.logspace(1, -8, d)
    sigma_a, sigma_b = ((rotation * part) @ rotation.T for part in (a, b))
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(np.zeros(d), sigma_a, np.zeros(d), sigma_b) == pytest.approx(expected, rel=1e-7)


def test_frechet_of_opposed_spectra():
    """What is large in one covariance is nearly nothing in the other: 13 decades, a small factor times a large one."""
    d = 60
    rotation = np.linalg.qr(np.random.default_rng(27).standard_normal((d, d)))[0]
    a = np.logspace(0, -13, d)
    sigma_a, sigma_b = ((rotation * part) @ rotation.T for part in (a, a[::-1]))
    expected = ((np.sqrt(a) - np.sqrt(a[::-1])) ** 2).sum()
    assert frechet_distance(np.zeros(d), sigma_a, np.zeros(d), sigma_b) == pytest.approx(expected, abs=1e-8)


def test_full_rank_takes_the_quick_way(monkeypatch):
    """One symmetric eigenvalue problem: singular values of two factors would take twice as long."""
    rng = np.random.default_rng(28)
    monkeypatch.setattr(scipy.linalg, "svdvals", lambda *_, **__: pytest.fail("the way of singular covariances"))
    assert frechet_distance(np.zeros(9), _spd(rng, 9), np.zeros(9), _spd(rng, 9)) > 0


@pytest.mark.parametrize(("n", "m", "d"), [(7, 9, 40), (7, 90, 40), (41, 40, 40), (200, 300, 40)])
def test_few_samples_take_the_smaller_factor(n, m, d):
    """The distance of features is that of their moments, whichever sets have more samples than features."""
    rng = np.random.default_rng(25)
    x, y = rng.standard_normal((n, d)), rng.standard_normal((m, d)) + 0.1
    moments = [part for z in (x, y) for part in (z.mean(0), np.cov(z, rowvar=False))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few samples
        found = Statistics.from_features(x).distance(Statistics.from_features(y))
    assert found == pytest.approx(frechet_distance(*moments), rel=1e-9)


def test_sixty_images_of_many_pixels_make_no_large_matrix():
    """3072 features of 60 samples: no covariance is built, and the closed form of two shifted copies comes out."""
    x = np.random.default_rng(26).random((60, 3072))
    first, second = Statistics.from_features(x), Statistics.from_features(x + 0.01)
    with pytest.warns(UserWarning, match="60 samples for 3072 features"):
        assert first.distance(second) == pytest.approx(3072 * 0.01**2, rel=1e-6)
    assert "sigma" not in vars(first) and first.sigma.shape == (3072, 3072)


def test_statistics_are_numpy_cov_and_survive_the_disk(tmp_path):
    x = np.random.default_rng(5).standard_normal((50, 6))
    stats = Statistics.from_features(torch.from_numpy(x), "raw")
    np.testing.assert_allclose(stats.sigma, np.cov(x, rowvar=False), rtol=1e-12)
    stats.save(tmp_path / "fid_stats.npz")
    again = Statistics.load(tmp_path / "fid_stats.npz")
    assert (again.n, again.extractor) == (50, "raw")
    np.testing.assert_array_equal(again.sigma, stats.sigma)
    np.savez(tmp_path / "foreign.npz", mu=stats.mu, sigma=stats.sigma)  # as other FID tools store them
    assert Statistics.load(tmp_path / "foreign.npz").distance(again) == pytest.approx(0, abs=1e-10)


def test_statistics_of_two_extractors_never_mix():
    x = np.random.default_rng(6).standard_normal((50, 6))
    with pytest.raises(UserError, match=r"raw.*inception"):
        Statistics.from_features(x, "raw").distance(Statistics.from_features(x, "inception"))


def test_few_samples_warn_and_enough_do_not():
    rng = np.random.default_rng(7)
    few, many = (Statistics.from_features(rng.standard_normal((n, 10))) for n in (8, 40))
    with pytest.warns(UserWarning, match="8 samples for 10 features"):
        few.distance(many)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many.distance(many)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not a readable"), (b"PK\x03\x04 truncated", "not a readable"), (None, "no such file")],
)
def test_statistics_files_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "stats.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Statistics.load(path)


def test_statistics_files_of_another_kind(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="no feature statistics"):
        Statistics.load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(UserError, match="NaN"):
        Statistics.load(tmp_path / "b.npz")
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    for wrong in (
        {"mu": "x"}, {"mu": np.zeros(3) * 1j}, {"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, {"sigma": -np.eye(3)},
        {"mu": np.full(3, 1e200)}, {"n": np.nan}, {"n": [1, 2]}, {"n": -5}, {"activations": 3},
    ):  # fmt: skip
        np.savez(tmp_path / "d.npz", **{**good, **wrong})
        with pytest.raises(UserError, match=r"d\.npz"):
            Statistics.load(tmp_path / "d.npz")
    np.savez(tmp_path / "c.npz", mu=np.zeros(3), sigma=np.array([object()]))
    with pytest.raises(UserError, match="not a readable"):  # would need pickle
        Statistics.load(tmp_path / "c.npz")


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((1, 4)),
        np.zeros(4),
        np.full((5, 4), np.inf),
        np.full((5, 4), 1e200),
        np.full((5, 4), "x"),
        np.zeros((5, 0)),
    ],
)
def test_features_that_no_metric_takes(bad):
    good = np.random.default_rng(0).standard_normal((30, 4))
    for call in (
        Statistics.from_features,
        lambda x: kernel_distance(x, good),
        lambda x: improved_precision_recall(x, good),
    ):
        with pytest.raises(UserError):
            call(bad)
    with pytest.raises(UserError, match="not symmetric"):
        frechet_distance(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), np.zeros(2), np.eye(2))


# ---- kernel distance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "size"), [(40, 33, 25), (400, 390, 12)])
def test_kernel_distance_is_the_mean_over_subsets(n, m, size, monkeypatch):
    """Few overlapping subsets and many: the two ways to sum the kernel are the loop over subsets."""
    monkeypatch.setattr(kernel, "_BLOCK", 16)  # several blocks, the last one cut
    rng = np.random.default_rng(9)
    x, y = rng.standard_normal((n, 6)), rng.standard_normal((m, 6)) + 0.2
    values = [mmd2(x[a], y[b]) for a, b in zip(*kernel.draw_subsets(n, m, 7, size, 3), strict=True)]
    assert kernel_distance(x, y, 7, size, seed=3) == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)


def test_every_call_starts_its_own_stream():
    rng = np.random.default_rng(11)
    x, y = rng.standard_normal((80, 4)), rng.standard_normal((90, 4))
    first = kernel_distance(x, y, 5, 20, legacy=True)
    np.random.rand(17)
    assert kernel_distance(x, y, 5, 20, legacy=True) == first
    assert kernel_distance(x, y, 5, 20, seed=1) != kernel_distance(x, y, 5, 20, seed=2)


def test_two_halves_of_one_set_are_at_no_distance():
    x = np.random.default_rng(12).standard_normal((800, 8))
    mean, std = kernel_distance(x[:400], x[400:], 50, 100)
    assert abs(mean) < 3 * std


def test_small_sets_reduce_the_subsets_with_a_warning():
    x = np.random.default_rng(13).standard_normal((30, 4))
    with pytest.warns(UserWarning, match="subsets of 20 instead of 1000"):
        mean, _ = kernel_distance(x, x[:20] + 1)
    assert mean > 0


def test_subsets_that_are_the_whole_set_have_no_deviation():
    """Equal subsets differ by rounding alone: 0, not 1e-15, and a line that says so."""
    rng = np.random.default_rng(22)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((30, 4)) + 0.5
    for size in (30, 1000):
        with pytest.warns(UserWarning, match="there is no standard deviation"):
            mean, std = kernel_distance(x, y, 100, size)
        assert std == 0 and mean == pytest.approx(mmd2(x, y), rel=1e-12)


def test_kernel_distance_holds_blocks_only(monkeypatch):
    """A single subset of a whole large set: never more than a block of the kernel at once."""
    made = []
    real = kernel.cubic_kernel
    monkeypatch.setattr(kernel, "cubic_kernel", lambda a, b: made.append((len(a), len(b))) or real(a, b))
    x = np.random.default_rng(23).standard_normal((1500, 2))
    kernel_distance(x, x[:1400] + 1, 1, 1300)
    assert len(made) > 9 and max(max(shape) for shape in made) <= kernel._BLOCK


def test_kernel_distance_refuses_bad_options():
    x = np.random.default_rng(14).standard_normal((30, 4))
    for options in ({"subsets": 0}, {"subset_size": 1}):
        with pytest.raises(UserError):
            kernel_distance(x, x, **{"subset_size": 10, **options})
    with pytest.raises(UserError, match="dimensions"):
        kernel_distance(x, x[:, :2])


@pytest.mark.gpu
def test_the_gpu_gives_the_same_numbers():
    rng = np.random.default_rng(15)
    x, y = rng.standard_normal((500, 64)), rng.standard_normal((450, 64)) + 0.1
    cpu = kernel_distance(x, y, 10, 100)
    assert kernel_distance(x, y, 10, 100, device="cuda") == pytest.approx(cpu, rel=1e-9)
    assert improved_precision_recall(x, y, device="cuda") == improved_precision_recall(x, y)


# ---- precision and recall ------------------------------------------------------------------------------------------


def _modes(rng, chosen, n=600, d=8):
    """n points around the first `chosen` of 10 well separated modes."""
    centres = 30 * np.eye(10, d + 2)[:, :d] + np.arange(10)[:, None]
    return centres[rng.integers(chosen, size=n)] + rng.standard_normal((n, d))


@pytest.fixture(scope="module")
def collapsed():
    """(reference with 10 modes, evaluated set that reaches only 2 of them)."""
    rng = np.random.default_rng(16)
    return _modes(rng, 10), _modes(rng, 2)


def test_mode_collapse_keeps_precision_and_loses_recall(collapsed):
    """The convention: the evaluated set comes first, its collapse shows in recall and in F8, not in precision."""
    reference, narrow = collapsed
    precision, recall = improved_precision_recall(narrow, reference)
    assert precision > 0.85 and recall < 0.35
    f8, f18 = f_beta_pair(*precision_recall_distribution(narrow, reference, runs=2))
    assert f18 > 0.85 and f8 < 0.35


def test_inventing_modes_keeps_recall_and_loses_precision(collapsed):
    """The same two sets with exchanged roles: exactly the exchanged numbers for k-NN."""
    reference, narrow = collapsed
    assert improved_precision_recall(reference, narrow) == improved_precision_recall(narrow, reference)[::-1]
    f8, f18 = f_beta_pair(*precision_recall_distribution(reference, narrow, runs=2))
    assert f8 > 0.85 and f18 < 0.35


def test_prd_known_answers():
    precision, recall = prd_from_histograms([0.5, 0.5], [1.0, 0.0])
    assert precision.max() == pytest.approx(0.5) and recall.max() == pytest.approx(1.0)
    middle = 1001 // 2
    precision, recall = prd_from_histograms([0.2, 0.8], [0.2, 0.8])
    assert (precision[middle], recall[middle]) == pytest.approx((1, 1), abs=1e-6)
    assert f_beta_pair(*prd_from_histograms([1.0, 0.0], [0.0, 1.0])) == (0.0, 0.0)


def test_prd_is_the_double_loop():
    rng = np.random.default_rng(17)
    e, r = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    precision, recall = prd_from_histograms(e, r, angles=9)
    for i, angle in enumerate(np.linspace(1e-10, np.pi / 2 - 1e-10, 9)):
        total = sum(min(np.tan(angle) * r[c], e[c]) for c in range(6))
        assert (precision[i], recall[i]) == pytest.approx((total, total / np.tan(angle)), abs=1e-12)


def test_prd_runs_are_seeded(collapsed):
    curves = [precision_recall_distribution(*collapsed, runs=1, angles=11, seed=s) for s in (0, 0, 5)]
    np.testing.assert_array_equal(curves[0], curves[1])
    both = precision_recall_distribution(*collapsed, runs=2, angles=11, seed=4)
    one = precision_recall_distribution(*collapsed, runs=1, angles=11, seed=4)
    np.testing.assert_allclose(both, (np.array(one) + np.array(curves[2])) / 2)


@pytest.mark.parametrize(
    "options", [{"angles": 2}, {"angles": 2_000_000}, {"clusters": 0}, {"clusters": 5000}, {"runs": 0}]
)
def test_prd_refuses_bad_options(collapsed, options):
    with pytest.raises(UserError):
        precision_recall_distribution(*collapsed, **{"runs": 1, **options})


def test_prd_refuses_bad_input(collapsed):
    with pytest.raises(UserError, match="one size"):
        precision_recall_distribution(collapsed[0][:50], collapsed[1], runs=1)
    for bad in (([0.5, 0.6], [0.5, 0.5]), ([1.5, -0.5], [0.5, 0.5]), ([1.0], [0.5, 0.5])):
        with pytest.raises(UserError):
            prd_from_histograms(*bad)
    with pytest.raises(UserError, match="beta"):
        f_beta_pair(np.ones(3), np.ones(3), beta=0)
    with pytest.raises(UserError, match="precision"):
        f_beta_pair(np.full(3, 1.5), np.ones(3))


@pytest.mark.parametrize("block", [7, 4096])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_improved_precision_recall_is_the_definition(k, block, monkeypatch):
    monkeypatch.setattr(precision_recall, "_BLOCK", block)
    rng = np.random.default_rng(18)
    x, y = rng.standard_normal((61, 3)) * 0.8, rng.standard_normal((50, 3)) + 1.2
    expected = improved_precision_recall_ref(x, y, k)
    assert 0.1 < expected[0] + expected[1] < 2
    assert improved_precision_recall(x, y, k) == pytest.approx(expected, abs=1e-12)


def test_improved_precision_recall_at_the_ends():
    rng = np.random.default_rng(19)
    x = rng.standard_normal((40, 300)) + 1000  # far from the origin: the shift must not cost digits
    assert improved_precision_recall(x, x) == (1.0, 1.0)
    assert improved_precision_recall(x, x + 500) == (0.0, 0.0)
    repeated = np.repeat(x[:1], 20, axis=0)  # a generator with a single picture that is in the reference
    one = np.full((8, 3), 4.0)
    assert improved_precision_recall(one, one) == (1.0, 1.0)  # balls of radius 0 hold their centres
    precision, recall = improved_precision_recall(repeated, x)
    assert (precision, recall) == (1.0, pytest.approx(1 / 40))
    with pytest.raises(UserError, match="at least 4"):
        improved_precision_recall(x[:3], x)


def test_a_sample_on_the_edge_of_a_ball_is_inside():
    """Pairs p, p + v and the evaluated points p - v, as far from p as its nearest neighbour: inside, whatever the
    rounding of the products that give the distances.
    """
    rng = np.random.default_rng(24)
    p = 1000.0 * np.arange(200)[:, None] + rng.integers(0, 50, (200, 20))
    v = rng.integers(1, 9, (200, 20)).astype(float)
    assert improved_precision_recall(p - v, np.concatenate([p, p + v]), k=1)[0] == 1


# ---- all together --------------------------------------------------------------------------------------------------


def test_score_runs_each_metric_on_the_same_features(collapsed):
    rng = np.random.default_rng(20)
    a, b = (rng.integers(0, 256, (60, 1, 4, 4), dtype=np.uint8) for _ in range(2))
    with pytest.warns(UserWarning, match="subsets"):
        result = score(a, b, ("fid", "kid", "prd", "ipr"), "raw", device="cpu", prd_runs=2)
    x, y = a.reshape(60, -1) / 255, b.reshape(60, -1) / 255
    assert result["fid"] == pytest.approx(Statistics.from_features(x).distance(Statistics.from_features(y)))
    assert result["kid_mean"] == pytest.approx(mmd2(x, y))
    assert (result["ipr_precision"], result["ipr_recall"]) == improved_precision_recall(x, y)
    pair = f_beta_pair(*precision_recall_distribution(x, y, runs=2))
    assert (result["prd_f8"], result["prd_f1/8"]) == pytest.approx(pair)
    assert (result["n_evaluated"], result["comparable"], result["resize"]) == (60, False, "paper")
    assert "not comparable to published FID" in result["note"]


def test_score_balances_prd_and_serves_statistics():
    rng = np.random.default_rng(21)
    a, b = (rng.integers(0, 256, (n, 1, 3, 3), dtype=np.uint8) for n in (50, 40))
    with pytest.warns(UserWarning, match="40 of 50 samples"):
        score(a, b, ("prd",), "raw", device="cpu", prd_runs=1)
    rows = np.arange(50.0)[:, None]
    with pytest.warns(UserWarning, match="40 of 50 samples"):
        drawn, same = _balance(rows, rows[:40], 0)  # as many, none twice
    assert len(np.unique(drawn)) == 40 and same.tolist() == rows[:40].tolist()
    stats = Statistics.from_features(b.reshape(40, -1) / 255)
    assert score(a, stats, ("fid",), "raw", device="cpu")["fid"] == pytest.approx(
        score(a, b, ("fid",), "raw", device="cpu")["fid"]
    )
    for few in (Statistics(stats.mu, stats.sigma, 1), a[:1]):
        with pytest.raises(UserError, match=r"1 image\(s\), at least 2 are needed"):
            score(a, few, ("fid",), "raw", device="cpu")
    unknown = Statistics(stats.mu, stats.sigma)  # of another tool, which does not tell how many
    assert score(a, unknown, ("fid",), "raw", device="cpu")["n_reference"] == 0
    with pytest.raises(UserError, match="fid only"):
        score(a, stats, ("fid", "kid"), "raw", device="cpu")


def test_score_refuses_what_would_take_hours(monkeypatch):
    monkeypatch.setattr(frechet, "_MOST", 47)
    a = np.random.default_rng(0).integers(0, 256, (49, 3, 4, 4), dtype=np.uint8)
    with pytest.raises(UserError, match="48 features would take hours"):
        score(a, a, ("fid",), "raw", device="cpu")
    with pytest.warns(UserWarning, match="40 samples for 48 features"):
        assert score(a[:40], a[:40], ("fid",), "raw", device="cpu")["fid"] == pytest.approx(0, abs=1e-9)
