r"""Write a data set by the pickle contract: <root>/<name>/<name>.pickle = {"train", "test", "classes"}.

    python nfpi/extract_dataset.py cifar10 --root data                       # from the set that common.datasets reads
    python nfpi/extract_dataset.py svhn --root data --download               # fetch it with torchvision first
    python nfpi/extract_dataset.py tinyimagenet --root data --folder tiny-imagenet-200 --size 64

"train" and "test" are {"data": uint8 tensor, "targets": int64 tensor}; colour images (N, 3, H, W), grey ones (N, H, W).
--folder: a folder with train/<class>/*.jpg and test/<class>/*.jpg (or val/). TinyImageNet's own layout
(train/<class>/images, val/images with val_annotations.txt) is understood too. SVHN's train part includes `extra`.
"""

import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import numpy as np
import torch
from PIL import Image
from pydantic import Field, StringConstraints
from torch import Tensor

from common import datasets
from common.errors import UserError, run_command
from common.images import PICTURE_SUFFIXES, natural_sorted, open_picture
from common.options import Options, Says, from_flags, option
from nfpi.data import write_pickle

TORCHVISION = {
    "mnist": "MNIST",
    "fashionmnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}


def as_part(data, targets) -> dict[str, Tensor]:
    """{"data", "targets"} in the contract's types: channels first, grey images without the channel axis."""
    data = torch.as_tensor(np.asarray(data))
    if data.ndim == 4 and data.shape[-1] in (1, 3):
        data = data.permute(0, 3, 1, 2)
    if data.ndim == 4 and data.shape[1] == 1:
        data = data[:, 0]
    if data.dtype != torch.uint8:
        raise UserError(f"expected uint8 images, got {data.dtype}")
    return {"data": data.contiguous(), "targets": torch.as_tensor(np.asarray(targets)).long()}


def from_torchvision(name: str, root: Path) -> dict:
    """The set of torchvision, fetched below `root` where it is absent. Raises UserError when that fails."""
    import torchvision

    if name not in TORCHVISION:
        raise UserError(
            f"--download {name}: torchvision offers {', '.join(TORCHVISION)}; use --folder for other images"
        )
    make = getattr(torchvision.datasets, TORCHVISION[name])

    def part(**where):
        try:
            return make(str(root), download=True, **where)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{name} cannot be fetched below {root} ({error})") from error

    if name == "svhn":
        train, extra, test = (part(split=s) for s in ("train", "extra", "test"))
        data, labels = np.concatenate([train.data, extra.data]), np.concatenate([train.labels, extra.labels])
        return {
            "train": as_part(data, labels),
            "test": as_part(test.data, test.labels),
            "classes": [str(k) for k in range(10)],
        }
    train, test = part(train=True), part(train=False)
    parts = {"train": as_part(train.data, train.targets), "test": as_part(test.data, test.targets)}
    return {**parts, "classes": [str(c) for c in train.classes]}


def from_common(name: str, root: Path) -> dict:
    """The set of common.datasets."""
    parts, classes = {}, None
    for split in ("train", "test"):
        loaded = datasets.load({"fashionmnist": "fashion_mnist"}.get(name, name), root=root, split=split)
        images, targets = loaded.arrays()
        parts[split], classes = as_part(images, targets), loaded.classes
    count = int(parts["train"]["targets"].max()) + 1
    return {**parts, "classes": [str(c) for c in classes or range(count)]}


def _listing(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """(file, label) of a folder of class folders, or of TinyImageNet's val folder with its annotations."""
    notes = folder / "val_annotations.txt"
    if notes.is_file():
        rows = [line.split("\t") for line in notes.read_text(errors="replace").splitlines() if line.strip()]
        if bad := [row for row in rows if len(row) < 2 or row[1] not in classes]:
            raise UserError(f"{notes}: {' '.join(bad[0])[:60]!r} names no file and class of the training images")
        return [(folder / "images" / row[0], classes.index(row[1])) for row in rows]
    if unknown := set(_folders(folder)) - set(classes):
        raise UserError(f"{folder / min(unknown)}: no such class among the training images; take the folder out")
    found = []
    for label, name in enumerate(classes):
        files = [path for path in (folder / name).rglob("[!.]*") if path.suffix.lower() in PICTURE_SUFFIXES]
        if not files:
            raise UserError(f"{folder / name} holds no images ({', '.join(PICTURE_SUFFIXES)})")
        found += [(path, label) for path in natural_sorted(files)]
    return found


def _folders(folder: Path) -> list[str]:
    return natural_sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def from_folder(folder: Path, size: int) -> dict:
    """Images of class folders below `train` and `test` (or `val`), resized to `size` (0 keeps them); labels in natural
    order of the classes' names. Grey where all pictures are.
    """
    train = folder / "train"
    test = next((folder / name for name in ("test", "val") if _has_labels(folder / name)), None)
    if not train.is_dir() or test is None:
        raise UserError(f"{folder}: expected train/<class>/ and test/<class>/ (or val/) with images")
    classes, rows, images = _folders(train), {}, {}
    for split, place in (("train", train), ("test", test)):
        rows[split] = _listing(place, classes)
        images[split] = [open_picture(path) for path, _ in rows[split]]
        if size:
            images[split] = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images[split]]
    sizes = {image.size for part in images.values() for image in part}
    if len(sizes) > 1:
        raise UserError(f"{folder}: the images differ in size ({min(sizes)} and {max(sizes)}); give --size")
    mode = "L" if all(image.mode == "L" for part in images.values() for image in part) else "RGB"
    parts = {
        split: as_part(np.stack([np.asarray(image.convert(mode)) for image in part]), [k for _, k in rows[split]])
        for split, part in images.items()
    }
    return {**parts, "classes": classes}


def _has_labels(folder: Path) -> bool:
    if (folder / "val_annotations.txt").is_file():
        return True
    return folder.is_dir() and any(name != "images" for name in _folders(folder))


class Config(Options):
    """The options."""

    name: Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$"), Says("a name without slashes")] = option(
        ..., "name of the set; also of the folder and file that are written")  # fmt: skip
    root: str = option("", "where sets lie, and where the pickle goes (default: DATA_ROOT, else data/)")
    folder: str = option("", "take the images of this folder")
    size: Annotated[int, Field(ge=0, le=4096)] = option(0, "with --folder: resize to size x size; 0 keeps them")
    download: bool = option(False, "let torchvision fetch the set")
    dry_run: bool = option(False, "check the options and leave")


def main(argv: list[str] | None = None) -> None:
    """Command line: name, --root, --folder, --size, --download."""
    args, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__, positional=("name",))
    if args.folder and args.download:
        raise UserError("--folder takes your own images, --download torchvision's: leave one out")
    if args.size and not args.folder:
        raise UserError("--size resizes the images of --folder: it has no effect on other sets")
    if args.dry_run:
        print(args.model_dump_json(indent=2))
        return
    root = datasets.data_root(args.root)
    path = root / args.name / f"{args.name}.pickle"
    if path.exists():
        raise UserError(f"{path} is there already; move it away, or name another set")
    if args.folder:
        content = from_folder(Path(args.folder), args.size)
    elif args.download:
        content = from_torchvision(args.name, root)
    else:
        content = from_common(args.name, root)
    write_pickle(path, content)
    shapes = {split: tuple(content[split]["data"].shape) for split in ("train", "test")}
    print(f"wrote {path}: {shapes}, {len(content['classes'])} classes")


if __name__ == "__main__":
    sys.exit(run_command(main))
