"""The quickstart's page: numbers from the files that the papers' scripts wrote, beside trivial baselines, and pictures.

`write_page(out, outcomes)` writes <out>/index.html and copies its pictures to <out>/pictures; the folder can be moved
or sent as a whole. Each number in a table names the file that it comes from (`data-source`, relative to <out>) and its
text there (`data-raw`); a number derived from it names the formula, too (`data-formula`).
"""

import csv
import html
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lbae.results import read_line


class Raw(float):
    """A number that remembers how it was written."""

    text: str

    def __new__(cls, text: str) -> "Raw":
        value = super().__new__(cls, text)
        value.text = str(text)
        return value


# what is shown may be one of these functions of the number in the file
FORMULAS: dict[str, Callable[[float], float]] = {
    "": lambda x: x,
    "percent": lambda x: 100 * x,
    "bits of a uniform guess among the levels": math.log2,
    "percent of a guess among the classes": lambda x: 100 / x,
    "minutes": lambda x: x / 60,
}


@dataclass(frozen=True)
class Number:
    """A number of a table, and the file that holds it."""

    raw: Raw
    source: Path
    digits: int = 2
    formula: str = ""
    unit: str = ""

    @property
    def text(self) -> str:
        """The number as it is shown."""
        return f"{FORMULAS[self.formula](self.raw):.{self.digits}f}{self.unit}"


@dataclass
class Table:
    """Rows of cells, the first one a name. `trivial` are rows that need no learning, `best` the paper's."""

    caption: str
    head: list[str]
    rows: list[list[str | Number]]
    trivial: tuple[int, ...] = ()
    best: tuple[int, ...] = ()


@dataclass
class Picture:
    """Pictures under one caption: (file, alternative text) each, shown `width` pixels wide."""

    files: list[tuple[Path, str]]
    caption: str
    width: int = 320
    plot: bool = False  # a diagram: smooth when scaled, unlike enlarged pixels


@dataclass
class Section:
    """What the page tells about one paper."""

    name: str
    title: str
    cite: str
    text: str
    remark: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def read_json(path: Path) -> Any:
    """A JSON file whose numbers remember their text."""
    return json.loads(path.read_text(), parse_float=Raw, parse_int=Raw)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def last(rows: list[dict[str, str]], name: str) -> Raw:
    """The last value of a column. Raises ValueError when it has none."""
    values = [row[name] for row in rows if row.get(name)]
    if not values:
        raise ValueError(f"no column {name}")
    return Raw(values[-1])


# ------------------------------------------------------------------------------------------------------------- papers
def lbae(run: Path) -> Section:
    """Distances of generated images, and the images."""
    exp = run / "exp"
    source = exp / "results.txt"
    found, features = {}, ""
    for line in source.read_text().splitlines():
        results = read_line(line)
        features = results.features
        found |= {section.name: section for section in results.sections}
    real = next(name for name in found if name.endswith("_train"))
    names = {
        real: "real training images (what a perfect generator reaches)",
        "reco": "reconstructions of the test images",
        "samples_cov": "new codes by hyperplanes (the paper's sampler)",
        "samples_int": "interpolations between training codes",
        "samples_independent": "baseline: bits with the right means, drawn independently",
        "samples_random": "baseline: fair coins",
    }
    rows: list[list[str | Number]] = []
    for key, title in names.items():
        section = found[key]
        recall, precision = (Number(Raw(str(value)), source, 3) for value in section.f8)
        rows.append([title, Number(Raw(str(section.fid)), source), recall, precision])
    mosaics = {
        "reconstructions": max((exp / "reconstructed_eval").glob("*.jpg"), key=lambda path: path.stat().st_mtime),
        **{method: exp / f"generated/sample_0_{method}.jpg" for method in ("cov", "int", "independent", "random")},
    }
    captions = {
        "reconstructions": "Test images, each followed by its reconstruction from binary codes.",
        "cov": "New images: codes drawn by the paper's sampler, which keeps the correlations of the bits.",
        "int": "Each row goes from one training image (left) to another (right) through binary codes.",
        "independent": "Baseline: bits drawn independently with the right means. The correlations are what is missing.",
        "random": "Baseline: codes of fair coins.",
    }
    return Section(
        "lbae",
        "LBAE: latent Bernoulli autoencoder",
        "Fajtl, Argyriou, Monekosso, Remagnino, ICML 2020",
        "An autoencoder whose code is a vector of bits and that is trained for reconstruction alone. After training, "
        "the second moments of the codes give hyperplanes from which new codes, and so new images, are drawn.",
        f"Distances are in {features} features of a small sample, so they only compare rows of this table.",
        [
            Table(
                "Distance of sets of images from the test images",
                ["images", "Fréchet distance (lower is better)", "recall F8 (higher)", "precision F1/8 (higher)"],
                rows,
                trivial=(4, 5),
                best=(2,),
            )
        ],
        [Picture([(path, captions[key])], captions[key], 320) for key, path in mosaics.items()]
        + [
            Picture(
                [(exp / "PR.png", "Curves of precision against recall of real images and four samplers")],
                "Precision against recall of real images and of four ways to make codes: a larger area is better.",
                420,
                plot=True,
            )
        ],
    )


