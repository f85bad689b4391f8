r"""The 2-D experiment: class Gaussians of a labelled planar cloud before and after the fixed point iteration.

    python nfpi/synthetic_2d.py --data cifar10_tsne.npz --out runs/synthetic_2d          # t-SNE of CIFAR-10, ships
    python nfpi/synthetic_2d.py --data rings --strength 100 1000 5000                    # a generated cloud
    python nfpi/synthetic_2d.py --data cloud.npz --force-isotropic 4 --no-variances

--data: a .npz with `x` (N, 2) and `y` (N,), a pickle with the same keys (only arrays are read; the published
tsne_cifar10_data_file.pickle is one), or `blobs`, `rings`. cifar10_tsne.npz lies beside this script: CIFAR-10's 50,000
training images in the plane, scikit-learn's TSNE(n_components=2, random_state=0) of their pixels, with their labels;
the coordinates of the published file, float32, compressed.
Start values are the class statistics; no sum trick; as in section "2-D data" of Enescu & Sahbi (BMVC 2024).
Writes to --out: tsne.png (the cloud), tsne_class<k>.png (classes added one after the other), tsne_gaussians.png (1000
samples a class of the estimated Gaussians), fpi_<lambda>.png (the same after the iteration), steps_<lambda>.png, and
results.json (iterations, means, standard deviations, smallest KL).
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from common.checkpoint import write_json
from common.datasets.readers import read_npz
from common.errors import UserError, run_command
from common.images import save_image
from common.options import Count, Decay, NonNegative, Options, from_flags, option
from nfpi import pictures
from nfpi.data import read_pickle
from nfpi.estimator import FixedPointGaussians
from nfpi.gaussians import ClassMoments, kl_matrix, off_diagonal

STRENGTHS = (100.0, 1000.0, 5000.0, 10000.0, 50000.0, 100000.0)
CIFAR10 = Path(__file__).parent / "cifar10_tsne.npz"
SAMPLES = 1000  # a class, in the pictures of Gaussians


def load_cloud(source: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points (N, 2) float64 and labels (N,). Raises UserError for other contents."""
    if source in ("blobs", "rings"):
        return generated_cloud(source, seed)
    path = Path(source)
    if path == Path(CIFAR10.name) and not path.exists():
        path = CIFAR10
    if path.suffix == ".npz":
        if not path.is_file():
            raise UserError(f"no file {path}; --data takes {CIFAR10.name} (it ships), a .npz, a pickle, blobs or rings")
        content = read_npz(path)
    else:
        content = read_pickle(path)
    try:
        x, y = torch.as_tensor(content["x"]).double(), torch.as_tensor(content["y"]).long()
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{path} has no points 'x' and labels 'y'") from error
    if x.ndim != 2 or x.shape[1] != 2 or y.shape != x.shape[:1] or len(x) == 0:
        raise UserError(f"{path}: expected x (N, 2) and y (N,), got {tuple(x.shape)} and {tuple(y.shape)}")
    if not bool(torch.isfinite(x).all()) or not 0 <= int(y.min()) <= int(y.max()) < 10_000:
        raise UserError(f"{path}: expected finite points and labels 0 to K - 1")
    return x, y


def generated_cloud(kind: str, seed: int, classes: int = 10, count: int = 500) -> tuple[Tensor, Tensor]:
    """Overlapping `blobs`, or `rings` of different radius, (classes x count, 2)."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(count)
    noise = torch.randn(len(y), 2, generator=rng, dtype=torch.float64)
    if kind == "blobs":
        centres = 15 * torch.randn(classes, 2, generator=rng, dtype=torch.float64)
        return centres[y] + 25 * noise, y
    angle = 2 * np.pi * torch.rand(len(y), generator=rng, dtype=torch.float64)
    radius = 5.0 * (1 + y)
    shift = 10 * torch.randn(classes, 2, generator=rng, dtype=torch.float64)
    return shift[y] + radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1) + 2 * noise, y


def class_statistics(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Class means and unbiased variances (K, 2)."""
    return ClassMoments.of(x, y, int(y.max()) + 1).statistics()


