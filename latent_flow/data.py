"""Image sequences for all variants: transformed digits, sweeps of known factors, folders of consecutive frames.

A source answers two questions: `labelled` (one transformation a sequence; supervised, weakly) and `composed`
(several, switching at every step; unsupervised). Frames are float (T+1, B, C, N, N) in [0, 1] on the source's device.
"""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from common import datasets
from common.datasets.base import FactorSet
from common.datasets.files import subfolders
from common.datasets.folder import held_out_rows, names_below
from common.datasets.readers import read_image
from common.errors import UserError, suggest
from common.images import list_pictures, natural_sorted
from latent_flow import transforms

log = logging.getLogger(__name__)

# K flows, D-flag (twice the steps), image side, swept factors; the published settings where there are any
DEFAULTS: dict[str, dict[str, Any]] = {
    "mnist": {"flows": 3, "timesteps": 16, "image_size": 28, "latent_size": 324, "channels": 3},
    "fashion_mnist": {"flows": 3, "timesteps": 16, "image_size": 28, "latent_size": 324, "channels": 3},
    "digits": {"flows": 3, "timesteps": 16, "image_size": 8, "latent_size": 32, "channels": 3},
    "shapes3d": {"flows": 5, "timesteps": 14, "image_size": 64, "latent_size": 226, "channels": 3},
    "dsprites": {"flows": 5, "timesteps": 12, "image_size": 64, "latent_size": 226, "channels": 1},
    "sprites": {"flows": 5, "timesteps": 12, "image_size": 64, "latent_size": 226, "channels": 1},
    "falcor3d": {"flows": 7, "timesteps": 10, "image_size": 128, "latent_size": 324, "channels": 3},
    "isaac3d": {"flows": 8, "timesteps": 8, "image_size": 128, "latent_size": 324, "channels": 3},
    "folder": {"flows": 3, "timesteps": 16, "image_size": 64, "latent_size": 226, "channels": 3},
    "frames": {"flows": 3, "timesteps": 12, "image_size": 64, "latent_size": 226, "channels": 3},
}
FALCOR3D_FACTORS = {
    "lighting_intensity": 5,
    "lighting_x-dir": 6,
    "lighting_y-dir": 6,
    "lighting_z-dir": 6,
    "camera_x-pos": 6,
    "camera_y-pos": 6,
    "camera_z-pos": 6,
}
ISAAC3D_FACTORS = {
    "object_shape": 3,
    "robot_x-move": 8,
    "robot_y-move": 5,
    "camera_height": 4,
    "object_scale": 4,
    "lighting_intensity": 4,
    "lighting_y-dir": 6,
    "object_color": 4,
    "wall_color": 4,
}
# factors that are swept, in the order of the flows
SWEPT = {
    "shapes3d": ("floor_hue", "wall_hue", "object_hue", "scale", "orientation"),
    "falcor3d": tuple(FALCOR3D_FACTORS),
    "isaac3d": tuple(ISAAC3D_FACTORS)[1:],
    "dsprites": ("posX", "posY", "orientation", "scale", "shape"),
    "sprites": ("posX", "posY", "orientation", "scale", "shape"),
}
TESTED = ("mnist", "fashion_mnist", "digits", "folder")  # sets with official test images, or test/ of one's own
HELD_OUT = 0.1  # for testing, of a folder without train/ and test/
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v")  # and GIFs that move
MOVES = {"posX": 2.0, "posY": 2.0, "orientation": 2.0}  # grid units a step of the moving factors (unsupervised)
TURNING = (
    "sprites",
    "dsprites",
)  # sets whose orientation is a whole turn; that of Shapes3D goes from -30 to 30 degrees


