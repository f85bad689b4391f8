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
DIP = f"{GLANCE} --loss_terms DIPVAEI"
DRAWN = f"{GLANCE} --file_save true --gif_save false --traverse_z true"
TEST = "eval_results/test_metrics.csv"
# option: (another value, the call that it changes, where the change shows: the weights or a file)
EFFECTS = {
    "alg": ("VAE", GLANCE, "weights"),
    "encoder": ("PadlessGaussianConv64", GLANCE, "weights"),
    "decoder": ("DeepLinear", GLANCE, "weights"),
    "z_dim": ("9", GLANCE, "weights"),
    "z_class": ("4", GLANCE, "weights"),
    "num_layer_disc": ("3", FACTOR, "weights"),
    "size_layer_disc": ("9", FACTOR, "weights"),
    "loss_terms": ("INFOVAE", GLANCE, "weights"),
    "w_recon": ("0.5", GLANCE, "weights"),
    "w_kld": ("3", GLANCE, "weights"),
    "label_weight": ("50", GLANCE, "weights"),
    "latent_weight": ("50", GLANCE, "weights"),
    "latent_loss": ("BCE", GLANCE, "weights"),
    "masking_fact": ("40", GLANCE, "weights"),
    "conditional_prior": ("true", GLANCE, "weights"),
    "cluster_dim": ("3", PRIOR, "weights"),
    "classification_epoch": ("0.3", GLANCE, "weights"),
    "controlled_capacity_increase": ("true", GLANCE + GROWN, "weights"),
    "max_c": ("1", CAPACITY + GROWN, "weights"),
    "iterations_c": ("1", CAPACITY, "weights"),
    "w_tc": ("9", FACTOR, "weights"),
    "w_infovae": ("90", f"{GLANCE} --loss_terms INFOVAE", "weights"),
    "w_dipvae": ("9", DIP, "weights"),
    "lambda_od": ("9", DIP, "weights"),
    "lambda_d_factor": ("1", DIP, "weights"),
    "w_le": ("9", IFCVAE, "weights"),
    "w_aux": ("9", IFCVAE, "weights"),
    "batch_size": ("6", GLANCE, "weights"),
    "max_iter": ("4", GLANCE, "weights"),
    "max_epoch": ("0.5", GLANCE, "weights"),
    "lr_G": ("0.02", GLANCE, "weights"),
    "lr_D": ("0.02", FACTOR, "weights"),
    "beta1": ("0.5", GLANCE, "weights"),
    "beta2": ("0.9", GLANCE, "weights"),
    "warmup_epochs": ("3", GLANCE, "weights"),
    "lr_scheduler_args": ("gamma=0.1", f"{GLANCE} --lr_scheduler ExponentialLR --lr_scheduler_args gamma=0.9 "
                          "--schedulers_iter 1", "weights"),
    "w_recon_scheduler_args": ("target_value=0 epochs=1", f"{GLANCE} --w_recon_scheduler LinearScheduler "
                               "--w_recon_scheduler_args target_value=9 epochs=1 --schedulers_iter 1", "weights"),
    "schedulers_iter": ("1", f"{GLANCE} --lr_scheduler ExponentialLR --lr_scheduler_args gamma=0.1", "weights"),
    "sprites_sizes": ("3 1 1 3 4", GLANCE, "weights"),
    "include_labels": ("1", GLANCE, "weights"),
    "n_classes": ("3", GLANCE, "weights"),
    "seed": ("5", GLANCE, "weights"),
    "amp": ("true", GLANCE, "weights"),
    "max_eval_images": ("1", GLANCE, TEST),
    "mc_samples": ("3", GLANCE, TEST),
    "osr_quantile": ("0.5", GLANCE, "train_runs/thr_rec.csv"),
    "osr_sample": ("true", GLANCE, "train_runs/thr_y.csv"),
    "evaluation_metric": ("mig", GLANCE + " --metric_train 100 --metric_eval 100", "eval_results/dis_metrics.csv"),
    "metric_train": ("200", GLANCE + " --metric_train 100 --metric_eval 100 --evaluation_metric mig",
                     "eval_results/dis_metrics.csv"),
    "test_iter": ("1", GLANCE, TEST),
    "evaluate_iter": ("1", GLANCE + " --metric_train 100 --metric_eval 100 --evaluation_metric mig --test_iter 1",
                      "eval_results/dis_metrics.csv"),
    "float_iter": ("1", GLANCE, "run/metrics.csv"),
    "all_iter": ("1", GLANCE, "run/metrics.csv"),
    "treat_iter_as_epoch": ("true", GLANCE + " --test_iter 1", TEST),
    "show_loss": ("1", GLANCE + " --float_iter 100", "run/metrics.csv"),
    "file_save": ("true", GLANCE, "x/recon.jpg"),
    "gif_save": ("true", DRAWN, "x/gif_rand0.gif"),
    "traverse_min": ("-1", DRAWN, "x/traverse_rand0.jpg"),
    "traverse_max": ("1", DRAWN, "x/traverse_rand0.jpg"),
    "traverse_spacing": ("1", DRAWN, "x/traverse_rand0.jpg"),
    "traverse_z": ("true", f"{GLANCE} --file_save true", "x/traverse_rand0.jpg"),
    "traverse_l": ("true", f"{GLANCE} --file_save true", "x/traverse_rand0.jpg"),
    "traverse_c": ("true", "--alg CVAE --include_labels 1 --file_save true", "x/traverse_rand0.jpg"),
}  # fmt: skip
# options without such a line, and why
ELSEWHERE = {
    "discriminator": "one choice is left for latents", "label_tiler": "one choice", "image_size": "one choice",
    "lr_scheduler": "with its arguments", "w_recon_scheduler": "with its arguments",
    "d_version": "names a file: test_data", "dset_dir": "test_data", "dset_name": "test_main",
    "early_stopping": "test_behaviour, test_resume", "metric_eval": "held-out points of DCI and SAP: tests of metrics",
    "metric_jobs": "speed alone", "num_workers": "a GPU's batches alone", "pin_memory": "a GPU's batches alone",
    "hold_data": "speed alone: test_devices", "device": "test_devices", "deterministic": "a GPU's kernels",
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
