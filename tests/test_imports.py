"""Who imports whom: no paper another, `common` no paper, and no circles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ("glancenet", "inv_flow", "latent_flow", "lbae", "nfpi")


def modules():
    """{module name: the modules of this repository that it imports, inside functions too}."""
    files = {}
    for folder in ("common", *PAPERS):
        for path in (ROOT / folder).rglob("*.py"):
            if "build" in path.relative_to(ROOT).parts:
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for name, path in files.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        found[name] = {one for one in wanted & files.keys() if one != name}
    return found


def test_no_arrow_from_common_to_a_paper_nor_between_papers():
    for name, wanted in modules().items():
        own = name.split(".")[0]
        strangers = {one for one in wanted if one.split(".")[0] in PAPERS and one.split(".")[0] != own}
        assert not strangers, f"{name} imports {sorted(strangers)}"


def test_no_circles():
    graph, done = modules(), set()

    def visit(name, path):
        if name in path:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            for one in sorted(graph[name]):
                # a package's __init__ that gathers its parts for users is no part of their work
                if not (one in graph and graph[one] and one == name.rpartition(".")[0]):
                    visit(one, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