def glancenet(run: Path) -> Section:
    """Accuracy and alignment beside an untrained network; leakage when it was measured."""
    source = run / "evaluation" / "runs.csv"
    rows: list[list[str | Number]] = []
    names = {
        "glancenet": "GlanceNet",
        "cbnm": "concept bottleneck (CBNM): same encoder and classifier, no decoder",
        "untrained": "baseline: the same network after one step",
    }
    measured = read_csv(source)
    for key, title in names.items():
        row = next(row for row in measured if row["run"].rstrip("/").endswith(f"/{key}"))
        rows.append(
            [
                title,
                Number(Raw(row["accuracy"]), source, 1, "percent", " %"),
                *(Number(Raw(row[name]), source, 3) for name in ("alignment", "explicitness")),
            ]
        )
    tables = [
        Table(
            "Held-out sprites: class accuracy, and how well latents and concepts match one to one",
            ["model", "accuracy", "alignment (DCI, 0 to 1)", "explicitness (0 to 1)"],
            rows,
            trivial=(2,),
            best=(0,),
        )
    ]
    pictures = run / "pictures" / "glancenet"
    shown = [
        Picture(
            [(pictures / "gif_random.gif", "Animation: seven panels, in each of them one latent changes")],
            "One panel a latent (square, ellipse, heart, scale, x, y, one free): the image while that latent goes from "
            "-3 to 3. A concept that has its own latent changes alone.",
            480,
        ),
        Picture(
            [(pictures / "traverse_random.jpg", "Grid: a row a latent, the latent's value growing to the right")],
            "The same as a grid: one row a latent.",
            420,
        ),
        Picture(
            [(pictures / "latent_factor_matrix.png", "Matrix of correlations between latents and concepts")],
            "Absolute correlation of latents (rows) and concepts (columns): a bright diagonal is perfect alignment.",
            360,
            plot=True,
        ),
        Picture(
            [(pictures / "recon.jpg", "Sprites on the left, their reconstructions on the right")],
            "Sprites (left) and reconstructions (right).",
            480,
        ),
    ]
    tables.append(
        leakage(
            run / "leakage" / "leakage.json",
            "Leakage: the models see sprites at the centre only; how much their concepts tell about two corners",
        )
    )
    shown.append(
        Picture(
            [(run / "leakage" / "pca.png", "Two clouds of points in each of two panels")],
            "Sprites of two corners in the space of the learned concepts, first two principal components: where the "
            "colours come apart, concepts that never saw a corner betray it. Rejection has to stop this.",
            560,
            plot=True,
        )
    )
    parity = run / "parity" / "results.json"
    if parity.exists():
        caption = "Leakage on MNIST: concepts of 4 and 5; how much they tell about even and odd of other digits"
        tables.append(leakage(parity, caption))
        shown.append(
            Picture(
                [(run / "parity" / "leakage.png", "Bars: leakage of each model with and without rejection")],
                "The same for MNIST, with and without rejection. Dashed: the paper.",
                480,
                plot=True,
            )
        )
    return Section(
        "glancenet",
        "GlanceNets: interpretable, leak-proof concept-based models",
        "Marconato, Passerini, Teso, NeurIPS 2022",
        "A variational autoencoder whose first latents are supervised to be known concepts and whose prior has a mean "
        "for each class; classes are read from the concepts alone. It is compared with a concept bottleneck, which has "
        "neither decoder nor prior.",
        "On a set as easy as this the bottleneck learns the concepts as well or better; the paper's comparison needs "
        "the full sets. The check of the reconstruction stops the leak; the distance to the prototypes does not.",
        tables,
        shown,
    )


