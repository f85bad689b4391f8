"""`python -m common.metrics` as a user runs it: folders and files in, a table or JSON out, one line for a mistake."""

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
from common.metrics import benchmark, disentanglement
from common.metrics.__main__ import _parser, main
from common.metrics.frechet import Statistics, frechet_distance


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
        (["--jsn"], "did you mean '--json'"),
        ([*RAW, "--inception-weights", "w.pth"], "--inception-weights has no use with --features raw"),
        (["--features", "inception", "--offline"], "--inception-weights PATH"),
        (["--features", "inception", "--inception-weights", "absent.pth"], "no such file: absent.pth"),
        ([*RAW[:2], "--device", "cuda:99"], "cuda:99"),
        ([*RAW, "--mode", "best"], "expected paper or clean"),
        ([*RAW, "--limit", "1"], "at least 2"),
        ([*RAW, "--limit", "many"], "invalid int value"),
        ([*RAW, "--metrics", "ipr", "--ipr-k", "40"], "at least 41"),
        ([*RAW, "--metrics", "kid", "--kid-subsets", "0"], "at least 1 subset"),
        ([*RAW, "--metrics", "prd", "--prd-clusters", "100"], "100 clusters"),
    ],
)
def test_mistakes_are_user_errors(sets, flags, message):
    root, _ = sets
    with pytest.raises(UserError, match=message):
        main([str(root / "a"), str(root / "b"), *flags])


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
        args = _parser().parse_args(shlex.split(line)[3:])
        assert args.evaluated.startswith("samples") and args.reference


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
