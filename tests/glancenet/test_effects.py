"""Every option of main.py changes what it says: a tiny training with the default and with another value."""

import functools
import hashlib
import logging

import pytest

from common.checkpoint import load_state
from glancenet import main as training
from glancenet.options import Config
from glancenet.state import KIND

pytestmark = pytest.mark.usefixtures("narrow")
SMALL = ["--dset_name", "sprites", "--sprites_sizes", "3", "1", "1", "3", "3", "--encoder", "ShallowGaussianLinear"]
SMALL += ["--decoder", "ShallowLinear", "--z_dim", "7", "--batch_size", "5", "--warmup_epochs", "0", "--lr_G", "0.01"]
SMALL += ["--max_iter", "3", "--mc_samples", "0", "--file_save", "false", "--device", "cpu", "--test_iter", "100"]
GLANCE = "--alg GlanceNet"
PRIOR = f"{GLANCE} --conditional_prior true"
FACTOR = f"{GLANCE} --loss_terms FACTORVAE --size_layer_disc 8 --lr_D 0.01 --w_tc 2"
IFCVAE = "--alg IFCVAE --encoder ShallowGaussianLinear PadlessConv64 --size_layer_disc 8 --include_labels 1"
GROWN = " --max_c 3000 --iterations_c 1"  # above the KL: below it the capacity moves no gradient
CAPACITY = f"{GLANCE} --controlled_capacity_increase true"
MEASURED = "--metric_train 100 --metric_eval 100"
DRAWN = f"{GLANCE} --file_save true --gif_save false --traverse_z true"
# options that change the trained weights, each with another value, by the call in which they do
WEIGHTS = {
    GLANCE: {
        "alg": "VAE", "encoder": "PadlessGaussianConv64", "decoder": "DeepLinear", "z_dim": "9", "z_class": "4",
        "loss_terms": "INFOVAE", "w_recon": "0.5", "w_kld": "3", "label_weight": "50", "latent_weight": "50",
        "latent_loss": "BCE", "masking_fact": "40", "conditional_prior": "true", "classification_epoch": "0.3",
        "batch_size": "6", "max_iter": "4", "max_epoch": "0.5", "lr_G": "0.02", "beta1": "0.5", "beta2": "0.9",
        "warmup_epochs": "3", "sprites_sizes": "3 1 1 3 4", "include_labels": "1", "n_classes": "3", "seed": "5",
        "amp": "true",
    },
    PRIOR: {"cluster_dim": "3"},
    GLANCE + GROWN: {"controlled_capacity_increase": "true"},
    CAPACITY + GROWN: {"max_c": "1"},
    CAPACITY: {"iterations_c": "1"},
    FACTOR: {"num_layer_disc": "3", "size_layer_disc": "9", "w_tc": "9", "lr_D": "0.02"},
    f"{GLANCE} --loss_terms INFOVAE": {"w_infovae": "90"},
    f"{GLANCE} --loss_terms DIPVAEI": {"w_dipvae": "9", "lambda_od": "9", "lambda_d_factor": "1"},
    IFCVAE: {"w_le": "9", "w_aux": "9"},
    f"{GLANCE} --lr_scheduler ExponentialLR --lr_scheduler_args gamma=0.9 --schedulers_iter 1": {
        "lr_scheduler_args": "gamma=0.1"},
    f"{GLANCE} --lr_scheduler ExponentialLR --lr_scheduler_args gamma=0.1": {"schedulers_iter": "1"},
    f"{GLANCE} --w_recon_scheduler LinearScheduler --w_recon_scheduler_args target_value=9 epochs=1 "
    "--schedulers_iter 1": {"w_recon_scheduler_args": "target_value=0 epochs=1"},
}  # fmt: skip
# those that change a file, by the file and the call
FILES = {
    ("eval_results/test_metrics.csv", GLANCE): {"max_eval_images": "1", "mc_samples": "3", "test_iter": "1"},
    ("eval_results/test_metrics.csv", f"{GLANCE} --test_iter 1"): {"treat_iter_as_epoch": "true"},
    ("train_runs/thr_rec.csv", GLANCE): {"osr_quantile": "0.5"},
    ("train_runs/thr_y.csv", GLANCE): {"osr_sample": "true"},
    ("eval_results/dis_metrics.csv", f"{GLANCE} {MEASURED}"): {"evaluation_metric": "mig"},
    ("eval_results/dis_metrics.csv", f"{GLANCE} {MEASURED} --evaluation_metric mig"): {"metric_train": "200"},
    ("eval_results/dis_metrics.csv", f"{GLANCE} {MEASURED} --evaluation_metric mig --test_iter 1"): {
        "evaluate_iter": "1"},
    ("run/metrics.csv", GLANCE): {"float_iter": "1", "all_iter": "1"},
    ("run/metrics.csv", f"{GLANCE} --float_iter 100"): {"show_loss": "1"},
    ("x/recon.jpg", GLANCE): {"file_save": "true"},
    ("x/gif_rand0.gif", DRAWN): {"gif_save": "true"},
    ("x/traverse_rand0.jpg", DRAWN): {"traverse_min": "-1", "traverse_max": "1", "traverse_spacing": "1"},
    ("x/traverse_rand0.jpg", f"{GLANCE} --file_save true"): {"traverse_z": "true", "traverse_l": "true"},
    ("x/traverse_rand0.jpg", "--alg CVAE --include_labels 1 --file_save true"): {"traverse_c": "true"},
}  # fmt: skip
EFFECTS = {
    name: (value, call, where)
    for (where, call), options in ({("weights", call): options for call, options in WEIGHTS.items()} | FILES).items()
    for name, value in options.items()
}
# options without such a line, and why
ELSEWHERE = {
    "discriminator": "one choice is left for latents", "label_tiler": "one choice", "image_size": "one choice",
    "lr_scheduler": "with its arguments", "w_recon_scheduler": "with its arguments",
    "d_version": "names a file: test_data", "dset_dir": "test_data", "dset_name": "test_main",
    "concepts": "front/test_your_data", "class_column": "front/test_your_data",
    "early_stopping": "test_behaviour, test_resume", "metric_eval": "held-out points of DCI and SAP: tests of metrics",
    "metric_jobs": "speed alone", "num_workers": "a GPU's batches alone", "pin_memory": "a GPU's batches alone",
    "hold_data": "speed alone: test_devices", "device": "test_devices", "deterministic": "a GPU's kernels",
    "cuda_graph": "the same step, in fewer launches: tests/front/test_cuda_graph.py",
    "tf32": "test_devices", "print_iter": "lines on the terminal", "recon_iter": "the same picture, earlier",
    "traverse_iter": "the same picture, earlier", "ckpt_save_iter": "test_resume", "test": "test_main",
    "name": "test_main", "log_dir": "test_main", "out_path": "test_main", "ckpt_dir": "test_main",
    "train_output_dir": "test_main", "test_output_dir": "test_main", "ckpt_load": "test_resume",
    "ckpt_load_iternum": "test_resume", "ckpt_load_optim": "test_resume", "resume": "test_resume",
    "overwrite": "test_resume", "use_wandb": "tests/test_wandb.py", "verbose": "lines on the terminal",
    "dry_run": "test_options",
}  # fmt: skip