class Config(Options):
    """The options."""

    data: str = option(..., ".npz or pickle with x and y, or blobs, rings")
    out: str = option("runs/synthetic_2d", "folder for pictures and results.json")
    strength: Annotated[list[NonNegative], Field(min_length=1)] = option(list(STRENGTHS), "values of lambda")
    means: bool = option(True, "let the means move")
    variances: bool = option(True, "let the variances move")
    isotropic: bool = option(True, "mean update with averaged variances")
    sum_trick: bool = option(False, "summed squares in the variance update")
    force_isotropic: NonNegative = option(0.0, "fix all variances at this value (0 = off)")
    variance_update: Literal["upstream", "exact"] = option(
        "upstream", "exact: stationary in means and variances, whatever isotropic and sum-trick say")  # fmt: skip
    damping: Decay = option(0.0, "weight of the previous iterate")
    alpha: Annotated[float, Field(ge=1e-3, le=1e9)] = option(10.0, "alpha of the pair weights")
    epsilon: NonNegative = option(0.1, "stop when no mean or variance moves further")
    max_iters: Count = option(10000, "iterations at most")
    dry_run: bool = option(False, "check the options and leave")

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.variance_update == "exact" and (self.force_isotropic or not self.variances):
            raise ValueError("--variance-update exact has no effect where the variances do not move: leave it, "
                             "--force-isotropic and --no-variances out")  # fmt: skip
        return self

    def fixed_point(self, strength: float) -> FixedPointGaussians:
        """The iteration for one lambda."""
        return FixedPointGaussians(
            strength, means=self.means, variances=self.variances and not self.force_isotropic,
            isotropic=self.isotropic, sum_trick=self.sum_trick, alpha=self.alpha, variance_update=self.variance_update,
            damping=self.damping, epsilon=self.epsilon, max_iters=self.max_iters,
            start_variance=self.force_isotropic or None, min_variance=1e-12,
        )  # fmt: skip


def gaussian_samples(mean: Tensor, var: Tensor, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """1000 points of every Gaussian, and their labels."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(len(mean)).repeat_interleave(SAMPLES)
    z = mean[y].double() + var[y].double().sqrt() * torch.randn(len(y), 2, generator=rng, dtype=torch.float64)
    return z.numpy(), y.numpy()


def main(argv: list[str] | None = None) -> None:
    """Read the command line, iterate for every lambda, write pictures and results.json."""
    args, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    if args.dry_run:
        print(args.model_dump_json(indent=2))
        return
    out = Path(args.out)
    x, y = load_cloud(args.data)
    mean, var = class_statistics(x, y)
    save_image(out / "tsne.png", pictures.scatter(x.numpy(), y.numpy(), size=1))
    limits = (x.min(0).values.tolist(), x.max(0).values.tolist())
    for k in range(len(mean)):
        shown = y <= k
        picture = pictures.scatter(x[shown].numpy(), y[shown].numpy(), size=1, limits=limits, classes=len(mean))
        save_image(out / f"tsne_class{k}.png", picture)
    save_image(out / "tsne_gaussians.png", pictures.scatter(*gaussian_samples(mean, var), size=1))
    results = {}
    for strength in args.strength:
        # float32 iterates, as the flow stores them
        fitted = args.fixed_point(strength).fit(x.float().numpy(), y.numpy())
        found_mean, found_var = fitted.gaussians.mean, fitted.gaussians.var
        smallest = float(off_diagonal(kl_matrix(found_mean, found_var)).min())
        std = found_var.double().sqrt()
        results[f"{strength:g}"] = {
            "iterations": fitted.n_iter_,
            "converged": fitted.converged_,
            "non_finite": fitted.non_finite_,
            "mean": found_mean.tolist(),
            "std": std.tolist(),
            "smallest_kl": smallest,
            "last_step": fitted.history_[-1] if fitted.history_ else {},
        }
        ending = "converged" if fitted.converged_ else "non-finite" if fitted.non_finite_ else "max_iters"
        print(
            f"lambda {strength:g}: {fitted.n_iter_} iterations ({ending}), mean std {std.mean():.4f}, "
            f"closest centres {torch.pdist(found_mean.double()).min():.4f}, smallest KL {smallest:.4f}"
        )
        for m, s in zip(found_mean.tolist(), std.tolist(), strict=True):
            print(f"  mean {m[0]:9.4f} {m[1]:9.4f}   std {s[0]:7.4f} {s[1]:7.4f}")
        save_image(out / f"fpi_{strength:g}.png", pictures.scatter(*gaussian_samples(found_mean, found_var), size=1))
        if fitted.history_:
            save_image(out / f"steps_{strength:g}.png", pictures.fpi_curves(fitted.history_))
    write_json(out / "results.json", results)


if __name__ == "__main__":
    sys.exit(run_command(main))
