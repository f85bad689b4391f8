"""The two sources of points, the plain loops as oracles, bad input, and the command."""

import csv
import json
from pathlib import Path

import metric_definitions as definitions
import numpy as np
import pytest
import torch
from numpy.random import RandomState

from common.datasets.sprites import Sprites
from common.errors import UserError, run_command
from common.metrics import disentanglement as dis
from common.metrics.disentanglement_points import Split

SIZES = (3, 4, 5)


@pytest.fixture(scope="module")
def table():
    return definitions.entangled_table(SIZES, num_codes=4)


@pytest.fixture(scope="module")
def data(table):
    """Points of a half disentangled code: enough rows for a fit, few enough for the loops."""
    return definitions.factor_grid(SIZES, lambda index: table[index]).split(500, 250, RandomState(1))


# ---------------------------------------------------------------------------------------- loops as oracles


def test_mig_equals_the_loop(data):
    ours = dis.mig(dis.Arrays(data.codes, data.factors))["discrete_mig"]
    assert ours == pytest.approx(definitions.mig_ref(data.codes, data.factors), abs=1e-12)


def test_sap_equals_the_loop(data):
    assert dis.best_gap(dis.sap_matrix(data)).mean() == pytest.approx(definitions.sap_ref(data), abs=1e-12)


def test_dci_equals_the_loop(data):
    few = Split(data.codes[:200], data.factors[:200, :2], data.codes_test, data.factors_test[:, :2])
    ours = dis.disentanglement_of(dis.dci_importance(few)[0])[0]
    assert ours == pytest.approx(definitions.dci_ref(few), abs=1e-12)


def test_irs_equals_the_loop(data):
    codes = np.column_stack([data.codes, np.full(len(data.codes), 2.0)])  # a constant code is left out by both
    ours = dis.irs(dis.Arrays(codes, data.factors))["IRS"]
    assert ours == pytest.approx(definitions.irs_ref(codes, data.factors), abs=1e-12)


@pytest.mark.parametrize("seed", [0, 5])
def test_factor_vae_equals_the_loop(table, seed):
    """One stream of random numbers, more votes than are gathered at once, and a code that is pruned."""
    codes = np.column_stack([table[:, :1], 0.01 * table[:, 1:2], table[:, 2:]])
    grid = definitions.factor_grid(SIZES, lambda index: codes[index])
    ours = dis.factor_vae_metric(grid, seed=seed, num_train=700, num_test=600)
    assert ours["num_active_dims"] == 3
    # the loop counts pruned codes out as well, so its argmin indexes the active ones
    assert ours["eval_accuracy"] == definitions.factor_vae_ref(SIZES, lambda index: codes[index], seed, 700, 600)


