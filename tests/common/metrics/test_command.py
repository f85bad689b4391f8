"""`python -m common.metrics` as a user runs it: folders and files in, a table or JSON out, one line for a mistake."""

import contextlib
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from metric_definitions import mmd2
from PIL import Image

from common import metrics
from common.errors import UserError
from common.metrics import benchmark, disentanglement, paths_and_options
from common.metrics.__main__ import Config, main
from common.metrics.frechet import Statistics, frechet_distance
from common.options import from_flags


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of 40 grey images 6 x 6 and their arrays."""
    root, arrays = tmp_path_factory.mktemp("sets"), {}
    for name, seed in (("a", 0), ("b", 1)):
        arrays[name] = np.random.default_rng(seed).integers(40 * seed, 200 + 40 * seed, (40, 6, 6), dtype=np.uint8)
        (root / name).mkdir()
        for i, picture in enumerate(arrays[name]):
            Image.fromarray(picture).save(root / name / f"{i}.png")
        np.savez(root / f"{name}.npz", images=arrays[name])
    return root, arrays


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METRICS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


RAW = ["--features", "raw", "--device", "cpu"]


def test_json_holds_what_the_definitions_give(sets, capsys, cache):
    root, arrays = sets
    command = [
        str(root / "a"),
        str(root / "b"),
        "--metrics",
        "fid",
        "kid",
        "prd",
        "ipr",
        "--json",
        *RAW,
        "--prd-runs",
        "2",
    ]
    main(command)
    output = capsys.readouterr()
    result = json.loads(output.out)
    x, y = (arrays[name].reshape(40, -1) / 255 for name in "ab")
    moments = [part for z in (x, y) for part in (z.mean(0), np.cov(z, rowvar=False))]
    assert result["fid"] == pytest.approx(frechet_distance(*moments))
    assert result["kid_mean"] == pytest.approx(mmd2(x, y)) and 0 <= result["prd_f8"] <= 1
    assert (result["features"], result["resize"], result["comparable"]) == ("raw", "paper", False)
    assert "not comparable to published FID" in result["note"]
    assert "warning: kernel distance: subsets of 40 instead of 1000" in output.err
    assert len(list((cache / "features").iterdir())) == 2
    main(command)  # from the cache now
    assert json.loads(capsys.readouterr().out) == result


def test_arrays_give_the_numbers_of_the_folders(sets, capsys):
    root, _ = sets
    values = []
    for a, b in (("a", "b"), ("a.npz", "b.npz"), ("a", "b.npz")):
        main([str(root / a), str(root / b), "--metrics", "fid", "--json", "--no-cache", *RAW])
        values.append(json.loads(capsys.readouterr().out)["fid"])
    assert values[0] == values[1] == values[2] > 0


def test_the_table_names_features_and_protocol(sets, capsys):
    root, _ = sets
    main(
        [
            str(root / "a"),
            str(root / "b"),
            "--features",
            "pixel-pca5",
            "--mode",
            "clean",
            "--size",
            "4",
            "--device",
            "cpu",
        ]
    )
    out = capsys.readouterr().out
    assert "pixel-pca5, resize clean" in out and "not comparable to published FID" in out
    assert out.count("40 samples") == 2 and "FID " in out and "KID " in out and " +/- " in out


def test_saved_statistics_and_features(sets, capsys, tmp_path):
    root, arrays = sets
    x, y = (arrays[name].reshape(40, -1) / 255 for name in "ab")
    np.savez(tmp_path / "x.npz", features=x)
    np.savez(tmp_path / "y.npz", features=y)
    Statistics.from_features(y).save(tmp_path / "stats.npz")
    direct = Statistics.from_features(x).distance(Statistics.from_features(y))
    for a, b in (("x.npz", "y.npz"), ("x.npz", "stats.npz"), (root / "a", "stats.npz")):
        main([str(tmp_path / a), str(tmp_path / b), "--metrics", "fid", "--json", *RAW])
        assert json.loads(capsys.readouterr().out)["fid"] == pytest.approx(direct)
    main([str(tmp_path / "x.npz"), str(tmp_path / "y.npz"), "--metrics", "kid", "ipr", "--json"])
    assert json.loads(capsys.readouterr().out)["kid_mean"] == pytest.approx(mmd2(x, y))
    Statistics.from_features(y, "inception weights:0 resize:paper size:299").save(tmp_path / "other.npz")
    with pytest.raises(UserError, match="cannot be compared"):
        main([str(root / "a"), str(tmp_path / "other.npz"), "--metrics", "fid", *RAW])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metrics", "fdi"], "did you mean 'fid'"),
        (["--features", "rwa"], "did you mean 'raw'"),
        (["--jsn"], "did you mean 'as_json'"),
        ([*RAW, "--inception-weights", "w.pth"], "--inception-weights has no use with --features raw"),
        (["--features", "inception", "--offline"], "name it as inception weights"),
        (["--features", "inception", "--inception-weights", "absent.pth"], "no such file: absent.pth"),
        ([*RAW[:2], "--device", "cuda:99"], "cuda:99"),
        ([*RAW, "--mode", "best"], "--mode=best: expected one of paper, clean"),
        ([*RAW, "--limit", "1"], "at least 2"),
        ([*RAW, "--limit", "many"], "--limit=many: expected a whole number of at least 1"),
        ([*RAW, "--metrics", "ipr", "--ipr-k", "40"], "at least 41"),
        ([*RAW, "--metrics", "kid", "--kid-subsets", "0"], "--kid_subsets=0: expected a whole number of at least 1"),
        ([*RAW, "--metrics", "prd", "--prd-clusters", "100"], "100 clusters"),
        ([*RAW, "--size", "100000"], "--size=100000: expected a whole number"),
        ([*RAW, "--size", "4096", "--batch-size", "200"], "40 images of 16777216 values"),
        (
            [*RAW, "--metrics", "fid", "statistics"],
            "--metrics=statistics: expected a list, each one of fid, kid, prd, ipr",
        ),
        (["--features", "pixel-pca99999999999"], "unknown features"),
    ],
)
def test_mistakes_are_user_errors(sets, flags, message):
    root, _ = sets
    with pytest.raises(UserError, match=message):
        main([str(root / "a"), str(root / "b"), *flags])


@pytest.mark.parametrize("name", [name for name in Config.model_fields if name not in ("features", "as_json")])
@pytest.mark.parametrize("value", ["", "-1", "0", "nan", "inf", "1e30", "x", "1.5"])
def test_every_option_is_checked_before_any_image_is_read(name, value, tmp_path):
    """One line about the value or, where it is allowed, about the sets, which are not there."""
    with pytest.raises(UserError, match=rf"--{name}|{name.replace('_', '-')} has no use|no such folder") as error:
        main([str(tmp_path / "a"), str(tmp_path / "b"), f"--{name}={value}", *RAW])
    field = str(Config.model_fields[name].annotation)
    if ("int" in field and name not in ("limit", "size")) or "float" in field:
        allowed = ("0",) if "seed" in name else ()
        assert ("no such folder" in str(error.value)) == (value in allowed)


def test_the_two_sets_may_stand_behind_the_options(sets, capsys):
    root, _ = sets
    pair = [str(root / "a"), str(root / "b")]
    words = [*RAW, "--no-cache", "--json", "--metrics", "fid", "ipr"]
    main([*words, *pair])
    assert json.loads(capsys.readouterr().out)["fid"] > 0
    with pytest.raises(UserError, match="expected EVALUATED REFERENCE before the options"):
        main([pair[0], *words])


def test_subset_size_and_sample_count_are_recorded(sets, capsys):
    root, _ = sets
    command = [str(root / "a"), str(root / "b"), *RAW, "--metrics", "kid", "prd", "--prd-runs", "1", "--limit", "30"]
    main([*command, "--kid-subset-size", "20", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["kid_subsets"], result["kid_subset_size"], result["prd_n"]) == (100, 20, 30)
    main([*command, "--json"])  # subsets of 1000 are the whole sets here
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert (result["kid_subsets"], result["kid_subset_size"], result["kid_std"]) == (1, 30, 0)
    assert "there is no standard deviation" in output.err
    main(command)
    assert "(1 subsets of 30)" in capsys.readouterr().out


BASE = ["--features", "raw", "--size", "5", "--device", "cpu", "--metrics", "fid", "kid", "prd", "ipr", "--json"]
BASE += ["--kid-subsets", "5", "--kid-subset-size", "20", "--prd-runs", "2"]
CHANGED = {
    "metrics": ["fid"], "as_json": ["false"], "features": ["pixel-pca3"], "mode": ["clean"], "size": ["4"],
    "limit": ["30"], "seed": ["1"], "kid_subsets": ["6"], "kid_subset_size": ["10"], "kid_seed": ["1"],
    "kid_legacy": ["true"], "prd_clusters": ["7"], "prd_angles": ["11"], "prd_runs": ["3"], "ipr_k": ["6"],
}  # fmt: skip
ELSEWHERE = {  # no other number here, and why
    "batch_size": "bounds the memory, and no number depends on it: below",
    "cache": "where features lie: below",
    "no_cache": "that they lie nowhere: below",
    "device": "there is a CPU alone; the GPU's numbers: test_generation.py",
    "inception_weights": "raw needs none: test_features.py",
    "inception_sha256": "raw needs none: test_features.py",
    "offline": "raw needs none: test_mistakes_are_user_errors",
    "lenet_data": "raw needs none: test_features.py",
    "data_root": "raw needs none: test_features.py",
}


@pytest.fixture(scope="module")
def plain(sets, tmp_path_factory):
    """What the command prints without a change, and its folder of features."""
    cache = tmp_path_factory.mktemp("plain")
    return printed(sets[0], "--cache", str(cache)), cache


def printed(root, *words):
    """The numbers that the command prints, or the text where it is no JSON."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        main([str(root / "a"), str(root / "b"), *BASE, *words])
    try:
        found = json.loads(out.getvalue())
    except ValueError:
        return out.getvalue()
    return {key: value for key, value in found.items() if isinstance(value, float)}


