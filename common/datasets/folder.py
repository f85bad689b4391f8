"""A folder of one's own images: flat, in class sub-folders, or below train/ and test/; a CSV may say more of each.

    load("folder", MYIMAGES, "train", held_out=0.1, seed=0, image_size=64, channels=0, labels="labels.csv")

A CSV has a header, and commas, semicolons or tabs between its cells. Its column `file` (else the first) names the
image, from the folder or by its bare name; `class` (or `class_column`) is the class; every other column with a name is
a concept. Two values 0/1, -1/1, no/yes or false/true make a binary concept, numbers a continuous one, words a
categorical one; an empty cell (also nan, na, n/a, none, null, ?) is missing.
"""

import csv
import hashlib
import io
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.datasets.files import FileSet, first_present, folder_items, subfolders, tree
from common.datasets.readers import reading
from common.errors import UserError, suggest
from common.images import PICTURE_SUFFIXES, natural_sorted, picture_head

FEWEST = 10  # images to train on and to hold out
LOOKED_AT = 500  # files whose size and colour say what the folder holds
FILE_COLUMNS = ("file", "filename", "image", "path")
MISSING = ("", "nan", "na", "n/a", "none", "null", "?")
SEPARATORS = (",", ";", "\t")
TRUTHS = ({"0": 0, "1": 1}, {"-1": 0, "1": 1}, {"no": 0, "yes": 1}, {"false": 0, "true": 1})
CATEGORIES = 100  # of one column
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?", re.I | re.A)
LOOKS_LIKE_ONE = re.compile(r"[+\u2212-]?[\d\s.,'_%]*\d[\d\s.,'_%]*", re.A)  # 1.000,5 and 1_0 and 5 %, not 3D, 10-20


@dataclass(frozen=True)
class Column:
    """What a CSV says of every image: 0 or 1, a number, or the place of a word in `categories`; NaN where missing."""

    name: str
    values: np.ndarray  # (N,) float
    kind: str  # binary, continuous, categorical
    categories: tuple[str, ...] = ()
    span: tuple[float, float] = (0.0, 1.0)  # of a continuous one, in the whole file

    def encoded(self) -> tuple[list[str], np.ndarray]:
        """Names and values in [0, 1], (N, k): as it is, scaled by its span, or one column a word (`name=word`)."""
        if self.kind == "categorical":
            hot = (self.values[:, None] == np.arange(len(self.categories))).astype(float)
            hot[np.isnan(self.values)] = np.nan
            return [f"{self.name}={word}" for word in self.categories], hot
        low, high = self.span
        return [self.name], ((self.values - low) / ((high - low) or 1.0))[:, None]


def _column(path: Path, name: str, cells: list[str], point: str = ".", words: bool = False) -> Column:
    """The column of these cells, whose numbers may have a `point` of their own; `words`: classes, whatever they look
    like.
    """
    known = {cell for cell in cells if cell.lower() not in MISSING}
    numbers = {} if words else {cell: number for cell in known if (number := _number(cell, point)) is not None}
    odd = next((cell for cell in natural_sorted(known - numbers.keys()) if LOOKS_LIKE_ONE.fullmatch(cell)), None)
    if odd is not None and not words:
        raise UserError(f"{path}: column {name!r} holds {odd!r}: write numbers with a point and without signs between "
                        "the digits (1000.5), words with a letter")  # fmt: skip
    if strays := natural_sorted(known - numbers.keys()) if numbers else []:
        raise UserError(f"{path}: column {name!r} holds numbers and words ({strays[0]!r} is no number): empty that "
                        "cell if it is missing, else write numbers alone, or words alone")  # fmt: skip
    if known and not words:
        for truth in TRUTHS:
            meant = {cell: truth.get(f"{numbers[cell]:g}" if numbers else cell.lower()) for cell in known}
            if None not in meant.values():
                return Column(name, np.array([meant.get(cell, np.nan) for cell in cells], float), "binary")
    if numbers:
        values = np.array([numbers.get(cell, np.nan) for cell in cells])
        if np.isinf(values).any():
            raise UserError(f"{path}: column {name!r} holds an infinite number; mend or empty that cell")
        return Column(name, values, "continuous", span=(float(np.nanmin(values)), float(np.nanmax(values))))
    categories = tuple(natural_sorted(known))
    if len(categories) > (len(cells) if words else CATEGORIES):
        raise UserError(f"{path}: column {name!r} has {len(categories)} different words, too many for a concept; take "
                        "it out, or write numbers")  # fmt: skip
    place = {word: float(i) for i, word in enumerate(categories)}
    return Column(name, np.array([place.get(cell, np.nan) for cell in cells]), "categorical", categories)


