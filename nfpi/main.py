r"""NFPI: a flow with one Gaussian a class, placed by fixed point iteration; classification, generation, CNNs.

    python nfpi/main.py --config-path=___configs/cifar10 --config-name=mean
    python nfpi/main.py --config-path=___configs/mnist --config-name=mean_and_var data_path=data
    python nfpi/main.py --config-path=___configs/cifar10 --config-name=mean \
        val.gmm.fpi_info.lambda_fpi_mu=100000 val.gmm.fpi_info.lambda_fpi_sigma=100000 extra=smaller_lambda
    python nfpi/main.py --config-path=___configs/cifar10 --config-name=mean train_nf=0 nf_load_path=flow.safetensors \
        extra=ckpt_test num_test_alone=1 only_T=1 T=1.0
    torchrun --nproc_per_node=2 nfpi/main.py --config-path=___configs/cifar10 --config-name=mean
    python nfpi/main.py --config-path=___configs/digits --config-name=smoke        # seconds, on a CPU

Enescu & Sahbi, "Learning conditionally untangled latent spaces using Fixed Point Iteration", BMVC 2024. Options: hydra
overrides of nfpi/___configs/base.yaml (`--config_path` is understood too). Three stages, each can be switched off:
train_nf, test_nf_alone, train_classifier. Everything is written below
outputs/<dataset>/<variant>/<lambda_mu>_<lambda_sigma>/<extra>/version_<N>/ (see train.py and cnn.py), the figures of
all stages in results.json there. An unfinished training run goes on with nf_ckpt_path=.../state_epoch<e>.pt.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os

import hydra
import numpy as np
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from common.checkpoint import load_state, write_json
from common.errors import NonFiniteError, UserError, disk_full, run_command
from common.launch import Distributed, seed_everything
from common.run import Run
from nfpi import augment, cnn
from nfpi.conditional import STATE_KIND, ConditionalFlow
from nfpi.config import config_place, plain_argv, resolve, search_path
from nfpi.data import Images, flow_sets, load_generated, load_split
from nfpi.train import evaluate, train_flow

HYDRA_ONLY = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--resolve",
    "--package",
    "-p",
)


def load_images(cfg: DictConfig) -> tuple[Images, Images]:
    """The real training and test images, of the size that the configuration says."""
    info = cfg.dataset_info[cfg.dataset_name]
    pad = augment.recipe(info.augmentation).zero_pad
    shape = (info.ch, info.h - 2 * pad, info.w - 2 * pad)
    train, test = (load_split(cfg.dataset_nf, cfg.data_path, split) for split in ("train", "test"))
    return tuple(part.check(shape, info.num_classes, f"data set {cfg.dataset_nf}") for part in (train, test))


def version_folder(base: Path, dist: Distributed) -> Path:
    """`base/version_<N>`, N the first free number; the same on all processes."""
    taken = [int(p.name[8:]) for p in base.glob("version_*") if p.name[8:].isdigit()] if dist.is_main else []
    return base / f"version_{int(dist.sum(float(max(taken, default=-1) + 1 if dist.is_main else 0)))}"


def classifier_images(cfg: DictConfig, real: Images) -> Images:
    """The labelled training images of the real-data CNN: the data set itself, another one, or a generated file."""
    name = str(cfg.dataset_classification)
    if name.endswith(".pickle"):
        info = cfg.dataset_info[cfg.dataset_name]
        return load_generated(name, real.classes).check(tuple(real.images.shape[1:]), info.num_classes, name)
    return real if name == cfg.dataset_nf else load_split(name, cfg.data_path, "train")


def experiment(cfg: DictConfig, output: Path) -> dict:
    """All stages of one configuration; returns (and writes) the figures."""
    dist = Distributed.start(cfg.device)
    # atomics in some CUDA kernels vary from run to run; deterministic=true forbids them
    seed_everything(cfg.seed, bool(cfg.deterministic) and dist.device.type == "cuda")
    plain = OmegaConf.to_container(cfg, resolve=True)
    real, test = load_images(cfg)
    state = load_state(cfg.nf_ckpt_path, kind=STATE_KIND) if cfg.nf_ckpt_path else None
    folder = Path(cfg.nf_ckpt_path).resolve().parent.parent if state else version_folder(output, dist)
    results, model = {"config": plain, "folder": str(folder)}, None
    where = {"resume": state is not None, "resume_step": state["step"] if state else None}
    try:
        with Run(folder, plain, **where, wandb=cfg.wandb or None, enabled=dist.is_main) as run:
            run.info(f"device {dist.device}, {dist.world} process(es), writing to {folder}")
            weights = cfg.nf_load_path
            if cfg.train_nf:
                train, fit = flow_sets(
                    real,
                    cfg.dataset_info,
                    bool(cfg.val.gmm.use_train_dataset),
                    cfg.dataset_info[cfg.dataset_name].train_ratio,
                    cfg.seed,
                )
                weights = train_flow(cfg, train, fit, test, dist, run, state)
                if weights is None:  # a signal stopped the training, and its state is saved
                    raise KeyboardInterrupt
            if weights:
                model = ConditionalFlow.load(weights, dist.device)
                check_model(model, cfg, weights)
            if cfg.test_nf_alone:
                results["nf"] = test_flow(model, test, cfg, dist, run)
            if cfg.train_classifier:
                if model is not None and not model.knows_classes and cfg.classifier_nf_strategy != "do_not_use":
                    raise UserError(f"{weights} has no classes to generate: add train_classifier=0")
                source = classifier_images(cfg, real)
                results["cnn"] = {}
                for t in cnn.temperatures(cfg):
                    accuracy = cnn.train_cnn(model, cfg, source, test, t, dist, folder)
                    results["cnn"][f"{t:.1f}"] = accuracy
                    run.info(f"CNN ({cfg.classifier_nf_strategy}, T={t:.1f}): test accuracy {accuracy:.4f}")
            if dist.is_main:
                write_json(folder / "results.json", results)
                report(results)
    finally:
        dist.close()
    return results


def check_model(model: ConditionalFlow, cfg: DictConfig, source: str | Path) -> None:
    """Raise UserError when loaded weights are of another image size or number of classes than the configuration."""
    info, config = cfg.dataset_info[cfg.dataset_name], model.flow.config
    rows = model.codes.rows if model.codes else 0
    if (config.channels, config.height - rows, config.width) != (info.ch, info.h, info.w):
        raise UserError(
            f"{source}: a flow of {config.channels} x {config.height} x {config.width} images, not {cfg.dataset_name}'s"
        )
    if model.classes != info.num_classes:
        raise UserError(f"{source}: {model.classes} classes, {cfg.dataset_name} has {info.num_classes}")


def test_flow(model: ConditionalFlow, test: Images, cfg: DictConfig, dist: Distributed, run: Run) -> dict:
    """Mean and standard deviation of the test figures over `num_test_alone` draws of the dequantisation noise."""
    rows = [evaluate(model, test, cfg, dist, repeat) for repeat in range(cfg.num_test_alone)]
    figures = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        figures[name] = float(np.mean(values))
        figures[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    run.info(f"test over {len(rows)} draw(s): " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
    return {"repeats": len(rows), **figures}


def report(results: dict) -> None:
    """Print the figures of all stages."""
    for name, value in results.get("nf", {}).items():
        print(f"nf {name} {value:.6g}")
    for temperature, value in results.get("cnn", {}).items():
        print(f"cnn T={temperature} accuracy {value:.4f}")
    print(f"results: {results['folder']}/results.json")


def main(argv: list[str] | None = None) -> None:
    """Read the command line as hydra does (config path and name, overrides, --multirun, --cfg ...), run the job(s)."""
    argv = plain_argv(list(sys.argv[1:] if argv is None else argv))
    path, argv = _flag(argv, "--config-path", "-cp")
    name, argv = _flag(argv, "--config-name", "-cn")
    folder, name = config_place(path, name)
    overrides = [a for a in argv if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    flags = [a for a in argv if a not in overrides]  # hydra wants them in front
    asks = any(a.partition("=")[0] in HYDRA_ONLY for a in flags)
    stray = [a for a in flags if not a.startswith("-")]
    if stray and not asks:
        raise UserError(f"cannot read '{stray[0]}': options are written key=value")
    multirun = bool({"-m", "--multirun"} & set(flags))
    if not asks and not multirun:
        resolve(folder, name, overrides)  # refuse a bad configuration before hydra makes a folder
    failures: list[BaseException] = []

    def job(cfg: DictConfig) -> None:
        # hydra would turn these into a traceback and exit code 1
        if any(isinstance(failure, KeyboardInterrupt) for failure in failures):
            return
        try:
            if multirun:
                resolve(folder, name, list(HydraConfig.get().overrides.task))
            experiment(cfg, Path(HydraConfig.get().runtime.output_dir))
        except (UserError, NonFiniteError, KeyboardInterrupt) as error:
            failures.append(error)
        except OSError as error:
            if not disk_full(error):
                raise
            failures.append(error)

    extra = [search_path(), "hydra/job_logging=none", "hydra/hydra_logging=none"]
    if os.environ.get("RANK", "0") != "0":
        extra.append("hydra.output_subdir=null")
    before = sys.argv
    sys.argv = [str(Path(__file__)), *flags, *overrides, *extra]
    try:
        GlobalHydra.instance().clear()
        hydra.main(version_base="1.3", config_path=str(folder), config_name=name)(job)()
    finally:
        sys.argv = before
    if failures:
        raise failures[0]


def _flag(argv: list[str], *names: str) -> tuple[str | None, list[str]]:
    """(value of the flag, the other arguments); raises UserError when the value is missing."""
    value, rest, index = None, [], 0
    while index < len(argv):
        flag, equals, tail = argv[index].partition("=")
        if flag in names:
            if not equals:
                index += 1
                if index >= len(argv):
                    raise UserError(f"{flag} needs a value")
                tail = argv[index]
            value = tail
        else:
            rest.append(argv[index])
        index += 1
    return value, rest


if __name__ == "__main__":
    sys.exit(run_command(main))
