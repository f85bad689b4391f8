"""scripts/explore.py: the page in a real Chromium, wide and as on a phone; what it computes; who can reach it.

About 70 s, most of it the models and the page starting twice.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from common.errors import UserError

pytest.importorskip("gradio", reason="no Gradio here: pip install -e .[explore]")

from front.browser import CHROMIUM, Browser

from scripts import explore

ROOT = Path(__file__).resolve().parents[2]
WATCH = """import os, socket
def watched(name, place):
    plain = getattr(place, name)
    def call(first, *rest, **more):
        host = first if name == "getaddrinfo" else rest[0]
        print(name, host, file=open(os.environ["CONNECTIONS"], "a"))
        return plain(first, *rest, **more)
    setattr(place, name, call)
watched("getaddrinfo", socket), watched("connect", socket.socket), watched("connect_ex", socket.socket)
"""
# what stands in the open tab: pictures, and words about a drawn digit
SHOWN = "[...document.querySelectorAll('img, .says, .bar')].filter(x => x.offsetParent).map(x => x.src ?? x.innerText)"
VISIBLE = "[...document.querySelectorAll('{}')].filter(x => x.offsetParent)"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The running script: its process, its address, and the file of what it connected to."""
    folder = tmp_path_factory.mktemp("explore")
    (folder / "sitecustomize.py").write_text(WATCH)
    environment = {**os.environ, "PYTHONPATH": str(folder), "CONNECTIONS": str(folder / "connections"),
                   "GRADIO_TEMP_DIR": str(folder / "gradio"), "http_proxy": "http://127.0.0.1:9"}  # fmt: skip
    port = free_port()
    words = [sys.executable, str(ROOT / "scripts/explore.py"), "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    line = process.stdout.readline()
    assert f"http://127.0.0.1:{port} " in line, process.communicate(timeout=60)
    process.address, process.connections, process.port = f"http://127.0.0.1:{port}/", folder / "connections", port
    yield process
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read().strip() == "interrupted"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: install the package chromium to see the page in a browser")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def moves_of_a_tab(browser: Browser):
    """A name and an action for every control of the open tab: radio groups first, then sliders, then canvases."""
    for j in range(browser(f"{VISIBLE.format('fieldset')}.length")):
        group = f"{VISIBLE.format('fieldset')}[{j}]"
        yield (
            f"choice {j}",
            lambda group=group, j=j: browser(
                f"(o => o[Math.min({j} + 1, o.length - 1)].click())({group}.querySelectorAll('input'))"
            ),
        )
    for j in range(browser(f"{VISIBLE.format('input[type=range]')}.length")):
        yield (
            f"slider {j}",
            lambda j=j: browser(
                f"(s => {{ s.value = s.value == s.max ? s.min : s.max; "
                f"s.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
                f"({VISIBLE.format('input[type=range]')}[{j}])"
            ),
        )
    for j in range(browser(f"{VISIBLE.format('canvas')}.length")):
        yield f"canvas {j}", lambda j=j: stroke(browser, j)


def stroke(browser: Browser, j: int) -> None:
    """Press on the j-th canvas, draw across it, and let go."""
    canvas = f"{VISIBLE.format('canvas')}[{j}]"
    x, y, w, h = browser(
        f"(c => {{ c.scrollIntoView({{block: 'center'}}); const r = c.getBoundingClientRect(); "
        f"return [r.x, r.y, r.width, r.height]; }})({canvas})"
    )
    browser.mouse("mousePressed", x + 0.2 * w, y + 0.3 * h)
    for t in (0.4, 0.6, 0.8):
        browser.mouse("mouseMoved", x + t * w, y + 0.3 * h)
    browser.mouse("mouseReleased", x + 0.8 * w, y + 0.3 * h)


@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)], ids=["wide", "phone"])
def test_every_tab_opens_every_control_moves_and_nothing_is_asked_elsewhere(server, browser, width, height):
    browser.requests.clear(), browser.complaints.clear()
    browser.open(server.address, width, height)
    browser.until(f"{VISIBLE.format('[role=tab]')}.length == {len(explore.TABS)}", "not all tabs are in sight")
    controls = 0
    for i, name in enumerate(explore.TABS):
        browser(f"{VISIBLE.format('[role=tab]')}[{i}].click()")
        browser.until(f"{VISIBLE.format('[role=tab]')}[{i}].ariaSelected == 'true'", f"{name} does not open")
        browser.until(f"{VISIBLE.format('img')}.length > 0 && {VISIBLE.format('img')}.every(i => i.naturalWidth > 0)",
                      f"{name} shows no pictures")  # fmt: skip
        assert browser("document.documentElement.scrollWidth") <= width, f"{name} is too wide"
        for control, act in moves_of_a_tab(browser):
            before = browser(f"JSON.stringify({SHOWN})")
            act()
            browser.until(f"JSON.stringify({SHOWN}) != {before!r}", f"{name}: {control} changes nothing")
            quiet = 0  # what follows from it has come before the next one moves
            while quiet < 3:
                before, _ = browser(f"JSON.stringify({SHOWN})"), time.sleep(0.1)
                quiet = quiet + 1 if browser(f"JSON.stringify({SHOWN})") == before else 0
            controls += 1
    assert controls == 5 + 1 + 1 + 10 + 1 + 5 + 6 + 1 + 7 + 1
    assert browser.complaints == []
    assert [a for a in browser.requests if not a.startswith((server.address, "data:", "blob:"))] == []


