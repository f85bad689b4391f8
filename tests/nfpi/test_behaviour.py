"""What a user would see: options of the flow matter; which weights and mode each stage uses; labels travel."""

import copy
import csv
import functools
import hashlib
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from common.batches import Batches
from common.checkpoint import load_state, load_weights, read_json, save_state
from common.errors import UserError
from common.launch import Distributed
from common.options import flat
from nfpi import cnn, data, main, sample
from nfpi.conditional import STATE_KIND, ConditionalFlow
from nfpi.config import Config, composed, config_place, without_effect
from nfpi.evaluate import evaluate
from nfpi.evaluate import test_stream as batches_of_test
from nfpi.fit_gaussians import latents
from nfpi.train import initialise, new_model, picture_epoch, read_state

TINY = {
    "device": "cpu", "num_flows": [1, 1], "hidden_channels": [4, 4], "train.epochs": 2, "train.batch_size": 40,
    "train.init_batch_size": 60, "train.warmup_steps": 4, "dataset_info.items_per_class_train": 12,
    "dataset_info.items_per_class_val": 12, "save_every_n_epochs": 0, "temperature_sampling_for_results": 0,
    "test_every_n_epochs": 5, "test_nf_alone": 0, "train_classifier": 0,
}  # fmt: skip
CNN = {
    "train_nf": 0, "train_classifier": 1, "only_T": 1, "num_imgs_scale": 0.015, "mixing_nbr": 0.015,
    "classification.stem": "imagenet", "classification.digits.epochs": 1, "classification.digits.batch_size": 10,
    "classification.digits.imgs_per_class": 2,
}  # fmt: skip
VALUES = OmegaConf.to_container(composed(*config_place("___configs/digits", "smoke"), []), resolve=True)
CPU = Distributed(torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("undrawn", "narrow_cnn")


def options(changes):
    """The options of the smoke configuration with values by their dotted names."""
    values = copy.deepcopy(VALUES)
    for name, value in changes.items():
        place = values
        *groups, last = name.split(".")
        for group in groups:
            place = place[group]
        place[last] = value
    return Config.build(values)


def run(folder, changes):
    """All stages of these options below `folder`: (figures, the run's folder)."""
    results = main.experiment(options(TINY | changes), folder)
    return results, Path(results["folder"])


def prints(folder):
    """A digest of a run's weights, one of the sets that it generated, and all that it measured and wrote, by name."""
    weights, sets, rows, names = hashlib.sha256(), hashlib.sha256(), [], []
    for path in sorted(folder.rglob("*")):
        names.append(path.relative_to(folder).as_posix())
        if path.suffix == ".safetensors":
            for key, tensor in sorted(load_weights(path)[0].items()):
                weights.update(key.encode() + tensor.numpy().tobytes())
        elif path.suffix == ".pickle":
            made = data.load_generated(path, ())
            sets.update(made.images.numpy().tobytes() + made.targets.numpy().tobytes())
        elif path.name == "metrics.csv":
            rows.append(path.read_text())
    results = read_json(folder / "results.json")
    figures = {stage: results.get(stage) for stage in ("nf", "cnn")}
    return {"weights": weights.hexdigest(), "sets": sets.hexdigest(), "figures": (rows, figures),
            "files": [name for name in names if "/tb/" not in f"/{name}"]}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def digits_read_once():
    """A hundred runs read the same set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "load_split", functools.lru_cache(data.load_split))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one tiny trained flow, and its figures of every epoch."""
    changes = {"train.epochs": 3, "test_every_n_epochs": 1, "test_nf_alone": 1}
    results, folder = run(tmp_path_factory.mktemp("trained"), changes)
    return folder, results, options(TINY | changes)


@pytest.fixture(scope="module")
def model(trained):
    """The trained flow, as later stages load it."""
    return ConditionalFlow.load(trained[0] / "checkpoints/flow.safetensors")


# ---------------------------------------------------------------- every option

FPI = "val.gmm.fpi_info."
MOVING = {f"{FPI}lambda_fpi_mu": 5, f"{FPI}lambda_fpi_sigma": 5, f"{FPI}interval_sigma": [0, 200],
          f"{FPI}identity_diag": False}  # fmt: skip
LATE = {"train.epochs": 3, "val.gmm.merge_datasets_after": 3}
BAND = {"val.gmm.gaussian_method_name": "one_conditioned_on_images"}
# the gradient baseline: three moves of the Gaussians, along schedules with a knot on each side of the second
GLEM = LATE | {"val.gmm.training_algorithm": "glem"}
for _part in ("mu", "sigma"):
    for _values, _first, _last in ((f"{_part}_lr", 0.1, 0.01), (f"lambda_kld_{_part}", 50, 5),
                                   (f"lambda_nf_{_part}", 1, 0.2)):  # fmt: skip
        GLEM |= {f"val.gmm.{_values}_arr": [_first, _last]}
        GLEM |= {f"val.gmm.{_values}_steps{'_arr' if 'lr' in _values else ''}": [0, 3]}
FREE = GLEM | {"val.gmm.reparam_name": "no_reparam"}
STEEP = GLEM | {"val.gmm.use_adam_for_gradients": 0}  # Adam's direction hardly hangs on the gradient's size

# option: another value, and what else both runs have
FLOW = {
    "seed": (3, {}), "trainer_precision": (64, {}), "conv_type": ("standard", {}), "flow_type": ("affine", {}),
    "use_attention_after": (1, {}), "num_levels": (1, {}), "num_flows": ([2, 1], {}), "num_blocks": ([2, 1], {}),
    "hidden_channels": ([6, 4], {}), "bits": (5, {}), "level_method.choice": ("spcb", {}),
    "level_method.level_idx": (1, {"level_method.choice": "all_levels_idx", "level_method.level_idx": 2}),
    "uniform_noise_value": (0.5, {}), "test_every_n_epochs": (1, {}), "test_nf_alone": (1, {}),
    "num_test_alone": (2, {"test_nf_alone": 1}), "test.batch_size": (50, {}), "test.uniform_noise_value": (0.0, {}),
    "train.epochs": (3, {}), "train.batch_size": (30, {}), "train.init_batch_size": (50, {}),
    "train.optimizer": ("adam", {}), "train.lr": (0.02, {}), "train.lr_decay": (0.3, {"train.step_size": [1]}),
    "train.step_size": ([1], {}), "train.warmup_steps": (2, {}), "train.center_warmup_epochs": (1, {}),
    "train.ema_name": ("", {}), "train.ema.beta": (0.1, {}), "train.ema.update_after_step": (3, {}),
    "train.ema.update_every": (2, {}), "train.ema.power": (0.3, {}), "val.batch_size": (50, {}),
    "dataset_info.items_per_class_train": (10, {}), "dataset_info.items_per_class_val": (10, {}),
    "dataset_info.digits.augmentation": ("none", {}),
    "dataset_info.digits.train_ratio": (0.8, {"val.gmm.use_train_dataset": 0, "dataset_info.items_per_class_train": 0}),
    "val.gmm.use_train_dataset": (0, {}), "val.gmm.every_n_epochs": (2, LATE),
    "val.gmm.merge_datasets_after": (2, {}), "val.gmm.gaussian_method_name": ("one", {}),
    "val.gmm.training_algorithm": ("fpi_nf", {}), f"{FPI}lambda_fpi_mu": (500, {}), f"{FPI}exp_den_update": (0, {}),
    f"{FPI}identity_diag": (False, {}), f"{FPI}max_iters": (1, {}), f"{FPI}epsilon_convergence": (1e3, {}),
    f"{FPI}use_isotropic_variance_when_training_mean": (0, {f"{FPI}identity_diag": False}),
    f"{FPI}sum_mu_diffs_arr_square": (0, MOVING), f"{FPI}interval_mu": ([-1, -1], {}),
    f"{FPI}interval_sigma": ([0, 200], {k: v for k, v in MOVING.items() if "interval" not in k}),
    f"{FPI}pw_kld_factors_scale": (7, {}), f"{FPI}damping": (0.5, {}), f"{FPI}variance_update": ("exact", MOVING),
    "amp": (1, {}), "label_encoder.pxh": (4, BAND), "label_encoder.iters": (0, BAND),
    "nf_weights_load_path": ("TRAINED", {}), "gaussians_load_path": ("TRAINED", {}),
}  # fmt: skip
FIGURES_ALONE = {"test_every_n_epochs", "test_nf_alone", "num_test_alone", "test.batch_size",
                 "test.uniform_noise_value"}  # fmt: skip
GRADIENTS = {
    "n_loops": (2, GLEM), "kld": (7, STEEP), "use_adam_for_gradients": (0, GLEM),
    "reset_adam_after_first_iteration": (0, GLEM), "adam_beta1": (0.5, GLEM), "adam_beta2": (0.5, GLEM),
    "reparam_name": ("no_reparam", GLEM), "reparam_method.sigmoid.a": (2.0, GLEM),
    "reparam_method.sigmoid.b": (2.0, GLEM), "reparam_method.sigmoid.c": (0.5, GLEM),
    "reparam_method.no_reparam.eps": (2.0, FREE), "reparam_method.no_reparam.init_value": (1.3, FREE),
}  # fmt: skip
for _part in ("mu", "sigma"):
    GRADIENTS |= {
        f"{_part}_lr_arr": ([0.2, 0.01], GLEM), f"{_part}_lr_steps_arr": ([0, 1], GLEM),
        f"manual_sched_lr_{_part}": ("lin", GLEM), f"lambda_kld_{_part}_arr": ([50, 9], STEEP),
        f"lambda_kld_{_part}_steps": ([0, 1], STEEP), f"manual_sched_lambda_kld_{_part}": ("geom", STEEP),
        f"lambda_nf_{_part}_arr": ([0.5, 0.2], STEEP), f"lambda_nf_{_part}_steps": ([0, 1], STEEP),
        f"manual_sched_lambda_nf_{_part}": ("lin", STEEP), f"kld_blank_{_part}": (1, GLEM),
    }  # fmt: skip
FLOW |= {f"val.gmm.{name}": row for name, row in GRADIENTS.items()}
MIXED = {"classifier_nf_strategy": "mix_datasets"}
REAL = {"classifier_nf_strategy": "do_not_use", "nf_load_path": ""}
ODD = {"classification.digits.batch_size": 7}  # 20 images: a last batch that is not full
ADAM = {"classification.optimizer_name": "adam", "classification.digits.epochs": 2, "classification.adam.steps": [1]}
# of the CNNs: another value, what else both runs have, and where it shows
CNNS = {
    "T": (0.5, {}, "sets"), "sample_seed_start": (3, {}, "sets"), "num_imgs_scale": (0.03, {}, "sets"),
    "dataset_info.digits.train_size": (2000, {}, "sets"), "mixing_nbr": (0.03, MIXED, "sets"),
    "do_all_classifications": (0, {}, "files"), "cnn_load_path": ("CNN", {}, "files"),
    "classifier_nf_strategy": ("mix_datasets", {}, "weights"), "dataset_info.digits.cnn": ("cifar", {}, "weights"),
    "do_k_bits_posterize_transform": (1, REAL | {"bits": 2}, "weights"),
    "dataset_classification": ("GENERATED", REAL, "weights"),
    "classification.resnet_version": (34, {}, "weights"), "classification.stem": ("small", {}, "weights"),
    "classification.drop_last": (False, ODD, "weights"), "classification.optimizer_name": ("adam", {}, "weights"),
    "classification.sgd.weight_decay": (0.1, {}, "weights"), "classification.sgd.max_lr": (0.3, {}, "weights"),
    "classification.adam.lr": (0.01, ADAM, "weights"), "classification.adam.steps_decay": (0.1, ADAM, "weights"),
    "classification.adam.steps": ([9], ADAM | {"classification.adam.steps_decay": 0.1}, "weights"),
    "classification.digits.epochs": (2, {}, "weights"), "classification.digits.batch_size": (9, {}, "weights"),
    "classification.digits.imgs_per_class": (3, REAL, "weights"), "seed": (3, {}, "weights"),
    "amp": (1, REAL, "weights"),
}  # fmt: skip
FILES = {"TRAINED": "", "CNN": "nf_datasets/cnn.safetensors", "GENERATED": "pickle_datasets/ds_0.pickle"}
ELSEWHERE = {
    "train_nf, train_classifier, resume, nf_ckpt_path, nf_load_path": "the stages of a run: test_main, test_runs",
    "variant, extra, dry_run": "the folder's name, the check alone: test_main, test_options",
    "save_every_n_epochs, save_start_epoch, save_model_ckpt_every_n_epochs, temperature_sampling_for_results, "
    "only_T": "the test of pictures and states below",
    "dataset_name, dataset_nf, data_path, dataset_info.digits.ch, dataset_info.digits.h, dataset_info.digits.w, "
    "dataset_info.digits.num_classes": "facts of the images, refused where they are wrong: test_data, test_runs",
    f"{FPI}lambda_fpi_sigma": "with lambda_fpi_mu, to which it is equal",
    "level_method.spcb": "has one value",
    "classification.sgd.momentum": "without effect, as published and as it says: the test of the one cycle below",
    "activation_checkpointing": "memory alone, the same gradients: test_model",
    "device, deterministic, tf32, cuda_graph, torch_compile, torch_compile_mode": "a GPU's: the same flow, faster",
    "wandb": "tests/test_wandb.py",
}


def test_no_option_is_forgotten():
    """The entries of the other data sets have those of the digits' options."""
    elsewhere = {name for names in ELSEWHERE for name in names.split(", ")}
    others = tuple(f"{group}.{name}." for group in ("dataset_info", "classification") for name in VALUES[group]
                   if name in {*VALUES["dataset_info"], "folder"} - {"digits"})  # fmt: skip
    options = {name for name in flat(VALUES) if not name.startswith(others)}
    assert options == set(FLOW) | set(CNNS) | elsewhere


@functools.cache
def few_test_images(name, root, split, **options):
    images = data.load_split(name, root, split, **options)
    return images.subset(torch.arange(60)) if split == "test" else images


@pytest.fixture(scope="module")
def outcome(trained, tmp_path_factory):
    """The prints of a run with some options, made once; some values stand for files of other runs."""
    made, weights = {}, str(trained[0] / "checkpoints/flow.safetensors")
    own = CNN | {"nf_load_path": weights}

    def folder_of(changes):
        key = str(sorted(changes.items()))
        if key not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(main, "load_split", few_test_images)
                made[key] = run(tmp_path_factory.mktemp("run"), changes)[1]
        return made[key]

    def file_of(value):
        if value not in FILES:
            return value
        return weights if value == "TRAINED" else str(folder_of(own) / "0_exp_0_T1.0" / FILES[value])

    def made_with(changes):
        return prints(folder_of({k: file_of(v) if isinstance(v, str) else v for k, v in changes.items()}))

    return made_with


@pytest.mark.parametrize("name", FLOW)
def test_an_option_changes_the_flow_or_its_figures(name, outcome):
    value, also = FLOW[name]
    both = {f"{FPI}lambda_fpi_sigma": value} if name == f"{FPI}lambda_fpi_mu" else {}
    before, after = outcome(also), outcome(also | {name: value} | both)
    assert (before["weights"] == after["weights"]) is (name in FIGURES_ALONE) and before != after


@pytest.mark.parametrize("name", CNNS)
def test_an_option_changes_the_cnn(name, outcome):
    value, also, where = CNNS[name]
    base = CNN | {"nf_load_path": "TRAINED"} | also
    assert outcome(base | {name: value})[where] != outcome(base)[where]


def test_pictures_and_states_are_written_when_asked(tmp_path, monkeypatch):
    drawn = [e for e in range(8) if picture_epoch(options({"save_every_n_epochs": 2, "save_start_epoch": 4}), e)]
    assert drawn == [5, 7] and not picture_epoch(options({"save_every_n_epochs": 0}), 1)
    saved, save = [], main.FlowTraining.save
    monkeypatch.setattr(main.FlowTraining, "save", lambda self: (saved.append(self.epoch), save(self)))
    monkeypatch.setattr("nfpi.train.pictures.latent_tsne", lambda *_: torch.zeros(4, 4, 3, dtype=torch.uint8).numpy())
    changes = {"train.epochs": 4, "save_model_ckpt_every_n_epochs": 3, "save_every_n_epochs": 3, "save_start_epoch": 2,
               "temperature_sampling_for_results": 1}  # fmt: skip
    folder = run(tmp_path, changes)[1]
    assert saved == [2, 3]  # after the third epoch, and at the end
    names = {path.stem for path in (folder / "pictures").iterdir()}
    assert {"samples_9", "samples_0_t0.1", "samples_9_t1.0", "mean_0", "var_2", "tsne_latents"} <= names
    assert cnn.temperatures(options({"only_T": 0})) == [1.2, 1.1, 1.0, 0.9, 0.8, 0.7]
    assert cnn.temperatures(options({"only_T": 1, "T": 0.3})) == [0.3]


# ---------------------------------------------------------------- which weights, which mode, which data


def test_tests_use_averaged_weights_and_the_gaussians_of_the_iteration(trained, model):
    folder, results, config = trained
    tests = batches_of_test(data.load_split("digits", None, "test"), config, CPU)
    rows = (folder / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("test_bpd")
    in_training = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    stored = evaluate(model, tests, CPU)
    assert results["nf"]["bpd"] == stored["bpd"] == pytest.approx(in_training[-1], rel=1e-12)
    assert len(in_training) == 3
    state = load_state(folder / "checkpoints/state_epoch0003.pt", STATE_KIND)
    online = copy.deepcopy(model)
    online.flow.load_state_dict(state["flow"])
    assert evaluate(online, tests, CPU)["bpd"] != stored["bpd"]
    average = ConditionalFlow.load(folder / "checkpoints/state_epoch0003.pt")
    assert evaluate(average, tests, CPU) == stored
    assert model.pixel_noise == average.pixel_noise == config.test_noise == 0.05
    assert torch.equal(model.gaussians.mean, state["gaussians"]["mean"])


def test_the_untrained_flow_is_normalised_on_the_first_images():
    config = options(TINY)
    images = data.flow_sets(data.load_split("digits", None, "train"), config).train
    model = new_model(config)
    initialise(model, images, config, None, CPU.device)
    first = images.subset(torch.arange(60))
    x, y, noise, _ = next(data.Stream(first, config, CPU, data.Use.INIT, 60).epoch(0))
    seen = []
    model.flow.blocks[0][0].actnorm.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    model.nll(x, y, noise)
    std, mean = torch.std_mean(seen[0], dim=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-3)


def test_a_state_keeps_the_codes_of_classes_told_in_the_image(tmp_path):
    folder = run(tmp_path, BAND | {"train.epochs": 1, "label_encoder.iters": 2})[1]
    (path,) = folder.glob("checkpoints/*.pt")
    codes = read_state(path)["codes"]
    assert torch.equal(codes, ConditionalFlow.load(folder / "checkpoints/flow.safetensors").codes.codes)
    save_state(path, STATE_KIND, **load_state(path, STATE_KIND) | {"codes": "bands"})
    with pytest.raises(UserError, match="codes"):
        read_state(path)


def test_the_iteration_sees_the_latents_of_the_trained_flow(tmp_path):
    """Without separation the Gaussians stand at the class means of the flow's latents as they are after the epoch."""
    changes = {"train.epochs": 1, "val.gmm.training_algorithm": "fpi_nf", "train.lr": 0.05}
    folder, config = run(tmp_path, changes)[1], options(TINY | changes)
    model = ConditionalFlow.load(folder / "checkpoints/flow.safetensors")
    images = data.flow_sets(data.load_split("digits", None, "train"), config).fit
    stream = data.Stream(images, config, CPU, data.Use.LATENTS, config.val.batch_size)
    z, y, nll = (torch.cat(part) for part in zip(*latents(model, stream, 1), strict=True))
    means = torch.stack([z[y == k].double().mean(0) for k in range(10)])
    torch.testing.assert_close(model.gaussians.mean.double(), means, rtol=1e-4, atol=1e-4)
    assert torch.equal(y.sort().values, torch.arange(10).repeat_interleave(12)) and nll.isfinite().all()
    # and they start where the untrained flow's latents stand
    still = run(tmp_path / "still", changes | {"train.lr": 1e-12, f"{FPI}interval_mu": [-1, -1]})[1]
    first = ConditionalFlow.load(still / "checkpoints/flow.safetensors")
    assert float((first.gaussians.mean - model.gaussians.mean).abs().max()) > 0.05


def test_labels_travel_with_generated_images(model, trained):
    """Images generated near the centre of a class are of that class, by the flow's own Bayes' rule."""
    config = options(TINY | CNN | {"nf_load_path": "x", "num_imgs_scale": 0.1})
    made = cnn.generate(model, config, 0.05, 0, CPU)
    assert torch.bincount(made.targets).tolist() == [14] * 10 and not torch.equal(made.targets, made.targets.sort()[0])
    own = model.scores(made.images.float() / 255, 0.5).argmax(1)
    assert (own == made.targets).float().mean() > 0.9

    def spread(made):
        return sum(made.images[made.targets == k].float().var(0).mean() for k in range(10))

    assert spread(cnn.generate(model, config, 1.0, 0, CPU)) > 2 * spread(made)  # the temperature
    again = cnn.generate(model, config, 0.05, 0, CPU)
    assert torch.equal(again.images, made.images) and torch.equal(again.targets, made.targets)
    other = cnn.generate(model, config, 0.05, 1, CPU)
    assert not torch.equal(other.images, made.images)


def test_mixed_sets_hold_real_and_generated_images_with_their_labels(model, tmp_path):
    real = data.load_split("digits", None, "train").subset(torch.arange(30))
    config = options(TINY | CNN | MIXED | {"nf_load_path": "x"})
    both = cnn.training_set(model, config, real, 0.05, 0, CPU, tmp_path)
    assert torch.equal(both.images[:30], real.images) and torch.equal(both.targets[:30], real.targets)
    own = model.scores(both.images[30:].float() / 255, 0.5).argmax(1)
    assert len(own) == 20 and (own == both.targets[30:]).float().mean() > 0.8
    stored = data.load_generated(tmp_path / "pickle_datasets/ds_0.pickle", ())
    assert torch.equal(stored.images, both.images[30:]) and torch.equal(stored.targets, both.targets[30:])
    index = data.items_per_class(real.targets, 2, torch.Generator().manual_seed(0))
    few = real.subset(index)
    assert all(torch.equal(image, real.images[i]) and label == real.targets[i]
               for image, label, i in zip(few.images, few.targets, index, strict=True))  # fmt: skip


def test_a_cnn_is_tested_in_evaluation_mode_on_every_image():
    torch.manual_seed(0)
    config = options(TINY | CNN | {"classifier_nf_strategy": "do_not_use"})
    test, net = data.load_split("digits", None, "test"), cnn.resnet(18, 1, 10, "imagenet")
    matrix = cnn.confusion_matrix(net.train(), test, config, CPU)
    with torch.no_grad():
        predicted = net.eval()(test.images.float() / 127.5 - 1).argmax(1)
    assert matrix.sum() == len(test) and torch.equal(matrix.sum(1), torch.bincount(test.targets).double())
    assert all(matrix[k, j] == ((test.targets == k) & (predicted == j)).sum() for k in range(10) for j in range(10))


def test_a_cnn_sees_mnist_framed_in_black():
    mnist = OmegaConf.to_container(composed(*config_place("___configs/mnist", "mean_and_var"), []), resolve=True)
    seen = cnn.normalised(torch.full((2, 1, 28, 28), 255, dtype=torch.uint8), Config.build(mnist))
    assert seen.shape == (2, 1, 32, 32) and torch.equal(seen[..., 2:-2, 2:-2], torch.ones(2, 1, 28, 28))
    assert int((seen == -1).sum()) == 2 * (32 * 32 - 28 * 28)


def test_figures_of_a_cnn_s_epoch_are_means_over_its_images():
    config = options({})
    images = data.load_split("digits", None, "train").subset(torch.arange(25))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    net[1].weight.data.zero_()
    net[1].bias.data = torch.eye(10)[3]  # every image is taken for a 3
    idle = torch.optim.SGD(net.parameters(), lr=0.0)
    figures = cnn.train_epoch(net, net, Batches(images, 10, device=CPU.device, drop_last=False), 0, config, idle, None)
    threes, all_of_them = int((images.targets == 3).sum()), math.log(9 + math.e)
    assert figures["train_acc"] == threes / 25 > 0
    assert figures["train_loss"] == pytest.approx(all_of_them - threes / 25)


def test_the_flow_is_tested_in_the_epochs_that_are_asked_and_the_last(tmp_path):
    folder = run(tmp_path, {"train.epochs": 5, "test_every_n_epochs": 2})[1]
    with open(folder / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file) if row["test_bpd"]] == ["1", "3", "4"]


def test_the_one_cycle_reaches_the_rate_that_is_asked():
    config = options({"classification.sgd.max_lr": 0.3, "classification.digits.epochs": 4})
    net = torch.nn.Linear(2, 2)
    optimizer, cycle, every_batch = cnn.optimizer_of(net, config, 5)
    rates, moments = [], []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        moments.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        cycle.step()
    assert every_batch and rates[0] == pytest.approx(0.3 / 25) and max(rates) == pytest.approx(0.3)
    assert rates.index(max(rates)) == 5 and rates[-1] < 1e-5 and optimizer.param_groups[0]["weight_decay"] == 5e-4
    # whatever sgd.momentum says: it is said to be without effect
    assert max(moments) == pytest.approx(0.95) and min(moments) == pytest.approx(0.85, abs=0.01)
    assert "sgd.momentum" in "".join(without_effect(config, ["classification.sgd.momentum"]))
    adam = options({"classification.optimizer_name": "adam", "classification.adam.steps": [2]})
    optimizer, _, every_batch = cnn.optimizer_of(net, adam, 5)
    assert isinstance(optimizer, torch.optim.Adam) and not every_batch and optimizer.param_groups[0]["lr"] == 1e-4


def test_test_images_get_their_noise_and_no_transform():
    config = options(TINY | {"dataset_info.digits.augmentation": "noise"})
    test = data.load_split("digits", None, "test").subset(torch.arange(100))

    def batch(changes, epoch=0):
        config = options(TINY | changes)
        return next(batches_of_test(test, config, CPU).epoch(epoch))

    x, y, noise, count = batch({})
    added = x - test.images / 255
    assert count == 100 and torch.equal(y, test.targets)
    assert added.min() >= 0 and 0.045 < added.max() <= 0.05 + 1e-6 and config.uniform_noise_value == 0.05
    assert noise.min() >= 0 and noise.max() < 1 and abs(float(noise.mean()) - 0.5) < 0.02
    clean = batch({"test.uniform_noise_value": 0.0})
    assert torch.equal(clean[0], test.images / 255)
    turning = {"dataset_info.digits.augmentation": "mnist", "dataset_info.digits.h": 12, "dataset_info.digits.w": 12}
    padded = batch(turning | {"test.uniform_noise_value": 0.0})  # black around, neither turned nor moved
    assert torch.equal(padded[0], torch.nn.functional.pad(test.images / 255, (2,) * 4))
    wide = batch({"test.uniform_noise_value": 1.0})
    assert (wide[0] - test.images / 255).max() > 0.9
    again, other = batch({}), batch({}, epoch=1)
    assert torch.equal(again[2], noise) and not torch.equal(other[2], noise) and not torch.equal(other[0], x)


def test_bayes_rule_and_likelihoods_by_their_definitions(model, trained):
    """Accuracy, top five, and both bits a dimension, written out for the first test images."""
    config = trained[2]
    test = data.load_split("digits", None, "test").subset(torch.arange(50))
    tests = batches_of_test(test, config, CPU)
    figures = evaluate(model, tests, CPU)
    x, y, noise, _ = next(tests.epoch(0))
    latent = model.flow(model.input(x, y, noise))
    normal = torch.distributions.Normal(model.gaussians.mean.double(), model.gaussians.var.double().sqrt())
    log_p = normal.log_prob(latent.z.detach().double()[:, None]).sum(2) + latent.log_det.detach().double()[:, None]
    log_p = log_p - 64 * torch.log(torch.tensor(128.0).double())  # grey levels 0..256 in [-1, 1]
    given = log_p[torch.arange(50), y]
    bits = 64 * torch.log(torch.tensor(2.0).double())
    assert figures["bpd"] == pytest.approx(float(-given.mean() / bits), rel=1e-6)
    marginal = torch.logsumexp(log_p, 1) - torch.log(torch.tensor(10.0).double())
    assert figures["bpd_marginal"] == pytest.approx(float(-marginal.mean() / bits), rel=1e-6)
    assert figures["acc"] == pytest.approx(float((log_p.argmax(1) == y).double().mean()))
    assert figures["top5"] == pytest.approx(float((log_p.topk(5).indices == y[:, None]).any(1).double().mean()))


def test_tests_and_cnns_hang_on_the_stored_weights_alone(trained, tmp_path):
    """The same command twice, and without its first stage: the same figures, CNN and generated images."""
    changes = CNN | {"test_nf_alone": 1, "nf_load_path": str(trained[0] / "checkpoints/flow.safetensors")}
    found = [prints(run(tmp_path / name, changes | more)[1])
             for name, more in (("a", {}), ("b", {}), ("c", {"test_nf_alone": 0}))]  # fmt: skip
    assert found[0] == found[1] and found[0]["figures"][1]["nf"]["bpd"] == trained[1]["nf"]["bpd"]
    assert all(found[0][part] == found[2][part] for part in ("weights", "sets"))


def test_samples_are_a_function_of_weights_seed_and_options(trained, tmp_path):
    weights = ["--weights", str(trained[0] / "checkpoints/flow.safetensors"), "--per-class", "4", "--device", "cpu"]

    def drawn(name, *more):
        sample.main([*weights, "--out", str(tmp_path / name), *more])
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = drawn("a")
    assert set(first) == {"classes.png", *(f"samples_{k}.png" for k in range(10))} and drawn("b") == first
    assert drawn("seed", "--seed", "1") != first and drawn("cold", "--temperature", "0.1") != first
    assert set(drawn("two", "--classes", "3", "7")) == {"classes.png", "samples_3.png", "samples_7.png"}
