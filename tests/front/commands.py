"""Six training steps of each paper, three an epoch, by its own command; and where its state and its tables lie."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from front.children import finish, start, train

from common.checkpoint import load_state

STEPS, EPOCH = 6, 3


@dataclass
class Paper:
    """One paper's tiny run in a folder."""

    command: Callable[[int], list[str]]  # number of workers -> arguments; files go below the current folder
    resume: Callable[[Path, bool], list[str]]  # (folder, killed without a word) -> further arguments
    state: Callable[[Path], dict[str, Any]]  # the full state at the end
    tables: tuple[str, ...]  # the metric files, compared byte by byte
    step: int = 1  # what one training step adds to the logged step
    has_workers: bool = False
    replaces: bool = False  # `resume` is the whole command line


def _plain(value: Any) -> Any:
    """Without what names the call: folders, resume switches."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in ("config", "options", "args")}
    return value


def _lbae_state(folder: Path) -> dict[str, Any]:
    state = load_state(folder / "exp/models/last.cp", "lbae")
    for name in ("latents-last.npz", "latents.npz", "latents-eval.npz"):
        with np.load(folder / "exp" / name) as arrays:
            state[name] = {key: arrays[key].tolist() for key in arrays.files}
    return state


LBAE = "dataset=digits width=2 zsize=16 batch_size=32 batch_size_test=32 lr=1e-2 dec_in_channels=4 device=cpu exp=exp "
LBAE += "train_images=96 test_images=20 epochs_max=2 tensorboard=0 hold=0"
GLANCENET = "--dset_name sprites --sprites_sizes 3 2 2 4 4 --dset_dir . --encoder PadlessGaussianConv64 --z_dim 7 "
GLANCENET += "--decoder ShallowLinear --batch_size 48 --warmup_epochs 1 --lr_G 0.001 --device cpu --log_dir logs "
GLANCENET += "--ckpt_dir ckpt --train_output_dir pictures --out_path x --name x --file_save false --alg GlanceNet "
GLANCENET += "--conditional_prior true --loss_terms FactorVAE --size_layer_disc 16 --lr_scheduler ExponentialLR "
GLANCENET += "--lr_scheduler_args gamma=0.9 --max_epoch 2 --float_iter 1 --ckpt_save_iter 3"
LATENT_FLOW = "--smoke --batch-size 500 --image-size 8 --latent-size 4 --num-timesteps 4 --eval-images 8 --device cpu "
LATENT_FLOW += "--out run"
INV_FLOW = "--smoke --device cpu --out run --n_train 150 --n_test 20 --log_interval 1 --scheduler_name Exponential "
INV_FLOW += "--gamma 0.5 --warmup_epochs 2 --n_samples 4"
NFPI = "--config_path=___configs/digits --config-name=smoke device=cpu num_flows=[1,1] hidden_channels=[4,4] "
NFPI += "train.batch_size=40 train.init_batch_size=40 dataset_info.items_per_class_train=12 train.epochs=2 "
NFPI += "dataset_info.items_per_class_val=12 save_every_n_epochs=0 temperature_sampling_for_results=0 test_nf_alone=0 "
NFPI += "train_classifier=0 save_model_ckpt_every_n_epochs=1 test_every_n_epochs=1"
NFPI_RUN = "outputs/digits/smoke/1000_1000/_/version_0"


def _nfpi_state(folder: Path) -> Path:
    return next((folder / NFPI_RUN / "checkpoints").glob("state_*.pt"))


PAPERS = {
    "lbae": Paper(
        lambda workers: [*LBAE.split(), f"workers={workers}"],
        lambda folder, killed: ["l", "exp=exp", "device=cpu"],
        _lbae_state,
        ("exp/metrics.csv",),
        step=32,
        has_workers=True,
        replaces=True,
    ),
    "glancenet": Paper(
        lambda workers: [*GLANCENET.split(), "--num_workers", str(workers)],
        lambda folder, killed: ["--ckpt_load", f"ckpt/x/{'last' if killed else 'final'}"],
        lambda folder: load_state(folder / "ckpt/x/final", "glancenet"),
        tuple(
            f"logs/sprites__GlanceNet/x/{name}"
            for name in (
                "run/metrics.csv",
                "train_runs/metrics.csv",
                "train_runs/val_metrics.csv",
                "eval_results/test_metrics.csv",
            )
        ),
    ),
    "latent_flow": Paper(
        lambda workers: LATENT_FLOW.split(),
        lambda folder, killed: ["--resume"],
        lambda folder: load_state(folder / "run/checkpoint.pt", "latent_flow"),
        ("run/metrics.csv", "run/eval.json"),
    ),
    "inv_flow": Paper(
        lambda workers: [*INV_FLOW.split(), "--workers", str(workers)],
        lambda folder, killed: ["--resume"],
        lambda folder: load_state(folder / "run/checkpoints/last.pt", "inv_flow"),
        ("run/metrics.csv",),
        has_workers=True,
    ),
    "nfpi": Paper(
        lambda workers: NFPI.split(),
        lambda folder, killed: [f"nf_ckpt_path={_nfpi_state(folder).relative_to(folder)}"],
        lambda folder: load_state(_nfpi_state(folder), "nfpi-training"),
        (f"{NFPI_RUN}/metrics.csv", f"{NFPI_RUN}/fpi_epoch0000.csv"),
    ),
}


def run(name: str, folder: Path, *more: str, workers: int = 0, stop: tuple[int, signal.Signals] | None = None) -> int:
    """Train in a process of its own; the exit code. stop = (training steps, signal)."""
    paper = PAPERS[name]
    at = None if stop is None else (stop[0] * paper.step, int(stop[1]))
    return finish(start(train, name, [*paper.command(workers), *more], str(folder), at))


def resume(name: str, folder: Path, killed: bool, workers: int = 0) -> int:
    """Go on from the folder's checkpoint, in another process."""
    paper = PAPERS[name]
    before = [] if paper.replaces else paper.command(workers)
    return finish(start(train, name, [*before, *paper.resume(folder, killed)], str(folder)))


def output(folder: Path) -> str:
    """What the last process of the folder printed."""
    return (folder / "output.txt").read_text()


def final_state(name: str, folder: Path) -> dict[str, Any]:
    """Everything in the last checkpoint but the names of the call."""
    return _plain(PAPERS[name].state(folder))
