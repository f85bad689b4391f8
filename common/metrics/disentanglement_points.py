"""Where a disentanglement metric takes its points from: plain arrays, or an encoder on a grid of factors.

Both sources, `Arrays` and `Grid`, have `num_factors` and the draws that the metrics need:

* `split`: points for a fit and held-out points,
* `codes_for_variance`: codes that show how much each varies (FactorVAE),
* `fixed_value`: batches that share the value of one factor (FactorVAE),
* `shared_pairs`: pairs that share the value of one factor (BetaVAE).

`Grid` draws from `numpy.random.RandomState` in the order of disentanglement_lib (Locatello et al. 2019), so that the
same seed gives the same images; it encodes every image once. `Arrays` resamples the rows it was given.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import RandomState

from common.errors import UserError
from common.given import whole

MIN_ROWS = 100  # below this a 20-bin histogram and a held-out accuracy say nothing
SPLIT_CHUNK = 16  # disentanglement_lib draws its training points in chunks of 16
POINTS_AT_ONCE = 500  # batches gathered at once: bounds the memory, changes no number


@dataclass(frozen=True)
class Split:
    """Codes (n, D) and factors (n, F) for a fit, and held-out ones ((0, D) and (0, F) when none were asked)."""

    codes: np.ndarray
    factors: np.ndarray
    codes_test: np.ndarray
    factors_test: np.ndarray


def _are_whole(factors: np.ndarray) -> np.ndarray:
    """Whether each column of factors (n, F) holds whole numbers only, which int64 can take: (F,)."""
    return ((factors == np.round(factors)) & (np.abs(factors.astype(np.float64)) < 2**53)).all(axis=0)


def integer_factors(factors: np.ndarray) -> np.ndarray:
    """Factors (n, F) as int64. Raises UserError naming the first column that holds other than whole numbers."""
    whole = _are_whole(factors)
    if not whole.all():
        raise UserError(
            f"factor column {int(np.argmin(whole))} holds fractions or huge numbers, and this metric needs classes: "
            "bin it first (`bin_factors(factors, 20)`, or `--factor-bins 20` on the command line)"
        )
    return factors.astype(np.int64)


def bin_factors(factors: np.ndarray, bins: int) -> np.ndarray:
    """Factors (n, F) as int64; a column of other than whole numbers is cut into `bins` equal parts of its range.

    Raises UserError for factors that are no table of finite numbers, and for bins that are no whole number above 0.
    """
    factors, bins = _table(factors, "factors"), whole(bins, "bins")
    if not len(factors):
        raise UserError(f"factors of shape {factors.shape}: expected (n, F), at least one row")
    columns = [
        column if is_whole else np.digitize(column, np.histogram_bin_edges(column, bins)[:-1])
        for column, is_whole in zip(factors.T, _are_whole(factors), strict=True)
    ]
    return np.stack(columns, axis=1).astype(np.int64)


def _table(values: Any, name: str) -> np.ndarray:
    """A finite numeric (n, k) array on the CPU, float32/float64/integer kept, below 1e30 in size. Raises UserError."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values  # unknown to numpy
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise UserError(f"{name} must be numbers, not {values.dtype}")
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    if values.ndim != 2 or values.shape[1] == 0:
        raise UserError(f"{name} must be a table (points, columns), not an array of shape {values.shape}")
    with np.errstate(invalid="ignore"):
        bad = ~(np.abs(values.astype(np.float64)) < 1e30)  # with larger ones the solvers do not end
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UserError(
            f"{name}[{row}, {column}] is {values[row, column]} ({int(bad.sum())} values that are not finite or above "
            "1e30): drop these rows or mend the encoder"
        )
    return values


def _codes(values: Any, name: str = "codes") -> np.ndarray:
    """Codes (n, D), float32 or float64: differences of unsigned bytes would wrap around."""
    values = _table(values, name)
    return values if values.dtype.kind == "f" else values.astype(np.float64)