def test_drawing_speaks_for_itself(server, browser):
    """A stroke is no 4 and no 5; a cleared pad and one of the ten digits are what they are."""
    browser.open(server.address, 1280, 900)
    browser.until(f"{VISIBLE.format('[role=tab]')}.length == {len(explore.TABS)}", "no tabs")
    browser(f"{VISIBLE.format('[role=tab]')}[1].click()")
    said = "document.querySelector('.says')?.innerText"
    browser.until(f"{said} == 'class 4'", "the 4 to begin with is no 4")
    browser("document.querySelectorAll('canvas + button')[0].click()")
    browser.until(f"{said} == 'rejected'", "an empty pad is accepted")
    browser(f"{VISIBLE.format('fieldset')}[0].querySelectorAll('input')[5].click()")
    browser.until(f"{said} == 'class 5'", "the 5 is no 5")
    stroke(browser, 0)
    browser.until(f"{said} == 'rejected'", "a 5 with a line across is accepted")


def test_only_this_machine_reaches_the_page_and_it_reaches_no_other(server):
    psutil = pytest.importorskip("psutil", reason="psutil is of the extra `reproduce`")
    listening = [c.laddr.ip for c in psutil.Process(server.pid).net_connections("inet") if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    page = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(server.address).read().decode()
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"'](?:https?:)?//[^>]*>", page) == []
    assert "@font-face" not in page or "https://" not in page.split("@font-face")[1].split("}")[0]
    asked = server.connections.read_text().splitlines()
    assert asked and [line for line in asked if not re.search(r"127\.0\.0\.1|localhost|^\w+ None$", line)] == []


def test_a_port_that_cannot_be_had_is_one_line(server, capsys):
    for words, text in (
        ([f"--port={server.port}"], f"--port {server.port}: Address already in use"),
        (["--port", "0"], "port"), (["--port", "65536"], "port"), (["--port", "web"], "port"),
        (["--share"], "--share"), (["--prot", "8000"], "did you mean 'port'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(text)):
            explore.main(words)
    assert capsys.readouterr().out == ""


def test_without_gradio_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(explore, "gr", None)
    with pytest.raises(UserError, match=r"pip install -e \.\[explore\]"):
        explore.main([])


# ---- what the moves compute, without a browser ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def moves():
    return {(move.tab, move.name): move for move in explore.build()[1]}


@pytest.fixture(scope="module")
def boards():
    """The ten digits as boards."""
    with torch.no_grad():
        return [explore.cells(x) for x in explore.Page().digits]


def test_a_path_of_codes_runs_from_one_digit_to_the_other(moves):
    path = moves["LBAE", "path, attribute"].compute
    ends = [path(3, 8, step, "none", 0.5)[0] for step in (0, explore.STEPS)]
    assert ends == [path(3, 5, 0, "none", 0.5)[0], path(8, 1, 0, "none", 0.5)[0]]
    assert ends[0] != ends[1] and set(ends[0]) == {"0", "f"} and len(ends[0]) == 200
    assert path(3, 8, 0, 7, 0.3)[0] != ends[0]
    assert path(3, 8, 0, 7, 1.0)[0] == ends[0]  # no mean exceeds 1


def test_bayes_rule_knows_most_of_the_ten_digits(moves, boards):
    """The flow was trained with noise on the pixels; without it nearly every digit is one class."""
    found = []
    for board in boards:
        chances = [
            float(p) for p in re.findall(r"<span>(\d\.\d\d)</span>", moves["NFPI", "a drawn digit"].compute(board)[0])
        ]
        assert len(chances) == 10 and abs(sum(chances) - 1) < 0.06
        found.append(chances.index(max(chances)))
    assert sum(k == digit for digit, k in enumerate(found)) >= 6, found


def test_a_digit_takes_fewer_bits_than_noise(moves, boards):
    judge = moves["Inverse-Flow", "a drawn digit"].compute
    noise = explore.cells(torch.rand(784, generator=torch.Generator().manual_seed(0)))
    digit, other = (float(re.search(r"([\d.]+) bits/dim", judge(board)[0])[1]) for board in (boards[3], noise))
    assert 0 < digit < other - 2


def test_flows_of_no_steps_leave_the_digit_and_others_do_not(moves):
    move = moves["Latent flow", "a flow"].compute
    for how in ("in turn", "at once"):
        still = move(7, how, 0, 0, 0)
        assert 'alt="1 images"' in still[1]
        assert move(7, how, 0, 0, 8)[0] != still[0]
    assert 'alt="9 images"' in move(7, "at once", 3, 8, 2)[1]
    assert 'alt="14 images"' in move(7, "in turn", 3, 8, 2)[1]


def test_the_ends_of_a_way_are_its_digits_and_a_draw_repeats_itself(moves):
    for tab in ("Inverse-Flow", "NFPI"):
        between, sample = moves[tab, "way between two"].compute, moves[tab, "samples"].compute
        assert between(3, 8, 0) == between(3, 5, 0)
        assert between(3, 8, 1) == between(1, 8, 1)
        assert between(3, 8, 0.5) not in (between(3, 8, 0), between(3, 8, 1))
        first = moves[tab, "samples"].first
        assert sample(*first) == sample(*first)
        assert sample(*first[:-1], 2) != sample(*first)


def test_a_move_takes_less_than_a_fifth_of_a_second_and_the_page_says_how_long(moves):
    for move in moves.values():
        times = []
        for _ in range(5):
            begin = time.process_time()
            move.compute(*move.first)
            times.append(time.process_time() - begin)
        assert min(times) < 0.2, (move.tab, move.name, times)
    table = (ROOT / "docs/explore.md").read_text(encoding="utf-8")
    rows = {(tab, name): (int(wall), int(cpu)) for tab, name, wall, cpu in
            re.findall(r"(?m)^\| ([\w -]+) \| ([^|]+) \| (\d+) \| (\d+) \|$", table)}  # fmt: skip
    assert rows.keys() == moves.keys()
    assert all(cpu < 200 for _, cpu in rows.values())
