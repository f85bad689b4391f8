"""The planar experiment, by its command."""

import json
import pickle

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from golden_cases import load

from common.errors import UserError
from nfpi import synthetic_2d


def cloud_with(mean, var, count=40, seed=0):
    """Points whose class means and unbiased variances are exactly `mean` and `var`."""
    rng = np.random.default_rng(seed)
    x, y = [], []
    for k in range(len(mean)):
        part = rng.standard_normal((count, 2))
        part = (part - part.mean(0)) / part.std(0, ddof=1)
        x.append(mean[k] + np.sqrt(var[k]) * part)
        y.append(np.full(count, k))
    return np.concatenate(x), np.concatenate(y)


def test_command_reproduces_the_published_iteration(tmp_path, capsys):
    """A cloud with the class statistics of the t-SNE data gives the published iterations, means and deviations."""
    g = load("nfpi", "fpi_2d")
    strengths = sorted(float(k.split("/")[0].removeprefix("lam")) for k in g if k.endswith("/iters"))
    x, y = cloud_with(g["data_mean"], g["data_var"])
    np.savez(tmp_path / "cloud.npz", x=x, y=y)
    out = tmp_path / "out"
    synthetic_2d.main(
        ["--data", str(tmp_path / "cloud.npz"), "--out", str(out), "--strength", *(f"{s:g}" for s in strengths)]
    )
    results = json.loads((out / "results.json").read_text())
    for s in strengths:
        got, want = results[f"{s:g}"], {k.split("/")[1]: v for k, v in g.items() if k.startswith(f"lam{s:g}/")}
        assert got["iterations"] == int(want["iters"]) and got["converged"]
        np.testing.assert_allclose(got["mean"], want["mu"], atol=2e-4)
        np.testing.assert_allclose(got["std"], want["std"], atol=2e-4)
        picture = iio.imread(out / f"fpi_{s:g}.png")
        assert picture.ndim == 3 and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 5
        assert (
            f"lambda {s:g}: {int(want['iters'])} iterations (converged)" in capsys.readouterr().out or s != strengths[0]
        )
    for name in ("tsne", "tsne_gaussians", f"tsne_class{len(g['data_mean']) - 1}"):
        assert (out / f"{name}.png").stat().st_size > 1000


def test_generated_clouds_and_options(tmp_path, capsys):
    base = ["--out", str(tmp_path), "--strength", "1000"]
    found = {}
    for kind, options in (
        ("blobs", []),
        ("rings", ["--force-isotropic", "4"]),
        ("blobs", ["--no-means", "--damping", "0.5"]),
    ):
        synthetic_2d.main(["--data", kind, *base, *options])
        found[kind, bool(options)] = json.loads((tmp_path / "results.json").read_text())["1000"]
    assert np.allclose(found["rings", True]["std"], 2.0)
    x, y = synthetic_2d.generated_cloud("blobs", 0)
    data_mean, data_var = synthetic_2d.class_statistics(x, y)
    np.testing.assert_allclose(found["blobs", True]["mean"], data_mean, rtol=1e-6)
    assert not np.allclose(found["blobs", True]["std"], data_var.sqrt())
    apart = torch.pdist(torch.tensor(found["blobs", False]["mean"])).min()
    assert apart > torch.pdist(data_mean).min()


def test_the_planar_data_ship():
    """`--data cifar10_tsne.npz` is found from anywhere, and has the published classes' statistics."""
    g = load("nfpi", "fpi_2d")
    mean, var = synthetic_2d.class_statistics(*synthetic_2d.load_cloud("cifar10_tsne.npz"))
    np.testing.assert_allclose(mean, g["data_mean"], rtol=1e-6)
    np.testing.assert_allclose(var, g["data_var"], rtol=1e-6)


def test_pickles_and_wrong_files(tmp_path):
    path = tmp_path / "cloud.pickle"
    x, y = synthetic_2d.generated_cloud("blobs", 0, classes=3, count=5)
    path.write_bytes(pickle.dumps({"x": x.numpy(), "y": y.numpy()}))
    assert torch.equal(synthetic_2d.load_cloud(str(path))[0], x)
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3)), y=np.zeros(4))
    np.savez(tmp_path / "b.npz", z=np.zeros(4))
    (tmp_path / "c.npz").write_text("no archive")
    for name in ("a.npz", "b.npz", "c.npz", "d.npz", "e.pickle"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            synthetic_2d.load_cloud(str(tmp_path / name))