def test_every_option_is_tried():
    assert set(Config.model_fields) == CHANGED.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("name", CHANGED)
def test_every_option_changes_a_number(sets, plain, tmp_path, name):
    flag = {"as_json": "--json"}.get(name, f"--{name.replace('_', '-')}")
    assert printed(sets[0], "--cache", str(tmp_path), flag, *CHANGED[name]) != plain[0]


def test_options_of_the_work_change_no_number(sets, plain, cache):
    numbers, folder = plain
    assert len(list((folder / "features").iterdir())) == 2
    assert printed(sets[0], "--no-cache", "--batch-size", "7") == numbers
    assert not cache.exists()  # nothing lies in the place of the environment


def test_sets_of_another_make_are_compared_with_a_line(tmp_path, capsys):
    """28 against 32 pixels, PNG against JPEG, grey against colour: each one warning; the same kind: none."""
    rng = np.random.default_rng(3)
    for name, side, channels, suffix in (("a", 28, 1, "png"), ("b", 32, 3, "jpg")):
        (tmp_path / name).mkdir()
        for i in range(20):
            picture = rng.integers(0, 256, (side, side, channels), dtype=np.uint8).squeeze()
            Image.fromarray(picture).save(tmp_path / name / f"{i}.{suffix}")
    options = ["--features", "lenet", "--lenet-data", "digits", "--metrics", "ipr", "--json", "--device", "cpu"]
    main([str(tmp_path / "a"), str(tmp_path / "b"), *options])
    warned = json.loads(capsys.readouterr().out)["warnings"]
    for start in ("images of 28x28 pixels against 32x32", "grey images against colour", "PNG files against JPEG"):
        assert sum(line.startswith(start) for line in warned) == 1, warned
    main([str(tmp_path / "a"), str(tmp_path / "a"), *options])
    assert json.loads(capsys.readouterr().out)["warnings"] == []


