r"""Write a data set by the pickle contract: <root>/<name>/<name>.pickle = {"train", "test", "classes"}.

    python nfpi/extract_dataset.py cifar10 --root data                       # from the set that common.datasets reads
    python nfpi/extract_dataset.py svhn --root data --download               # fetch it with torchvision first
    python nfpi/extract_dataset.py tinyimagenet --root data --folder tiny-imagenet-200 --size 64

"train" and "test" are {"data": uint8 tensor, "targets": int64 tensor}; colour images (N, 3, H, W), grey ones (N, H, W).
--folder: a folder with train/<class>/*.jpg and test/<class>/*.jpg (or val/). TinyImageNet's own layout
(train/<class>/images, val/images with val_annotations.txt) is understood too. SVHN's train part includes `extra`.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.datasets.readers import read_image
from common.errors import UserError, run_command
from nfpi.data import write_pickle

TORCHVISION = {
    "mnist": "MNIST",
    "fashionmnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


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


def from_torchvision(name: str, root: str, download: bool) -> dict:
    """The set of torchvision below `root`. Raises UserError when it is absent and `download` was not asked."""
    import torchvision

    if name not in TORCHVISION:
        raise UserError(f"{name}: torchvision offers {', '.join(TORCHVISION)} here; use --folder for other images")
    make = getattr(torchvision.datasets, TORCHVISION[name])

    def part(**where):
        try:
            return make(root, download=download, **where)
        except RuntimeError as error:
            raise UserError(f"{name} is not below {root}: add --download, or put it there ({error})") from error

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


def from_common(name: str, root: str) -> dict:
    """The set of common.datasets."""
    from common import datasets

    parts, classes = {}, None
    for split in ("train", "test"):
        loaded = datasets.load({"fashionmnist": "fashion_mnist"}.get(name, name), root=root, split=split)
        images, targets = loaded.arrays()
        parts[split], classes = as_part(images, targets), loaded.classes
    count = int(parts["train"]["targets"].max()) + 1
    return {**parts, "classes": [str(c) for c in classes or range(count)]}


def _image(path: Path, size: int) -> np.ndarray:
    image = read_image(path, 3)
    if size and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _listing(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """(file, label) of a folder of class folders, or of TinyImageNet's val folder with its annotations."""
    notes = folder / "val_annotations.txt"
    if notes.is_file():
        rows = [line.split("\t")[:2] for line in notes.read_text().splitlines() if line.strip()]
        return [(folder / "images" / name, classes.index(label)) for name, label in rows]
    found = []
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{folder / name} holds no images ({', '.join(SUFFIXES)})")
        found += [(path, label) for path in files]
    return found


def from_folder(folder: Path, size: int) -> dict:
    """Images of class folders below `train` and `test` (or `val`), resized to `size` (0 keeps them)."""
    train = folder / "train"
    test = next((folder / name for name in ("test", "val") if _has_labels(folder / name)), None)
    if not train.is_dir() or test is None:
        raise UserError(f"{folder}: expected train/<class>/ and test/<class>/ (or val/) with images")
    classes = sorted(p.name for p in train.iterdir() if p.is_dir())
    parts = {}
    for split, place in (("train", train), ("test", test)):
        rows = _listing(place, classes)
        images = [_image(path, size) for path, _ in rows]
        if len({image.shape for image in images}) > 1:
            raise UserError(f"{place}: the images differ in size; give --size")
        parts[split] = as_part(np.stack(images), [label for _, label in rows])
    return {**parts, "classes": classes}


def _has_labels(folder: Path) -> bool:
    if (folder / "val_annotations.txt").is_file():
        return True
    return folder.is_dir() and any(p.is_dir() and p.name != "images" for p in folder.iterdir())


def main(argv: list[str] | None = None) -> None:
    """Command line: name, --root, --folder, --size, --download."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the set; also of the folder and file that are written")
    parser.add_argument("--root", default="data", help="where sets lie, and where the pickle goes")
    parser.add_argument("--folder", help="take the images of this folder")
    parser.add_argument("--size", type=int, default=0, help="with --folder: resize to size x size")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch the set")
    args = parser.parse_args(argv)
    if args.folder:
        content = from_folder(Path(args.folder), args.size)
    elif args.download:
        content = from_torchvision(args.name, args.root, download=True)
    else:
        content = from_common(args.name, args.root)
    path = Path(args.root) / args.name / f"{args.name}.pickle"
    write_pickle(path, content)
    shapes = {split: tuple(content[split]["data"].shape) for split in ("train", "test")}
    print(f"wrote {path}: {shapes}, {len(content['classes'])} classes")


if __name__ == "__main__":
    sys.exit(run_command(main))
