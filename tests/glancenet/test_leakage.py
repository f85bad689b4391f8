"""Rejection, the leakage score, the position leakage command and the MNIST parity command."""

import json
import re

import numpy as np
import pytest
import torch

from common.checkpoint import load_weights
from common.errors import UserError
from glancenet import leakage, mnist_parity, osr, passes
from glancenet.mnist_objective import MODELS, ParityGlanceNet

TINY = [
    "--encoder",
    "PadlessGaussianConv64",
    "--decoder",
    "ShallowLinear",
    "--warmup_epochs",
    "0",
    "--batch_size",
    "16",
]


def test_leakage_of_chance_and_of_certainty():
    assert osr.leakage(0.5) == 0 and osr.leakage(1.0) == osr.leakage(0.0) == 1


def test_rejected_inputs_count_as_half():
    right, label = np.array([1, 1, 0, 0]), np.array([1, 1, 1, 1])
    assert osr.expected_accuracy(right, label) == 0.5
    assert osr.expected_accuracy(right, label, np.array([True, False, False, True])) == (1 + 0.5 + 0.5 + 0) / 4
    assert osr.expected_accuracy(right, label, np.zeros(4, bool)) == 0.5


def test_thresholds_keep_their_quantile_of_the_training_images():
    rng = np.random.default_rng(0)
    means = np.array([[0.0, 0, 9], [4, 0, 9]])
    y = rng.integers(0, 2, 4000)
    z = means[y] + rng.normal(size=(4000, 3))
    errors = rng.gamma(2, 10, 4000)
    fitted = osr.fit_thresholds(errors, z, y, means, z_class=2, quantile=0.9)
    assert np.mean(errors < fitted.reconstruction) == pytest.approx(0.9, abs=0.002)
    checks = osr.accept(errors, z, fitted)
    assert 0.88 < checks.latent.mean() < 0.95 and checks.both.mean() == pytest.approx(
        0.9 * checks.latent.mean(), abs=0.01
    )
    # Rayleigh distribution: the 0.9 quantile of the distance in two dimensions
    np.testing.assert_allclose(fitted.distance, np.sqrt(-2 * np.log(0.1)), rtol=0.06)
    far = osr.accept(np.full(2, 0.0), np.array([[2.0, 9, 0], [0, 0, -50]]), fitted)
    assert far.latent.tolist() == [False, True], "dimensions beyond z_class do not count"


@pytest.mark.parametrize("y", [[5, 6, 7, 8], [-1, 0, 1, 0], [0.0, 1.0, 0.0, 1.0], ["a", "b", "a", "b"], []])
def test_labels_without_a_prototype_are_refused(y):
    """They once gave thresholds of 0, which reject everything, without a word."""
    n = len(y)
    with pytest.raises(UserError, match="whole numbers of 0 to 1"):
        osr.fit_thresholds(np.ones(n), np.zeros((n, 2)), np.array(y), np.zeros((2, 2)), 2)


def test_threshold_search_agrees_with_the_quantile():
    values = np.random.default_rng(0).gamma(2, 1, 20_000)
    assert osr.grid_threshold(values) == pytest.approx(np.quantile(values, 0.95), rel=0.01)
    assert np.isnan(osr.grid_threshold(np.r_[np.zeros(100), 1e9]))


def test_probe_reads_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 2000)
    informative, noise = label[:, None] + 0.1 * rng.normal(size=(2000, 3)), rng.normal(size=(2000, 3))
    half = slice(0, 1000), slice(1000, None)
    leaked = osr.probe_leakage(informative[half[0]], label[half[0]], informative[half[1]], label[half[1]])
    assert leaked[1] > 0.98
    assert osr.probe_leakage(noise[half[0]], label[half[0]], noise[half[1]], label[half[1]])[1] < 0.1
    nobody = np.zeros(1000, bool)
    rejected = osr.probe_leakage(
        informative[half[0]], label[half[0]], informative[half[1]], label[half[1]], np.ones(1000, bool), nobody
    )
    assert rejected == (0.5, 0.0)