def test_beta_vae_equals_the_loop(table):
    """The features of the pairs, drawn one after the other as published."""
    count, size, rng = 520, 8, RandomState(3)
    bases = np.prod(SIZES) // np.cumprod(SIZES)
    expected, labels = [], []
    for _ in range(count):
        factor = rng.randint(len(SIZES))
        first, second = (np.stack([rng.randint(k, size=size) for k in SIZES], axis=1) for _ in range(2))
        second[:, factor] = first[:, factor]
        expected.append(np.mean(np.abs(table[first @ bases] - table[second @ bases]), axis=0))
        labels.append(factor)
    grid = definitions.factor_grid(SIZES, lambda index: table[index])
    chunks = list(grid.shared_pairs(count, size, RandomState(3)))
    assert len(chunks) > 1
    np.testing.assert_array_equal(np.concatenate([chosen for chosen, _, _ in chunks]), labels)
    features = np.concatenate([np.mean(np.abs(first - second), axis=1) for _, first, second in chunks])
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_discretize_equals_the_histogram(dtype):
    """Ties with edges, wide and narrow ranges, an offset that eats the digits, a constant, whole numbers."""
    rng = np.random.default_rng(0)
    n = 4000
    columns = [
        rng.normal(size=n),
        np.repeat(np.linspace(0, 1, 21)[:-1], n // 20),  # every value on an edge
        rng.integers(0, 40, n) / 7,
        1e4 + 0.2 * rng.random(n),
        1e-30 * rng.normal(size=n),
        1e20 * rng.normal(size=n),
        np.full(n, 0.3),
        rng.integers(-5, 6, n),
    ]
    values = np.stack(columns, axis=1).astype(dtype)
    for bins in (2, 20, 33):
        np.testing.assert_array_equal(dis.discretize(values, bins), definitions.discretize_ref(values, bins))


def test_discretize_a_collapsed_code():
    """A range of three float32 steps has no 20 distinct float32 edges; the bins are then cut in float64."""
    steps = np.arange(300) % 4
    code = (np.float32(1) + steps.astype(np.float32) * np.finfo(np.float32).eps)[:, None]
    with pytest.raises(ValueError, match="Too many bins"):
        definitions.discretize_ref(code)
    np.testing.assert_array_equal(dis.discretize(code)[:, 0], np.array([1, 7, 14, 20])[steps])


def test_mutual_information_of_a_known_table():
    """Joint distribution [[3/8, 1/8], [1/8, 3/8]]: I = ln 2 - H(1/4)."""
    first, second = np.repeat([0, 0, 1, 1], [3, 1, 1, 3]), np.repeat([0, 1, 0, 1], [3, 1, 1, 3])
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    expected = np.log(2) - entropy
    # labels far apart and negative: the values must not matter
    for relabel in (lambda x: x, lambda x: 10**12 * x - 7, lambda x: -3 - x):
        information = dis.mutual_information(relabel(first)[:, None], second[:, None])
        assert information[0, 0] == pytest.approx(expected, abs=1e-14)


# ---------------------------------------------------------------------------------------- grids


def centre_of_mass(images):
    """Codes (n, 2): the mean row and column of the lit pixels."""
    light = images[:, 0].double()
    along = torch.arange(light.shape[-1], dtype=torch.double)
    mass = light.sum(dim=(1, 2))
    return torch.stack([(light.sum(2) @ along) / mass, (light.sum(1) @ along) / mass], dim=1)


def test_sprites_by_their_centre_of_mass():
    """An encoder that finds the position scores the maximum on a grid of positions; the images are rendered."""
    sprites = Sprites(sizes=(1, 1, 1, 6, 6), image_size=32)
    grid = dis.Grid(sprites, centre_of_mass)
    results = dis.evaluate(grid, ["mig", "irs", "factor_vae_metric"], num_train=1000, num_test=300)
    # rendering moves the centre of mass of neighbours a little along the other axis, so not exactly 1
    assert results["mig"]["discrete_mig"] > 0.95
    assert results["irs"]["IRS"] > 0.95
    assert results["factor_vae_metric"]["eval_accuracy"] == 1


def test_a_grid_encodes_each_image_once(table):
    calls = []

    def represent(index):
        calls.append(index)
        return torch.from_numpy(table[index]).requires_grad_()

    grid = definitions.factor_grid(SIZES, represent)
    grid.batch_size = 7
    dis.evaluate(grid, ["mig", "factor_vae_metric", "beta_vae_sklearn"], num_train=300, num_test=100)
    encoded = np.concatenate(calls)
    assert max(len(call) for call in calls) == 7
    assert sorted(encoded) == list(range(len(table)))
    np.testing.assert_array_equal(grid.codes_of(np.indices(SIZES).reshape(3, -1).T), table)


def test_a_factor_of_size_1_is_not_scored(table):
    """With and without a leading factor of size 1 the same images are drawn."""
    plain = definitions.factor_grid(SIZES, lambda index: table[index])
    coloured = definitions.factor_grid((1, *SIZES), lambda index: table[index])
    assert coloured.num_factors == 3
    for name in ("mig", "factor_vae_metric", "beta_vae_sklearn"):
        expected = dis.evaluate(plain, [name], num_train=200, num_test=100)
        assert dis.evaluate(coloured, [name], num_train=200, num_test=100) == expected


def test_a_grid_refuses_a_broken_encoder(table):
    def scored(represent, sizes=SIZES):
        dis.evaluate(definitions.factor_grid(sizes, represent), ["mig"], num_train=200)

    with pytest.raises(UserError, match=r"codes.*is nan"):
        scored(lambda index: np.where(index[:, None] == 3, np.nan, table[index]))
    with pytest.raises(UserError, match="1 codes for 60 images"):
        scored(lambda index: table[index][:1])
    with pytest.raises(UserError, match=r"shape \(60,\)"):
        scored(lambda index: table[index][:, 0])
    with pytest.raises(UserError, match="no factor has more than one value"):
        scored(lambda index: table[index], (1, 1))


# ---------------------------------------------------------------------------------------- arrays


def test_rows_that_share_a_value():
    """With the factors as codes one sees what was drawn: that factor equal, the others free; no lonely row."""
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 4, size=(400, 3))
    factors[0, 1] = 77  # this value has one row, which shares it with no other
    points = dis.Arrays(factors.astype(float), factors)
    for chosen, codes in points.fixed_value(900, 12, RandomState(0)):
        own = codes[np.arange(len(chosen)), :, chosen]  # (m, 12)
        assert (own == own[:, :1]).all()
        assert not (own[chosen == 1] == 77).any()
        for factor in range(3):
            others = np.delete(codes[chosen == factor], factor, axis=2)
            assert np.ptp(others, axis=1).min(axis=1).mean() > 2.5  # 12 draws of 4 values nearly always span 3
    for chosen, first, second in points.shared_pairs(900, 12, RandomState(0)):
        at = np.arange(len(chosen))
        np.testing.assert_array_equal(first[at, :, chosen], second[at, :, chosen])
        assert np.ptp(first[at, :, chosen], axis=1).min() > 0  # the shared value differs from pair to pair
        agreement = np.mean([(first == second)[chosen == f].mean(axis=(0, 1)) for f in range(3)], axis=0)
        assert agreement == pytest.approx((1 + 2 * 0.25) / 3, abs=0.05)


