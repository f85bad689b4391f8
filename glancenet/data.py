"""The data sets: images by index (memory-mapped or rendered), concept labels, classes, splits and supervision.

| --dset_name      | images                                                          | L  | C  | splits               |
|------------------|-----------------------------------------------------------------|----|----|----------------------|
| dsprites_full    | the published dSprites file                                     | 7  | 2  | 80 / 10 / 10 %       |
| sprites          | sprites rendered here on dSprites' factor grid (or a smaller)   | 7  | 2  | 80 / 10 / 10 %       |
| dsprites_leakage | dsprites_leakage_train.npz, dsprites_leakage_test.npz           | 5  | 3  | centre / two corners |
| mpi3d_toy        | mpi3d_toy/mpi3d_toy_full.npz                                    | 21 | 10 | 80 / 10 / 10 %       |
| celebA           | celebA/celebA64-full-10.npz, celebA/clusters_4.npz              | 10 | 4  | the official one     |
| folder           | those of --dset_dir, with the CSV --concepts                    | CSV | | 81 / 9 / 10 %, test/ |

Images stay uint8 where they lie; a batch is turned into floats on the training device.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from common.checkpoint import atomic_write
from common.datasets import load
from common.datasets.folder import Column, OwnImages, Table, held_out_rows, names_below
from common.datasets.readers import NpzFile, reading
from common.errors import MissingDataError, UserError
from common.metrics.disentanglement_points import MIN_ROWS
from glancenet import labels as rules
from glancenet.algorithms import Shape
from glancenet.losses import Batch
from glancenet.options import Config

log = logging.getLogger(__name__)
PREPARE = {
    "dsprites_full": "python -m common.datasets.prepare dsprites",
    "dsprites_leakage": "python glancenet/prepare_dsprites_leakage.py",
    "mpi3d_toy": "python glancenet/prepare_mpi3d.py",
    "celebA": "python glancenet/prepare_celeba.py",
}
CELEBA_TOTAL, CELEBA_TRAIN_END, CELEBA_VAL_END = 127_817, 102_635, 115_013
HOLD_LIMIT = 16_000_000_000  # bytes of images kept on a GPU
# dSprites images that the published code draws in every traversal: a square, an ellipse, a heart; and four of CelebA
DSPRITES_FIXED = {"fixed_square": 87040, "fixed_ellipse": 332800, "fixed_heart": 578560}
CELEBA_FIXED = {"fixed_0": 11281, "fixed_1": 114307, "fixed_2": 10535, "fixed_3": 59434}


# ---- files ----------------------------------------------------------------------------------------------------------


def open_npz(path: Path, key: str, remedy: str) -> np.ndarray:
    """Array `key` of an npz file, memory-mapped. A compressed member is unpacked once to `<path>.<key>.npy`.

    Raises UserError naming the file and `remedy` (a command) when it is missing, truncated or holds Python objects.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; make it by: {remedy}")
    try:
        archive = NpzFile(path)
        mapped = archive.mapped(key)
        return _unpacked(path, archive, key) if mapped is None else mapped
    except UserError as error:
        raise UserError(f"{error}; make it again by: {remedy}") from error


def _unpacked(path: Path, archive: NpzFile, key: str) -> np.ndarray:
    target = path.with_name(f"{path.name}.{key}.npy")
    if not target.exists() or target.stat().st_mtime < path.stat().st_mtime:
        shape, dtype = archive.header(key)  # what it claims is what the archive says it holds
        with atomic_write(target) as file:
            header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(file, header)
            for block in archive.blocks(key):
                file.write(block.tobytes())
    with reading(target, "npy"):
        return np.load(target, mmap_mode="r", allow_pickle=False)