class DigitSequences:
    """Images zoomed, rotated or turned in hue (transformations 0, 1, 2); grey ones are made red."""

    def __init__(
        self, images: Tensor, steps: int, device: torch.device | str = "cpu", centre: str = "upstream",
        files: Sequence[str] = (),
    ):  # fmt: skip
        self.images, self.steps, self.centre, self.files = images.to(device), steps, centre, files
        self.names = self.moving = transforms.NAMES
        self.channels, self.image_size = 3, images.shape[-1]

    def __len__(self) -> int:
        return len(self.images)

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation rows: a fifth, by the names of the files where there are any."""
        return split_names(self.files, seed) if self.files else split_rows(len(self), seed)

    def _grey(self, rows: Any) -> Tensor:
        rows = torch.as_tensor(rows, device=self.images.device)
        return self.images[rows].float() / 255

    def labelled(self, rows: Any, labels: Tensor, steps: int | None = None) -> Tensor:
        """Frames of the images `rows` (B,) under one transformation each, labels (B,)."""
        grey = self._grey(rows)
        return transforms.sequence(grey, labels.to(grey.device), steps or self.steps, self.centre)

    def composed(self, rows: Any, active: Tensor, speed: Tensor | None = None) -> Tensor:
        """Frames of the images `rows` under the active transformations (T, B, 3) at their speeds (T, B, 3)."""
        grey = self._grey(rows)
        speed = None if speed is None else speed.to(grey)
        return transforms.composed_sequence(grey, active.to(grey), speed, self.centre)

    def chosen(self, rows: Any, steps_labels: Tensor) -> Tensor:
        """Frames that switch: transformation steps_labels[t] (T,) at table speed in step t, composed from x_0.

        Zoom and rotation add up as parameters and warp x_0 once, so the truth carries no interpolation error.
        """
        grey = self._grey(rows)
        done = F.one_hot(steps_labels, 3).cumsum(0).to(grey)  # (T, 3) steps done of each
        return self.by_amounts(grey, torch.cat([torch.zeros_like(done[:1]), done]))

    def superposed(self, rows: Any, labels: tuple[int, ...], steps: int) -> Tensor:
        """Frames in which all of `labels` act at table speed at every step."""
        grey = self._grey(rows)
        amount = torch.zeros(steps + 1, 3).to(grey)
        amount[:, list(labels)] = torch.arange(steps + 1).to(grey)[:, None]
        return self.by_amounts(grey, amount)

    def by_amounts(self, grey: Tensor, amount: Tensor) -> Tensor:
        """Frames of images (B, 1 or 3, N, N) at table entries `amount` (T+1, 3) of zoom, rotation and hue."""
        frames, batch = len(amount), len(grey)
        amount = amount[:, None].expand(-1, batch, -1)
        zoom = 1 + transforms.ZOOM_STEP * amount[..., 0]
        turn = transforms.TURN_STEP * amount[..., 1]
        moved = transforms.warp(grey.repeat(frames, 1, 1, 1), zoom.flatten(), turn.flatten(), self.centre)
        return transforms.colour(moved.unflatten(0, (frames, batch)), transforms.HUE_STEP * amount[..., 2])


class FactorSequences:
    """Sweeps of one known factor of a `FactorSet`, all other factors of the drawn item kept.

    The sweep of a factor takes `steps` + 1 values from its first one, see `sweep_values`.
    """

    def __init__(
        self, source: FactorSet, swept: tuple[str, ...], steps: int, device: torch.device | str = "cpu", size: int = 0
    ):
        self.source, self.steps, self.device = source, steps, device
        self.columns = [source.factor_names.index(name) for name in swept]
        self.names, self.channels = swept, source.channels
        self.image_size = size or source.image_size
        self.moving = tuple(name for name in swept if name in MOVES)

    def __len__(self) -> int:
        return len(self.source)

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation rows. No picture of a validation row's sweeps is in a sweep of a training row, and no
        two share all factors that do not move, so that neither sweeps nor moving sprites of one part show the other's.

        The sweeps of the validation rows hold a hundredth of all pictures: each rules out the rows of many sweeps that
        cross it. Raises UserError for a set so small that no training row is left.
        """
        order, sizes = np.random.default_rng([seed, 80]).permutation(len(self)), self.source.factor_sizes
        still = [column for column, name in enumerate(self.source.factor_names) if name not in self.moving]
        apart = np.zeros(len(order), bool)
        if self.moving and still:  # a fifth of the groups at most
            group = np.ravel_multi_index(self.source.factors_of(order)[:, still].T, [sizes[column] for column in still])
            count = len(order) // np.prod([sizes[column] for column in still])
            apart = np.isin(group, group[: max(len(order) // count // 5, 1)])
        pool = order[apart] if apart.any() else order
        valid = pool[: max(len(order) // (100 * (len(self.names) * self.steps + 1)), 1)]
        shown = np.zeros(self.source.factor_sizes, bool)
        factors = self.source.factors_of(valid)
        for label in range(len(self.names)):
            swept = np.concatenate([self.sweep(one, label, self.steps) for one in factors])
            shown.flat[self.source.index_of(swept)] = True
        taken = np.zeros_like(shown)
        for column, name in zip(self.columns, self.names, strict=True):
            values = sweep_values(shown.shape[column], self.steps, name)
            taken |= shown.take(values, column).any(column, keepdims=True)
        train = order[~apart & ~taken.flat[order]]
        if not len(train):
            raise UserError(f"{self.source.name} is too small for sweeps of {self.steps + 1} frames to be held out")
        return train, valid

    def _images(self, index: np.ndarray, shape: tuple[int, int]) -> Tensor:
        images = self.source.images_at(index).to(self.device).float() / 255
        if images.shape[-1] != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode="area")
        return images.unflatten(0, shape)

    def sweep(self, factors: np.ndarray, label: int, steps: int) -> np.ndarray:
        """Factor vectors (T+1, F) of item `factors` (F,) with the swept one running over its values."""
        column = self.columns[label]
        out = np.repeat(factors[None], steps + 1, axis=0)
        out[:, column] = sweep_values(self.source.factor_sizes[column], steps, self.names[label])
        return out

    def labelled(self, rows: Any, labels: Tensor, steps: int | None = None) -> Tensor:
        """Frames of the items `rows` (B,) with the factor of flow labels (B,) swept."""
        steps = steps or self.steps
        factors = self.source.factors_of(np.asarray(rows))
        vectors = [self.sweep(one, int(k), steps) for one, k in zip(factors, labels.tolist(), strict=True)]
        index = self.source.index_of(np.concatenate(vectors)).reshape(len(factors), steps + 1).T
        return self._images(index.ravel(), index.shape)

    def chosen(self, rows: Any, steps_labels: Tensor) -> Tensor:
        """Frames that switch: in step t the factor of flow steps_labels[t] (T,) moves on along its sweep."""
        done = F.one_hot(steps_labels, len(self.names)).cumsum(0).numpy()
        return self._by_amounts(rows, np.concatenate([np.zeros_like(done[:1]), done]))

    def superposed(self, rows: Any, labels: tuple[int, ...], steps: int) -> Tensor:
        """Frames in which the factors of all `labels` move on at every step."""
        amount = np.zeros((steps + 1, len(self.names)), int)
        amount[:, list(labels)] = np.arange(steps + 1)[:, None]
        return self._by_amounts(rows, amount)

    def _by_amounts(self, rows: Any, amount: np.ndarray) -> Tensor:
        """Frames whose factors stand at places `amount` (T+1, K) of their sweeps; factors that never move are kept."""
        factors = self.source.factors_of(np.asarray(rows))
        path = np.repeat(factors[None], len(amount), axis=0)  # (T+1, B, F)
        for k in np.flatnonzero(amount.any(0)):
            column = self.columns[k]
            values = sweep_values(self.source.factor_sizes[column], len(amount) - 1, self.names[k])
            path[..., column] = values[amount[:, k]][:, None]
        return self._images(self.source.index_of(path.reshape(-1, path.shape[-1])), path.shape[:2])

    def composed(self, rows: Any, active: Tensor, speed: Tensor | None = None) -> Tensor:
        """Frames of sprites whose moving factors `moving` advance where `active` (T, B, K'), by `MOVES` times speed.

        The start is drawn from the lower half of each moving factor by the item itself; a factor stops at the end of
        its range, but for the orientation of sprites, which turns on. Raises UserError for sets without moving factors.
        """
        if not self.moving:
            raise UserError(
                f"no moving factors are known for {self.source.name}; use sprites, dsprites, shapes3d or frames"
            )
        factors = self.source.factors_of(np.asarray(rows)).astype(np.float64)
        amount = active.cpu().double() * (1.0 if speed is None else speed.cpu().double())
        path = np.repeat(factors[None], len(active) + 1, axis=0)  # (T+1, B, F)
        for number, name in enumerate(self.moving):
            column = self.source.factor_names.index(name)
            size = self.source.factor_sizes[column]
            travel = np.concatenate([np.zeros((1, len(factors))), amount[..., number].numpy().cumsum(0)]) * MOVES[name]
            place = np.rint(np.floor(factors[:, column] / 2) + travel)
            turns = name == "orientation" and self.source.name in TURNING
            # the first and last orientation of a turn are the same angle
            path[..., column] = place % (size - 1) if turns else np.minimum(place, size - 1)
        index = self.source.index_of(path.reshape(-1, path.shape[-1]))
        return self._images(index, path.shape[:2])


def sweep_values(size: int, steps: int, name: str = "") -> np.ndarray:
    """Values (T+1,) that a swept factor of `size` values takes: 0, 1, ...; sprites' factors spread over their range."""
    if name in ("posX", "posY", "orientation", "scale", "shape") and (size <= steps or size >= 20):
        span = size // 2 if name == "orientation" else size - 1  # half a turn: a square cannot tell a whole one
        return np.rint(np.arange(steps + 1) * span / steps).astype(np.int64)
    if steps + 1 > size:
        raise UserError(
            f"factor {name} has {size} values, too few for {steps + 1} frames: lower --num-timesteps (twice the steps)"
        )
    return np.arange(steps + 1)


class FrameSequences:
    """Consecutive frames of clips (CalMS, Cityscapes, any video): pictures in natural order of names, and video files,
    in `folder` and in its sub-folders; or one video file.

    An item is T+1 frames `stride` pictures apart. No transformation is known: weakly and unsupervised training only.
    Raises UserError for a clip too short and for a file that cannot be read.
    """

    def __init__(self, folder: Path, steps: int, size: int, device: torch.device | str = "cpu", stride: int = 1):
        if not folder.exists():
            raise UserError(
                f"no folder of frames at {folder}: put one sub-folder of pictures, or a video, a clip there"
            )
        self.clip_names, self.clips = zip(*clips_of(folder, size).items(), strict=True)
        self.steps, self.device, self.stride, self.span = steps, device, stride, steps * stride
        self.starts = [
            (number, start) for number, clip in enumerate(self.clips) for start in range(len(clip) - self.span)
        ]
        if not self.starts:
            raise UserError(
                f"no clip in {folder} has the {self.span + 1} frames that one sequence needs: lower --frame-stride or "
                "--num-timesteps"
            )
        short = [name for name, clip in zip(self.clip_names, self.clips, strict=True) if 0 < len(clip) <= self.span]
        if short:
            log.warning("left out, shorter than the %d frames of a sequence: %s", self.span + 1, ", ".join(short))
        pictures = [path for clip in self.clips if isinstance(clip, list) for path in clip]
        for path in tqdm(pictures, "reading the frames", disable=None, leave=False, delay=2):
            read_picture(path, size)  # a damaged one is named before anything is trained or written
        self.names, self.moving, self.channels, self.image_size = (), (), 3, size

    def __len__(self) -> int:
        return len(self.starts)

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation rows: about a fifth of the clips, one at least, is held out, drawn by their names. Of
        a single clip it is the last fifth, and no sequence crosses the cut. Raises UserError when it is too short.
        """
        numbers = np.array([number for number, _ in self.starts])
        clips = np.unique(numbers)
        if len(clips) > 1:
            held = clips[split_names([self.clip_names[number] for number in clips], seed)[1]]
            return np.flatnonzero(~np.isin(numbers, held)), np.flatnonzero(np.isin(numbers, held))
        length = len(self.clips[clips[0]])
        cut = min(int(0.8 * length), length - self.span - 1)
        if cut <= self.span:
            raise UserError(
                f"the only clip has {length} pictures; one to train on and one to hold out take {2 * self.span + 2}"
            )
        first = np.array([start for _, start in self.starts])
        return np.flatnonzero(first + self.span < cut), np.flatnonzero(first >= cut)

    def sequences(self, rows: Any) -> Tensor:
        """Frames of the items `rows` (B,)."""
        items = []
        for row in np.asarray(rows):
            number, start = self.starts[int(row)]
            clip = self.clips[number][start : start + self.span + 1 : self.stride]
            read = isinstance(clip, np.ndarray)
            items.append(clip if read else np.stack([read_picture(path, self.image_size) for path in clip]))
        frames = torch.from_numpy(np.stack(items, axis=1)).to(self.device)  # (T+1, B, 3, N, N)
        return frames.float() / 255


def clips_of(place: Path, size: int) -> dict[str, list[Path] | np.ndarray]:
    """The clips at a video, or in a folder and its sub-folders, by name: paths of pictures, or a video's frames (n, 3,
    size, size).
    """
    if place.is_file():
        return {place.name: read_video(place, size)}
    clips: dict[str, list[Path] | np.ndarray] = {}
    for folder in (place, *subfolders(place)):
        videos = [path for path in natural_sorted(folder.iterdir()) if is_video(path)]
        clips[folder.relative_to(place).as_posix()] = [path for path in list_pictures(folder) if path not in videos]
        clips |= {path.relative_to(place).as_posix(): read_video(path, size) for path in videos}
    return clips


def is_video(path: Path) -> bool:
    """Whether a file is a video by its name, or a GIF of several frames. Raises UserError for a damaged GIF."""
    if path.suffix.lower() == ".gif" and path.is_file():
        try:
            with Image.open(path) as picture:
                return getattr(picture, "n_frames", 1) > 1
        except Exception as error:  # a damaged GIF: OSError, SyntaxError, IndexError, struct.error, ...
            raise UserError(f"cannot read {path}; repair it or take it out") from error
    return path.suffix.lower() in VIDEOS


def read_video(path: Path, size: int) -> np.ndarray:
    """The frames of a video as uint8 (n, 3, size, size), read by imageio. Raises UserError for one that cannot be."""
    plugin = "pillow" if path.suffix.lower() == ".gif" else "FFMPEG"
    if plugin == "FFMPEG" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UserError(f"{path}: only GIFs are read without `pip install imageio[ffmpeg]`; or unpack it to pictures")
    try:
        frames = tqdm(iio.imiter(path, plugin=plugin), f"reading {path.name}", disable=None, leave=False, delay=2)
        found = [resized(Image.fromarray(frame).convert("RGB"), size) for frame in frames]
    except Exception as error:  # each of imageio's plugins has errors of its own
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"cannot read {path} as a video ({reason}); repair it or take it out") from error
    if not found:
        raise UserError(f"{path} has no frames; take it out")
    return np.stack(found)


def read_picture(path: Path, size: int) -> np.ndarray:
    """One RGB picture as uint8 (3, size, size); UserError for a file that is no picture."""
    return resized(read_image(path, 3), size)


def resized(rgb: Image.Image, size: int) -> np.ndarray:
    """An RGB picture as uint8 (3, size, size)."""
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1)


class FactorPictures(FactorSet):
    """One PNG a combination of factors, sorted by name (Falcor3D, Isaac3D): rank = linear factor index."""

    def __init__(self, name: str, folder: Path, factors: dict[str, int], size: int):
        if not folder.is_dir():
            raise UserError(f"no {name} pictures at {folder}: unpack the down-sampled images there")
        self.files = [path for path in list_pictures(folder) if path.suffix.lower() == ".png"]
        expected = int(np.prod(list(factors.values())))
        if len(self.files) != expected:
            raise UserError(f"{folder} holds {len(self.files)} pictures, {name} has {expected}: unpack it again")
        super().__init__(name, "train", factors, (3, size, size))

    def _fetch(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack([read_picture(self.files[row], self.height) for row in rows]))


def open_source(
    name: str,
    steps: int,
    *,
    size: int = 0,
    root: str | None = None,
    split: str = "train",
    device: torch.device | str = "cpu",
    centre: str = "upstream",
    stride: int = 1,
    fetch: bool = False,
):
    """The source of sequences called `name`: one of `DEFAULTS`. `size` 0: the data set's own side; `stride`: that of
    `FrameSequences`; `fetch`: get a small public set that is absent.

    Raises UserError for an unknown name and for absent data, naming the path that is expected.
    """
    if name not in DEFAULTS:
        raise UserError(f"unknown data set {name!r}{suggest(name, DEFAULTS)}; known: {', '.join(DEFAULTS)}")
    size = size or DEFAULTS[name]["image_size"]
    if name in TESTED:
        own = {"image_size": size, "channels": 0, "held_out": HELD_OUT} if name == "folder" else {}
        found = datasets.load(name, root=root, split=split, fetch=fetch, **own)
        images = found.arrays()[0]
        if images.shape[-1] != size:
            images = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True).round().byte()
        files = names_below(datasets.data_root(root), found.paths) if name == "folder" else ()
        return DigitSequences(images, steps, device, centre, files)
    base = datasets.data_root(root)
    if name == "frames":
        return FrameSequences(base, steps, size, device, stride)
    if name == "falcor3d":
        source: FactorSet = FactorPictures("Falcor3D", base / "Falcor3D_down128" / "images", FALCOR3D_FACTORS, size)
    elif name == "isaac3d":
        source = FactorPictures("Isaac3D", base / "Isaac3D_down128" / "images", ISAAC3D_FACTORS, size)
    else:
        source = datasets.load(name, root=root, fetch=fetch)
    return FactorSequences(source, SWEPT[name], steps, device, size)


def split_rows(count: int, seed: int, share: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """A seeded split of 0..count-1 into training and validation rows (the published one is unseeded)."""
    order = np.random.default_rng([seed, 80]).permutation(count)
    cut = int(share * count)
    return order[:cut], order[cut:]


def split_names(names: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`split_rows` by the items' names: what is added moves nothing from training to validation."""
    held = held_out_rows(names, np.zeros(len(names)), 0.2, f"{seed} validation")
    return np.delete(np.arange(len(names)), held), held
