"""For tests of many tiny runs: the linear predictor of an evaluation is fitted to a few images."""

import pytest

from latent_flow import evaluate, train


@pytest.fixture(scope="module", autouse=True)
def few_linear_images():
    """Rendering thousands of sequences a transformation takes longer than the rest of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluate, train):
            patch.setattr(module, "LINEAR_IMAGES", 100)
        yield
