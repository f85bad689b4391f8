"""Concept labels and classes from the factors of each data set, by the paper's procedures (appendix A.3)."""

from collections.abc import Sequence

import numpy as np

from common.errors import UserError, suggest

# ---- dSprites -------------------------------------------------------------------------------------------------------

DSPRITES_SIZES = (1, 3, 6, 40, 32, 32)
DSPRITES_FACTORS = ("color", "shape", "scale", "orientation", "pos_x", "pos_y")
# the plane that splits the classes; its colour entry is 0
DSPRITES_NORMAL = np.array([0.0, -0.55329954, -0.3754565, 0.46785691, 0.37617377, 0.4387428])
SHAPES = ("square", "ellipse", "heart")


def dsprites_normalise(values: np.ndarray) -> np.ndarray:
    """`latents_values` (n, 6) -> shape code 0..2, other columns to [0, 1] by their own minimum and maximum."""
    out = np.array(values, dtype=np.float64)
    out[:, 1] -= 1
    out[:, 2:] -= out[:, 2:].min(0)
    highest = out[:, 2:].max(0)
    out[:, 2:] /= np.where(highest > 0, highest, 1)
    return out


def dsprites_concepts(values: np.ndarray) -> np.ndarray:
    """`latents_values` (n, 6) -> concepts (n, 7): square, ellipse, heart, scale, orientation, x, y."""
    v = dsprites_normalise(values)
    return np.concatenate([np.eye(3)[v[:, 1].astype(int)], v[:, 2:]], axis=1)


def dsprites_classes(values: np.ndarray) -> np.ndarray:
    """Class 1 on the negative side of the plane through the data's mean (the shape code takes part, as published)."""
    v = dsprites_normalise(values)
    return ((v - v.mean(0)) @ DSPRITES_NORMAL < 0).astype(np.int64)


def leakage_train_rows(values: np.ndarray) -> np.ndarray:
    """Mask (n,) of the images at the centre: both positions strictly between 0.48 and 0.52."""
    x, y = values[:, 4], values[:, 5]
    return (x > 0.48) & (x < 0.52) & (y > 0.48) & (y < 0.52)


def leakage_test_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mask (n,) of the two corners and, for those images in order, the corner label: 1 for the far corner (> 0.75)."""
    x, y = values[:, 4], values[:, 5]
    near, far = (x < 0.25) & (y < 0.25), (x > 0.75) & (y > 0.75)
    mask = near | far
    return mask, far[mask].astype(np.int64)


# ---- MPI3D ----------------------------------------------------------------------------------------------------------

MPI3D_SIZES = (6, 6, 2, 3, 3, 40, 40)
MPI3D_FACTORS = ("color", "shape", "size", "camera_height", "background", "dof_1", "dof_2")
# prototypes of the ten classes over the five categorical factors (colour, shape, size, height, background)
MPI3D_CENTROIDS = np.array(
    [
        [0, 4, 0, 2, 1], [1, 4, 1, 2, 1], [0, 0, 0, 1, 1], [2, 0, 1, 0, 2], [3, 5, 0, 2, 0],
        [4, 2, 0, 0, 1], [1, 4, 1, 0, 1], [4, 0, 0, 0, 0], [0, 5, 1, 1, 1], [3, 1, 1, 0, 0],
    ]
)  # fmt: skip


def mpi3d_concepts(factors: np.ndarray) -> np.ndarray:
    """Integer factors (n, 7) -> concepts (n, 21): colour 6, shape 6, size, height 3, background 3, the two angles."""
    f = factors.astype(int)
    one_hot = [np.eye(MPI3D_SIZES[i])[f[:, i]] for i in (0, 1)]
    size = f[:, 2:3].astype(np.float64)
    one_hot_2 = [np.eye(MPI3D_SIZES[i])[f[:, i]] for i in (3, 4)]
    return np.concatenate([*one_hot, size, *one_hot_2, f[:, 5:] / 39.0], axis=1)


def mpi3d_classes(factors: np.ndarray, centroids: np.ndarray = MPI3D_CENTROIDS) -> np.ndarray:
    """Nearest prototype over the first five factors; a tie goes to the lowest class."""
    return nearest_mode(factors[:, :5], centroids)


# ---- CelebA ---------------------------------------------------------------------------------------------------------

CELEBA_ATTRIBUTES = (
    "Bald", "Black_Hair", "Blond_Hair", "Brown_Hair", "Eyeglasses", "Gray_Hair", "Male", "No_Beard", "Smiling",
    "Wearing_Hat"
)  # fmt: skip
CELEBA_HAIR = (0, 1, 2, 3, 5)


def celeba_kept_rows(attributes: np.ndarray, unique_hair: bool = False) -> np.ndarray:
    """Mask (n,) of images to keep: some hair attribute, and not Bald together with a hair colour.

    attributes (n, 10) in {0, 1}. `unique_hair` also drops two colours at once: the rule of the paper's text; the
    published code keeps those images.
    """
    hair = attributes[:, CELEBA_HAIR].astype(int)
    count = hair.sum(1)
    if unique_hair:
        return count == 1
    return (count >= 1) & ~((hair[:, 0] == 1) & (count > 1))


# ---- factors by name ------------------------------------------------------------------------------------------------

LEAKAGE_FACTORS = ("shape", "scale", "orientation")
FACTORS = {
    "dsprites_full": DSPRITES_FACTORS, "sprites": DSPRITES_FACTORS, "dsprites_leakage": LEAKAGE_FACTORS,
    "mpi3d_toy": MPI3D_FACTORS, "celebA": CELEBA_ATTRIBUTES,
}  # fmt: skip


def chosen_factors(given: Sequence[int | str] | None, factors: Sequence[str]) -> list[int]:
    """The numbers of the factors that --include_labels gives by number or name; None: all. Raises UserError."""
    if given is None:
        return list(range(len(factors)))
    chosen = [factors.index(one) if one in factors else one for one in given]
    wrong = [one for one in chosen if one not in range(len(factors))]
    if wrong or len(set(chosen)) < len(chosen):
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(factors))
        near = suggest(str(wrong[0]), factors) if wrong else ""
        raise UserError(f"--include_labels {' '.join(map(str, given))}{near}: expected different ones of {listed}")
    return chosen


# ---- k-modes --------------------------------------------------------------------------------------------------------


def nearest_mode(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Index (n,) of the centroid (C, F) with the fewest unequal features of rows (n, F); ties go to the lowest."""
    distances = np.stack([(rows != centroid).sum(1) for centroid in centroids], axis=1)
    return distances.argmin(1)