def image_array(path: Path, key: str, remedy: str, binary: bool = False) -> "Images":
    """The images of an npz file, memory-mapped. Raises UserError unless they are uint8 (N, 64, 64) or (N, 64, 64, 3);
    `binary` ones hold 0 and 1.
    """
    array = open_npz(path, key, remedy)
    if array.dtype != np.uint8 or array.shape[1:] not in ((64, 64), (64, 64, 1), (64, 64, 3)):
        raise UserError(
            f"{path}: {key} holds {array.dtype} {array.shape}, expected uint8 images (N, 64, 64) or (N, 64, 64, 3); "
            f"make it again by: {remedy}"
        )
    step = 4096
    if binary and any(array[start : start + step].max(initial=0) > 1 for start in range(0, len(array), step)):
        raise UserError(f"{path}: {key} must hold 0 and 1 alone; make it again by: {remedy}")
    if not binary and len(array) and array[:step].max() <= 1:
        raise UserError(f"{path}: {key} must hold 0 to 255, not 0 and 1 alone; make it again by: {remedy}")
    return Images(array, scale=255 if binary else 1)


def whole_numbers(path: Path, key: str, remedy: str, low: int, high: Any) -> np.ndarray:
    """A table of labels as int64. Raises UserError unless every entry is a whole number of `low` to `high` (a number,
    or one a column).
    """
    values = np.asarray(open_npz(path, key, remedy))
    wrong = f"{path}: {key} must hold whole numbers of {low} to {np.max(high)}"
    if values.dtype.kind not in "biuf" or (np.ndim(high) and values.shape[1:] != np.shape(high)):
        raise UserError(f"{wrong}, not {values.dtype} {values.shape}; make it again by: {remedy}")
    if not (np.isfinite(values) & (values == np.floor(values)) & (values >= low) & (values <= high)).all():
        raise UserError(f"{wrong}; make it again by: {remedy}")
    return values.astype(np.int64)


class Images:
    """Images by row: uint8 (n, C, 64, 64). `array` is (N, 64, 64[, C]) or an image set with `images_at`."""

    def __init__(self, source: Any, scale: int = 1):
        self.source, self.scale = source, scale  # scale 255 for files that store 0 and 1
        self.held: Tensor | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def channels(self) -> int:
        """1 or 3."""
        if hasattr(self.source, "images_at"):
            return self.source.channels
        return self.source.shape[3] if self.source.ndim == 4 else 1

    def fetch(self, rows: np.ndarray | Tensor) -> Tensor:
        """uint8 (n, C, 64, 64) of 0..255."""
        if self.held is not None:
            return self.held[torch.as_tensor(rows, device=self.held.device)]
        rows = rows.numpy() if isinstance(rows, Tensor) else np.asarray(rows)
        if hasattr(self.source, "images_at"):
            return self.source.images_at(rows)
        part = torch.from_numpy(np.ascontiguousarray(self.source[rows]))
        part = part.permute(0, 3, 1, 2) if part.ndim == 4 else part[:, None]
        return part * self.scale if self.scale != 1 else part

    def hold(self, device: torch.device, limit: int) -> bool:
        """Keep all images on `device` when they take at most `limit` bytes; returns whether they are kept."""
        n = len(self)
        if self.held is not None:
            return True
        if n * self.channels * 64 * 64 > limit:
            return False
        held = torch.empty((n, self.channels, 64, 64), dtype=torch.uint8, device=device)
        for start in range(0, n, 4096):
            held[start : start + 4096] = self.fetch(np.arange(start, min(n, start + 4096))).to(device)
        self.held = held
        return True


# ---- parts of a data set --------------------------------------------------------------------------------------------


