"""One page to look inside the models that ship in checkpoints/: a tab a paper, on the CPU, without data, offline.

    python scripts/explore.py                 # then open http://127.0.0.1:7860; Ctrl-C ends it
    python scripts/explore.py --port 8000
    python scripts/explore.py --time          # no page: median wall-clock and CPU milliseconds of each move

Needs Gradio: `pip install -e .[explore]`. Only this machine reaches the page, and the page asks no other for anything.
The digits are LBAE's reconstructions of training images, from the codes that ship with its weights.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import base64
import io
import os
import socket
import statistics
import threading
import time
import timeit
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import glancenet
import inv_flow
import latent_flow
import lbae
import nfpi
from common.errors import UserError, run_command
from common.images import mosaic
from common.options import Options, from_flags, option
from glancenet import osr

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
try:
    import gradio as gr
except ImportError:
    gr = None

HOST = "127.0.0.1"
STEPS = 8  # of a path between codes, and of a flow
KNOWN, IMAGES, QUANTILE = (4, 5), 400, 0.95  # digits of GlanceNet's parity test, how many of each, what is kept
CSS = """
img, canvas { image-rendering: pixelated; border-radius: 4px; width: 100% }
canvas { touch-action: none; cursor: crosshair } canvas + button { font: inherit; text-decoration: underline }
.says { font-size: 1.5em } .digits label { padding: 4px 9px } .tab-container button { padding: 0 6px }
@media (max-width: 500px) { .tab-container button { font-size: 13px } }
.bar { display: flex; gap: 8px; align-items: center } .bar span { min-width: 4em } .bar div { flex: 1; height: 12px }
"""
BOARD = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
# compute at once, the newest values last, without a spinner and without a place in the public interface
AT_ONCE = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
# what a change of a control computes: its tab and name, the function, the controls' first values
Move = namedtuple("Move", "tab name compute first")


class Page:
    """The page under construction: ten digits to begin with, and the moves."""

    def __init__(self):
        self.tab, self.moves = "", []
        self.lbae = lbae.load("mnist_bae_w16")
        self.codes = torch.cat([self.codes_of(k, 1) for k in range(10)])  # (10, D)
        self.digits = self.images(self.codes)  # (10, 1, 28, 28)

    def codes_of(self, k: int, count: int) -> Tensor:
        """The first `count` training codes (count, D) of digit k."""
        return self.lbae.codes[self.lbae.labels[:, 0] == k][:count]

    def images(self, codes: Tensor) -> Tensor:
        """LBAE's images of codes, without its frame of two pixels: (B, 1, 28, 28)."""
        return torch.cat([self.lbae.decode(part) for part in codes.split(100)])[:, :, 2:-2, 2:-2]

    def live(self, name: str, compute: Callable, controls: Sequence[Any], *outputs: Any) -> None:
        """Show `compute` of the controls' values, a list, in the outputs: now, and whenever a control changes."""
        compute, first = torch.no_grad()(compute), [control.value for control in controls]  # in Gradio's threads, too
        for output, value in zip(outputs, compute(*first), strict=True):
            output.value = value
        self.moves.append(Move(self.tab, name, compute, first))
        gr.on([control.change for control in controls], compute, controls, outputs, **AT_ONCE)

    def pad(self, start: int) -> Any:
        """A place to draw a digit; its value is a board of 28 x 28."""
        place = board(self.digits[start], 28, 28, brush=True)
        choice = digit("draw, or begin with", start)
        choice.input(lambda k: cells(self.digits[k]), choice, place, **AT_ONCE)
        return place


def digit(label: str, start: int) -> Any:
    """One of the ten digits."""
    return gr.Radio(range(10), value=start, label=label, elem_classes="digits")


def board(start: Tensor, columns: int, rows: int, brush: bool) -> Any:
    """Cells to paint on with a brush, or to switch one by one."""
    canvas = f'<canvas width="{columns}" height="{rows}"></canvas>' + "<button>clear</button>" * brush
    return gr.HTML(cells(start), html_template=canvas, js_on_load=BOARD, brush=brush)


def cells(values: Tensor) -> str:
    """Values in [0, 1] of any shape as a board holds them."""
    return "".join(f"{v:x}" for v in (15 * values.flatten()).round().int().tolist())


def values(board: str, *shape: int) -> Tensor:
    """The values of a board, in [0, 1]; by default an image (1, 1, 28, 28)."""
    return torch.tensor([int(cell, 16) for cell in board]).view(shape or (1, 1, 28, 28)) / 15


def picture(images: Tensor, columns: int = 1) -> str:
    """HTML of images (N, C, H, W) in [0, 1] side by side, with the pixels in it."""
    file = io.BytesIO()
    Image.fromarray(mosaic(images, columns).squeeze()).save(file, "png")
    return f'<img alt="{len(images)} images" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def bars(rows: Iterable[tuple[str, float, float, str]]) -> str:
    """HTML of bars: name, value, the value of a full bar, and a note behind it."""
    bar = ('<div class="bar"><span>{}</span><div style="background: linear-gradient(90deg, #f97316 {:.1%}, #8884 0)">'
           "</div><span>{}</span></div>")  # fmt: skip
    return "".join(bar.format(name, value / full, note) for name, value, full, note in rows)