def _modes(rows: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    new = centroids.copy()
    for c in range(len(centroids)):
        members = rows[labels == c]
        if len(members):
            new[c] = [np.bincount(column).argmax() for column in members.T]
    return new


def _huang_start(rows: np.ndarray, n_clusters: int, rng: np.random.Generator) -> np.ndarray:
    # each feature of a start point is drawn by its frequency, then the point moves to its nearest row, without repeats
    drawn = np.stack([rng.choice(column, n_clusters) for column in rows.T], axis=1)
    start = np.empty_like(drawn)
    taken: set[tuple[int, ...]] = set()
    for c, point in enumerate(drawn):
        order = (rows != point).sum(1).argsort(kind="stable")
        chosen = next((i for i in order if tuple(rows[i]) not in taken), order[0])
        start[c] = rows[chosen]
        taken.add(tuple(rows[chosen]))
    return start


def fit_kmodes(
    rows: np.ndarray, n_clusters: int, seed: int = 42, restarts: int = 10, iterations: int = 100
) -> tuple[np.ndarray, int]:
    """k-modes (Huang 1998): centroids (C, F) and the total number of unequal features; the best of `restarts`.

    rows (n, F) are non-negative integers. Deterministic for a seed. Raises UserError with fewer distinct rows than
    clusters.
    """
    rows = np.asarray(rows).astype(np.int64)
    if len(np.unique(rows, axis=0)) < n_clusters:
        raise UserError(f"k-modes: {n_clusters} clusters need as many distinct rows; lower the number of classes")
    rng = np.random.default_rng(seed)
    best: tuple[np.ndarray, int] | None = None
    for _ in range(restarts):
        centroids = _huang_start(rows, n_clusters, rng)
        for _ in range(iterations):
            new = _modes(rows, nearest_mode(rows, centroids), centroids)
            if np.array_equal(new, centroids):
                break
            centroids = new
        cost = int(np.stack([(rows != c).sum(1) for c in centroids], axis=1).min(1).sum())
        if best is None or cost < best[1]:
            best = centroids, cost
    return best


# ---- who is supervised, and who is in which split -------------------------------------------------------------------


def supervision_mask(n: int, percent: float, seed: int, discard: int = 0) -> np.ndarray:
    """Which of n images carry concept labels: u_i <= percent / 100 with u drawn by RandomState(seed).

    The same u_i serve every percentage, so the 1 % set lies inside the 10 % set. `discard` numbers are drawn before
    (dSprites: 6 + n, for the random plane and the label noise that the published code draws and does not use).
    """
    if not 0 <= percent <= 100:
        raise UserError(f"--masking_fact {percent}: expected a percentage between 0 and 100")
    rng = np.random.RandomState(seed % 2**32)
    rng.uniform(size=discard)
    return rng.uniform(size=n) <= percent / 100


def random_split(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices (train, val, test): 20 % of a seeded shuffle are held out, half of them for validation."""
    order = np.arange(n)
    np.random.RandomState(seed % 2**32).shuffle(order)
    held = int(np.floor(0.2 * n))
    half = int(np.floor(held / 2))
    return order[held:], order[:half], order[half:held]