def test_position_leakage_command(tmp_path, leakage_data, capsys):
    """All three models, few steps: rejected corner images cannot leak, and a second call measures the checkpoints."""
    out = tmp_path / "out"
    words = ["--dset_dir", str(leakage_data), "--out", str(out), "--seeds", "1", "--device", "cpu", "--", *TINY]
    summary = leakage.main(
        [*words, "--max_epoch", "12", "--lr_G", "0.002", "--test_iter", "100", "--file_save", "false"]
    )
    rows = {(row["model"], row["rejection"]): row for row in summary}
    assert {key[0] for key in rows} == {"cbnm", "vae", "cg-vae", "glancenet"}
    assert ("cbnm", "reconstruction") not in rows, "a bottleneck has no reconstruction error"
    both = rows["glancenet", "both"]
    assert both["rejected_percent"] > 90 and both["leakage_percent"] < 10
    kept = {name: rows["glancenet", name]["closed_set_kept_percent"] for name in ("distance", "reconstruction", "both")}
    assert (
        kept["both"] <= min(kept["distance"], kept["reconstruction"])
        and rows["cg-vae", "none"]["closed_set_kept_percent"] == 100
    )
    model, data, _ = leakage.load_model(str(out / "checkpoints" / "glancenet_1" / "final"), torch.device("cpu"))
    with passes.evaluating(model, 1):
        thresholds, _ = passes.fit_rejection(model, data, torch.device("cpu"), 0.95, False)
        seen = passes.encode_for_rejection(model, data.val, torch.device("cpu"), False)
    near = osr.accept(seen.errors, seen.z, thresholds).latent
    assert kept["distance"] == pytest.approx(100 * near.mean()), "the share of the distance check alone"
    for row in summary:
        assert row["leakage_percent"] == pytest.approx(200 * abs(row["accuracy"] - 0.5))
        assert (row["rejection"] == "none") <= (row["rejected_percent"] == 0)
    details = json.loads((out / "leakage.json").read_text())["runs"]
    glance = next(run for run in details if run["model"] == "glancenet")
    assert glance["median_error_corners"] > 2 * glance["median_error_train"], "corners reconstruct badly"
    for name in ("leakage.png", "pca.png", "leakage.csv"):
        assert (out / name).stat().st_size > 100
    said = capsys.readouterr().out
    paper = re.findall(r"^(\S+) +rejection (\S+) .*\(paper (\d+) %\)", said, re.MULTILINE)
    assert paper == [("cbnm", "none", "80"), ("cg-vae", "none", "98"), ("glancenet", "both", "1")]
    again = leakage.main(
        ["--checkpoints", str(out / "checkpoints" / "glancenet_1" / "final"), "--out", str(tmp_path / "again")]
    )
    repeated = {(row["model"], row["rejection"]): row["accuracy"] for row in again}
    for key, value in repeated.items():
        assert value == pytest.approx(rows[key]["accuracy"], abs=1e-6)


