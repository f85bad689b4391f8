"""CLAIMS.md: what the papers say, each statement with a verdict that is computed from rows of results/*.json.

results/claims.json lists the claims in our own words. A claim has tests, and each test compares two rows, or one row
with a number that stands for "no effect":

    {"number": 9, "paper": "glancenet", "claim": "...", "where": "Section 5.1", "tests": [
        {"better": "glancenet/claims-accuracy-glancenet", "worse": "glancenet/claims-accuracy-cbnm", "margin": -0.02}]}
    {"better": "latent_flow/claims-vp", "than": 33.3}

The effect is better minus worse, in the direction of the rows ("lower is better" turns it round), from the seeds'
values: paired where both rows have the same seeds, else by Welch's t, both with the two-sided 95 % interval. A test
holds when the whole interval lies above `margin` (0 if left out; negative: "no worse by more than"), fails when it lies
below, else it is undecided; so it is with fewer than three seeds. A claim holds when all its tests hold, and does not
hold when one fails.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from common.errors import UserError, suggest
from scripts.collect import read_json
from scripts.experiments import problem
from scripts.tables import PAPERS, markdown

ROOT = Path(__file__).resolve().parents[1]
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided at this scale"
NOT_RUN = "not yet run"
SEEDS = 3  # with fewer there is no verdict

Row = dict[str, Any]


def seeds_of(row: Row) -> list[str]:
    """The seeds of a row's values, read from the paths of its files; [] when it was typed."""
    if "files" not in row:
        return []
    pattern = re.escape(f"{row['source']['folder']}/{row['source']['file']}").replace(r"\{seed\}", r"(\d+)")
    found = [re.fullmatch(pattern, file["path"]) for file in row["files"]]
    return [match[1] for match in found if match and match.re.groups]


def interval(better: Row, worse: Row | float) -> tuple[float, float, float]:
    """Mean effect and its 95 % interval (low, high), in the rows' direction; nan, nan where it needs more seeds."""
    from scipy import stats

    sign = -1.0 if better["direction"] == "lower" else 1.0
    first = [sign * value for value in better["ours"]]
    if isinstance(worse, dict):
        second = [sign * value for value in worse["ours"]]
        paired = seeds_of(better) and seeds_of(better) == seeds_of(worse)
    else:
        second, paired = [sign * worse] * len(first), True
    mean = statistics.fmean(first) - statistics.fmean(second)
    if min(len(first), len(second)) < SEEDS:
        return mean, float("nan"), float("nan")
    if paired:
        differences = [a - b for a, b in zip(first, second, strict=True)]
        if len(set(differences)) == 1:
            return mean, mean, mean
        found = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    elif len(set(first)) == len(set(second)) == 1:
        return mean, mean, mean
    else:
        found = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return mean, float(found.low), float(found.high)


def judge(test: dict[str, Any], rows: dict[str, Row]) -> dict[str, Any]:
    """One test's verdict, with what the page shows of it."""
    better = rows[test["better"]]
    worse = rows[test["worse"]] if "worse" in test else float(test["than"])
    pair = [better, worse] if isinstance(worse, dict) else [better]
    if any(row["ours"] is None for row in pair):
        return {"verdict": NOT_RUN, "pair": pair}
    if lost := next((row for row in pair if not isinstance(row["ours"], list)), None):
        raise UserError(f"results/claims.json: row {lost['id']!r} keeps no single seeds")
    mean, low, high = interval(better, worse)
    margin = test.get("margin", 0.0)
    verdict = HOLDS if low > margin else FAILS if high < margin else UNDECIDED
    return {"verdict": verdict, "pair": pair, "mean": mean, "low": low, "high": high, "margin": margin}


def together(verdicts: list[str]) -> str:
    """The claim's verdict from those of its tests."""
    for one in (FAILS, NOT_RUN, UNDECIDED):
        if one in verdicts:
            return one
    return HOLDS


def read_claims(root: Path, rows: list[Row]) -> list[dict[str, Any]]:
    """The claims of root/results/claims.json. Raises UserError naming the claim and the key."""
    path = root / "results/claims.json"
    try:
        claims = read_json(path.read_text(encoding="utf-8"), "results/claims.json")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"results/claims.json: {error}") from error
    schema = json.loads((ROOT / "scripts/templates/claim.schema.json").read_text())
    known = {row["id"]: row for row in rows}
    if not isinstance(claims, list):
        raise UserError("results/claims.json: not a list of claims")
    for number, claim in enumerate(claims, start=1):
        where = f"results/claims.json, claim {number}"
        if wrong := problem(claim, schema):
            raise UserError(f"{where}: {wrong}")
        if claim["number"] != number:
            raise UserError(f"{where}: its number is {claim['number']}: they are numbered 1, 2, 3, ... in order")
        for test in claim["tests"]:
            for name in filter(None, (test["better"], test.get("worse"))):
                if name not in known:
                    raise UserError(f"{where}: no row {name!r}{suggest(name, known)}")
            one, other = known[test["better"]], known[test.get("worse", test["better"])]
            if one["direction"] == "neither" or (one["direction"], one["unit"]) != (other["direction"], other["unit"]):
                raise UserError(f"{where}: {one['id']!r} and {other['id']!r} have no common direction and unit")
    return claims