LEAKING = {
    ("cbnm", "none"): "concept bottleneck",
    ("cbnm", "distance"): "concept bottleneck that rejects images far from the class means",
    ("cg-vae", "none"): "GlanceNet without rejection",
    ("glancenet", "none"): "GlanceNet without rejection",
    ("glancenet", "distance"): "GlanceNet that rejects images far from its class prototypes only",
    ("glancenet", "both"): "GlanceNet that also rejects images which it reconstructs badly",
    ("vae", "none"): "VAE without class prototypes",
    ("vae", "both"): "VAE without class prototypes, with both checks",
}


def leakage(source: Path, caption: str) -> Table:
    """How much the concepts tell about what they should not know, and how many foreign images are rejected."""
    rows: list[list[str | Number]] = []
    best = ()
    for row in read_json(source)["summary"]:
        key = row["model"], row["rejection"].replace(" checks", "")
        if key in LEAKING:
            best = (len(rows),) if key == ("glancenet", "both") else best
            shares = (Number(row[name], source, 1, "", " %") for name in ("leakage_percent", "rejected_percent"))
            rows.append([LEAKING[key], *shares])
    head = ["model", "leakage (0 %: a guess, as it should be)", "foreign images rejected"]
    return Table(caption, head, rows, best=best)


def latent_flow(run: Path) -> Section:
    """Equivariance errors beside trivial predictions; truth above model as GIFs."""
    source = run / "run" / "eval.json"
    rows: list[list[str | Number]] = []
    kinds = {
        "model": "flow moves the latent of the first frame",
        "unmoved": "ablation: latent not moved, dec(z_0) for all frames",
        "identity": "baseline: first frame repeated",
        "black": "baseline: black frames",
    }
    measured = read_json(source)["equivariance"]
    rows += [
        [title, *(Number(entry[key]["mean"], source, 1) for entry in measured.values())] for key, title in kinds.items()
    ]
    pictures = run / "run" / "pictures"
    shown = []
    singles = [pictures / f"{name}.gif" for name in measured]
    composed = [pictures / f"{name}.gif" for name in ("rotation_then_hue", "rotation_and_hue")]
    for path in [*singles, *(path for path in composed if path.exists())]:
        title = path.stem.replace("_", " ")
        caption = f"{title}: upper row the true sequences, lower row the model, which saw the first frame only."
        shown.append(Picture([(path, f"Animation of digits under {title}, truth above model")], caption, 340))
    for path in sorted(pictures.glob("*.png"))[:1]:
        caption = f"{path.stem} frame by frame from left to right, in pairs of rows: truth above model."
        shown.append(Picture([(path, f"Frames of {path.stem}, truth above model")], caption, 480))
    return Section(
        "latent_flow",
        "Latent flow: flow factorized representations",
        "Song, Keller, Sebe, Welling, NeurIPS 2023; Song, Keller, Yue, Perona, Welling, 2024",
        "A variational autoencoder encodes the first frame of a sequence; the latents of all later frames are reached "
        "by learned vector fields, one for each kind of transformation (scale, rotation, hue).",
        "After so few steps the network draws little more than a mean digit; what is learned is how it moves (turns, "
        "changes its colour, less so its size). The other variants and the paper's sizes are in the paper's folder.",
        [
            Table(
                "Equivariance error, validation images: absolute pixel error summed over all frames (lower is better)",
                ["prediction of the later frames", *measured],
                rows,
                trivial=(2, 3),
                best=(0,),
            )
        ],
        shown,
    )