def test_the_figure_shows_the_papers_leakage_where_it_has_one(monkeypatch, tmp_path):
    """A dashed line across its bar: each bottleneck and VAE without rejection, the GlanceNet with both checks."""
    made = {}
    monkeypatch.setattr(leakage, "save_figure", lambda path, figure: made.update({path.name: figure}))
    pairs = [(model, kind) for model in ("cbnm", "own", "glancenet") for kind in ("none", "distance", "both")]
    rows = [{"model": model, "rejection": kind, "leakage_percent": 9.0, "leakage_percent_std": 1.0}
            for model, kind in pairs]  # fmt: skip
    z = np.random.default_rng(0).normal(size=(9, 2)) * (3, 1)
    leakage.plot(tmp_path, rows, {"own": (z, np.arange(9) % 2)})
    points = np.concatenate([found.get_offsets() for found in made["pca.png"].axes[0].collections])
    np.testing.assert_allclose(np.linalg.svd(points)[1], np.linalg.svd(z - z.mean(0))[1], err_msg="the plane, turned")
    (axes,) = made["leakage.png"].axes
    lines = [(np.asarray(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_ls() == "--"]
    assert [y for _, y in lines] == [[80.0, 80.0], [1.0, 1.0]]
    for (x, _), bar in zip(lines, (axes.patches[0], axes.patches[5]), strict=True):
        np.testing.assert_allclose(x, [bar.get_x(), bar.get_x() + bar.get_width()])
    assert axes.get_legend() is not None
    leakage.plot(tmp_path, rows[3:6], {"own": (np.eye(4), np.array([0, 1, 0, 1]))})
    assert made["leakage.png"].axes[0].get_legend() is None


def test_models_are_written_as_they_finish(tmp_path, leakage_data, monkeypatch):
    """A stop in the second model keeps the first, and --resume auto trains only what is missing."""
    out, trained = tmp_path / "out", []
    words = ["--dset_dir", str(leakage_data), "--out", str(out), "--models", "cbnm", "vae", "--seeds", "1", "--device"]
    after = ["--", *TINY, "--max_epoch", "1", "--file_save", "false"]
    train = leakage.train_one

    def stopped(key, *rest):
        if key == "vae" and not trained:
            trained.append(key)
            raise KeyboardInterrupt
        return train(key, *rest)

    monkeypatch.setattr(leakage, "train_one", stopped)
    with pytest.raises(KeyboardInterrupt):
        leakage.main([*words, "cpu", *after])
    assert {row["model"] for row in json.loads((out / "leakage.json").read_text())["summary"]} == {"cbnm"}
    before, _ = load_weights(out / "checkpoints/cbnm_1/model.safetensors")
    summary = leakage.main([*words, "cpu", "--resume", "auto", *after])
    assert {row["model"] for row in summary} == {"cbnm", "vae"}
    after_it, _ = load_weights(out / "checkpoints/cbnm_1/model.safetensors")
    assert all(torch.equal(before[name], value) for name, value in after_it.items())
    with pytest.raises(UserError, match="z_dim"):
        leakage.main([*words, "cpu", "--resume", "auto", *after, "--z_dim", "6", "--z_class", "6"])


def test_the_published_rejection_compares_with_stale_reconstructions():
    """A model that reconstructs perfectly accepts every training image, and by the published code no test image."""
    g = torch.Generator().manual_seed(0)
    digits = [mnist_parity.Digits((torch.rand(400, 784, generator=g) > 0.5).float(), torch.arange(400) % 10)
              for _ in range(2)]  # fmt: skip

    class Perfect(torch.nn.Module):
        """Latents are the place in the training set; the decoder looks the image up."""

        def encoder(self, x):
            mu = torch.zeros(len(x), 10)
            mu[:, 2] = torch.cdist(x, digits[0].x).argmin(1)
            return mu, torch.full_like(mu, -60.0)

        def decoder(self, z):
            return 40 * (2 * digits[0].x[z[:, 2].round().long()] - 1)

        def class_means(self):
            return torch.zeros(2, 10)

    train_mask, test_mask, _ = mnist_parity.as_published(Perfect(), *digits)
    own = mnist_parity.encode(Perfect(), digits[0]).errors
    assert own.max() < 1e-3 and not test_mask.any(), "other images' reconstructions are in the rows"
    assert train_mask.shape == (400,)


def test_leakage_needs_the_leakage_data(glancenet_run):
    with pytest.raises(UserError, match="no corner label"):
        leakage.main(
            ["--checkpoints", str(glancenet_run.folder / "ckpt" / "one" / "final"), "--out", str(glancenet_run.folder)]
        )


# ---- MNIST parity -------------------------------------------------------------------------------------------------


def test_parity_parameters():
    count = {key: sum(p.numel() for p in model().parameters()) for key, model in MODELS.items()}
    # vae and glancenet have two heads of 10 latents, a decoder, and the unused probes of the published models
    assert count == {"cbnm": 117_256, "vae": 238_656, "glancenet": 238_660}


def test_parity_rates():
    rates = [mnist_parity.learning_rate("glancenet", epoch) for epoch in range(10)]
    np.testing.assert_allclose(rates[:8], 1e-3 * 0.8 ** np.arange(8))
    np.testing.assert_allclose(rates[8:], [rates[7] / 2, rates[7] / 4])
    assert mnist_parity.learning_rate("cbnm", 2) == pytest.approx(1e-3 * 0.75**2)


def test_parity_command(tmp_path, mnist_root):
    out = tmp_path / "parity"
    words = ["--data_root", str(mnist_root), "--out", str(out), "--device", "cpu"]
    summary = mnist_parity.main([*words, "--seeds", "0", "1", "--epochs", "12"])
    rows = {(row["model"], row["rejection"]): row for row in summary}
    assert {key[0] for key in rows} == {"cbnm", "vae", "glancenet"} and all(row["seeds"] == 2 for row in summary)
    for (_, rejection), row in rows.items():
        assert 0 <= row["leakage_percent"] <= 100
        assert row["rejected_percent"] == 0 or rejection != "none"
    # bars at other places than those of 4 and 5 reconstruct badly: nearly all are rejected, so nothing leaks
    both = rows["glancenet", "both checks"]
    assert both["rejected_percent"] > 90 and both["leakage_percent"] < 10
    assert both["closed_set_kept_percent"] > 60
    assert rows["glancenet", "none"]["leakage_percent"] >= both["leakage_percent"]
    with pytest.raises(UserError, match=r"epochs \(12 there, None here\)"):
        mnist_parity.main([*words, "--models", "cbnm", "--reuse", "true"])
    words += ["--epochs", "12"]
    again = mnist_parity.main([*words, "--models", "cbnm", "--seeds", "0", "1", "--reuse", "true"])
    assert again[0]["accuracy"] == pytest.approx(rows["cbnm", "none"]["accuracy"]), "stored weights are measured alike"
    mnist_parity.main([*words, "--seeds", "0", "1", "--resume", "auto"])
    record = json.loads((out / "results.json").read_text())
    assert len(record["runs"]) == 2 * (2 + 4 + 4)
    for name in ("leakage.png", "latents.png", "results.csv", "0/samples/osr_vae.png"):
        assert (out / name).stat().st_size > 100
    tensors, config = load_weights(out / "1" / "osr_vae.safetensors")
    model = ParityGlanceNet()
    model.load_state_dict(tensors)
    assert config["model"] == "glancenet" and list((out / "0" / "tensorboard_runs" / "CBM").iterdir())


def test_parity_trains_on_four_and_five_only(mnist_root):
    """The model is the same whatever the other digits look like."""
    digits, _ = mnist_parity.load_digits(str(mnist_root), torch.device("cpu"))
    noise = digits.x.clone()
    others = ~mnist_parity.known(digits.y)
    noise[others] = torch.rand(int(others.sum()), 784)
    weights = []
    for x in (digits.x, noise):
        torch.manual_seed(0)
        model = MODELS["cbnm"]()
        mnist_parity.train(model, "cbnm", mnist_parity.Digits(x, digits.y), epochs=1, seed=0)
        weights.append(model.encoder.mu.weight.detach())
    assert torch.equal(*weights)
    torch.manual_seed(0)
    start = MODELS["cbnm"]().encoder.mu.weight
    assert not torch.equal(start, weights[0])


def test_parity_without_data_names_the_command(tmp_path):
    with pytest.raises(UserError, match="prepare"):
        mnist_parity.main(["--data_root", str(tmp_path), "--out", str(tmp_path / "out")])


@pytest.mark.data
def test_parity_on_real_digits(tmp_path):
    """Two epochs on real MNIST: the GlanceNet rejects most other digits and keeps most unseen 4s and 5s."""
    summary = mnist_parity.main(["--models", "glancenet", "--epochs", "2", "--out", str(tmp_path), "--device", "cpu"])
    both = next(row for row in summary if row["rejection"] == "both checks")
    assert both["closed_set_kept_percent"] > 80 and both["rejected_percent"] > 10
