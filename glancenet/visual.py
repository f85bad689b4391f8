"""Pictures of a model: reconstructions, latent traversals (grids and GIFs), the latent-against-factor matrix."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.images import mosaic, save_gif, save_image
from glancenet.algorithms import Algorithm
from glancenet.data import ConceptData
from glancenet.losses import Batch, one_hot_labels

WHITE_COLUMN = 10
GIF_FPS = 10


def traversal_values(low: float, high: float, spacing: float) -> np.ndarray:
    """low, low + spacing, ... below high (12 values by default)."""
    return np.arange(low, high, spacing)


def reconstructions(model: Algorithm, batch: Batch) -> Tensor:
    """Reconstructed images (B, C, 64, 64) in [0, 1] from posterior means."""
    return torch.sigmoid(model.decode(model.encode(batch)[0], batch))


def reconstruction_picture(model: Algorithm, batch: Batch, columns: int = 8) -> np.ndarray:
    """Inputs, a white column of 10 pixels, reconstructions: (H, W, 3) uint8."""
    left = mosaic(batch.x.float(), columns)
    right = mosaic(reconstructions(model, batch), columns)
    white = np.full((left.shape[0], WHITE_COLUMN, 3), 255, np.uint8)
    return np.concatenate([left, white, right], axis=1)


def _one(batch: Batch, i: int, n: int) -> Batch:
    return Batch(*(part[i : i + 1].expand(n, *part.shape[1:]) for part in batch))


def traverse(
    model: Algorithm, batch: Batch, i: int, values: np.ndarray, latents: list[int], codes: bool = False
) -> Tensor:
    """Rows of images (rows, values, C, 64, 64) in [0, 1] for image i: its reconstruction repeated; then one row a
    latent,
    set to each of `values` in raw z while the others stay at the mean; then, with `codes`, one row a label (CVAE,
    IFCVAE), whose values run and repeat.
    """
    n = len(values)
    mu = model.encode(_one(batch, i, 1))[0]  # (1, D)
    same = _one(batch, i, n)
    rows = [model.decode(mu.expand(n, -1), same)]
    for latent in latents:
        z = mu.repeat(n, 1)
        z[:, latent] = torch.as_tensor(values, dtype=z.dtype, device=z.device)
        rows.append(model.decode(z, same))
    if codes:
        for column, size in enumerate(model.shape.code_sizes):
            changed = same.codes.clone()
            changed[:, column] = torch.arange(n, device=changed.device) % size
            rows.append(decode_with_codes(model, mu.expand(n, -1), same._replace(codes=changed)))
    return torch.sigmoid(torch.stack(rows))


def decode_with_codes(model: Algorithm, z: Tensor, batch: Batch) -> Tensor:
    """Logits with the labels of `batch.codes`, also for an algorithm that would predict them (IFCVAE)."""
    return model.decoder(torch.cat([z, one_hot_labels(batch.codes, list(model.shape.code_sizes)).to(z)], dim=1))


def save_traversal(
    folder: Path, stem: str, gif_stem: str | None, rows: Tensor, columns: int | None = None
) -> np.ndarray:
    """Write `<stem>.jpg` (one row a latent) and, unless None, `<gif_stem>.gif` (one frame a value); returns the
    picture.
    """
    n_rows, n = rows.shape[:2]
    picture = mosaic(rows.flatten(0, 1).cpu(), columns or n)
    save_image(folder / f"{stem}.jpg", picture)
    if gif_stem is not None:
        shown = rows[1:] if n_rows > 1 else rows
        frames = [mosaic(shown[:, j].cpu(), len(shown)) for j in range(n)]
        save_gif(folder / f"{gif_stem}.gif", frames, fps=GIF_FPS)
    return picture


def latent_factor_matrix(mu: np.ndarray, concepts: np.ndarray) -> np.ndarray:
    """|correlation| (D, L) of latents (n, D) and concepts (n, L); 0 where a column is constant."""
    z, g = mu - mu.mean(0), concepts - concepts.mean(0)
    scale = np.sqrt(np.square(z).sum(0))[:, None] * np.sqrt(np.square(g).sum(0))[None, :]
    return np.abs(z.T @ g) / np.where(scale > 0, scale, np.inf)


def traversed_places(data: ConceptData, seed: int, step: int) -> tuple[list[str], list[int]]:
    """Keys and places in the training set of the traversed images: the fixed ones of the data set (three seeded ones
    where it has none), and one that is chosen anew each time.
    """
    rows = data.train.rows.numpy()
    # a fixed image itself, or its neighbour when it is held out
    fixed = {name: int(np.argmin(np.abs(rows - row))) for name, row in (data.fixed or {}).items()}
    if not fixed:
        chosen = np.random.default_rng(seed).permutation(len(rows))[:3]
        fixed = {f"rand{i}": int(place) for i, place in enumerate(chosen)}
    fixed["random"] = int(np.random.default_rng([seed, step]).integers(len(rows)))
    return list(fixed), list(fixed.values())


def figure(width: float, height: float):
    """A matplotlib figure of that size in inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def save_figure(path: Path, made, dpi: int = 90) -> None:
    """Write a figure, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=dpi)


def save_matrix(path: Path, matrix: np.ndarray, names: list[str], title: str) -> None:
    """A heat map of (D, L) in [0, 1], latents down, concepts across."""
    made = figure(1.5 + 0.45 * matrix.shape[1], 1.8 + 0.32 * matrix.shape[0])
    axes = made.add_subplot()
    shown = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(matrix.shape[1]), names, rotation=60, ha="right")
    axes.set_yticks(range(matrix.shape[0]), [f"z{i}" for i in range(matrix.shape[0])])
    axes.set_title(title, fontsize=9)
    made.colorbar(shown, ax=axes)
    save_figure(path, made)