def _number(cell: str, point: str) -> float | None:
    """The number that a cell holds; None for words."""
    cell = cell.replace(point, ".").replace("\u2212", "-")  # the minus of typesetters
    return float(cell) if NUMBER.fullmatch(cell) else None


class Table(NamedTuple):
    """A CSV of labels: its class column, if any, and its concepts, a row an image."""

    classes: Column | None
    concepts: tuple[Column, ...]

    def rows(self, rows: np.ndarray) -> "Table":
        """The labels of some images; -1 is an image that the file does not list."""

        def of(column: Column) -> Column:
            return replace(column, values=np.append(column.values, np.nan)[rows])

        return Table(self.classes and of(self.classes), tuple(of(one) for one in self.concepts))

    def __str__(self) -> str:
        """What was understood: every column with its kind and its words or its span."""
        said = []
        for one in self.concepts:
            values = {"categorical": ": " + ", ".join(one.categories),
                      "continuous": ", {:g} to {:g}".format(*one.span)}.get(one.kind, "")  # fmt: skip
            said.append(f"{one.name} ({one.kind}{values})")
        classes = [f"{len(self.classes.categories)} classes by {self.classes.name}"] if self.classes else []
        return "; ".join(classes + said)

    def encoded(self) -> tuple[list[str], np.ndarray, list[list[int]]]:
        """Names (L) and values (N, L) in [0, 1] of all concepts (NaN: missing), and the columns of each concept."""
        names, values, groups = [], [np.zeros((len(self.concepts[0].values) if self.concepts else 0, 0))], []
        for column in self.concepts:
            more, encoded = column.encoded()
            groups.append(list(range(len(names), len(names) + len(more))))
            names += more
            values.append(encoded)
        return names, np.concatenate(values, axis=1), groups


def _table(path: Path) -> tuple[list[str], dict[str, list[str]], str]:
    """The cells of the column that names the files, those of the others by name, stripped, and the decimal sign beside
    the point: a comma where it does not separate cells.
    """
    try:
        with reading(path, "a CSV"):
            text = path.read_text(encoding="utf-8-sig")
    except UserError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise UserError(f"{path} is no UTF-8 text: save it as CSV UTF-8 (comma separated)") from error
        raise
    first = next((line for line in text.split("\n") if line.strip()), "")
    separator = max(SEPARATORS, key=first.count)
    reader, lines, number = csv.reader(io.StringIO(text), delimiter=separator, strict=True), [], 1
    try:
        for line in reader:
            if any(cells := [cell.strip() for cell in line]):
                lines.append((number, cells))
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"cannot read {path} as a CSV, line {number} ({error}): close the quotes there, or save it as "
                        "text with commas") from error  # fmt: skip
    header = lines.pop(0)[1] if lines else []
    names = [name for name in header if name]
    if not lines or len(header) < 2 or not names:
        raise UserError(f"{path} is no table of labels: expected a header (file, class, concept, ...) and a line for "
                        "each image, with commas, semicolons or tabs between the cells")  # fmt: skip
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path} has two columns {twice!r}: rename one")
    for number, line in lines:
        if len(line) != len(header):
            raise UserError(f"{path}, line {number}: {len(line)} cells, the header has {len(header)}")
    file = next((name for name in names if name.lower() in FILE_COLUMNS), header[0])
    if file.lower().endswith(PICTURE_SUFFIXES):
        raise UserError(f"{path} begins with an image ({file}), not with a header: put a line of names first (file, "
                        "class, concept, ...)")  # fmt: skip
    cells = dict(zip(header, map(list, zip(*(line for _, line in lines), strict=True)), strict=True))
    point = "." if separator == "," else ","
    return cells.pop(file), {name: column for name, column in cells.items() if name}, point


def read_labels(path: str | Path, class_column: str = "") -> tuple[list[str], Table]:
    """(file names, labels) of a CSV. Raises UserError naming the file, and the line or column that does not fit."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no table of labels at {path}: expected a CSV with the columns file, class, concept, ...")
    files, cells, point = _table(path)
    if class_column and class_column not in cells:
        raise UserError(f"{path} has no column {class_column!r} of classes{suggest(class_column, cells)}; beside the "
                        f"files' names it has {', '.join(cells)}")  # fmt: skip
    class_column = class_column or next((name for name in cells if name.lower() == "class"), "")
    classes = _column(path, class_column, cells[class_column], words=True) if class_column else None
    concepts = [_column(path, name, cells[name], point) for name in cells if name != class_column]
    names = [name for one in concepts for name in one.encoded()[0]]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: a column and a word of another make two concepts {twice!r}: rename one")
    for one in (classes, *concepts):
        if one and np.isnan(one.values).all():
            raise UserError(f"{path}: column {one.name!r} is empty; fill it in or take it out")
    return files, Table(classes, tuple(concepts))


def _name(path: str | os.PathLike) -> str:
    """A file's name in one spelling: an accent may be a letter of its own on a disk and none in a CSV."""
    return unicodedata.normalize("NFC", os.fspath(path))