@pytest.fixture(scope="module")
def outcome(narrow, tmp_path_factory):
    """What a call leaves behind: the hash of its weights, and its tables and pictures by name."""

    @functools.cache
    def run(words: str) -> dict[str, str | bytes]:
        folder = tmp_path_factory.mktemp("effect")
        places = ["--log_dir", f"{folder}/logs", "--ckpt_dir", f"{folder}/ckpt", "--train_output_dir", str(folder)]
        places += ["--dset_dir", str(folder), "--name", "x", "--out_path", "x"]
        log = training.main([*SMALL, *places, *words.split()])
        files = {str(path.relative_to(top)): path.read_bytes() for top in (log, folder) for path in top.rglob("*.*")
                 if path.suffix in (".csv", ".jpg", ".gif")}  # fmt: skip
        model = load_state(folder / "ckpt/x/final", KIND)["model"]
        digest = hashlib.sha256(b"".join(model[name].numpy().tobytes() for name in sorted(model)))
        return files | {"weights": digest.hexdigest()}

    return run


def test_every_option_has_a_line():
    assert set(EFFECTS) | set(ELSEWHERE) == set(Config.model_fields) and not set(EFFECTS) & set(ELSEWHERE)


@pytest.mark.parametrize("name", EFFECTS)
def test_an_option_changes_what_it_says(outcome, caplog, name):
    value, context, where = EFFECTS[name]
    with caplog.at_level(logging.WARNING):
        before, after = outcome(context), outcome(f"{context} --{name} {value}")
    assert not [record for record in caplog.records if f"--{name} does nothing" in record.getMessage()]
    assert after[where] != before.get(where), f"--{name} {value} changes nothing"
