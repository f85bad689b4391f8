"""The published protocols of the scripts beside the trainings: what each resolves to where nothing is given.

The trainings' own tables stand in <paper>/test_options.py.
"""

from importlib import import_module

import pytest

from glancenet import cluster, leakage, mnist_parity, prepare_celeba
from inv_flow import timing
from latent_flow import vp_score

# script, its options: the values of the paper's text or of its published program
PUBLISHED = {
    ("lbae.eval", "Scores"): {"mode": "paper", "prd": True, "kid_subsets": 100, "kid_size": 1000, "limit": 0},
    ("latent_flow.traverse_latent_space_vae", "TraverseOptions"): {
        "shift_steps": 16, "eps": 1.0, "shift_leap": 1, "batch_size": None, "img_quality": 75, "gif": False,
        "gif_size": 256, "gif_fps": 30},
    ("latent_flow.sample_vae", "SampleOptions"): {"num_samples": 4},
    ("glancenet.leakage", "Config"): {
        "models": ["cbnm", "vae", "glancenet"], "seeds": [883], "osr_quantile": 0.95, "osr_sample": False},
    ("glancenet.mnist_parity", "Config"): {
        "models": ["cbnm", "vae", "glancenet"], "epochs": None, "max_iter": None, "quantile": 0.95,
        "threshold_search": False, "sampled": True, "sampled_reconstruction": False, "stale": True, "limit": None},
    ("glancenet.cluster", "Config"): {"n_classes": None, "seed": 42, "restarts": None, "rows": None},
    ("glancenet.prepare_celeba", "Config"): {"n_classes": 4, "seed": 42, "unique_hair": False},
    ("glancenet.prepare_dsprites_leakage", "Config"): {"test_images": 5000, "sizes": None},
    ("glancenet.prepare_mpi3d", "Config"): {"sizes": (6, 6, 2, 3, 3, 40, 40)},
    ("nfpi.synthetic_2d", "Config"): {
        "strength": [100, 1000, 5000, 10000, 50000, 100000], "means": True, "variances": True, "isotropic": True,
        "variance_update": "upstream", "damping": 0, "alpha": 10, "epsilon": 0.1,
        "max_iters": 10_000, "sum_trick": False, "force_isotropic": 0},
    ("inv_flow.timing", "TimingOptions"): {
        "num_blocks": 2, "block_size": 32, "coupling_width": 512, "batch": 100, "repeats": 20, "conv1x1": False},
    ("inv_flow.classify_mnist", "ClassifierOptions"): {"dataset": "mnist", "epochs": 50, "no_inverse": False},
}  # fmt: skip


@pytest.mark.parametrize(("script", "options"), PUBLISHED)
def test_a_bare_call_follows_the_published_protocol(script, options):
    fields = getattr(import_module(script), options).model_fields
    expected = PUBLISHED[script, options]
    assert {name: fields[name].get_default(call_default_factory=True) for name in expected} == expected


def test_numbers_that_are_no_options():
    assert (mnist_parity.LR, mnist_parity.BATCH) == (1e-3, 100)
    assert mnist_parity.PUBLISHED_EPOCHS == {"cbnm": 21, "vae": 51, "glancenet": 51}
    assert {name: source[2:] for name, source in cluster.SOURCES.items()} == {
        "mpi3d_toy": (5, 30_000), "celebA": (10, 10_000)}  # fmt: skip
    assert (prepare_celeba.CROP, prepare_celeba.SIDE) == (178, 64)
    assert leakage.PAPER == {"cbnm": 80.0, "cg-vae": 98.0, "glancenet": 1.0}
    assert timing.SIZES == {"7": (16, 32, 64, 128, 256), "10": (32,)}
    assert timing.KERNELS == {"7": (3,), "10": (2, 3, 5, 7, 9, 11)}
    assert vp_score.vp_score.__defaults__ == (40_000, (0.01, 0.1), 3, 0) and vp_score.fit_and_test.__defaults__ == (
        100,
    )
