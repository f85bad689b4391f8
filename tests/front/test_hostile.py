"""Files from elsewhere: damaged, foreign or made to harm. Only UserError escapes a reader, soon and in little memory.

Each reader of the repository gets a valid file, some hundred seeded mutations of it (flipped bytes, cuts, repeated and
foreign pieces) and files made to lie: archives that unpack to gigabytes, headers that claim 10^12 numbers, deep
JSON, YAML aliases of aliases. All of it runs in a child process whose address space is limited to 3 GB beyond what it
holds, with a clock that stops it: a reader that allocates what a header claims, or loops, fails there.

A pickle that calls os.system is given to every place that opens one; a search of the sources finds places that this
file does not know. Downloads (a digest that does not fit, a web page in place of the data, broken connections) and
archives are tested in tests/common/test_datasets_prepare.py and tests/lbae/test_download.py; here archives get the
mutations, and entries of all kinds that lead outside.
Costs about 30 CPU seconds.
"""

import ast
import os
import pickle
from pathlib import Path

import pytest
import torch
from front.children import ROOT, finish, start
from front.hostile_files import PICKLES, READERS, attack, lies

from common.errors import UserError

PAPERS = ("lbae", "glancenet", "latent_flow", "inv_flow", "nfpi")
SOURCES = [path for top in ("common", *PAPERS, "scripts") for path in sorted((ROOT / top).rglob("*.py"))]


# ------------------------------------------------------------------------------------------------- the sources


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """(dotted name, call) of every call."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found.append((name, node))
    return found


def keyword(call: ast.Call, name: str) -> object:
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


@pytest.mark.parametrize("top", ["common", *PAPERS, "scripts"])
def test_no_source_opens_a_file_that_can_run_code(top):
    """torch.load is weights_only, numpy never unpickles, yaml is safe, pickles go through the one restricted reader."""
    for path in (p for p in SOURCES if p.relative_to(ROOT).parts[0] == top):
        place = path.relative_to(ROOT)
        tree = ast.parse(path.read_text())
        for name, call in calls(tree):
            where = f"{place}:{call.lineno}"
            if name.endswith("torch.load") or name == "torch.load":
                assert keyword(call, "weights_only") is True, where
            if name in ("np.load", "numpy.load"):
                assert keyword(call, "allow_pickle") is False, where
            assert not any(k.arg == "allow_pickle" and getattr(k.value, "value", None) for k in call.keywords), where
            assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec", "os.system"), where
            if name == "yaml.load":  # a loader of the same file that derives from the safe one
                assert f"class {ast.unparse(call.keywords[0].value)}(yaml.SafeLoader)" in path.read_text(), where
            assert name not in (
                "yaml.unsafe_load",
                "yaml.load_all",
                "yaml.full_load",
                "joblib.load",
                "pd.read_pickle",
            ), where
            assert name not in ("torch.jit.load", "torch.hub.load", "marshal.loads", "shelve.open", "dill.load"), where
            assert keyword(call, "shell") is not True, where
        bases = [ast.unparse(b) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for b in node.bases]
        if place != Path("common/unpickle.py"):
            assert not any(base.startswith("pickle.") for base in bases), place


# ------------------------------------------------------------------------------------------------- the readers

NAMES = list(READERS)
GROUPS = [NAMES[i::3] for i in range(3)]


@pytest.mark.parametrize("names", GROUPS, ids=range(3))
def test_only_user_errors_escape_in_bounded_time_and_memory(tmp_path, names):
    code = finish(start(attack, names, str(tmp_path)), 400)
    report = tmp_path / "report.txt"
    assert report.is_file(), (
        f"the child ended with {code} (time or memory) at {sorted(p.name for p in tmp_path.iterdir())}"
    )
    assert code == 0, report.read_text()


class Call:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_runs_nothing(tmp_path, name):
    """Functions, classes and attributes of allowed modules: none is called, whatever opens the file."""
    read = READERS[name][1]
    path, made = tmp_path / name, tmp_path / "ran"
    payloads = [Call(os.system, f"touch {made}"), Call(eval, f"open({str(made)!r}, 'w')"), Call(Path.touch, made)]
    payloads.append(Call(getattr, Path(made), "touch"))
    for payload in payloads:
        files = [pickle.dumps({"data": payload, "labels": []}, protocol=p) for p in (0, 2, 4, 5)]
        files.append(pickle.dumps([payload, payload]))
        if path.suffix in (".pt", ".ckpt"):
            torch.save({"state_dict": {"w": torch.zeros(1)}, "hyper_parameters": payload}, path)
            files.append(path.read_bytes())
        for data in files:
            path.write_bytes(data)
            try:
                read(path)
            except UserError:
                continue
            assert name == "epoch.ckpt", "only the converter passes over foreign objects, as inert ones"
        assert not made.exists()
    # a name of an allowed module that is not in the table
    for text in (b"cnumpy\nload\n(S'x'\ntR.", b"ctorch\nload\n(S'x'\ntR.", b"c_codecs\nlookup\n(S'x'\ntR."):
        path.write_bytes(text)
        with pytest.raises(UserError):
            read(path)


@pytest.mark.parametrize("name", ["data.zip", "data.tar.gz", "models.zip", "models.tar.gz"])
def test_archives_cannot_write_outside_their_folder(tmp_path, name):
    """Entries named ../, absolute, with backslashes, links, devices: refused, and no file is anywhere else."""
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    content, read = READERS[name]
    for number, data in enumerate(lies(name, content(place))):
        (place / name).write_bytes(data)
        with pytest.raises(UserError):
            read(place / name)
            raise AssertionError(f"archive {number} was unpacked")
        assert [p.name for p in tmp_path.rglob("*") if p.is_file() or p.is_symlink()] == [name], number
        assert not Path("/tmp/never-made-here").exists()