def lbae_tab(page: Page) -> None:
    """The path of codes between two digits, by hyperplanes; the bits that go with a digit; 200 bits, each a switch."""
    model, sampler = page.lbae, page.lbae.sampler
    with gr.Row():
        with gr.Column():
            image, step = gr.HTML(), gr.Slider(0, STEPS, STEPS // 2, step=1, label="step of the path")
        with gr.Column():
            code, strip = board(torch.zeros(200), 25, 8, brush=False), gr.HTML()
        with gr.Column():
            ends = [digit("from", 3), digit("to", 8)]
            attribute = gr.Radio(["none", *range(10)], value="none", label="force the bits of", elem_classes="digits")
            threshold = gr.Slider(0, 1, 0.5, step=0.05, label="those whose mean exceeds")

    def path(begin: int, end: int, step: int, attribute: int | str, threshold: float) -> list[str]:
        codes = sampler.interpolate(page.codes[begin], page.codes[end], STEPS - 1)
        if attribute != "none":
            codes = sampler.set_attribute(codes, attribute, threshold)
        return [cells((codes[step] + 1) / 2), picture(model.decode(codes), 3)]

    page.live("path, attribute", path, [*ends, step, attribute, threshold], code, strip)
    page.live("a bit", lambda bits: [picture(model.decode(2 * values(bits, 1, -1) - 1))], [code], image)


def glancenet_tab(page: Page) -> None:
    """Concepts of a drawn digit; it is rejected beyond the reconstruction error or the distance from both classes that
    95 % of the known 4s and 5s keep. The sliders are its latents, concepts first."""
    model = glancenet.load("mnist_parity")
    means, names = model.prototypes.numpy(), [f"is a {name}" for name in model.concept_names]
    with gr.Row():
        with gr.Column():
            pad = page.pad(4)
        with gr.Column():
            verdict, again, image = gr.HTML(), gr.HTML(), gr.HTML()
        with gr.Column(), gr.Row():
            labels = names + [f"free {i}" for i in range(1, means.shape[1] - len(names) + 1)]
            sliders = [gr.Slider(-4, 4, 0, step=0.05, label=label, min_width=150, buttons=[]) for label in labels]

    def seen(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, D), reconstructions, their errors (B,) in nats."""
        recon = model.decode(z := model.encode(x))
        return z, recon, F.binary_cross_entropy(recon, x, reduction="none").sum((1, 2, 3))

    z, _, errors = seen(page.images(torch.cat([page.codes_of(k, IMAGES) for k in KNOWN])))
    classes = torch.arange(len(KNOWN)).repeat_interleave(IMAGES)
    limits = osr.fit_thresholds(errors.numpy(), z.numpy(), classes.numpy(), means, len(KNOWN), QUANTILE)

    def look(drawn: str) -> list[Any]:
        z, recon, error = seen(values(drawn))
        distances = osr.prototype_distances(z.numpy(), means, len(KNOWN))[0]
        k = (distances / limits.distance).argmin()
        rows = [(name, p, 1, f"{p:.2f}") for name, p in zip(names, z[0].sigmoid().tolist(), strict=False)]
        checks = {"error": (error.item(), limits.reconstruction), "distance": (distances[k], limits.distance[k])}
        rows += [(name, v, 2 * limit, f"{v:.3g} of {limit:.3g}") for name, (v, limit) in checks.items()]
        word = f"class {model.class_names[k]}" if osr.accept(error.numpy(), z.numpy(), limits).both[0] else "rejected"
        latents = [round(v, 2) for v in z[0].clamp(-4, 4).tolist()]
        return [f'<div class="says">{word}</div>{bars(rows)}', picture(torch.cat([values(drawn), recon]), 2), *latents]

    page.live("a drawn digit", look, [pad], verdict, again, *sliders)
    page.live("a latent", lambda *z: [picture(model.decode(torch.tensor([z], dtype=torch.float)))], sliders, image)


def latent_flow_tab(page: Page) -> None:
    """A digit along three flows: in turn, each from its own beginning, or superposed."""
    model = latent_flow.load("mnist_supervised_d16")
    flows = torch.eye(len(model.concept_names))
    with gr.Row():
        with gr.Column():
            image, strip = gr.HTML(), gr.HTML()
        with gr.Column():
            controls = [digit("digit", 7), gr.Radio(["in turn", "at once"], value="in turn", label="the flows act")]
            for name, steps in zip(model.concept_names, (3, 5, 0), strict=True):
                controls.append(gr.Slider(0, STEPS, steps, step=1, label=f"steps of {name}"))

    def move(k: int, how: str, *steps: int) -> list[str]:
        path = [model.encode(torch.cat([page.digits[k : k + 1], torch.zeros(1, 2, 28, 28)], 1))]  # a red digit
        parts = [flow.expand(count, -1) for flow, count in zip(flows, steps, strict=True)]
        if how == "at once":
            parts = [(torch.arange(max(steps))[:, None] < torch.tensor(steps)).float()]
        for weights in parts:
            path += model.move(path[-1], weights)[1:].unbind() if len(weights) else ()
        frames = model.decode(torch.cat(path))
        return [picture(frames[-1:]), picture(frames, 5)]

    page.live("a flow", move, controls, image, strip)


def flow_tab(page: Page, starts: tuple[int, int, int], classes: bool, sample: Callable, between: Callable,
             judge: Callable) -> None:  # fmt: skip
    """Three columns: samples at a temperature, a way between two digits, what is said of a drawn one."""
    with gr.Row():
        with gr.Column():
            samples, controls = gr.HTML(), [digit("class", 0)] if classes else []
            controls += [gr.Slider(0, 1.2, 0.7, step=0.05, label="temperature"),
                         gr.Slider(1, 50, 1, step=1, label="draw")]  # fmt: skip
        with gr.Column():
            image, path = gr.HTML(), [digit("from", starts[0]), digit("to", starts[1])]
            path += [gr.Slider(0, 1, 0.5, step=0.05, label="way between them")]
        with gr.Column():
            pad, said = page.pad(starts[2]), gr.HTML()
    page.live("samples", sample, controls, samples)
    page.live("way between two", between, path, image)
    page.live("a drawn digit", judge, [pad], said)


def inv_flow_tab(page: Page) -> None:
    """Samples; a way between the latents of two images; bits/dim of a drawn digit: the fewer, the likelier."""
    model = inv_flow.load("mnist_inverse_w64")
    latents = model.encode(page.digits)

    def sample(temperature: float, draw: int) -> list[str]:
        rng = torch.Generator().manual_seed(draw)
        z = [temperature * torch.randn(4, *size, generator=rng) for size in model.flow.latent_sizes]
        return [picture(model.decode(z), 2)]

    flow_tab(
        page, (3, 5, 1), False, sample,
        lambda begin, end, t: [picture(model.decode([torch.lerp(z[[begin]], z[[end]], t) for z in latents]))],
        lambda drawn: [f'<div class="says">{float(model.bits_per_dim(values(drawn))):.2f} bits/dim</div>'],
    )  # fmt: skip


def nfpi_tab(page: Page) -> None:
    """Samples of a class; a way between the Gaussians of two classes; Bayes' rule for a drawn digit."""
    model = nfpi.load("mnist_small")
    mean, deviation = model.gaussians.mean, model.gaussians.var.sqrt()

    def between(begin: int, end: int, t: float) -> list[str]:
        rng, heat = torch.Generator().manual_seed(1), 0.5
        noise = heat * torch.randn(1, mean.shape[1], generator=rng)
        z = torch.lerp(mean[begin], mean[end], t) + torch.lerp(deviation[begin], deviation[end], t) * noise
        return [picture(model.decode(z, heat, rng))]

    def judge(drawn: str) -> list[str]:
        [found] = model.posterior(F.pad(values(drawn), (2, 2, 2, 2)))
        return [bars((str(k), p, 1, f"{p:.2f}") for k, p in enumerate(found.tolist()))]

    flow_tab(
        page, (3, 8, 6), True,
        lambda k, t, draw: [picture(model.sample(torch.full((6,), k), t, torch.Generator().manual_seed(draw)), 3)],
        between, judge,
    )  # fmt: skip


TABS = {"LBAE": lbae_tab, "GlanceNet": glancenet_tab, "Latent flow": latent_flow_tab, "Inverse-Flow": inv_flow_tab,
        "NFPI": nfpi_tab}  # fmt: skip


@torch.no_grad()
def build() -> tuple[Any, list[Move]]:
    """The page, and its moves."""
    page = Page()
    with gr.Blocks(title="Inside five latent spaces", analytics_enabled=False) as blocks:
        for page.tab, make in TABS.items():
            with gr.Tab(page.tab):
                gr.Markdown(make.__doc__)
                make(page)
    return blocks, page.moves


class Config(Options):
    """The options."""

    port: Annotated[int, Field(ge=1, le=65535)] = option(7860, "port of the page on this machine")
    time: bool = option(False, "print how long each move takes, and end", bare=True)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    o, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    if gr is None:
        raise UserError("scripts/explore.py needs Gradio: pip install -e .[explore]")
    if o.time:
        for move in build()[1]:
            clocks, once = (time.perf_counter, time.process_time), partial(move.compute, *move.first)
            wall, cpu = (statistics.median(timeit.repeat(once, timer=clock, number=1, repeat=9)) for clock in clocks)
            print(f"| {move.tab} | {move.name} | {1000 * wall:.0f} | {1000 * cpu:.0f} |")
        return
    try:
        socket.create_server((HOST, o.port)).close()
    except OSError as error:
        raise UserError(f"--port {o.port}: {os.strerror(error.errno)}; name another, such as --port 8000") from error
    blocks, _ = build()
    # a proxy of the environment must not stand between Gradio and its own page
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = HOST
    blocks.launch(server_name=HOST, server_port=o.port, share=False, ssr_mode=False, quiet=True, footer_links=[],
                  css=CSS, prevent_thread_lock=True)  # fmt: skip
    print(f"open http://{HOST}:{o.port} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