def test_arrays_split_holds_out_rows():
    factors = np.arange(600)[:, None] % 5
    codes = np.arange(600.0)[:, None]
    split = dis.Arrays(codes, factors).split(10_000, 5_000, RandomState(0))
    assert (len(split.codes), len(split.codes_test)) == (400, 200)
    assert sorted(np.concatenate([split.codes, split.codes_test])[:, 0]) == list(range(600))
    np.testing.assert_array_equal(split.codes_test[:, 0] % 5, split.factors_test[:, 0])
    capped = dis.Arrays(codes, factors).split(100, 50, RandomState(0))
    assert (len(capped.codes), len(capped.codes_test)) == (100, 50)
    given = dis.Arrays(codes, factors, codes[:100], factors[:100]).split(10, 10, RandomState(0))
    assert (len(given.codes), len(given.codes_test)) == (600, 100)


def test_tensors_and_arrays_score_alike(data):
    arrays = dis.evaluate(dis.Arrays(data.codes, data.factors), ["mig", "irs"])
    tensors = dis.Arrays(torch.tensor(data.codes, requires_grad=True), torch.tensor(data.factors))
    assert dis.evaluate(tensors, ["mig", "irs"]) == arrays
    names = ["beta_vae_sklearn", "factor_vae_metric", "irs", "alignment_linear"]
    levels = np.clip(50 * data.codes + 100, 0, 255).round()
    for kind in (np.uint8, np.int16, bool):
        codes = (levels > 110) if kind is bool else levels
        expected = dis.evaluate(dis.Arrays(codes.astype(float), data.factors), names, num_train=300, num_test=100)
        found = dis.evaluate(dis.Arrays(codes.astype(kind), data.factors), names, num_train=300, num_test=100)
        assert found == expected, kind
    coarse = torch.tensor(data.codes).bfloat16()
    expected = dis.mig(coarse.float(), data.factors)
    assert dis.mig(coarse, data.factors) == expected


def test_jobs_and_seed(data):
    """The number of workers changes nothing; the seed changes the split."""
    few = dis.Arrays(data.codes[:150], data.factors[:150, :2])
    names = ["sap_score", "dci", "modularity_explicitness"]
    alone = dis.evaluate(few, names, seed=3, jobs=1)
    assert dis.evaluate(few, names, seed=3, jobs=2) == alone
    assert dis.evaluate(few, ["dci"], seed=4)["dci"] != alone["dci"]


def good():
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 4, size=(120, 2))
    return {"codes": factors + 0.1 * rng.normal(size=(120, 2)), "factors": factors}


def changed(**changes):
    arrays = good()
    for key, change in changes.items():
        arrays[key] = change(arrays[key].copy())
    return arrays


def put(value, row=5, column=1):
    def change(array):
        array = array.astype(float)
        array[row, column] = value
        return array

    return change