def test_features_of_two_extractors_never_mix(tmp_path):
    """Not for any metric, where the files say which extractor made them."""
    for name, extractor in (("x", "raw size:4"), ("y", "raw size:8")):
        np.savez(tmp_path / f"{name}.npz", features=np.random.default_rng(0).random((20, 3)), extractor=extractor)
    with pytest.raises(UserError, match=r"'raw size:4' and 'raw size:8' cannot be compared"):
        main([str(tmp_path / "x.npz"), str(tmp_path / "y.npz"), "--metrics", "kid"])


def test_a_mistake_is_one_line_and_exit_code_2(sets, tmp_path):
    root, _ = sets
    command = [sys.executable, "-m", "common.metrics", str(root / "a"), str(tmp_path), *RAW]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "no image" in done.stderr


def test_the_commands_of_the_readme_are_understood():
    readme = Path(metrics.__file__).with_name("README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("python -m common.metrics ")]
    assert len(lines) == 3
    for line in lines:
        (evaluated, reference), words = paths_and_options(shlex.split(line)[3:], ("EVALUATED", "REFERENCE"))
        assert evaluated.startswith("samples") and reference
        from_flags(Config, words)


def test_the_package_is_light():
    code = "import common.metrics, sys; from common.metrics import frechet_distance; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore:.*samples for:UserWarning")
def test_the_benchmark_compares_equal_results(capsys):
    """The same code at sizes of a test; the sizes of the tables are the defaults."""
    rows = [line.split(" | ") for line in benchmark.generation(0.01)[2:]]
    assert len(rows) >= 4 and all(float(row[-1].rstrip(" |")) < 1e-6 for row in rows)
    lines = benchmark.disentanglement((2, 3, 4), 4, num_train=60, num_test=30)
    assert [line.split()[1] for line in lines[2:]] == list(disentanglement.METRICS)
    with pytest.raises(UserError, match="unknown part generatoin"):
        benchmark.main(["generatoin"])
