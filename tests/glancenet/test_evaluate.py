"""Tables, plots, pictures, the comparison and the benchmark."""

import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from glancenet import benchmark, compare, evaluate, leakage, visual
from glancenet.records import Table, load_arrays, read_table, save_arrays, write_npz


def test_one_run(glancenet_run, capsys):
    table = evaluate.main([str(glancenet_run.log)])
    assert len(table) == 1 and table[0]["model"] == "GlanceNet" and table[0]["supervision"] == 50
    _, y, prediction = load_arrays(glancenet_run.log / "eval_results" / "downstream_obtained.npy", 3)
    assert table[0]["accuracy"] == pytest.approx((y == prediction).mean())
    assert 0 <= table[0]["mig"] <= 1
    for name in ("train.png", "validation.png", "test.png", "metrics.png", "supervision.png", "table.md"):
        assert (glancenet_run.log / "evaluation" / name).stat().st_size > 100, name
    assert "| sprites | GlanceNet | 50 | 1 |" in capsys.readouterr().out


def fake_run(folder, model, supervision, seed, accuracy, alignment):
    """A log folder as main.py leaves it, with 200 test images."""
    rng, evaluation = np.random.default_rng(seed), folder / "eval_results"
    evaluation.mkdir(parents=True)
    (folder / "train_runs").mkdir()
    options = {"dset_name": "sprites", "alg": model, "masking_fact": supervision, "seed": seed}
    (folder / "commandline_args.txt").write_text(json.dumps(options))
    table = Table(evaluation / "test_metrics.csv", ["iter", "rec", "kld", "latent", "BCE", "Acc", "I", "acc_hard"])
    table.append(
        {"iter": 10, "rec": 5.0, "kld": 1.0, "latent": 0.1, "BCE": 0.2, "Acc": 0.9, "I": 0, "acc_hard": accuracy}
    )
    g = rng.random((200, 3))
    save_arrays(evaluation / "latents_obtained.npy", 1, g[:, [2, 0, 1]], g)
    y = np.zeros(200, int)
    prediction = np.where(np.arange(200) < 200 * accuracy, 0, 1)
    save_arrays(evaluation / "downstream_obtained.npy", 1, y, prediction)
    path = evaluation / "dci" / "results" / "json"
    path.mkdir(parents=True)
    scores = {
        "disentanglement": alignment,
        "completeness": 0.5,
        "informativeness_test": 0.7,
        "informativeness_train": 1.0,
    }
    (path / "evaluation_results.json").write_text(json.dumps(scores))


def test_seeds_and_supervision_levels(tmp_path):
    """Means and standard deviations over seeds, by hand; permuted latents are perfectly aligned."""
    for k, (model, supervision, seed, accuracy, alignment) in enumerate([
        ("GlanceNet", 1.0, 0, 0.8, 0.6), ("GrayVAE_Join", 1.0, 1, 0.9, 0.8), ("CBM_Join", 1.0, 0, 0.5, 0.3),
        ("GlanceNet", 100.0, 0, 1.0, 0.9),
    ]):  # fmt: skip
        fake_run(tmp_path / "logs" / str(k), model, supervision, seed, accuracy, alignment)
    table = evaluate.main([str(tmp_path / "logs"), "--out", str(tmp_path / "out")])
    rows = {(row["model"], row["supervision"]): row for row in table}
    assert set(rows) == {("GlanceNet", 1.0), ("CBNM", 1.0), ("GlanceNet", 100.0)}
    pair = rows["GlanceNet", 1.0]
    assert pair["seeds"] == 2 and pair["accuracy"] == pytest.approx(0.85)
    assert pair["alignment"] == pytest.approx(0.7) and pair["alignment_std"] == pytest.approx(
        np.std([0.6, 0.8], ddof=1)
    )
    assert pair["explicitness"] == pytest.approx(0.7)
    assert pair["alignment_linear"] == pytest.approx(1, abs=1e-6) and pair["explicitness_linear"] == pytest.approx(
        1, abs=1e-6
    )
    assert (tmp_path / "out" / "supervision.png").stat().st_size > 1000
    assert len(read_table(tmp_path / "out" / "runs.csv")) == 4
    only = evaluate.main(["--log", str(tmp_path / "logs"), "--model", "cbnm", "--out", str(tmp_path / "cbnm")])
    assert [row["model"] for row in only] == ["CBNM"]