def scale_of(pairs: list[Row]) -> str:
    """The scale of the rows in one phrase."""
    return "; ".join(dict.fromkeys(re.sub(r"^(small|differs): ", "", row["protocol"]) for row in pairs))


def effect_cell(found: dict[str, Any]) -> str:
    """`better - worse` with its interval, or the mean alone."""
    if "mean" not in found:
        return "–"
    digits = found["pair"][0]["decimals"]
    cell = f"{found['mean']:+.{digits}f}"
    if found["low"] == found["low"]:
        cell += f" [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"
    return cell + (f", margin {found['margin']:g}" if found["margin"] else "")


def value_cell(row: Row) -> str:
    """A row's mean over its seeds."""
    return "–" if row["ours"] is None else f"{statistics.fmean(row['ours']):.{row['decimals']}f}"


def claim_part(claim: dict[str, Any], rows: dict[str, Row]) -> dict[str, Any]:
    """What CLAIMS.md and README.md show of one claim."""
    found = [judge(test, rows) for test in claim["tests"]]
    verdict = together([one["verdict"] for one in found])
    used = [row for one in found for row in one["pair"]]
    run = [row for row in used if row["ours"] is not None]
    seeds = min((len(row["ours"]) for row in run), default=0)
    scale = scale_of(run) if run else "–"
    shown = verdict + (f" ({scale})" if run and verdict != NOT_RUN else "")
    lines = []
    for test, one in zip(claim["tests"], found, strict=True):
        better = one["pair"][0]
        other = one["pair"][1] if len(one["pair"]) > 1 else None
        against = f"{other['setting']}, {other['metric']}" if other else f"{test['than']:g}"
        unit = f", {better['unit']}" if better["unit"] else ""
        value = value_cell(other) if other else f"{test['than']:g}"
        name = f"{better['setting']}, {better['metric']}{unit}"
        lines.append([name, value_cell(better), against, value, effect_cell(one), one["verdict"]])
    minutes = sum({(row["command"], row["minutes"]): row["minutes"] or 0.0 for row in run}.values()) * max(seeds, 1)
    commands = []
    for row in used:
        folder = row["source"]["folder"].removeprefix("results/").split("/") if row["source"] else []
        table = f"results/{folder[1]}/{folder[2]}" if folder[:1] == ["runs"] and len(folder) > 2 else ""
        commands.append(f"snakemake -s scripts/Snakefile --cores 2 {table}" if table else row["command"])
    title = PAPERS[claim["paper"]].split(":")[0]
    known = {"verdict": verdict, "shown": shown, "seeds": seeds, "lines": lines}
    known["minutes"] = f"{minutes:.0f}" if minutes else "not recorded"
    return {**claim, "title": title, **known, "commands": dict.fromkeys(commands)}


def between(text: str, mark: str, new: str) -> str:
    """A text with what stands between <!-- mark --> and <!-- end --> replaced."""
    return re.sub(rf"(?s)(<!-- {mark} -->\n).*?(\n<!-- end -->)", lambda found: found[1] + new + found[2], text)


def render_claims(root: Path, rows: list[Row]) -> dict[Path, str]:
    """CLAIMS.md, and README.md with its table of them: a function of claims and rows. Raises UserError."""
    import jinja2

    known = {row["id"]: row for row in rows}
    parts = [claim_part(claim, known) for claim in read_claims(root, rows)]
    folder = jinja2.FileSystemLoader(ROOT / "scripts/templates")
    pages = jinja2.Environment(loader=folder, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    head = ["model, metric", "value", "against", "value", "effect, 95 % interval", "verdict"]
    count = {one: sum(part["verdict"] == one for part in parts) for one in (HOLDS, FAILS, UNDECIDED, NOT_RUN)}
    page = pages.get_template("CLAIMS.md.j2").render(claims=parts, table=markdown, head=head, count=count, seeds=SEEDS)
    texts = {root / "CLAIMS.md": page.rstrip() + "\n"}
    if (root / "README.md").is_file():
        lines = [[str(p["number"]), p["title"], p["claim"], p["shown"], str(p["seeds"])] for p in parts]
        table = markdown(["", "paper", "claim", "verdict (scale)", "seeds"], lines)
        texts[root / "README.md"] = between((root / "README.md").read_text(encoding="utf-8"), "claims", table)
    return texts
