"""scripts/claims.py: verdicts are computed from rows, in the rows' direction, by the interval over seeds."""

import json
from pathlib import Path

import pytest
from scipy import stats

from common.errors import UserError
from scripts import results
from scripts.claims import FAILS, HOLDS, NOT_RUN, UNDECIDED, interval, judge, render_claims
from tests.front.test_results import measured, row, store

ROOT = Path(__file__).resolve().parents[2]
A, B = [1.0, 1.2, 1.1], [2.0, 2.3, 1.9]


def collected(name: str, values: list[float], **changes) -> dict:
    """A row read from files of seeds 0, 1, 2, ..."""
    source = {"folder": f"runs/inv_flow/toy/{name}_{{seed}}", "file": "e.json", "key": "bpd",
              "statistic": "mean and standard deviation over seeds"}  # fmt: skip
    files = [
        {"path": f"runs/inv_flow/toy/{name}_{seed}/e.json", "sha256": "0" * 64, "value": value}
        for seed, value in enumerate(values)
    ]
    one = measured(name, ours=values, source=source, files=files, setting=name, **changes)
    return {key: value for key, value in one.items() if key != "typed"}


def test_the_interval_is_paired_where_the_seeds_are_shared_and_welch_s_elsewhere():
    a, b = collected("a", A), collected("b", B)
    mean, low, high = interval(a, b)  # bits/dim: lower is better, so b - a
    expected = stats.ttest_rel(B, A).confidence_interval(0.95)
    assert mean == pytest.approx(2.0667 - 1.1, abs=1e-4) and (low, high) == pytest.approx(tuple(expected))
    typed = measured("b", ours=B)
    expected = stats.ttest_ind(B, A, equal_var=False).confidence_interval(0.95)
    assert interval(a, typed)[1:] == pytest.approx(tuple(expected)) != pytest.approx((low, high))
    higher = [{**one, "direction": "higher"} for one in (a, b)]
    assert interval(*higher) == pytest.approx((-mean, -high, -low))
    expected = stats.t.interval(0.95, 2, loc=1.1, scale=stats.sem(A))
    assert interval(a, 1.0)[1:] == pytest.approx((1.0 - expected[1], 1.0 - expected[0]))


def test_the_verdict_follows_from_the_interval_and_the_margin():
    rows = {one["id"].split("/")[1]: one for one in (collected("a", A), collected("b", B), collected("two", [9.0, 9.1]),
                                                      collected("near", [1.01, 1.2, 1.11]), row("none"))}  # fmt: skip

    def verdict(better: str, **other) -> str:
        return judge({"better": better, **other}, rows)["verdict"]

    assert verdict("a", worse="b") == HOLDS and verdict("b", worse="a") == FAILS
    assert verdict("near", worse="a") == UNDECIDED and verdict("near", worse="a", margin=-0.05) == HOLDS
    assert verdict("a", worse="b", margin=5.0) == FAILS and verdict("a", than=3.0) == HOLDS
    assert verdict("a", worse="two") == UNDECIDED  # far apart, but two seeds
    assert verdict("a", worse="none") == NOT_RUN


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "inv_flow").mkdir()
    (tmp_path / "inv_flow/flow.py").touch()
    store(tmp_path, collected("a", A), collected("b", B), collected("c", A[::-1], protocol="small: width 8"))
    (tmp_path / "README.md").write_text("front\n<!-- claims -->\n\n<!-- end -->\nback\n")
    return tmp_path


def claims(root: Path, *tests: dict, **changes) -> None:
    one = {"number": 1, "paper": "inv_flow", "claim": "a is better", "where": "Table 1", "tests": list(tests)}
    (root / "results/claims.json").write_text(json.dumps([{**one, **changes}]))


def test_the_page_and_the_front_page_say_the_verdict_its_scale_and_its_command(repository):
    claims(repository, {"better": "inv_flow/a", "worse": "inv_flow/b"}, {"better": "inv_flow/a", "worse": "inv_flow/c"})
    results.main(["--root", str(repository)])
    results.main(["--claims", "--root", str(repository)])
    page, front = ((repository / name).read_text() for name in ("CLAIMS.md", "README.md"))
    assert "**undecided at this scale (full; width 8)**" in page  # one test holds, the other cannot say
    assert "| +0.97 [+0.59, +1.35] | holds |" in page
    assert "Minutes of all trainings: not recorded." in page
    assert page.count("snakemake -s scripts/Snakefile --cores 2 results/inv_flow/toy") == 1
    assert "| 1 | Inverse-Flow (AISTATS 2025) | a is better | undecided at this scale (full; width 8) | 3 |" in front
    assert front.startswith("front\n") and front.endswith("back\n")
    results.main(["--check", "--root", str(repository)])
    (repository / "CLAIMS.md").write_text(page.replace("+0.97", "+9.97"))
    with pytest.raises(UserError, match=r"CLAIMS.md: the claims differ .* --claims"):
        results.main(["--check", "--root", str(repository)])


@pytest.mark.parametrize(
    ("tests", "changes", "message"),
    [
        ([{"better": "inv_flow/aa", "worse": "inv_flow/b"}], {}, "claim 1: no row 'inv_flow/aa'.*did you mean"),
        ([{"better": "inv_flow/a"}], {}, "claim 1: tests 0 is .*, not a list of"),
        ([{"better": "inv_flow/a", "worse": "inv_flow/b"}], {"number": 2}, "numbered 1, 2, 3"),
        ([{"better": "inv_flow/a", "worse": "inv_flow/b"}], {"verdict": "holds"}, "unknown key 'verdict'"),
        ([{"better": "inv_flow/a", "worse": "inv_flow/d"}], {}, "no common direction and unit"),
    ],
)
def test_a_bad_claim_is_one_line(repository, tests, changes, message):
    rows = [collected("a", A), collected("b", B), collected("d", A, unit="nats")]
    claims(repository, *tests, **changes)
    with pytest.raises(UserError, match=message):
        render_claims(repository, rows)


def test_the_claims_of_this_repository_are_those_of_its_rows():
    rows = results.read_rows(ROOT)
    for path, text in render_claims(ROOT, rows).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: python scripts/results.py --claims"
