"""What a user would see if a line of the method were wrong: which weights, rows, order and mode each stage uses."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from same_state import same
from torch import nn

from common.checkpoint import load_state, load_weights
from glancenet import compare, leakage, osr, passes, traverse
from glancenet import main as training
from glancenet.algorithms import Shape, make_model
from glancenet.data import TrainingBatches, load_data
from glancenet.options import parse
from glancenet.records import load_arrays, read_table
from glancenet.report import Report
from glancenet.state import KIND, make_optimizers

pytestmark = pytest.mark.usefixtures("narrow")
CPU = torch.device("cpu")
LINEAR = ["--encoder", "ShallowGaussianLinear", "--file_save", "false", "--conditional_prior", "true", "--alg"]


def words_in(command, folder, *more: str) -> list[str]:
    return command(folder, *LINEAR, "GlanceNet", "--name", "x", "--out_path", "x", *more)


def state_in(folder, file: str = "final", name: str = "x") -> dict:
    return load_state(folder / "ckpt" / name / file, KIND)


@pytest.fixture(scope="module")
def trained(narrow, command, tmp_path_factory):
    """A GlanceNet of three epochs, half supervised, with a metric: .folder, .log, .words, .data, .model."""
    folder = tmp_path_factory.mktemp("trained")
    words = words_in(command, folder, "--max_epoch", "3", "--masking_fact", "50", "--evaluation_metric", "sap_score",
                     "--metric_train", "100", "--metric_eval", "100", "--mc_samples", "7")  # fmt: skip
    log = training.main(words)
    o = parse(words)
    data = load_data(o)
    model = make_model(o, data.shape)
    model.load_state_dict(state_in(folder)["model"])
    return SimpleNamespace(folder=folder, log=log, words=words, data=data, model=model.eval(), o=o)


# ---- labels travel with images --------------------------------------------------------------------------------------


def test_training_batches_show_what_their_labels_say(tmp_path, command):
    """In every batch of two epochs: the sprite's centre of mass follows the labels x and y, its area the scale."""
    o = parse(words_in(command, tmp_path, "--sprites_sizes", "1", "2", "1", "5", "5", "--batch_size", "8"))
    data = load_data(o)
    batches = TrainingBatches(data.train, o, CPU, second=True)
    seen = []
    for epoch in (0, 1):
        for pair in batches.epoch(epoch):
            for images in pair:
                mass = images.x[:, 0]
                axis = torch.arange(64.0)
                x, y = ((mass.sum(k) * axis).sum(1) / mass.sum((1, 2)) for k in (1, 2))
                for place, label in (
                    (x, images.labels[:, 5]),
                    (y, images.labels[:, 6]),
                    (mass.sum((1, 2)), images.labels[:, 3]),
                ):
                    assert np.corrcoef(place, label)[0, 1] > 0.99
            seen.append(pair[0].labels)
    half = len(seen) // 2
    assert not torch.equal(torch.cat(seen[:half]), torch.cat(seen[half:])), "another order in another epoch"
    rows = torch.cat(seen[:half]).unique(dim=0)
    assert len(rows) == half * 8, "no image twice in an epoch"


def test_the_second_batch_is_another_one(tmp_path, command):
    """FactorVAE permutes the latents of images that it does not judge at the same time."""
    o = parse(words_in(command, tmp_path, "--loss_terms", "FACTORVAE"))
    for first, second in TrainingBatches(load_data(o).train, o, CPU, second=True).epoch(0):
        assert not (first.codes[:, None] == second.codes[None]).all(2).any()


# ---- which rows, weights and mode -----------------------------------------------------------------------------------