def test_evaluation_mistakes(tmp_path, glancenet_run):
    with pytest.raises(UserError, match="not a folder"):
        evaluate.main([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="holds no run"):
        evaluate.main([str(tmp_path)])
    with pytest.raises(UserError, match="name a log folder"):
        evaluate.main([])
    with pytest.raises(UserError, match="none of the"):
        evaluate.main([str(glancenet_run.log), "--dataset", "celeba"])
    fake_run(tmp_path / "broken", "GlanceNet", 1.0, 0, 0.5, 0.5)
    path = tmp_path / "broken" / "eval_results" / "downstream_obtained.npy"
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(UserError, match="truncated"):
        evaluate.main([str(tmp_path / "broken")])


def test_comparison_of_settings(tmp_path):
    """Both models under two settings, tiny; the second call repeats nothing and gives the same table."""
    words = ["--dset_dir", str(tmp_path), "--out", str(tmp_path / "out"), "--settings", "published", "fair_7"]
    words += [
        "--supervision",
        "100",
        "--seeds",
        "1",
        "--device",
        "cpu",
        "--",
        "--sprites_sizes",
        "3",
        "2",
        "2",
        "4",
        "4",
    ]
    words += [
        "--encoder",
        "PadlessGaussianConv64",
        "--decoder",
        "ShallowLinear",
        "--max_iter",
        "8",
        "--warmup_epochs",
        "0",
    ]
    words += [
        "--metric_train",
        "120",
        "--metric_eval",
        "100",
        "--file_save",
        "false",
        "--evaluation_metric",
        "sap_score",
    ]
    tables = compare.main(words)
    assert set(tables) == {"published", "fair_7"}
    for table in tables.values():
        assert {row["model"] for row in table} == {"GlanceNet", "CBNM"}
    options = json.loads((tmp_path / "out/logs/sprites__CBNM/fair_7_CBNM_100_1/commandline_args.txt").read_text())
    assert (options["label_weight"], options["latent_weight"]) == (100, 700)
    options = json.loads((tmp_path / "out/logs/sprites__CBNM/published_CBNM_100_1/commandline_args.txt").read_text())
    assert options["classification_epoch"] == pytest.approx(20 * 8 / 250000), "the published share of the run"
    assert compare.main(words) == tables
    with pytest.raises(UserError, match="other options"):
        compare.main([*words, "--lr_G", "0.5"])
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "fair_7, 100 %: GlanceNet - CBNM: accuracy" in text
    with pytest.raises(UserError, match="fair_<ratio>"):
        compare.main(["--settings", "unfair"])
    with pytest.raises(UserError, match="--max_iter 'many'"):
        compare.published_share(["--max_iter", "many"])


def test_benchmark_compares_the_same_computation(tmp_path):
    """The losses of both sides are compared by the benchmark itself, to 1e-5."""
    words = ["--cases", "glancenet", "cbnm", "mpi3d", "loading", "--batch-size", "4", "--repeat", "1", "--threads", "1"]
    rows = benchmark.main([*words, "--encoder", "PadlessGaussianConv64", "--decoder", "ShallowLinear", "--json",
                           str(tmp_path / "figures.json")])  # fmt: skip
    assert len(rows) == 4 and json.loads((tmp_path / "figures.json").read_text())["cases"] == rows
    for row in rows[:3]:
        assert row["ratio"] == pytest.approx(row["published_seconds"] / row["seconds"]) and 0 < row["peak_share"] < 2


def test_traversals_change_one_latent(glancenet_run):
    model, data, _ = leakage.load_model(str(glancenet_run.folder / "ckpt" / "one" / "final"), torch.device("cpu"))
    model.eval()
    batch = data.train.gather(torch.arange(3), torch.device("cpu"))
    with torch.no_grad():
        values = visual.traversal_values(-3, 3, 0.5)
        rows = visual.traverse(model, batch, 1, values, [0, 4])
        mu = model.encode(batch)[0][1:2]
        z = mu.clone()
        z[0, 4] = -2.0
        expected = torch.sigmoid(model.decode(z, batch))
        plain = visual.reconstructions(model, batch)[1]
    assert rows.shape == (3, 12, 1, 64, 64) and values[0] == -3 and values[-1] == 2.5
    torch.testing.assert_close(rows[2, 2], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows[0, 7], plain, rtol=1e-4, atol=1e-5)


def test_traversal_files_hold_all_frames(glancenet_run):
    pictures = glancenet_run.folder / "pictures" / "one"
    frames = iio.imread(pictures / "gif_rand0.gif", index=None)
    assert len(frames) == 12
    with Image.open(pictures / "traverse_rand0.jpg") as picture:
        assert picture.width > 12 * 64 and picture.height > 8 * 64, "a reconstruction row and seven latents"
    with Image.open(pictures / "recon.jpg") as picture:
        pixels = np.asarray(picture)
    middle = pixels.shape[1] // 2
    # JPEG smears the neighbours a little
    assert pixels[:, middle - 2 : middle + 2].mean() > 245, "a white column between inputs and reconstructions"


def test_latent_factor_matrix():
    g = np.random.default_rng(0).random((500, 3))
    z = np.column_stack([-g[:, 1], g[:, 0] + 0.01, np.ones(500)])
    matrix = visual.latent_factor_matrix(z, g)
    assert matrix[0, 1] == pytest.approx(1) and matrix[1, 0] == pytest.approx(1) and (matrix[2] == 0).all()


def test_npz_written_in_pieces_is_checked(tmp_path):
    with pytest.raises(ValueError, match="rows written"):
        write_npz(tmp_path / "a.npz", {"X": ((3, 2), np.uint8, [np.zeros((2, 2))])})
    assert not (tmp_path / "a.npz").exists()


def test_tables_continue_where_a_resumed_run_stands(tmp_path):
    table = Table(tmp_path / "t.csv", ["iter", "x"])
    for k in (1, 2, 3):
        table.append({"iter": k, "x": k * k})
    again = Table(tmp_path / "t.csv", ["iter", "x"], keep_until=("iter", 2))
    again.append({"iter": 3, "x": -1})
    assert [row["x"] for row in read_table(tmp_path / "t.csv")] == ["1", "4", "-1"]


def test_one_bad_run_does_not_lose_the_others(tmp_path, capsys):
    for k in range(3):
        fake_run(tmp_path / "logs" / str(k), "GlanceNet", 1.0, k, 0.8, 0.6)
    (tmp_path / "logs" / "1" / "eval_results" / "latents_obtained.npy").write_bytes(b"nothing")
    (tmp_path / "logs" / "2" / "commandline_args.txt").write_text("{}")
    with pytest.raises(UserError, match=r"not measured: .*latents_obtained.*; .*commandline_args"):
        evaluate.main([str(tmp_path / "logs"), "--out", str(tmp_path / "out")])
    rows = read_table(tmp_path / "out" / "runs.csv")
    assert [row["seed"] for row in rows] == ["0", "1"] and "| sprites |" in capsys.readouterr().out
    assert rows[1]["accuracy"] and not rows[1]["alignment_linear"], "what the damaged file does not hold is there"


def test_one_measure_that_fails_does_not_lose_the_others(tmp_path):
    """The CelebA recipe needs every attribute to vary, which a short test set may not give."""
    rng, run = np.random.default_rng(0), tmp_path / "run"
    fake_run(run, "GlanceNet", 1.0, 0, 0.8, 0.6)
    config = json.loads((run / "commandline_args.txt").read_text()) | {"dset_name": "celebA"}
    (run / "commandline_args.txt").write_text(json.dumps(config))
    concepts = np.zeros((200, 10))
    concepts[np.arange(200), rng.integers(1, 3, 200)] = 1
    concepts[:, 6:9] = rng.random((200, 3)) > 0.5
    save_arrays(run / "eval_results/latents_obtained.npy", 1, rng.random((200, 10)), concepts)
    with pytest.raises(UserError, match=r"not measured: .*run: .*(vary|constant|same)"):
        evaluate.main([str(run), "--out", str(tmp_path / "out"), "--dataset", "celeba"])
    (row,) = read_table(tmp_path / "out" / "runs.csv")
    assert row["accuracy"] and row["alignment"] and row["alignment_linear"]


def test_a_measure_without_a_value_is_left_out(tmp_path):
    """DCI writes null where a factor has too few values; it once ended in a traceback."""
    fake_run(tmp_path / "run", "GlanceNet", 1.0, 0, 0.8, 0.6)
    path = tmp_path / "run/eval_results/dci/results/json/evaluation_results.json"
    path.write_text(json.dumps({"disentanglement": 0.5, "completeness": 0.5, "informativeness_test": None}))
    (row,) = evaluate.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert row["alignment"] == 0.5 and "explicitness" not in row


def test_folders_stand_where_they_used_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_run(tmp_path / "a", "GlanceNet", 1.0, 0, 0.8, 0.6)
    fake_run(tmp_path / "b", "GlanceNet", 1.0, 1, 0.8, 0.6)
    for words in (["a", "b", "--out", "o"], ["--log", "a", "b"], ["a", "--log", "b", "--json"], ["--json", "a"]):
        assert len(evaluate.parse(words).log) == (1 if words == ["--json", "a"] else 2), words


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch):
    """A run that was stopped half-way is taken up where it stands, a finished one is kept, tables are there early."""
    words = ["--dset_dir", str(tmp_path), "--out", str(tmp_path / "out"), "--settings", "fair_1", "--supervision"]
    words += ["100", "--seeds", "1", "--device", "cpu", "--", "--sprites_sizes", "3", "2", "2", "4", "4", "--decoder"]
    words += ["ShallowLinear", "--encoder", "PadlessGaussianConv64", "--max_iter", "4", "--file_save", "false"]
    words += ["--metric_train", "60", "--metric_eval", "60", "--evaluation_metric", "sap_score", "--mc_samples", "2"]
    words += ["--ckpt_save_iter", "1"]
    step, calls = compare.training.train_step, []

    def stopped(*arguments):
        calls.append(arguments[4])
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(compare.training, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare.main(words)
    assert len(read_table(tmp_path / "out/compare.csv")) == 1, "what was measured is there"
    assert (tmp_path / "out/compare.png").stat().st_size > 1000
    compare.main(words)
    assert calls == [0, 1, 2, 3, 0, 1, 2, 2, 3], "only the missing steps"