def labels_of(path: str | Path, paths: Sequence[Path], root: Path, class_column: str = "") -> Table:
    """The labels of the images `paths` of the folder `root`, looked up by place below it, else by name.

    Raises UserError for a CSV that names an image which is not there, or twice.
    """
    listed, table = read_labels(path, class_column)
    place = {_name(os.path.abspath(one)): i for i, one in enumerate(paths)}
    by_name: dict[str, int] = {}
    for i, one in enumerate(paths):
        by_name[_name(one.name)] = -1 if _name(one.name) in by_name else i
    rows = np.full(len(paths), -1)
    for row, name in enumerate(listed):
        name = _name(name.replace("\\", "/"))
        i = place.get(_name(os.path.abspath(root / name)), by_name.get(name))
        if i is None or i < 0:
            why, near = "is not an image of", suggest(name, [one.relative_to(root).as_posix() for one in paths])
            if i is not None:
                why, near = "stands in several sub-folders of", ": write the sub-folder before the name"
            raise UserError(f"{path} names {name or 'no file'}, which {why} {root}{near}; the column `file`, else "
                            "the first, names the files")  # fmt: skip
        if rows[i] >= 0:
            raise UserError(f"{path} names {name} twice; keep one line")
        rows[i] = row
    return table.rows(rows)


def has_splits(root: Path) -> bool:
    """Whether a folder of images holds train/ and test/. Raises UserError for one of the two, and for Train or TEST."""
    found = [name for name in ("train", "test") if (root / name).is_dir()]
    for sub in subfolders(root) if root.is_dir() else ():
        if (name := sub.name.lower()) != sub.name and name in ("train", "valid", "val", "test"):
            raise UserError(f"{root} holds {sub.name}/: call it {name}/ if it is that part, else otherwise")
    if len(found) == 1:
        raise UserError(f"{root} holds {found[0]}/ alone: add the other one of train/ and test/, or move its images up")
    return bool(found)


def check_split(root: str | Path, seed: int, trained_root: str | Path, trained_seed: int, option: str) -> None:
    """Raise UserError when an evaluation on the images of a training would hold out others of them: `option` names the
    seed. Another folder, and one with train/ and test/, takes any.
    """
    root, same = Path(root), Path(root).resolve() == Path(trained_root).resolve()
    if same and seed != trained_seed and not has_splits(root):
        raise UserError(
            f"{option} is {seed}, but was {trained_seed} in training, which says what of {root} is held out: give that"
        )


class Look(NamedTuple):
    """What a folder holds: 1 (all grey) or 3 channels, the size for a network, and whether that is the files' own."""

    channels: int
    height: int
    width: int
    own: bool


def look(root: str | Path, largest: int = 64) -> Look:
    """Channels and size of the images of a folder, by the headers of up to 500 of them.

    Images of one size up to `largest` keep it; others get a square of the median shorter side, at most `largest`.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder of images at {root}")
    paths = folder_items(root / "train" if has_splits(root) else root)[0]
    heads = [picture_head(paths[i]) for i in np.unique(np.linspace(0, len(paths) - 1, LOOKED_AT).astype(int))]
    channels = 3 if any(colour for _, colour, _ in heads) else 1
    sizes = {size for *_, size in heads}
    if len(sizes) == 1 and max(heads[0][2]) <= largest:
        return Look(channels, *heads[0][2], True)
    side = min(largest, int(np.median([min(size) for *_, size in heads])))
    return Look(channels, side, side, False)


def held_out_rows(names: Sequence[str], targets: np.ndarray, share: float, seed: int | str) -> np.ndarray:
    """Ascending rows (n,) of about a share of each class, one at least and not all, drawn by `seed` and an item's name:
    items that are added move none of the others from training to what is held out.
    """
    digests = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names]
    drawn, held = np.array([int.from_bytes(digest) / 2**64 for digest in digests]), []
    for code in np.unique(targets):
        rows = np.flatnonzero(targets == code)
        rows = rows[np.argsort(drawn[rows])]
        held.append(rows[: min(max(1, (drawn[rows] < share).sum()), max(1, len(rows) - 1))])
    return np.sort(np.concatenate(held))


def names_below(root: Path, paths: Sequence[Path]) -> list[str]:
    """The place of each file below `root`, as `held_out_rows` wants it."""
    return [_name(path.relative_to(root).as_posix()) for path in paths]


class OwnImages(FileSet):
    """The images of a user's folder; `table`: what a CSV says of them, or None."""

    table: Table | None = None