class Part:
    """One split: rows of `images` with concepts (n, L) in [0, 1], classes (n,), supervision (n,), label codes (n,
    k).
    """

    def __init__(
        self, images: Images, rows: np.ndarray, concepts: np.ndarray, y: np.ndarray, mask: np.ndarray, codes: np.ndarray
    ):
        self.images, self.rows = images, torch.from_numpy(np.ascontiguousarray(rows.astype(np.int64)))
        self.concepts = torch.from_numpy(concepts.astype(np.float32))
        self.y = torch.from_numpy(y.astype(np.int64))
        self.mask = torch.from_numpy(mask.astype(np.float32))
        self.codes = torch.from_numpy(codes.astype(np.int64))
        self.class_weights: np.ndarray | None = None  # (C,): draw with replacement by these
        self._held: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, n: int, seed: int) -> "Part":
        """A seeded choice of at most `n` examples, in the stored order."""
        if n >= len(self):
            return self
        kept = np.sort(np.random.default_rng(seed % 2**32).permutation(len(self))[:n])
        arrays = (self.rows, self.concepts, self.y, self.mask, self.codes)
        return Part(self.images, *(array.numpy()[kept] for array in arrays))

    def hold(self, device: torch.device, limit: int = HOLD_LIMIT) -> bool:
        """Keep images and labels on `device`, where they fit; a batch then costs no copy."""
        if self.images.hold(device, limit):
            self._held = tuple(part.to(device) for part in self._labels())
        return self._held is not None

    def _labels(self) -> tuple[Tensor, ...]:
        return self.rows, self.concepts, self.y, self.mask, self.codes

    def order(self, seed: int, epoch: int) -> Tensor:
        """The places visited in `epoch`, a pure function of (seed, epoch); drawn with replacement by class weights."""
        rng = np.random.default_rng([seed % 2**32, epoch])
        if self.class_weights is None:
            return torch.from_numpy(rng.permutation(len(self)))
        p = self.class_weights[self.y.numpy()]
        return torch.from_numpy(rng.choice(len(self), len(self), p=p / p.sum()))

    def gather(self, places: Tensor, device: torch.device, pin: bool = False) -> Batch:
        """The examples at `places` (n,) as floats on `device`; the conversion happens there."""
        rows, *labels = self._held or self._labels()
        places = places.to(rows.device)
        parts = [self.images.fetch(rows[places]), *(label[places] for label in labels)]
        if pin and device.type == "cuda":
            parts = [part.pin_memory() if part.device.type == "cpu" else part for part in parts]
        x, concepts, y, mask, codes = (part.to(device, non_blocking=True) for part in parts)
        x = x.to(torch.float32, memory_format=torch.channels_last).div_(255)
        return Batch(x, concepts, y, mask, codes)

    def batches(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Every example once, in the stored order."""
        for places in torch.arange(len(self)).split(batch_size):
            yield self.gather(places, device)


class TrainingBatches:
    """The batches of an epoch as `common.training.Training` asks for them: pairs of a batch and, with `second`, the
    batch after it (FactorVAE permutes other images than it judges), else None. The last, partial batch is left out.
    """

    def __init__(self, part: Part, o: Config, device: torch.device, second: bool = False):
        self.part, self.o, self.device, self.second = part, o, device, second
        self.batch_size = o.batch_size

    def __len__(self) -> int:
        return len(self.part) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Batch, Batch | None]]:
        """Batches `start`, `start` + 1, ... of `epoch`; on a GPU one thread fetches ahead (--num_workers)."""
        order = self.part.order(self.o.seed, epoch)
        if self.part._held is not None:
            order = order.to(self.device)
        places = order[: len(self) * self.batch_size].split(self.batch_size)

        def fetch(i: int) -> Batch:
            return self.part.gather(places[i % len(self)], self.device, self.o.pin_memory)

        pairs = ((fetch(i), fetch(i + 1) if self.second else None) for i in range(start, len(self)))
        return _ahead(pairs) if self.o.num_workers and self.device.type == "cuda" else pairs


def _ahead(items: Iterator[Any], depth: int = 3) -> Iterator[Any]:
    """`items` made by a thread, `depth` ahead; errors come out at their place."""
    waiting: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def offer(entry: tuple[bool, Any]) -> bool:
        while not stop.is_set():
            try:
                waiting.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not offer((True, item)):
                    return
            offer((False, None))
        except BaseException as error:  # handed to the consumer
            offer((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            more, item = waiting.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stop.set()


@dataclass
class ConceptData:
    """A data set ready for training. `grid` is the factor set that the metrics sample, or None."""

    name: str
    train: Part
    val: Part
    test: Part
    concept_names: list[str]
    n_classes: int
    code_sizes: tuple[int, ...]
    grid: Any = None
    rejection: Part | None = None  # training images that fit the rejection; default all
    corner: np.ndarray | None = None  # dsprites_leakage: the absent factor of the test images (n,)
    class_names: tuple[str, ...] = ()  # where they have any
    fixed: dict[str, int] | None = None  # rows of `train.images` drawn in every traversal

    @property
    def shape(self) -> Shape:
        """What an algorithm needs to know."""
        n = len(self.concept_names)
        return Shape(self.train.images.channels, n, self.n_classes, self.code_sizes, len(self.train))


class Labels(NamedTuple):
    """Labels of a whole image file: concepts (N, L), their names, classes (N,), integer codes (N, k) and their
    sizes.
    """

    concepts: np.ndarray
    names: list[str]
    y: np.ndarray
    codes: np.ndarray
    sizes: tuple[int, ...]
    discard: int = 0  # uniform numbers that precede the supervision mask in the published stream


def _select(labels: Labels, groups: list[list[int]], chosen: list[int | str] | None, factors: Sequence[str]) -> Labels:
    """Keep the concept columns (`groups` of each factor) and codes of the factors `chosen`."""
    chosen = rules.chosen_factors(chosen, factors)
    columns = [column for i in chosen for column in groups[i]]
    varied = [i for i in chosen if labels.sizes[i] > 1]
    return labels._replace(
        concepts=labels.concepts[:, columns], names=[labels.names[c] for c in columns],
        codes=labels.codes[:, varied], sizes=tuple(labels.sizes[i] for i in varied),
    )  # fmt: skip


def _split_by_chance(images: Images, labels: Labels, o: Config) -> tuple[Part, Part, Part]:
    n = len(images)
    mask = rules.supervision_mask(n, o.masking_fact, o.seed, labels.discard)
    splits = rules.random_split(n, o.seed)
    return tuple(_part(images, labels, mask, rows) for rows in splits)


def _part(images: Images, labels: Labels, mask: np.ndarray, rows: np.ndarray) -> Part:
    return Part(images, rows, labels.concepts[rows], labels.y[rows], mask[rows], labels.codes[rows])


def _classes(o: Config, n: int) -> int:
    if o.n_classes is not None and o.n_classes < n:
        raise UserError(f"--n_classes {o.n_classes}: {o.dset_name} has {n} classes")
    return o.n_classes or n


# ---- the five data sets ---------------------------------------------------------------------------------------------

DSPRITES_GROUPS = [[], [0, 1, 2], [3], [4], [5], [6]]
DSPRITES_NAMES = ["square", "ellipse", "heart", "scale", "orientation", "pos_x", "pos_y"]


def _dsprites_labels(values: np.ndarray, codes: np.ndarray) -> Labels:
    sizes = tuple(int(codes[:, i].max()) + 1 for i in range(6))
    n = len(values)
    return Labels(
        rules.dsprites_concepts(values), DSPRITES_NAMES, rules.dsprites_classes(values), codes, sizes, discard=6 + n
    )


def load_dsprites(o: Config) -> ConceptData:
    """dSprites (the file), its `smaller` variant, or rendered sprites."""
    grid = None
    if o.dset_name == "sprites" or o.d_version == "full":
        sizes = {} if o.sprites_sizes is None else {"sizes": o.sprites_sizes}
        try:
            grid = load(o.dset_name.removesuffix("_full"), root=o.dset_dir, fetch=not o.test, **sizes)
        except MissingDataError as error:
            raise MissingDataError(f"{error}; or go on with rendered ones: --dset_name sprites (the scripts: "
                                   "DATASET_NAME=sprites)") from error  # fmt: skip
        rows = np.arange(len(grid))
        images, values, codes = Images(grid), grid.latents_values(rows), grid.latents_classes(rows)
    else:
        path = Path(o.dset_dir) / "dsprites" / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64_smaller.npz"
        remedy = "--d_version full (the smaller file was never published)"
        images = image_array(path, "imgs", remedy, binary=True)
        values = np.asarray(open_npz(path, "latents_values", remedy))
        codes = whole_numbers(path, "latents_classes", remedy, 0, np.array(rules.DSPRITES_SIZES) - 1)
        if values.shape != codes.shape or len(values) != len(images) or not np.isfinite(values).all():
            raise UserError(f"{path}: {values.shape} values and {codes.shape} codes do not describe {len(images)} "
                            f"images; use {remedy}")  # fmt: skip
    labels = _select(_dsprites_labels(values, codes), DSPRITES_GROUPS, o.include_labels, rules.DSPRITES_FACTORS)
    fixed = dict(DSPRITES_FIXED) if len(images) == 737_280 else None
    return ConceptData(
        o.dset_name, *_split_by_chance(images, labels, o), labels.names, _classes(o, 2), labels.sizes, grid, fixed=fixed
    )


def load_dsprites_leakage(o: Config) -> ConceptData:
    """Sprites at the centre (train 80 %, val 20 %) and, for the test, at two corners; all are supervised.

    Concepts: shape one-hot, scale, orientation, with the same columns in the test set; the class is the shape.
    """
    files = []
    for split in ("train", "test"):
        places = [Path(o.dset_dir) / sub / f"dsprites_leakage_{split}.npz" for sub in ("", "dsprites")]
        files.append(next((place for place in places if place.is_file()), places[0]))
    parts = []
    for path in files:
        remedy = f"{PREPARE['dsprites_leakage']} --out {o.dset_dir}"
        images = image_array(path, "X", remedy, binary=True)
        factors = np.asarray(open_npz(path, "G", remedy))
        y = whole_numbers(path, "Y", remedy, 0 if "test" in path.name else 1, 1 if "test" in path.name else 3)
        shapes = factors[:, 0] if factors.ndim == 2 and factors.shape[1] >= 3 else np.empty(0)
        if (
            len(images) != len(shapes)
            or len(y) != len(shapes)
            or not np.isfinite(factors).all()
            or not np.isin(shapes, (1, 2, 3)).all()
        ):
            raise UserError(
                f"{path}: factors {factors.shape} (shape 1 to 3, scale, orientation) do not describe {len(images)} "
                f"images; make it again by: {remedy}"
            )
        parts.append((images, factors, y.reshape(-1)))
    (images, factors, _), (test_images, test_factors, corner) = parts
    low, high = factors[:, 1:3].min(0), factors[:, 1:3].max(0)

    def concepts_of(values: np.ndarray) -> np.ndarray:
        scaled = (values[:, 1:3] - low) / np.where(high > low, high - low, 1)
        return np.concatenate([np.eye(3)[values[:, 0].astype(int) - 1], scaled], axis=1)

    names = ["square", "ellipse", "heart", "scale", "orientation"]
    shape = factors[:, 0].astype(int) - 1
    labels = Labels(concepts_of(factors), names, shape, shape[:, None], (3,))
    labels = labels._replace(codes=np.stack([shape, *[np.zeros_like(shape)] * 2], axis=1), sizes=(3, 1, 1))
    labels = _select(labels, [[0, 1, 2], [3], [4]], o.include_labels, rules.LEAKAGE_FACTORS)
    kept = [names.index(name) for name in labels.names]
    order = np.random.RandomState(o.seed % 2**32).permutation(len(images))
    cut = int(0.8 * len(images))
    everyone = np.ones(len(images), bool)
    train, val = (_part(images, labels, everyone, rows) for rows in (order[:cut], order[cut:]))
    # the class of a test image is its shape, as in training; its corner is what may leak
    test_shape, rows = test_factors[:, 0].astype(int) - 1, np.arange(len(test_images))
    test = Part(
        test_images, rows, concepts_of(test_factors)[:, kept], test_shape, np.ones(len(rows)), test_shape[:, None]
    )
    data = ConceptData(o.dset_name, train, val, test, labels.names, _classes(o, 3), labels.sizes)
    data.corner = corner.astype(np.int64)
    return data


MPI3D_GROUPS = [list(range(6)), list(range(6, 12)), [12], [13, 14, 15], [16, 17, 18], [19], [20]]
MPI3D_NAMES = (
    [f"color_{i}" for i in range(6)] + [f"shape_{i}" for i in range(6)] + ["size"]
    + [f"camera_height_{i}" for i in range(3)] + [f"background_{i}" for i in range(3)] + ["dof_1", "dof_2"]
)  # fmt: skip


class _FileGrid:
    """A file that holds every combination of factors once, row-major, as the metrics want it."""

    def __init__(self, images: Images, names: tuple[str, ...], sizes: tuple[int, ...]):
        self.images, self.factor_names, self.factor_sizes = images, names, sizes

    def index_of(self, factors: np.ndarray) -> np.ndarray:
        return np.ravel_multi_index(tuple(np.asarray(factors).T), self.factor_sizes)

    def images_at(self, index: np.ndarray) -> Tensor:
        return self.images.fetch(index)


def read_clusters(path: Path, n_classes: int, n_features: int) -> np.ndarray:
    """Centroids (C, F) that `cluster.py` wrote. Raises UserError on another shape."""
    remedy = "python glancenet/cluster.py"
    centroids = whole_numbers(path, "centroids", remedy, 0, 10_000)
    if centroids.shape != (n_classes, n_features):
        raise UserError(f"{path} holds centroids {centroids.shape}, expected {(n_classes, n_features)}; see {remedy}")
    return centroids


def load_mpi3d(o: Config) -> ConceptData:
    """MPI3D toy: classes are k-modes clusters, the published table unless a file mpi3d_toy/clusters_<C>.npz exists."""
    folder = Path(o.dset_dir) / "mpi3d_toy"
    path = folder / ("mpi3d_toy_full.npz" if o.d_version == "full" else "mpi3d_toy_small.npz")
    remedy = f"{PREPARE['mpi3d_toy']} --in mpi3d_toy.npz --out {o.dset_dir}"
    try:
        whole = None if path.is_file() or o.d_version != "full" else load("mpi3d_toy", root=o.dset_dir)
    except MissingDataError:
        whole = None
    if whole is not None:  # the images as `prepare mpi3d_toy` unpacks them
        images, factors = Images(whole), whole.targets.numpy()
    else:
        images = image_array(path, "X", remedy)
        factors = whole_numbers(path, "Y", remedy, 0, np.array(rules.MPI3D_SIZES) - 1)
    if len(images) != len(factors):
        raise UserError(
            f"{path}: factors {factors.shape} do not belong to {len(images)} MPI3D images; make it by: {remedy}"
        )
    n_classes = o.n_classes or len(rules.MPI3D_CENTROIDS)
    clusters = folder / f"clusters_{n_classes}.npz"
    if not clusters.is_file() and n_classes != len(rules.MPI3D_CENTROIDS):
        raise UserError(f"{clusters} is missing; make it by: python glancenet/cluster.py --dset_name mpi3d_toy "
                        f"--dset_dir {o.dset_dir} --n_classes {n_classes}")  # fmt: skip
    centroids = read_clusters(clusters, n_classes, 5) if clusters.is_file() else rules.MPI3D_CENTROIDS
    labels = Labels(
        rules.mpi3d_concepts(factors), MPI3D_NAMES, rules.mpi3d_classes(factors, centroids), factors, rules.MPI3D_SIZES
    )
    labels = _select(labels, MPI3D_GROUPS, o.include_labels, rules.MPI3D_FACTORS)
    grid = None
    if len(images) == int(np.prod(rules.MPI3D_SIZES)):
        grid = _FileGrid(images, rules.MPI3D_FACTORS, rules.MPI3D_SIZES)
    return ConceptData(o.dset_name, *_split_by_chance(images, labels, o), labels.names, n_classes, labels.sizes, grid)


def load_celeba(o: Config) -> ConceptData:
    """CelebA at 64x64 with ten attributes; classes are k-modes clusters; training draws by inverse class frequency."""
    folder = Path(o.dset_dir) / "celebA"
    path, remedy = folder / "celebA64-full-10.npz", f"{PREPARE['celebA']} --in img_align_celeba --out {o.dset_dir}"
    images = image_array(path, "X", remedy)
    attributes = whole_numbers(path, "Y", remedy, 0, np.ones(len(rules.CELEBA_ATTRIBUTES), int))
    if len(attributes) != len(images):
        raise UserError(
            f"{path}: attributes {attributes.shape} do not belong to {len(images)} images; make it by: {remedy}"
        )
    if "splits" in NpzFile(path):
        ends = whole_numbers(path, "splits", remedy, 0, len(images))
        if ends.shape != (2,) or ends[0] > ends[1]:
            raise UserError(f"{path}: splits must be the ends of training and validation; make it by: {remedy}")
    elif len(images) == CELEBA_TOTAL:
        ends = np.array([CELEBA_TRAIN_END, CELEBA_VAL_END])
    else:
        raise UserError(f"{path} has {len(images)} images and does not say where its splits end; make it by: {remedy}")
    n_classes = o.n_classes or 4
    centroids = read_clusters(folder / f"clusters_{n_classes}.npz", n_classes, len(rules.CELEBA_ATTRIBUTES))
    y = rules.nearest_mode(attributes, centroids)
    names = list(rules.CELEBA_ATTRIBUTES)
    labels = Labels(attributes.astype(float), names, y, attributes, (2,) * len(names))
    labels = _select(labels, [[i] for i in range(len(names))], o.include_labels, rules.CELEBA_ATTRIBUTES)
    mask = rules.supervision_mask(len(images), o.masking_fact, o.seed)
    rows = np.split(np.arange(len(images)), ends)
    train, val, test = (_part(images, labels, mask, part) for part in rows)
    share = np.bincount(train.y.numpy(), minlength=n_classes) / len(train)
    train.class_weights = 1 / np.maximum(share, 1e-12)
    fixed = dict(CELEBA_FIXED) if len(images) == CELEBA_TOTAL else None
    return ConceptData(o.dset_name, train, val, test, names if o.include_labels is None else labels.names, n_classes,
                       labels.sizes, fixed=fixed)  # fmt: skip


BINS = 10  # of a continuous concept of a folder, where labels must be codes


class Observed:
    """Factors that are observed with the images, not a grid of them: training and held-out images for the metrics."""

    def __init__(self, train: Part, test: Part):
        self.parts = train, test

    def tables(self, represent: Callable[[Tensor], Tensor], most: Sequence[int], seed: int) -> Iterator[np.ndarray]:
        """Codes (n, D) and factors (n, F) of at most `most[0]` training images, then of `most[1]` held-out ones."""
        for part, n in zip(self.parts, most, strict=True):
            part = part.part(n, seed)
            codes = [represent(part.images.fetch(rows)).cpu().numpy() for rows in part.rows.split(256)]
            yield from (np.concatenate(codes), part.codes.numpy())


def _observed_codes(column: Column) -> tuple[np.ndarray, int]:
    """Whole numbers (n,) of a concept, and how many there are: a continuous one cut into `BINS`, 0 where missing."""
    if column.kind == "continuous":
        low, high = column.span
        share = (np.nan_to_num(column.values, nan=low) - low) / ((high - low) or 1.0)
        return np.minimum((share * BINS).astype(np.int64), BINS - 1), BINS if high > low else 1
    return np.nan_to_num(column.values).astype(np.int64), len(column.categories) or 2


def _folder_part(found: OwnImages, o: Config) -> tuple[Images, Labels, np.ndarray]:
    """The images of a part of the folder, resized to 64 x 64; their labels; which of them have all their concepts."""
    n = len(found)
    table = found.table or Table(None, ())
    names, values, groups = table.encoded()
    coded = [_observed_codes(column) for column in table.concepts]
    codes = np.stack([code for code, _ in coded], axis=1) if coded else np.zeros((n, 0), np.int64)
    labels = Labels(
        values.reshape(n, len(names)), names, found.targets.numpy(), codes, tuple(size for _, size in coded)
    )
    labels = _select(labels, groups, o.include_labels, [column.name for column in table.concepts])
    known = ~np.isnan(labels.concepts).any(1)
    return Images(found.in_memory()), labels._replace(concepts=np.nan_to_num(labels.concepts)), known


def load_own(o: Config) -> ConceptData:
    """A folder of one's own images with the concepts of a CSV: a tenth of each class held out for the test (or test/),
    a tenth of the rest for validation. Images without all concepts train without them, and are left out of the test.
    """
    options = {
        "labels": o.concepts or "", "class_column": o.class_column or "", "held_out": 0.1, "seed": o.seed,
        "need_classes": o.algorithm in ("GlanceNet", "CBNM"), "image_size": 64, "channels": 0,
    }  # fmt: skip
    whole, held = (load("folder", o.dset_dir, split, **options) for split in ("train", "test"))
    images, labels, known = _folder_part(whole, o)
    mask = rules.supervision_mask(len(whole), o.masking_fact, o.seed) & known
    if whole.table:
        log.info("%s: %s", o.concepts, whole.table)
    val = held_out_rows(names_below(Path(o.dset_dir), whole.paths), labels.y, 0.1, f"{o.seed} validation")
    rows = np.delete(np.arange(len(whole)), val)
    test_images, test_labels, test_known = _folder_part(held, o)
    if not test_known.all():
        log.info("%d of the %d test images lack concepts and are left out of the test", (~test_known).sum(), len(held))
    test = _part(test_images, test_labels, test_known, np.flatnonzero(test_known))
    observed = _part(images, labels, mask, rows[known[rows]])
    if o.evaluation_metric and min(len(observed), len(test)) < MIN_ROWS:
        raise UserError(f"--evaluation_metric {' '.join(o.evaluation_metric)}: {MIN_ROWS} training and test images "
                        f"with concepts are needed, not {len(observed)} and {len(test)}; leave it out")  # fmt: skip
    classes, grid = tuple(whole.classes or ("",)), Observed(observed, test) if labels.names else None
    return ConceptData(
        "folder", _part(images, labels, mask, rows), _part(images, labels, mask, val), test, labels.names,
        _classes(o, len(classes)), labels.sizes, grid, class_names=classes,
    )  # fmt: skip


def other_images(folder: str, channels: int) -> tuple[Part, np.ndarray]:
    """Images that the concepts do not describe, from two class sub-folders, and their class (n,): what may leak.

    Raises UserError for another number of sub-folders, and for fewer than 100 images.
    """
    found = load("folder", folder, "all", image_size=64, channels=channels)
    if len(found.classes or ()) != 2:
        raise UserError(f"--other_dir {folder}: leakage is how well the concepts tell two kinds of images apart; put "
                        f"each into a sub-folder, there are {len(found.classes or ())}")  # fmt: skip
    n = len(found)
    if n < MIN_ROWS:
        raise UserError(f"--other_dir {folder}: {MIN_ROWS} images at least are needed to say what leaks, not {n}")
    nothing = np.zeros((n, 0))
    part = Part(Images(found.in_memory()), np.arange(n), nothing, np.zeros(n), np.ones(n), nothing)
    return part, found.targets.numpy()


LOADERS = {
    "folder": load_own,
    "dsprites_full": load_dsprites,
    "sprites": load_dsprites,
    "dsprites_leakage": load_dsprites_leakage,
    "mpi3d_toy": load_mpi3d,
    "celebA": load_celeba,
}


def load_data(o: Config) -> ConceptData:
    """The data set that the resolved options name. Raises UserError with the command that prepares a missing one."""
    data = LOADERS[o.dset_name](o)
    for name, part in (("train", data.train), ("val", data.val), ("test", data.test)):
        if len(part) == 0:
            raise UserError(f"{o.dset_name}: the {name} split is empty")
    data.rejection = data.train
    if o.max_eval_images is not None:
        data.val, data.test = (part.part(o.max_eval_images, o.seed) for part in (data.val, data.test))
        data.rejection = data.train.part(o.max_eval_images, o.seed)
    if len(data.train) < o.batch_size:
        raise UserError(f"--batch_size {o.batch_size} exceeds the {len(data.train)} training images; lower it")
    return data