def test_validation_and_test_score_their_own_split(trained):
    """The last rows of the tables, computed anew from the stored weights."""
    for table, part, more in (
        ("train_runs/val_metrics.csv", "val", {}),
        ("eval_results/test_metrics.csv", "test", {"mc_samples": 7, "all_rows": True}),
    ):
        last = read_table(trained.log / table)[-1]
        with passes.evaluating(trained.model, trained.o.seed + 12):
            scores, _ = passes.evaluate(trained.model, getattr(trained.data, part), 12, CPU, **more)
        expected = {"rec": scores.rec, "kld": scores.kld, "latent": scores.latent, "acc_hard": scores.acc_hard}
        assert {name: float(last[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert len({len(part) for part in (trained.data.train, trained.data.val)}) == 2


def test_saved_latents_and_predictions_are_of_the_test_images(trained):
    _, z, concepts = load_arrays(trained.log / "eval_results/latents_obtained.npy", 3)
    _, y, prediction = load_arrays(trained.log / "eval_results/downstream_obtained.npy", 3)
    np.testing.assert_allclose(concepts, trained.data.test.concepts)
    np.testing.assert_array_equal(y, trained.data.test.y)
    with torch.no_grad():
        images = trained.data.test.gather(torch.arange(len(y)), CPU)
        mu, logvar = trained.model.encode(images)
        likely = trained.model.classify(mu).argmax(1).numpy()
    raw = np.log(z / (1 - z))
    deviation = (raw - mu.numpy()) / np.exp(0.5 * logvar.numpy())
    assert 0.8 < deviation.std() < 1.2, "samples of each image's own posterior"
    assert np.mean(likely == prediction) > 0.8


def test_evaluation_leaves_the_training_as_it_was(tmp_path, command):
    """BatchNorm's statistics do not move in an evaluation, and training goes on in training mode."""
    o = parse(command(tmp_path, "--alg", "CBNM", "--encoder", "EncConv64"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glancenet.architectures.EncConv64.widths", (4, 4, 4, 4))
        data = load_data(o)
        model = make_model(o, data.shape)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with passes.evaluating(model, 0):
        assert not model.training and not torch.is_grad_enabled()
        one, _ = passes.evaluate(model, data.test, 0, CPU)
    assert model.training and torch.equal(torch.get_rng_state(), random)
    same(before, dict(model.state_dict()))
    with passes.evaluating(model, 0):
        part = data.test.part(3, 0)
        few, _ = passes.evaluate(model, part, 0, CPU)
        rows = [passes.evaluate(model, part.part(1, k), 0, CPU)[0].bce for k in range(9)]
    assert min(rows) <= few.bce <= max(rows), "an image's score does not depend on the others of its batch"
    assert one.bce > 0


class Reader(nn.Module):
    """An encoder that has learned to read the factors: its mean is what the image shows, its variance is noise."""

    gaussian = True

    def __init__(self, data, as_variance: bool = False):
        super().__init__()
        index = np.arange(len(data.grid))
        images, self.as_variance = data.grid.images_at(index), as_variance
        sizes = np.array(data.grid.factor_sizes)
        factors = np.stack(np.unravel_index(index, sizes), axis=1)[:, sizes > 1]
        self.known = {image.numpy().tobytes(): torch.tensor(row, dtype=torch.float32)
                      for image, row in zip(images, factors, strict=True)}  # fmt: skip
        self.register_parameter("unused", nn.Parameter(torch.zeros(())))

    def forward(self, x):
        read = torch.stack([self.known[(255 * image).round().byte().numpy().tobytes()] for image in x])
        noise = torch.randn(read.shape)
        return (noise, read) if self.as_variance else (read, noise)


@pytest.mark.parametrize("as_variance", [False, True])
def test_the_metrics_read_the_means(tmp_path, command, as_variance):
    o = parse(words_in(command, tmp_path, "--evaluation_metric", "sap_score", "mig", "--sprites_sizes", "3", "3", "1",
                       "4", "4", "--metric_train", "1000", "--metric_eval", "500", "--alg", "VAE",
                       "--conditional_prior", "false"))  # fmt: skip
    data = load_data(o)
    model = make_model(o, data.shape)
    model.encoder = Reader(data, as_variance)
    with passes.evaluating(model, 0):
        found = dict(passes.disentanglement(model, data, CPU, o))
    assert (found["mig"]["discrete_mig"] > 0.9) != as_variance
    assert (found["sap_score"]["SAP_score"] > 0.3) != as_variance


# ---- the rejection --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decoder", "expected"), [(nn.Identity(), [True, False, False]), (None, [True, False, True])])
def test_both_checks_reject(decoder, expected):
    """Near and well reconstructed; far; badly reconstructed: a bottleneck has no reconstruction."""
    thresholds = osr.Thresholds(10.0, np.array([1.0, 1.0]), np.array([[0.0, 0], [9, 9]]), 2)
    seen = passes.Encoded(np.array([5.0, 5, 50]), np.array([[0.1, 0], [4, 4], [9, 9]]), np.zeros(3, int))
    assert passes.accepted(SimpleNamespace(decoder=decoder), seen, thresholds).tolist() == expected


def test_thresholds_are_quantiles_of_the_training_images(trained):
    """thr_rec.csv, thr_y.csv and passed.npy from the stored weights, and the same numbers in the weights that ship."""
    with passes.evaluating(trained.model, trained.o.seed):
        train = passes.encode_for_rejection(trained.model, trained.data.train, CPU, False)
        test = passes.encode_for_rejection(trained.model, trained.data.test, CPU, False)
    (row,) = read_table(trained.log / "train_runs/thr_rec.csv")
    assert float(row["thr_rec"]) == pytest.approx(np.quantile(train.errors, 0.95), rel=1e-6)
    prior = trained.model.class_means().detach().double().numpy()
    reach = [np.quantile(np.linalg.norm(train.z[train.y == c] - prior[c], axis=1), 0.95) for c in (0, 1)]
    written = [float(row["thr_y"]) for row in read_table(trained.log / "train_runs/thr_y.csv")]
    np.testing.assert_allclose(written, reach, rtol=1e-6)
    near = (np.linalg.norm(test.z[:, None] - prior, axis=2) < reach).any(1)
    passed = np.load(trained.log / "eval_results/passed.npy")
    np.testing.assert_array_equal(passed, near & (test.errors < np.quantile(train.errors, 0.95)))
    tensors, _ = load_weights(trained.folder / "ckpt/x/model.safetensors")
    np.testing.assert_allclose(tensors["osr.distance"], reach, rtol=1e-6)


def test_thresholds_survive_a_resume_that_is_stopped(trained, monkeypatch, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    words = [word.replace(str(trained.folder), str(tmp_path / "copy")) for word in trained.words]
    before = state_in(tmp_path / "copy")["thresholds"]

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        training.main([*words, "--max_epoch", "4", "--resume", "auto"])
    state = state_in(tmp_path / "copy")
    assert state["iter"] == 16 and before
    same(state["thresholds"], before)


# ---- order ----------------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_has_the_lowest_validation_total(tmp_path, command, monkeypatch):
    """rec + kld + latent weight x latent + class weight x bce: 40, 20, 30, 25 at four test points."""
    scripted = [(10.0, 5.0, 1.0, 0.5), (4.0, 1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.52), (1.0, 1.0, 1.3, 0.0)]
    validate, calls = Report.validate, []

    def scores(self, step):
        found = validate(self, step)
        if len(calls) == len(scripted):
            return found
        rec, kld, latent, bce = scripted[len(calls)]
        calls.append(step)
        return found._replace(rec=rec, kld=kld, latent=latent, bce=bce)

    monkeypatch.setattr(Report, "validate", scores)
    training.main(words_in(command, tmp_path, "--max_epoch", "4", "--latent_weight", "15", "--label_weight", "20"))
    assert state_in(tmp_path, "best")["iter"] == 8 and state_in(tmp_path, "last")["iter"] == 16
    assert state_in(tmp_path)["best_total"] == 20


def test_no_state_of_the_warm_up_is_the_best(tmp_path, command, monkeypatch):
    validate = Report.validate
    monkeypatch.setattr(Report, "validate", lambda self, step: validate(self, step)._replace(rec=float(step)))
    training.main(words_in(command, tmp_path, "--max_epoch", "4", "--warmup_epochs", "2"))
    assert state_in(tmp_path, "best")["iter"] == 12, "the first epoch after two of warm-up"


def test_the_stopping_rule_ends_the_training(tmp_path, command, monkeypatch):
    """From epoch 11 on a rising class loss counts; after 11 bad validations the training ends, and since the first
    of them `last` stays what it was.
    """
    validate = Report.validate
    monkeypatch.setattr(Report, "validate", lambda self, step: validate(self, step)._replace(bce=float(step)))
    more = ["--sprites_sizes", "1", "1", "1", "4", "4", "--batch_size", "12", "--include_labels", "4", "5"]
    training.main(words_in(command, tmp_path, *more, "--max_epoch", "40", "--mc_samples", "0"))
    assert state_in(tmp_path)["iter"] == 10 + 11 and state_in(tmp_path, "last")["iter"] == 10


def score(model, part) -> passes.Scores:
    with passes.evaluating(model, 0):
        return passes.evaluate(model, part, 0, CPU)[0]


def test_a_step_lowers_what_it_is_told_to(tmp_path, command):
    """Concepts alone, then classes alone: the named loss falls, and falls further than under the other one."""
    found = {}
    for name, label, latent in (("concepts", "0", "100"), ("classes", "100", "0")):
        more = ["--label_weight", label, "--latent_weight", latent, "--lr_G", "0.003", "--conditional_prior", "false"]
        o = parse(words_in(command, tmp_path, *more, "--alg", "CBNM"))
        data = load_data(o)
        torch.manual_seed(0)
        model = make_model(o, data.shape)
        optimizers, images = make_optimizers(model, o), data.train.gather(torch.arange(len(data.train)), CPU)
        found[name] = [score(model, data.train)]
        for step in range(60):
            training.train_step(model, optimizers, images, step=step)
        found[name].append(score(model, data.train))
    assert found["concepts"][1].latent < 0.7 * found["concepts"][0].latent
    assert found["classes"][1].bce < 0.7 * found["classes"][0].bce
    assert found["classes"][1].latent > found["concepts"][1].latent
    assert found["concepts"][1].bce > found["classes"][1].bce


# ---- functions of the stored weights --------------------------------------------------------------------------------


def test_a_test_twice_writes_the_same(trained, tmp_path):
    """Tables, latents, predictions, metrics, thresholds and pictures are functions of the checkpoint."""
    written = []
    for k in ("a", "b"):
        torch.manual_seed(ord(k))
        words = [*trained.words, "--test", "true", "--ckpt_load", str(trained.folder / "ckpt/x/final"), "--traverse_z"]
        words += ["true", "--file_save", "true", "--log_dir", str(tmp_path / k), "--test_output_dir", str(tmp_path / k)]
        log = training.main(words)
        files = [*log.glob("eval_results/*"), *log.glob("train_runs/*"), *(tmp_path / k / "x").iterdir()]
        written.append({path.name: path.read_bytes() for path in files if path.is_file()})
    assert set(written[0]) >= {"test_metrics.csv", "passed.npy", "recon_12.jpg", "thr_y.csv", "dis_metrics.csv"}
    assert written[0] == written[1]
    (epoch,) = load_arrays(log / "eval_results/downstream_obtained.npy", 1)
    assert epoch == 3, "that of the trained weights"
    ours = read_table(trained.log / "eval_results/dis_metrics.csv")[-1]
    assert written[0]["dis_metrics.csv"].decode().split() == ["eval_sap_score", ours["eval_sap_score"]]


def test_traversals_start_from_the_prototypes(trained, tmp_path):
    path = trained.folder / "ckpt/x/model.safetensors"
    model = traverse.load(path, CPU)
    np.testing.assert_allclose(model.prototypes.detach(), trained.model.class_means().detach(), rtol=1e-6)
    rows = traverse.traverse(model, 1, torch.tensor([-2.0, 2.0]), [3])
    z = trained.model.class_means()[1].detach().repeat(2, 1)
    with torch.no_grad():
        np.testing.assert_allclose(rows[0], torch.sigmoid(trained.model.decode(z, None)), atol=1e-6)
        z[:, 3] = torch.tensor([-2.0, 2.0])
        np.testing.assert_allclose(rows[1], torch.sigmoid(trained.model.decode(z, None)), atol=1e-6)


# ---- leakage and comparison -----------------------------------------------------------------------------------------


def test_the_position_probe_is_judged_on_rows_that_it_has_not_seen(monkeypatch):
    """More latents than the probe has rows: it can learn its rows by heart, and must not be asked about them."""
    rng = np.random.default_rng(0)
    z, corner = rng.normal(size=(500, 600)), rng.integers(0, 2, 500)
    errors = np.r_[np.full(250, 50.0), np.full(250, 1.0)]
    near = np.where(np.arange(500)[:, None] % 5 == 0, 30.0, 0.1) * np.ones((1, 2))
    thresholds = osr.Thresholds(10.0, np.array([1.0]), np.zeros((1, 2)), 2)
    corners = passes.Encoded(errors, near, np.zeros(500, int))
    closed = passes.Encoded(np.array([1.0, 1, 1, 99]), np.array([[0.0, 0], [0, 0], [5, 5], [0, 0]]), np.zeros(4, int))
    data = SimpleNamespace(name="d", corner=corner, test="test", val="val")
    model = nn.Linear(1, 1)
    model.decoder = nn.Identity()
    monkeypatch.setattr(passes, "fit_rejection", lambda *_: (thresholds, closed))
    monkeypatch.setattr(passes, "encode_for_rejection", lambda m, part, *_: corners if part == "test" else closed)
    monkeypatch.setattr(passes, "evaluate", lambda *_, **__: (None, SimpleNamespace(z=z)))
    found = leakage.measure(model, data, CPU, 0.95, False, 0)["rejection"]
    assert found["none"]["leakage_percent"] < 40
    rejected = {name: found[name]["rejected_percent"] for name in found}
    assert rejected == pytest.approx({"none": 0, "distance": 20, "reconstruction": 50, "both": 60})
    kept = {name: found[name]["closed_set_kept_percent"] for name in found}
    assert kept == {"none": 100, "distance": 75, "reconstruction": 75, "both": 50}
    z[:, 0] = 50 * (2 * corner - 1)
    assert leakage.measure(model, data, CPU, 0.95, False, 0)["rejection"]["none"]["leakage_percent"] > 90


COMPARED = {
    ("published", "GlanceNet"): {"label_weight": 100, "latent_weight": None, "warmup_epochs": 5},
    ("published", "CBNM"): {"label_weight": 100, "latent_weight": None, "warmup_epochs": 10},
    ("mpi3d", "GlanceNet"): {"label_weight": 1000, "latent_weight": 7000, "classification_epoch": None},
    ("mpi3d", "CBNM"): {"label_weight": 1, "latent_weight": 2, "classification_epoch": None},
    ("fair_7", "GlanceNet"): {"label_weight": 100, "latent_weight": 700, "warmup_epochs": 5},
    ("fair_7", "CBNM"): {"label_weight": 100, "latent_weight": 700, "warmup_epochs": 5},
}  # fmt: skip


@pytest.mark.parametrize(("setting", "model"), COMPARED)
def test_compared_settings(setting, model):
    o = compare.Config(dset_dir=".", device="cpu")
    found = parse(compare.command(setting, model, 10, 3, o, [])).as_dict()
    expected = COMPARED[setting, model] | {
        "alg": model, "masking_fact": 10, "seed": 3, "max_iter": 250000, "z_dim": 7, "batch_size": 64,
        "conditional_prior": model == "GlanceNet", "lr_G": 1e-4, "evaluation_metric": ["dci"],
    }  # fmt: skip
    expected |= {"classification_epoch": 20.0} if setting == "published" else {"classification_epoch": None}
    assert {name: found[name] for name in expected} == expected


def test_a_model_is_made_for_its_data(trained):
    assert trained.data.shape == Shape(1, 7, 2, trained.data.code_sizes, len(trained.data.train))