def _check_pair(codes: Any, factors: Any, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    codes, factors = _codes(codes, "codes" + suffix), _table(factors, "factors" + suffix)
    if len(codes) != len(factors):
        raise UserError(
            f"codes{suffix} has {len(codes)} rows and factors{suffix} has {len(factors)}: "
            "both must be (points, columns) with one row a point"
        )
    if len(codes) < MIN_ROWS:
        raise UserError(f"codes{suffix} has {len(codes)} rows; the metrics need at least {MIN_ROWS}")
    return codes, factors


def check_varies(factors: np.ndarray, where: str = "") -> None:
    """Raise UserError naming the first column of factors (n, F) that has one value only."""
    constant = (factors == factors[:1]).all(axis=0)
    if constant.any():
        column = int(np.flatnonzero(constant)[0])
        raise UserError(
            f"factor column {column} is constant{where} ({factors[0, column]}): remove it, it scores nothing"
        )


class Arrays:
    """Codes (n, D) and factors (n, F) of the same n points, as arrays or tensors.

    `codes_test`, `factors_test`: held-out points; without them `split` holds out rows at random.
    Raises UserError for non-finite or non-numeric entries, unequal lengths, a constant factor, fewer than 100 rows.
    """

    def __init__(self, codes: Any, factors: Any, codes_test: Any = None, factors_test: Any = None) -> None:
        self.codes, self.factors = _check_pair(codes, factors)
        check_varies(self.factors)
        self.test = None
        if (codes_test is None) != (factors_test is None):
            raise UserError("codes_test and factors_test belong together: give both or none")
        if codes_test is not None:
            self.test = _check_pair(codes_test, factors_test, "_test")
            for held_out, kept, name in zip(self.test, (self.codes, self.factors), ("codes", "factors"), strict=True):
                if held_out.shape[1] != kept.shape[1]:
                    raise UserError(f"{name}_test has {held_out.shape[1]} columns, {name} has {kept.shape[1]}")
        self.num_factors = self.factors.shape[1]
        self._groups: list[tuple[np.ndarray, ...]] | None = None

    def split(self, num_train: int, num_test: int, rng: RandomState) -> Split:
        """All rows when `num_test` is 0; else the held-out rows as given; else random rows in the ratio num_train to
        num_test, at most so many of each.
        """
        if num_test == 0:
            return Split(self.codes, self.factors, self.codes[:0], self.factors[:0])
        if self.test is not None:
            return Split(self.codes, self.factors, *self.test)
        order = rng.permutation(len(self.codes))
        tested = min(num_test, len(order) * num_test // (num_train + num_test))
        test, train = order[:tested], order[tested : tested + num_train]
        return Split(self.codes[train], self.factors[train], self.codes[test], self.factors[test])

    def codes_for_variance(self, count: int, rng: RandomState) -> np.ndarray:
        """All codes (n, D): with the whole table at hand nothing is estimated."""
        return self.codes

    def _by_value(self) -> list[tuple[np.ndarray, ...]]:
        """For each factor: rows sorted by value, and for every row the start and the size of its group; rows whose
        value occurs once are left out, for they have no partner.
        """
        if self._groups is None:
            self._groups = []
            for column, values in enumerate(integer_factors(self.factors).T):
                _, group, count = np.unique(values, return_inverse=True, return_counts=True)
                start = np.cumsum(count) - count
                rows = np.flatnonzero(count[group] > 1)
                if not len(rows):
                    raise UserError(
                        f"every value of factor column {column} occurs once, so no two points share it: bin it first"
                    )
                self._groups.append((np.argsort(group, kind="stable"), start[group], count[group], rows))
        return self._groups

    def _partners(self, rows: np.ndarray, factor: int, rng: RandomState, size: int) -> np.ndarray:
        """`size` random rows for each of `rows` (m,) with the same value of `factor`: (m, size)."""
        order, start, count, _ = self._by_value()[factor]
        offset = (rng.random_sample((len(rows), size)) * count[rows, None]).astype(np.int64)
        return order[start[rows, None] + offset]

    def fixed_value(self, count: int, size: int, rng: RandomState) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Chunks of factor indices (m,) and codes (m, size, D) of rows that share one value of that factor."""
        for chosen in _chunks(rng.randint(self.num_factors, size=count)):
            rows = np.empty((len(chosen), size), np.int64)
            for factor in range(self.num_factors):
                mine = np.flatnonzero(chosen == factor)
                first = rng.choice(self._by_value()[factor][3], len(mine))
                rows[mine] = self._partners(first, factor, rng, size)
            yield chosen, self.codes[rows]

    def shared_pairs(
        self, count: int, size: int, rng: RandomState
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Chunks of factor indices (m,) and codes (m, size, D) twice, pairwise equal in that factor."""
        for chosen in _chunks(rng.randint(self.num_factors, size=count)):
            first, second = np.empty((2, len(chosen), size), np.int64)
            for factor in range(self.num_factors):
                mine = np.flatnonzero(chosen == factor)
                first[mine] = rng.choice(self._by_value()[factor][3], (len(mine), size))
                second[mine] = self._partners(first[mine].ravel(), factor, rng, 1).reshape(-1, size)
            yield chosen, self.codes[first], self.codes[second]


def _chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(values), POINTS_AT_ONCE):
        yield values[start : start + POINTS_AT_ONCE]


class Grid:
    """The codes of a data set whose images are indexed by independent factors, encoded when first needed.

    data: a factor set with `factor_sizes`, `index_of(factors (n, F)) -> (n,)` and `images_at(index) -> (n, C, H, W)
    uint8`; factors of size 1 are not scored. representation_function: images as they come from `images_at`
    -> codes (n, D), array or tensor, deterministic (an encoder's mean). Raises UserError for codes of a wrong shape or
    non-finite.
    """

    def __init__(self, data: Any, representation_function: Callable[[Any], Any], batch_size: int = 256) -> None:
        self.data, self.represent, self.batch_size = data, representation_function, batch_size
        sizes = np.asarray(data.factor_sizes, dtype=np.int64)
        self.scored = np.flatnonzero(sizes > 1)  # columns of index_of that are drawn
        self.all_factors, self.sizes = len(sizes), sizes[self.scored]
        self.num_factors = len(self.scored)
        if self.num_factors == 0:
            raise UserError(f"no factor has more than one value (sizes {sizes.tolist()}): nothing to score")
        self._row = np.full(int(np.prod(sizes)), -1, np.int64)  # image index -> row of the table
        self._table: np.ndarray | None = None  # (encoded, D), grown by doubling
        self._used = 0

    def draw(self, count: int, rng: RandomState) -> np.ndarray:
        """Factors (count, F) of independent uniform values, drawn factor by factor."""
        factors = np.empty((count, self.num_factors), np.int64)
        for column, size in enumerate(self.sizes):
            factors[:, column] = rng.randint(size, size=count)
        return factors

    def index_of(self, factors: np.ndarray) -> np.ndarray:
        """Image index (n,) of factors (n, F); the factors of size 1 are put back as 0."""
        full = np.zeros((len(factors), self.all_factors), np.int64)
        full[:, self.scored] = factors
        return np.asarray(self.data.index_of(full), dtype=np.int64)

    def codes_of(self, factors: np.ndarray) -> np.ndarray:
        """Codes (..., D) of factors (..., F)."""
        index = self.index_of(factors.reshape(-1, self.num_factors))
        self._encode(np.unique(index[self._row[index] < 0]))
        return self._table[self._row[index]].reshape(*factors.shape[:-1], self._table.shape[1])

    def _encode(self, index: np.ndarray) -> None:
        for start in range(0, len(index), self.batch_size):
            batch = index[start : start + self.batch_size]
            codes = _codes(self.represent(self.data.images_at(batch)))
            if len(codes) != len(batch):
                raise UserError(f"representation_function gave {len(codes)} codes for {len(batch)} images")
            if self._table is not None and codes.shape[1] != self._table.shape[1]:
                raise UserError(
                    f"representation_function gave codes of {codes.shape[1]} columns after {self._table.shape[1]}"
                )
            if self._table is None:
                self._table = np.empty((len(index), codes.shape[1]), codes.dtype)
            if self._used + len(batch) > len(self._table):
                longer = np.empty((2 * (self._used + len(batch)), codes.shape[1]), codes.dtype)
                longer[: self._used] = self._table[: self._used]
                self._table = longer
            self._table[self._used : self._used + len(batch)] = codes
            self._row[batch] = np.arange(self._used, self._used + len(batch))
            self._used += len(batch)

    def split(self, num_train: int, num_test: int, rng: RandomState, chunk: int = SPLIT_CHUNK) -> Split:
        """`num_train` points, then `num_test` from the same stream, in chunks of 16."""
        train, test = (
            np.concatenate(
                [self.draw(min(chunk, count - start), rng) for start in range(0, count, chunk)]
                or [np.empty((0, self.num_factors), np.int64)]
            )
            for count in (num_train, num_test)
        )
        check_varies(train, f" among {num_train} drawn points")
        return Split(self.codes_of(train), train, self.codes_of(test), test)

    def codes_for_variance(self, count: int, rng: RandomState) -> np.ndarray:
        """Codes (count, D) of one chunk of random points."""
        return self.codes_of(self.draw(count, rng))

    def fixed_value(self, count: int, size: int, rng: RandomState) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Chunks of factor indices (m,) and codes (m, size, D): that factor keeps the value of its first draw."""
        for start in range(0, count, POINTS_AT_ONCE):
            chosen, drawn = [], []
            for _ in range(min(POINTS_AT_ONCE, count - start)):
                factor = rng.randint(self.num_factors)
                factors = self.draw(size, rng)
                factors[:, factor] = factors[0, factor]
                chosen.append(factor)
                drawn.append(factors)
            yield np.array(chosen), self.codes_of(np.stack(drawn))

    def shared_pairs(
        self, count: int, size: int, rng: RandomState
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Chunks of factor indices (m,) and codes (m, size, D) twice, pairwise equal in that factor."""
        for start in range(0, count, POINTS_AT_ONCE):
            chosen, drawn = [], []
            for _ in range(min(POINTS_AT_ONCE, count - start)):
                factor = rng.randint(self.num_factors)
                first, second = self.draw(size, rng), self.draw(size, rng)
                second[:, factor] = first[:, factor]
                chosen.append(factor)
                drawn.append((first, second))
            codes = self.codes_of(np.array(drawn))  # (m, 2, size, D)
            yield np.array(chosen), codes[:, 0], codes[:, 1]