BAD = {
    "nan code": (changed(codes=put(np.nan)), r"codes\[5, 1\] is nan"),
    "infinite code": (changed(codes=put(np.inf)), r"codes\[5, 1\] is inf"),
    "nan factor": (changed(factors=put(np.nan)), r"factors\[5, 1\] is nan"),
    "fractions": (changed(factors=put(0.5)), "factor column 1 holds fractions.*factor-bins"),
    "lengths": (changed(factors=lambda f: f[:-1]), "codes has 120 rows and factors has 119"),
    "few": (changed(codes=lambda c: c[:10], factors=lambda f: f[:10]), "codes has 10 rows.*at least 100"),
    "constant": (changed(factors=lambda f: np.column_stack([f, np.full(len(f), 3)])), "factor column 2 is constant"),
    "flat": (changed(codes=lambda c: c[:, 0]), r"codes must be a table .*\(120,\)"),
    "text": (changed(codes=lambda c: c.astype(str)), "codes must be numbers"),
    "huge code": (changed(codes=put(1e200)), r"codes\[5, 1\] is 1e\+200"),
    "huge factor": (changed(factors=put(1e20)), "factor column 1 holds fractions or huge"),
    "half": ({**good(), "codes_test": np.zeros((120, 2))}, "give both or none"),
    "other width": ({**good(), "codes_test": np.zeros((120, 3)), "factors_test": good()["factors"]}, "3 columns"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays(case):
    arrays, message = BAD[case]
    with pytest.raises(UserError, match=message):
        dis.evaluate(dis.Arrays(**arrays), ["mig"])


def test_every_value_once():
    arrays = changed(factors=lambda f: np.column_stack([f, np.arange(len(f))]))
    with pytest.raises(UserError, match="every value of factor column 2 occurs once"):
        dis.evaluate(dis.Arrays(**arrays), ["factor_vae_metric"])


def test_one_factor():
    arrays = changed(factors=lambda f: f[:, :1])
    for name in ("dci", "alignment_linear", "beta_vae_sklearn"):
        with pytest.raises(UserError, match="at least 2"):
            dis.evaluate(dis.Arrays(**arrays), [name], num_train=100, num_test=50)


def test_a_factor_that_is_constant_among_the_training_rows():
    arrays = changed(factors=lambda f: np.column_stack([f, np.arange(len(f)) == 0]))
    seed = next(s for s in range(99) if 0 in RandomState(s).permutation(120)[:40])  # its only 1 is held out
    with pytest.raises(UserError, match="factor column 2 is constant among the training rows"):
        dis.evaluate(dis.Arrays(**arrays), ["sap_score"], seed=seed)


def test_unknown_metric():
    with pytest.raises(UserError, match=r"unknown metric 'sapscore'.*did you mean 'sap_score'"):
        dis.evaluate(dis.Arrays(**good()), ["mig", "sapscore"])


# ---------------------------------------------------------------------------------------- results and command


def test_registry_and_rows():
    assert list(dis.DEFAULT) == ["mig", "sap_score", "irs", "factor_vae_metric", "dci", "beta_vae_sklearn"]
    assert set(dis.DEFAULT) < set(dis.METRICS)
    scores = {"informativeness_train": 0.9, "informativeness_test": 0.8, "disentanglement": 0.7, "completeness": 0.6}
    assert dis.headline("dci", scores) == 0.7  # not the last key
    row = dis.table_row({"dci": scores, "mig": {"discrete_mig": 0.5}})
    assert list(row)[:2] == ["eval_dci", "eval_mig"]
    assert (row["eval_dci"], row["eval_mig"], row["dci.completeness"]) == (0.7, 0.5, 0.6)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "codes.npz"
    np.savez(path, **good())
    return path


def test_command_scores_every_default_metric(saved, capsys):
    dis.main([str(saved), "--num-train", "200", "--num-test", "100", "--jobs", "1", "--json"])
    results = json.loads(capsys.readouterr().out)
    expected = dis.evaluate(dis.Arrays(**good()), dis.DEFAULT, num_train=200, num_test=100)
    assert results == expected
    assert results["factor_vae_metric"]["eval_accuracy"] == 1  # two nearly perfect codes
    dis.main([str(saved), "--metrics", "mig", "irs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["mig", "irs"]
    assert float(lines[0].split()[1]) == pytest.approx(expected["mig"]["discrete_mig"], abs=5e-5)


CHANGED = {
    "metrics": ["mig"], "num_train": ["20"], "num_test": ["7"], "seed": ["1"], "as_json": ["false"],
}  # fmt: skip
ELSEWHERE = {
    "jobs": "the results do not depend on it: test_jobs_and_seed",
    "csv": "another file, the same numbers: test_command_appends_rows",
    "factor_bins": "for factors that hold fractions: test_command_bins_factors",
}


@pytest.mark.parametrize("name", [None, *(name for name in dis.Config.model_fields if name not in ELSEWHERE)])
def test_every_option_changes_a_number(saved, capsys, name):
    """Of a score of all rows and one of drawn and held-out rows."""
    base = [str(saved), "--metrics", "mig", "sap_score", "--num-train", "60", "--num-test", "30", "--json"]
    dis.main(base)
    plain = capsys.readouterr().out
    flag = {"as_json": "--json"}.get(name, f"--{str(name).replace('_', '-')}")
    dis.main([*base, flag, *CHANGED[name]] if name else base)
    assert (capsys.readouterr().out == plain) == (name is None)  # the same command twice, the same numbers


def test_command_appends_rows(saved, tmp_path, capsys):
    scores = tmp_path / "scores.csv"
    for seed in ("0", "1"):
        dis.main([str(saved), "--metrics", "mig", "alignment_linear", "--seed", seed, "--csv", str(scores)])
    with scores.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1"]
    assert rows[0]["eval_mig"] == rows[1]["eval_mig"]  # all rows, no split
    assert rows[0]["eval_alignment_linear"] != rows[1]["eval_alignment_linear"]
    before = scores.read_bytes()
    with pytest.raises(UserError, match="other columns"):
        dis.main([str(saved), "--metrics", "irs", "--csv", str(scores)])
    assert scores.read_bytes() == before


def test_a_full_disk_loses_no_score(saved, capsys):
    """The results are shown before the table takes them, and a table that is full is one line."""
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    with pytest.raises(UserError, match="the disk is full"):
        dis.main([str(saved), "--metrics", "mig", "--csv", "/dev/full"])
    assert capsys.readouterr().out.startswith("mig ")


def test_command_bins_factors(tmp_path, capsys):
    """Continuous factors in 5 bins: the same as binning them first, held-out rows by the same edges."""
    rng = np.random.default_rng(0)
    factors = rng.random((300, 2))
    held_out = 0.5 * rng.random((120, 2))
    path = tmp_path / "codes.npz"
    np.savez(path, codes=factors, factors=factors, codes_test=held_out, factors_test=held_out)
    with pytest.raises(UserError, match="holds fractions"):
        dis.main([str(path), "--metrics", "mig"])
    points = dis.load_codes(path, 5)
    edges = np.linspace(
        min(factors[:, 0].min(), held_out[:, 0].min()), max(factors[:, 0].max(), held_out[:, 0].max()), 6
    )
    np.testing.assert_array_equal(points.factors[:, 0], np.digitize(factors[:, 0], edges[:-1]))
    np.testing.assert_array_equal(points.test[1][:, 0], np.digitize(held_out[:, 0], edges[:-1]))
    dis.main([str(path), "--metrics", "mig", "--factor-bins", "5"])
    assert capsys.readouterr().out.startswith("mig ")


def test_command_refuses_files(tmp_path, saved):
    def refused(path, message, *options):
        with pytest.raises(UserError, match=message):
            dis.main([str(path), *options])

    refused(tmp_path / "absent.npz", "is not a file")
    text = tmp_path / "text.npz"
    text.write_text("codes, factors")
    refused(text, "no readable npz")
    truncated = tmp_path / "truncated.npz"
    truncated.write_bytes(saved.read_bytes()[:500])
    refused(truncated, "no readable npz")
    np.save(tmp_path / "bare.npy", np.zeros(3))
    refused(tmp_path / "bare.npy", "one bare array")
    np.savez(tmp_path / "objects.npz", codes=np.array([{}], dtype=object), factors=np.zeros((1, 1)))
    refused(tmp_path / "objects.npz", "no readable npz")
    np.savez(tmp_path / "keys.npz", z=np.zeros((3, 2)), factors=np.zeros((3, 2)))
    refused(tmp_path / "keys.npz", r"no key codes \(it has z, factors\)")
    refused(saved, "unknown metric 'migg'.*'mig'", "--metrics", "migg")
    refused(saved, "--factor_bins=1: expected a whole number of at least 2", "--factor-bins", "1")
    refused(saved, "--num_train=0: expected a whole number of at least 2", "--num-train", "0")


def test_command_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["disentanglement", str(tmp_path / "absent.npz")])
    assert run_command(dis.main) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    with pytest.raises(UserError, match="did you mean 'metrics'"):
        dis.main(["codes.npz", "--metric", "mig"])  # no abbreviations


VALUES = ("", "-1", "0", "nan", "inf", "1e30", "x", "1.5", "-99999999999999999999")


@pytest.mark.parametrize(
    "name", [name for name in dis.Config.model_fields if name not in ("metrics", "as_json", "csv")]
)
@pytest.mark.parametrize("value", VALUES)
def test_every_number_of_the_command_is_checked_before_the_file_is_read(name, value, tmp_path):
    """Each ends in one line: about the value, or (where the value is allowed) about the missing file."""
    with pytest.raises(UserError, match=rf"--{name}=|absent.npz is not a file") as error:
        dis.main([str(tmp_path / "absent.npz"), f"--{name}={value}", "--metrics", "mig"])
    allowed = {"seed": ("0",), "jobs": ("-1",), "factor_bins": ("inf",)}.get(name, ())
    assert ("is not a file" in str(error.value)) == (value in allowed)


def test_the_file_may_stand_behind_the_options(saved, capsys):
    dis.main(["--metrics", "mig", "irs", str(saved)])
    behind = capsys.readouterr().out
    dis.main([str(saved), "--metrics=mig,irs"])
    assert capsys.readouterr().out == behind
    for words in ([], ["--json"], ["a.npz", "b.npz", "--json"]):
        with pytest.raises(UserError, match=r"expected CODES\.npz before the options"):
            dis.main(words)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        dis.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"--{name}" in text for name in dis.Config.model_fields)


def test_a_table_that_cannot_take_the_row_is_refused_before_the_work(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(dis, "evaluate", lambda *args, **draw: pytest.fail("worked first"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for table, message in (
        ("other.csv", "other columns"),
        ("absent/scores.csv", "folder that exists"),
        (".", "name a file"),
    ):
        with pytest.raises(UserError, match=message):
            dis.main([str(saved), "--metrics", "mig", "--csv", str(tmp_path / table)])


def test_a_score_that_is_not_defined_is_null_with_a_reason(tmp_path, capsys):
    """All held-out points have one value of the second factor: no area under a curve."""
    factors = np.column_stack([np.arange(300) % 3, np.arange(300) % 2])
    rng = np.random.default_rng(0)
    codes = factors + 0.5 * rng.normal(size=factors.shape)
    path, table = tmp_path / "codes.npz", tmp_path / "scores.csv"
    np.savez(path, codes=codes, factors=factors, codes_test=codes[1:200:2], factors_test=factors[1:200:2])
    for _ in range(2):
        dis.main([str(path), "--metrics", "modularity_explicitness", "--json", "--csv", str(table)])
    scores = json.loads(capsys.readouterr().out.split("}\n}")[0] + "}}")["modularity_explicitness"]
    assert scores["explicitness_score_test"] is None and scores["explicitness_score_train"] > 0.5
    assert "factor column 1" in scores["explicitness_reason"]
    dis.main([str(path), "--metrics", "modularity_explicitness"])
    assert "explicitness_score_test None" in capsys.readouterr().out
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and rows[0]["modularity_explicitness.explicitness_score_test"] == ""


def test_plain_arrays_are_points(data):
    """`metric(codes, factors)` for every metric, as `metric(Arrays(codes, factors))`."""
    few = data.codes[:150], data.factors[:150, :2]
    for name in set(dis.METRICS) - {"dci"}:
        draw = {"seed": 1, "num_train": 90, "num_test": 60}
        assert getattr(dis, name)(*few, **draw) == getattr(dis, name)(dis.Arrays(*few), **draw), name
    with pytest.raises(UserError, match="factors must be numbers"):
        dis.mig(data.codes)
    with pytest.raises(UserError, match="at least 2"):
        dis.sap_score(*few, num_test=0)