class _Items(NamedTuple):
    """A part of the folder: files, class codes (N,), class names or None, labels or None."""

    paths: list[Path]
    targets: np.ndarray
    classes: list[str] | None
    table: Table | None


def _items(root: Path, part: Path, labels: str, class_column: str) -> _Items:
    paths, targets, classes = folder_items(part, root / "train" if part not in (root, root / "train") else None)
    if not labels:
        return _Items(paths, targets, classes, None)
    source = first_present([Path(labels).expanduser(), root / labels]) or Path(labels)
    every = paths if part == root else tree(root)
    place = {path: i for i, path in enumerate(every)}
    table = labels_of(source, every, root, class_column).rows(np.array([place[path] for path in paths]))
    if table.classes is None:
        return _Items(paths, targets, classes, table)
    unknown = np.flatnonzero(np.isnan(table.classes.values))
    if len(unknown):
        raise UserError(f"{source} gives no class of {paths[unknown[0]]} ({len(unknown)} such images): the cell "
                        f"of {table.classes.name!r} is empty, or reads {', '.join(MISSING[1:])}; write another "
                        "word, or take the images out")  # fmt: skip
    return _Items(paths, table.classes.values.astype(np.int64), list(table.classes.categories), table)


def _check_classes(train: _Items, test: _Items | None, root: Path) -> None:
    """Refuse what no classifier can be trained on; `test`: that of a test/ of its own."""
    names, counts = train.classes or [], np.bincount(train.targets, minlength=len(train.classes or ()))
    present = [name for name, n in zip(names, counts, strict=True) if n] if names else []
    if len(present) < 2:
        what = f"one class ({present[0]})" if present else "no classes"
        raise UserError(f"{root} has {what}: two at least are needed; put the images of each into a sub-folder of its "
                        "name")  # fmt: skip
    if test is None:
        alone = next((name for name, n in zip(names, counts, strict=True) if n == 1), None)
        if alone is not None:
            raise UserError(f"{root} has one image of class {alone}: two at least are needed, one of them held out")
        return
    for name, n, held in zip(names, counts, np.bincount(test.targets, minlength=len(names)), strict=True):
        if bool(n) != bool(held):
            has, lacks = ("train", "test") if n else ("test", "train")
            raise UserError(f"{root / lacks} has no image of class {name}, which {root / has} has: the classes of both "
                            "must be the same")  # fmt: skip


def load_folder(
    root: Path, split: str, *, labels: str = "", class_column: str = "", held_out: float = 0.0, seed: int = 0,
    need_classes: bool = False, image_size: int | None = None, channels: int = 3, **options: Any,
) -> OwnImages:  # fmt: skip
    """The images of `root`: those below train/, valid/ (or val/) and test/, else all of them.

    held_out: of a folder without these, train and test are parts drawn by `seed` and the files' names, about the share
    `held_out` of each class for test; a folder of fewer than 10 images is refused. channels 0: grey where all files
    are. The class is the sub-folder, or the CSV's. need_classes: refuse a single class, and classes that train or test
    lacks.
    """
    if not root.is_dir():
        raise UserError(f"no folder of images at {root}")
    own = split == "all" or (held_out > 0 and not has_splits(root))
    part = root if own else _part(root, split)
    items = _items(root, part, labels, class_column)
    if held_out and len(items.paths) < FEWEST and split != "test":
        raise UserError(f"{part} holds {len(items.paths)} image(s): {FEWEST} at least are needed to train on and to "
                        "hold out")  # fmt: skip
    if need_classes:
        parts = (root / "train", root / "test")
        train, test = (_items(root, one, labels, class_column) for one in parts) if part != root else (items, None)
        _check_classes(train, test, root)
    rows = np.arange(len(items.paths))
    if own and split != "all":
        held = held_out_rows(names_below(root, items.paths), items.targets, held_out, seed)
        rows = held if split == "test" else np.delete(rows, held)
    found = OwnImages(
        "folder", split, [items.paths[row] for row in rows], torch.from_numpy(items.targets[rows]), items.classes,
        image_size, channels=channels or look(root).channels, **options,
    )  # fmt: skip
    found.table = items.table and items.table.rows(rows)
    return found


def _part(root: Path, split: str) -> Path:
    """The sub-folder of a split; the folder itself stands for train where it has none."""
    parts = (root / split, root / "val") if split == "valid" else (root / split,)
    part = first_present([path for path in parts if path.is_dir()])
    if part is None and split in ("valid", "test"):
        raise UserError(f"folder: {root} has no sub-folder {split!r}; put the images of that split there")
    return part or root