def inv_flow(run: Path) -> Section:
    """Bits a dimension with the inverse convolution and without."""
    rows: list[list[str | Number]] = []
    names = {"inverse": "with the inverse convolution", "none": "the same flow without it"}
    for key, title in names.items():
        source = run / key / "metrics.csv"
        rows.append([title, Number(last(read_csv(source), "test_bpd"), source, 3)])
    config = run / "inverse" / "config.json"
    levels = read_json(config)["levels"]
    uniform = Number(levels, config, 3, "bits of a uniform guess among the levels")
    rows.append([f"baseline: every one of the {levels.text} grey levels equally likely", uniform])
    tables = [
        Table("Test images, bits a dimension (lower is better)", ["model", "bits/dim"], rows, trivial=(2,), best=(0,))
    ]
    evaluation = run / "inverse" / "evaluation.json"
    error = Number(read_json(evaluation)["recon_max_grey"], evaluation, 6)
    tables.append(
        Table(
            "Inversion: image to latent and back, in float32",
            ["model", "largest error in grey levels, before rounding"],
            [["with the inverse convolution", error]],
        )
    )
    last_samples = {key: newest(run / key / "samples") for key in names}
    shown = [
        Picture(
            [(last_samples["inverse"], "Grid of generated digits, flow with inverse convolution")],
            "Samples of the flow with inverse convolutions: one pass of plain convolutions.",
            300,
        ),
        Picture(
            [(last_samples["none"], "Grid of generated digits, flow without inverse convolution")],
            "Samples of the same flow without them.",
            300,
        ),
        Picture(
            [(newest(run / "inverse" / "recon"), "Digits, their reconstructions, and black differences")],
            "Images (top), sampled back from their latents (middle), absolute differences (bottom): black, because the "
            "flow inverts exactly.",
            480,
        ),
    ]
    return Section(
        "inv_flow",
        "Inverse-Flow: flows whose sampling pass is one convolution",
        "Nagar, Varma, AISTATS 2025",
        "A masked convolution is a triangular linear map. The flow takes its inverse from data to latent, so that "
        "training solves a triangular system and sampling is a plain convolution; the log-determinant is zero.",
        "Both flows have 1x1 convolutions and equal depth; the one without has slightly fewer parameters. With "
        "one seed and images this small, a difference of a few hundredths says nothing about the layer.",
        tables,
        shown,
    )


def nfpi(run: Path) -> Section:
    """Bayes' rule, a CNN on generated images, the fixed point iteration."""
    flow, real = (run / name / "version_0" / "results.json" for name in ("flow", "real"))
    figures = read_json(flow)
    data = figures["config"]["dataset_name"]
    classes = figures["config"]["dataset_info"][data]["num_classes"]
    on_samples, on_real = (next(iter(read_json(path)["cnn"].values())) for path in (flow, real))
    percent = {"digits": 1, "formula": "percent", "unit": " %"}
    accuracy = Table(
        "Accuracy on real test images (higher is better)",
        ["classifier", "accuracy"],
        [
            ["Bayes' rule in the flow's latent space", Number(figures["nf"]["acc"], flow, **percent)],
            ["CNN trained on images that the flow generated, and no real one", Number(on_samples, flow, **percent)],
            ["CNN trained on the real images", Number(on_real, real, **percent)],
            ["baseline: guess", Number(classes, flow, 1, "percent of a guess among the classes", " %")],
        ],
        trivial=(3,),
        best=(0, 1),
    )
    source = sorted((run / "flow" / "version_0").glob("fpi_epoch*.csv"))[-1]
    steps = read_csv(source)
    iteration = Table(
        "The fixed point iteration: Kullback-Leibler divergences of the class Gaussians, in nats",
        ["class Gaussians", "smallest pair", "mean", "largest pair"],
        [
            [title, *(Number(Raw(row[name]), source, 1) for name in ("kl_min", "kl_mean", "kl_max"))]
            for title, row in (("before the iteration", steps[0]), ("after the last iteration", steps[-1]))
        ],
        trivial=(0,),
        best=(1,),
    )
    pictures = run / "flow" / "version_0" / "pictures"
    samples = [(pictures / f"samples_{c}.png", f"Generated digits of class {c}") for c in range(int(classes))]
    shown = [
        Picture(samples, "Generated images, a grid for each class from 0 to 9: the class is chosen, not found.", 170),
        Picture(
            [(pictures / "tsne_latents.png", "Ten well separated clouds of points")],
            "t-SNE of draws from the class Gaussians in the latent space: one cloud a class.",
            340,
            plot=True,
        ),
        Picture(
            [(pictures / f"{source.stem}.png", "Step lengths falling and divergences levelling off over iterations")],
            "The iteration that places the Gaussians: largest step of a mean (left), pairwise divergences (right).",
            560,
            plot=True,
        ),
        Picture(
            [(newest(run / "flow" / "version_0", "0_exp_*/*/confusion.png"), "Confusion matrix of the CNN")],
            "Confusion matrix, on real test images, of the CNN that was trained on generated ones.",
            400,
            plot=True,
        ),
    ]
    return Section(
        "nfpi",
        "NFPI: class Gaussians by fixed point iteration",
        "Enescu, Sahbi, BMVC 2024",
        "A normalizing flow with one Gaussian a class in its latent space. A fixed point iteration, not a gradient, "
        "places the Gaussians far apart; one model classifies by Bayes' rule and generates images of a wanted class.",
        "",
        [accuracy, iteration],
        shown,
    )


