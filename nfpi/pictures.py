"""Pictures of a run: sample grids, mean and variance curves, sorted pairwise KL, t-SNE, confusion matrix.

Every function returns (H, W, 3) uint8; `write_all` puts pictures below the run's folder and into TensorBoard.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from common.images import mosaic, save_image
from common.run import Run
from nfpi.gaussians import ClassGaussians, kl_matrix, off_diagonal

if TYPE_CHECKING:
    from nfpi.conditional import ConditionalFlow


def write_all(run: Run, shown: Mapping[str, np.ndarray], step: int) -> None:
    """Write `pictures/<name>.png` (the newest replaces the older one) and TensorBoard images of the same names."""
    for name, picture in shown.items() if run.enabled else ():
        save_image(run.folder / "pictures" / f"{name}.png", picture)
        run.image(name, picture, step)


def render(figure: Figure) -> np.ndarray:
    """The figure's pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def class_grids(model: "ConditionalFlow", temperature: float, rng: torch.Generator) -> dict[str, np.ndarray]:
    """`samples_<class>`: grids, 8 columns, of 64 samples of each of the first ten classes (9 above a hundred classes).

    A model without classes gives one grid.
    """
    count = 64 if model.classes <= 100 else 9
    grids = {}
    for k in range(min(model.classes, 10) if model.knows_classes else 1):
        y = torch.full((count,), k, device=model.device)
        images, _ = model.sample(y, temperature, rng)
        grids[f"samples_{k}"] = mosaic(images.float().cpu(), columns=8)
    return grids


def fpi_curves(history: Sequence[dict[str, float]]) -> np.ndarray:
    """Step norms and KL statistics against the iteration, both on logarithmic axes."""
    figure = Figure(figsize=(8, 3), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("mean_change", "var_change"):
        values = np.array([row[name] for row in history])
        if values.any():
            left.plot(values, label=name.replace("_", " "))
    for name in ("kl_min", "kl_mean", "kl_max"):
        right.plot([row[name] for row in history], label=name.replace("_", " "))
    for axes, title in ((left, "largest L2 step of a class"), (right, "pairwise KL")):
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_xlabel("iteration")
        axes.set_title(title)
        axes.legend()
    return render(figure)


def sorted_kl(gaussians: ClassGaussians) -> dict[str, np.ndarray]:
    """The sorted pairwise KL divergences: all of them, and the smallest tenth."""
    values = off_diagonal(kl_matrix(gaussians.mean, gaussians.var)).sort().values.cpu().numpy()
    figures = {}
    for count in {len(values), max(1, len(values) // 10)}:
        figure = Figure(figsize=(5, 3), dpi=100, layout="constrained")
        axes = figure.subplots()
        axes.plot(values[:count], ".-")
        axes.set_xlabel(f"pair of classes, {count} of {len(values)}")
        axes.set_ylabel("KL divergence")
        figures["pairwise_kl" if count == len(values) else "pairwise_kl_smallest"] = render(figure)
    return figures


def gaussian_curves(gaussians: ClassGaussians, classes: int = 3) -> dict[str, np.ndarray]:
    """Means and variances of the first classes over the dimensions, as they are and sorted."""
    figures = {}
    for name in ("mean", "var"):
        for k, row in enumerate(getattr(gaussians, name)[:classes].float().cpu()):
            figure = Figure(figsize=(8, 3), dpi=80, layout="constrained")
            left, right = figure.subplots(1, 2)
            left.plot(row, linewidth=0.5)
            right.plot(row.sort().values)
            left.set_title(f"{name} of class {k}")
            right.set_title("sorted")
            figures[f"{name}_{k}"] = render(figure)
    return figures


def latent_tsne(gaussians: ClassGaussians, rng: torch.Generator) -> np.ndarray:
    """t-SNE of samples of all class Gaussians: 64 a class, 9 above a hundred classes."""
    from sklearn.manifold import TSNE  # here, as it takes seconds to import

    count = 64 if len(gaussians.mean) <= 100 else 9
    y = torch.arange(len(gaussians.mean), device=gaussians.mean.device).repeat_interleave(count)
    z = gaussians.sample(y, 1.0, rng).float().cpu().numpy()
    points = TSNE(n_components=2, random_state=0, perplexity=min(30, len(z) - 1)).fit_transform(z)
    return scatter(points, y.cpu().numpy(), "class samples in the latent space")


def scatter(
    points: np.ndarray,
    labels: np.ndarray,
    title: str = "",
    size: float = 4,
    limits: tuple[Sequence[float], Sequence[float]] | None = None,
    classes: int | None = None,
) -> np.ndarray:
    """Points (N, 2) coloured by class, equal aspect, without axes. `limits`: lower and upper corner of the view."""
    last = (classes or int(labels.max()) + 1) - 1
    figure = Figure(figsize=(5, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    colours = {"vmin": 0, "vmax": max(last, 9), "cmap": "tab10" if last < 10 else "nipy_spectral"}
    axes.scatter(points[:, 0], points[:, 1], c=labels, s=size, **colours)
    if limits:
        axes.set_xlim(limits[0][0], limits[1][0])
        axes.set_ylim(limits[0][1], limits[1][1])
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(title)
    return render(figure)


def confusion(matrix: Tensor, classes: Sequence[str]) -> np.ndarray:
    """Counts (K, K): rows are true classes, columns predictions; the numbers are written in up to twenty classes."""
    counts = matrix.cpu().numpy()
    figure = Figure(figsize=(6, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(counts) <= 20:
        names = classes if len(classes) == len(counts) else [str(k) for k in range(len(counts))]
        axes.set_xticks(range(len(counts)), names, rotation=90)
        axes.set_yticks(range(len(counts)), names)
        for i, row in enumerate(counts):
            for j, value in enumerate(row):
                colour = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, int(value), ha="center", va="center", fontsize=7, color=colour)
    return render(figure)
