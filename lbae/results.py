"""The line that an evaluation appends to results.txt: written and read back.

    line     e:<epoch> loss_eval:<loss> nref:<n> <section>* [feat:<name>]
    section  <folder> ntest:<n> [fid:<x>] [kid_mean:<x> [kid_std:<x>]] [f8/18:<F8>/<F1/8>] [kid_size:<n>] [prd_n:<n>]

A token without a colon starts a section. F8 weighs recall, F1/8 precision; `kid_size` is the number of images of a
subset, `prd_n` that of each set. `feat:` names the features when they are not `inception`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.errors import UserError


@dataclass
class Section:
    """The scores of one folder; what was not measured is None."""

    name: str
    ntest: int
    fid: float | None = None
    kid_mean: float | None = None
    kid_std: float | None = None
    f8: tuple[float, float] | None = None  # (F8, F1/8)
    kid_size: int | None = None
    prd_n: int | None = None

    def __str__(self) -> str:
        tokens = [self.name, f"ntest:{self.ntest}"]
        tokens += [
            f"{key}:{getattr(self, key)}" for key in ("fid", "kid_mean", "kid_std") if getattr(self, key) is not None
        ]
        if self.f8 is not None:
            tokens.append(f"f8/18:{self.f8[0]}/{self.f8[1]}")
        tokens += [f"{key}:{getattr(self, key)}" for key in ("kid_size", "prd_n") if getattr(self, key) is not None]
        return " ".join(tokens)


@dataclass
class Results:
    """One line of results.txt."""

    epoch: int
    loss_eval: float
    nref: int
    sections: Sequence[Section] = field(default_factory=list)
    features: str = "inception"

    def __str__(self) -> str:
        head = f"e:{self.epoch} loss_eval:{self.loss_eval} nref:{self.nref}"
        tail = [] if self.features == "inception" else [f"feat:{self.features}"]
        return " ".join([head, *map(str, self.sections), *tail]) + "\n"


def read_epoch(text: str) -> tuple[int, float]:
    """(epoch, loss) of the content of fid-epoch.txt; (-1, -1) when empty. Raises UserError for anything else."""
    if not text.strip():
        return -1, -1.0
    try:
        values = dict(token.split(":") for token in text.split())
        return int(values["e"]), float(values["loss_eval"])
    except (ValueError, KeyError):
        raise UserError(
            f"fid-epoch.txt holds {text[:60]!r}, expected 'e:<epoch> loss_eval:<loss>'; run eval again"
        ) from None


def read_line(line: str) -> Results:
    """Parse a line of results.txt. Raises UserError when it does not follow the grammar."""
    tokens = line.split()
    try:
        head = dict(token.split(":", 1) for token in tokens[:3])
        results = Results(int(head["e"]), float(head["loss_eval"]), int(head["nref"]), [])
        for token in tokens[3:]:
            key, mark, value = token.partition(":")
            if not mark:
                results.sections.append(Section(key, 0))
            elif key == "feat":
                results.features = value
            elif key == "f8/18":
                first, second = value.split("/")
                results.sections[-1].f8 = (float(first), float(second))
            elif key in ("ntest", "kid_size", "prd_n"):
                setattr(results.sections[-1], key, int(value))
            elif key in ("fid", "kid_mean", "kid_std"):
                setattr(results.sections[-1], key, float(value))
            else:
                raise ValueError(token)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"not a line of results.txt ({error}): {line[:80].strip()}") from None
    return results