def newest(folder: Path, pattern: str = "*.png") -> Path:
    """The newest file of a kind. Raises FileNotFoundError when there is none."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no {pattern} in {folder}")
    return found[-1]


SECTIONS: dict[str, Callable[[Path], Section]] = {
    "lbae": lbae,
    "glancenet": glancenet,
    "latent_flow": latent_flow,
    "inv_flow": inv_flow,
    "nfpi": nfpi,
}


# --------------------------------------------------------------------------------------------------------------- page
STYLE = """
:root { color-scheme: light dark; --text: #1c1c1e; --back: #fdfdfc; --soft: #62626a; --line: #d9d9de; --field: #f2f2f4;
  --mark: #0a5c8f; --bad: #a3231f; }
@media (prefers-color-scheme: dark) { :root { --text: #e9e9ec; --back: #17181a; --soft: #a5a6ad; --line: #3a3b40;
  --field: #222327; --mark: #7cc0ee; --bad: #ff8f87; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 1160px; color: var(--text); background: var(--back);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; } h2 { font-size: 1.3rem; margin: 0; }
p { margin: .5rem 0; max-width: 75ch; } a { color: var(--mark); }
.soft, figcaption, caption, .note { color: var(--soft); font-size: .92rem; }
section { border-top: 1px solid var(--line); margin-top: 2.2rem; padding-top: 1.4rem; }
.error { border-left: 4px solid var(--bad); padding: .4rem .8rem; background: var(--field); color: var(--bad); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .95rem; } caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.trivial { color: var(--soft); font-style: italic; } tr.best { font-weight: 600; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.4rem; align-items: flex-start; margin: 1.2rem 0; }
figure { margin: 0; max-width: 100%; } figcaption { margin-top: .35rem; max-width: 60ch; }
figure div { display: flex; flex-wrap: wrap; gap: 6px; }
img { display: block; max-width: 100%; height: auto; background: #fff; image-rendering: pixelated; border-radius: 3px; }
img.plot { image-rendering: auto; }
pre { background: var(--field); padding: .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.45;
  border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--mark); }
@media (max-width: 560px) { table { font-size: .84rem; } th, td { padding-right: .5rem; hyphens: auto; }
  td:first-child { min-width: 7em; } }
"""


def escape(text: str) -> str:
    """Text as HTML, in an attribute too."""
    return html.escape(str(text), quote=True)


def cell(value: str | Number, out: Path) -> str:
    """A cell of a table; a number names its source."""
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    marks = f'data-source="{escape(relative(value.source, out))}" data-raw="{escape(value.raw.text)}"'
    marks += f' data-formula="{escape(value.formula)}"' if value.formula else ""
    title = f"from {relative(value.source, out)}: {value.raw.text}"
    return f'<td class="number" title="{escape(title)}" {marks}>{escape(value.text)}</td>'


def relative(path: Path, out: Path) -> str:
    """`path` as seen from the page."""
    return os.path.relpath(path, out)


def table(part: Table, out: Path) -> str:
    """A table."""
    lines = ["<div class=wide><table>", f"<caption>{escape(part.caption)}</caption>"]
    lines.append("<tr>" + "".join(f"<th scope=col>{escape(name)}</th>" for name in part.head) + "</tr>")
    for number, row in enumerate(part.rows):
        kind = "trivial" if number in part.trivial else "best" if number in part.best else ""
        lines.append(f'<tr class="{kind}">' + "".join(cell(value, out) for value in row) + "</tr>")
    return "\n".join([*lines, "</table></div>"])


def figure(part: Picture, name: str, out: Path) -> str:
    """Copy the pictures of a figure beside the page. Raises OSError when one is missing."""
    images = []
    for path, alternative in part.files:
        target = out / "pictures" / name / relative(path, out / name).replace("../", "").replace("/", "-")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        address = "/".join(quote(piece) for piece in target.relative_to(out).parts)
        kind = ' class="plot"' if part.plot else ""
        images.append(f'<img src="{escape(address)}" alt="{escape(alternative)}" width="{part.width}"{kind}>')
    room = f' style="width: {max(part.width, 300)}px"' if len(images) == 1 else ""
    return f"<figure{room}><div>{''.join(images)}</div><figcaption>{escape(part.caption)}</figcaption></figure>"


def how(outcome: Any, out: Path) -> str:
    """The commands of a paper as they were run, with their times."""
    rows: list[list[str | Number]] = []
    for record in outcome.records:
        source = next(
            path for path in sorted((out / "steps" / outcome.paper.name).glob("*.json"))
            if json.loads(path.read_text())["digest"] == record["digest"]
        )  # fmt: skip
        numbers = read_json(source)
        minutes = (Number(numbers[key], source, 1, "minutes") for key in ("seconds", "cpu_seconds"))
        rows.append([record["name"], *minutes, relative(out / "logs" / outcome.paper.name / f"{source.stem}.txt", out)])
    times = table(Table("What was run", ["step", "minutes", "minutes of CPU time", "log"], rows), out)
    commands = "\n".join(record["command"] for record in outcome.records)
    return f"<details><summary>Commands, times, logs</summary>{times}<pre>{escape(commands)}</pre></details>"


def section(outcome: Any, build: Callable[[Path], Section] | None, out: Path) -> tuple[str, str]:
    """(HTML of a paper, why it failed or nothing)."""
    name, error, parts = outcome.paper.name, outcome.error, []
    head, body = name, ""
    try:
        made = build(out / name) if build else Section(name, name, "", "")
        head = made.title
        body += f"<p class=soft>{escape(made.cite)}</p><p>{escape(made.text)}</p>"
        body += "".join(table(part, out) for part in made.tables)
        body += f"<div class=pictures>{''.join(figure(part, name, out) for part in made.pictures)}</div>"
        body += f"<p class=note>{escape(made.remark)}</p>" if made.remark else ""
    except Exception as problem:  # one unreadable result must not take the page with it
        error, body = error or f"page: {type(problem).__name__}: {problem}", ""
    parts += [f'<section id="{escape(name)}">', f"<h2>{escape(head)}</h2>"]
    parts += [f"<p class=error>Not complete: {escape(error)}</p>"] if error else []
    parts += [body, f"<p class=note>Data: {escape(outcome.paper.data)}.</p>" if outcome.paper.data else ""]
    parts += [
        f"<p class=note>More, and runs of real size: {escape(name)}/README.md and RESULTS.md in the repository.</p>"
    ]
    parts += [how(outcome, out), "</section>"]
    return "\n".join(filter(None, parts)), error


def write_page(
    out: Path,
    outcomes: list[Any],
    environment: dict[str, str] | None = None,
    sections: dict[str, Callable[[Path], Section]] = SECTIONS,
) -> tuple[Path, list[tuple[str, str]]]:
    """Write <out>/index.html; returns its path and (paper, why) of each paper that failed."""
    parts, failures = [], []
    for outcome in outcomes:
        text, error = section(outcome, sections.get(outcome.paper.name), out)
        parts.append(text)
        failures += [(outcome.paper.name, error)] if error else []
    seconds = [sum(record[key] for o in outcomes for record in o.records) for key in ("seconds", "cpu_seconds")]
    links = " · ".join(f'<a href="#{escape(o.paper.name)}">{escape(o.paper.name)}</a>' for o in outcomes)
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in (environment or {}).items())
    page = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Structured latent spaces: quickstart</title>
<style>{STYLE}</style>
<body>
<header>
<h1>Structured latent spaces: quickstart</h1>
<p>Five papers, each trained, evaluated and drawn on this machine by its own scripts. These are <strong>small
runs</strong> of minutes: they show that every part works, next to what needs no learning, and are no results of the
papers. Measured rows of the papers' tables are in <code>RESULTS.md</code> and in each paper's README.</p>
<p class=soft>All steps one after the other: {seconds[0] / 60:.1f} minutes, {seconds[1] / 60:.1f} of CPU time. In the
tables <strong>bold</strong> is what the paper proposes and <em>italic</em> what needs no learning. Point at a number to
see its file.</p>
<nav>{links}</nav>
</header>
{chr(10).join(parts)}
<section id="again"><h2>Again, by hand</h2>
<p>The commands above run in the repository's root after these lines:</p>
<pre>source {escape(shlex.quote(os.path.relpath(sys.prefix)))}/bin/activate
{escape(exports)}</pre>
</section>
</body>
</html>
"""
    target, part = out / "index.html", out / "index.html.part"
    part.write_text(page, encoding="utf-8")
    os.replace(part, target)
    return target, failures
