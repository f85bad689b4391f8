r"""NFPI: a flow with one Gaussian a class, placed by fixed point iteration; classification, generation, CNNs.

    python nfpi/main.py --config-path=___configs/cifar10 --config-name=mean
    python nfpi/main.py --config-path=___configs/mnist --config-name=mean_and_var data_path=data
    python nfpi/main.py --config-path=___configs/cifar10 --config-name=mean \
        val.gmm.fpi_info.lambda_fpi_mu=100000 val.gmm.fpi_info.lambda_fpi_sigma=100000 extra=smaller_lambda
    python nfpi/main.py --config-path=___configs/cifar10 --config-name=mean train_nf=0 nf_load_path=flow.safetensors \
        extra=ckpt_test num_test_alone=1 only_T=1 T=1.0
    torchrun --nproc_per_node=2 nfpi/main.py --config-path=___configs/cifar10 --config-name=mean
    python nfpi/main.py --config-path=___configs/digits --config-name=smoke        # seconds, on a CPU

Enescu & Sahbi, "Learning conditionally untangled latent spaces using Fixed Point Iteration", BMVC 2024. Options are
hydra overrides (`--config_path` is understood too); --help lists them with the values of the chosen file, dry_run=true
checks them. Three stages, each can be switched off: train_nf, test_nf_alone, train_classifier. Everything is written
below outputs/<dataset>/<variant>/<lambda_mu>_<lambda_sigma>/<extra>/version_<N>/ (see train.py and cnn.py), the figures
of all stages in results.json there. An unfinished training run goes on with resume=auto, or with
nf_ckpt_path=.../checkpoints/state_epoch<e>.pt.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from common.checkpoint import read_json, write_json
from common.errors import NonFiniteError, UserError, disk_full, run_command
from common.launch import Distributed, full_precision, keep_freed_memory, pick_device, seed_everything
from common.options import check_resume, compare, flat
from nfpi import augment, cnn
from nfpi.conditional import ConditionalFlow
from nfpi.config import (
    FOLDER,
    Config,
    composed,
    config_place,
    folder_options,
    help_text,
    judge,
    override_names,
    plain_argv,
    resolve,
    search_path,
    sweep,
    take_architecture,
    without_effect,
)
from nfpi.data import Images, flow_sets, load_generated, load_split
from nfpi.evaluate import repeated, test_stream
from nfpi.train import FlowTraining, read_state, train_flow

# options that say which stages run, and how a call is made, not what a stage gives
STAGE_SWITCHES = {
    "test_nf_alone",
    "train_classifier",
    "only_T",
    "T",
    "resume",
    "nf_ckpt_path",
    "dry_run",
    "device",
    "wandb",
}
HYDRA_ONLY = ("--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--resolve", "--package", "-p")


def load_images(config: Config) -> tuple[Images, Images, Images]:
    """The real training and test images, of the size that the configuration says, and the images of the real-data CNN:
    the data set itself, another one, or a generated file.
    """
    info, name = config.dataset, config.dataset_classification
    pad = augment.RECIPES[info.augmentation].zero_pad
    shape = (info.ch, info.h - 2 * pad, info.w - 2 * pad)

    def checked(images: Images, source: str) -> Images:
        return images.check(shape, info.num_classes, source)

    options: dict[str, Any] = {"fetch": bool(config.train_nf or config.train_classifier)}
    if config.dataset_nf == FOLDER:
        options |= folder_options(config)
    train, test = (checked(load_split(config.dataset_nf, config.data_path, split, **options),
                           f"data set {config.dataset_nf}") for split in ("train", "test"))  # fmt: skip
    if name == config.dataset_nf or not config.train_classifier:
        return train, test, train
    if name.endswith(".pickle"):
        return train, test, checked(load_generated(name, train.classes), name)
    return train, test, checked(load_split(name, config.data_path, "train"), f"data set {name}")


# ---------------------------------------------------------------- the folder of a run


def resumed_state(config: Config) -> dict[str, Any] | None:
    """The state at `nf_ckpt_path`. Raises UserError, before anything is written, for one that does not lie in a run's
    folder or was made with other settings.
    """
    if not config.nf_ckpt_path:
        return None
    path = Path(config.nf_ckpt_path)
    state = read_state(path)
    check_resume(state["options"], config, path)
    if path.resolve().parent.name != "checkpoints":
        raise UserError(f"nf_ckpt_path={path}: a run goes on in its own folder, and its states lie in "
                        "<run>/checkpoints/; put the file back")  # fmt: skip
    return state


def newest_state(folder: Path) -> Path | None:
    """The newest full state of a run."""
    return max((folder / "checkpoints").glob("state_epoch[0-9]*.pt"), default=None)


def is_finished(folder: Path, config: Config) -> bool:
    """Whether all stages that are asked now have ended in `folder`, with as many epochs."""
    results = folder / "results.json"
    if not results.is_file():
        return False
    content = read_json(results)
    if not config.train_nf and content.get("weights") != weights_of(config):
        return False
    epochs = content.get("config", {}).get("train", {}).get("epochs", 0)
    tested = "nf" in content or not config.test_nf_alone
    cnns = {cnn.spelled(t) for t in cnn.temperatures(config)} if config.train_classifier else set()
    enough = epochs >= config.train.epochs or not config.train_nf
    return content.get("finished", True) and enough and tested and cnns <= content.get("cnn", {}).keys()


def of_same_command(base: Path, config: Config) -> list[Path]:
    """The version folders that were made with these settings, the newest first."""
    found = [p for p in base.glob("version_*") if p.name[8:].isdigit() and (p / "config.json").is_file()]
    return sorted((p for p in found if _made_by(read_json(p / "config.json"), config)), key=lambda p: -int(p.name[8:]))


def _made_by(old: dict[str, Any], config: Config) -> bool:
    """Whether saved options are those of a run that `config` may go on with: a training with the same settings, or the
    same tests of the same weights.
    """
    if not config.train_nf:
        return _same_stages(old, config)
    return bool(old.get("train_nf", True)) and not compare(old, config)["same"]


def _same_stages(old: dict[str, Any], config: Config) -> bool:
    """Whether saved options lead to the same figures."""
    before, now = flat(old), flat(config.as_dict())
    return all(before.get(name, now[name]) == now[name] for name in now.keys() - STAGE_SWITCHES)


def weights_of(config: Config) -> str | None:
    """The digest of the weights that are tested with train_nf=0."""
    if config.train_nf or not config.nf_load_path:
        return None
    with open(config.nf_load_path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def figures_so_far(folder: Path, config: Config) -> dict[str, Any]:
    """The figures of stages that an interrupted run with the same options and weights has finished."""
    path = folder / "results.json"
    content = read_json(path) if path.is_file() else {}
    if not _same_stages(content.get("config", {"seed": None}), config) or content.get("weights") != weights_of(config):
        return {}
    return {stage: content[stage] for stage in ("nf", "cnn") if stage in content}


def version_folder(base: Path, config: Config, dist: Distributed) -> Path:
    """`base/version_<N>`, the same on all processes: with resume=auto the newest unfinished one of this command, else
    its newest finished one, else an empty one (the engine makes the folders of what a step writes); else a new one.
    """
    number = 0
    if dist.is_main:
        earlier = of_same_command(base, config) if config.resume else []
        unfinished = [p for p in earlier if not is_finished(p, config)]
        found = sorted(p for p in base.glob("version_*") if p.name[8:].isdigit() and p.is_dir())
        empty = [p for p in found if config.resume and not any(p.iterdir())]
        if chosen := unfinished[:1] or earlier[:1] or empty[:1]:
            number = int(chosen[0].name[8:])
        else:
            taken = [int(p.name[8:]) for p in base.glob("version_*") if p.name[8:].isdigit()]
            for number in itertools.count(max(taken, default=-1) + 1):
                try:
                    (base / f"version_{number}").mkdir(parents=True)
                    break
                except FileExistsError:  # another process was faster
                    continue
                except OSError as error:
                    raise UserError(f"cannot make a folder in {base}: {error.strerror}") from error
    return base / f"version_{int(dist.sum(float(number)))}"


# ---------------------------------------------------------------- the stages


def experiment(config: Config, output: Path, given: Iterable[str] = (), state: dict[str, Any] | None = None) -> dict:
    """All stages of one configuration; returns (and writes) the figures. `given`: the options of the command line;
    `state`: what `resumed_state` read.
    """
    dist = Distributed.start(config.device)
    try:
        return _stages(config, output, list(given), state, dist)
    finally:
        dist.close()


def _stages(config: Config, output: Path, given: list[str], state: dict[str, Any] | None, dist: Distributed) -> dict:
    full_precision(config.tf32)
    if dist.device.type == "cpu":
        keep_freed_memory()
    # atomics in some CUDA kernels vary from run to run; deterministic=true forbids them
    seed_everything(config.seed, config.deterministic and dist.device.type == "cuda")
    notes = list(without_effect(config, given))
    check_files(config)
    config, model = loaded_model(config, given, dist.device)
    real, test, cnn_images = load_images(config)
    shape = "x".join(map(str, real.images.shape[1:]))
    notes.append(f"{len(real)} training and {len(test)} test images of {shape}, {config.dataset.num_classes} classes")
    if config.train_classifier and config.cnn_load_path:
        cnn.new_net(config)  # refuses weights that do not fit before hours of training
    if state is not None:
        folder, how = Path(config.nf_ckpt_path).resolve().parent.parent, {"resume": True}
        how["checkpoint"] = config.nf_ckpt_path
    else:
        folder, how = version_folder(output, config, dist), {}
        if config.resume and (folder / "config.json").is_file():
            if is_finished(folder, config):
                print(f"{folder} is finished")
                return read_json(folder / "results.json")
            how = {"resume": "auto", "checkpoint": newest_state(folder)}
    results: dict[str, Any] = {"config": config.as_dict(), "folder": os.path.relpath(folder), "finished": False,
                               "weights": weights_of(config)}  # fmt: skip
    done = figures_so_far(folder, config) if how else {}
    with FlowTraining(folder, config, dist, state, wandb=config.wandb or None, **how) as training:
        run = training.run
        for line in (f"device {dist.device}, {dist.world} process(es), writing to {folder}", *notes):
            run.info(line)
        keep(results | done, dist)
        if config.train_nf:
            try:
                weights = train_flow(config, flow_sets(real, config), test, training, dist)
            except KeyboardInterrupt:
                run.info(f"go on with resume=auto, or with nf_ckpt_path={training.checkpoint}")
                raise
            model = ConditionalFlow.load(weights, dist.device)
        results |= done
        if config.test_nf_alone and "nf" not in done:
            results["nf"] = repeated(model, test_stream(test, config, dist), config.num_test_alone, dist, run)
            keep(results, dist)
        for t in cnn.temperatures(config) if config.train_classifier else ():
            name = cnn.spelled(t)
            if name not in results.setdefault("cnn", {}):
                results["cnn"][name] = cnn.train_cnn(model, config, cnn_images, test, t, dist, folder)
                run.info(f"CNN ({config.classifier_nf_strategy}, T={name}): test accuracy {results['cnn'][name]:.4f}")
                keep(results, dist)
        results["finished"] = True
        keep(results, dist)
        if dist.is_main:
            report(results)
    return results


def keep(results: dict, dist: Distributed) -> None:
    """Write what is known so far: a later stage may fail."""
    if dist.is_main:
        write_json(Path(results["folder"]) / "results.json", results)


def check_files(config: Config) -> None:
    """Raise UserError for weights that are asked for and missing."""
    for path in (config.nf_weights_load_path, config.gaussians_load_path, config.cnn_load_path):
        if path and not Path(path).is_file():
            raise UserError(f"no weights at {path}")


def loaded_model(config: Config, given: Iterable[str], device: Any) -> tuple[Config, ConditionalFlow | None]:
    """With train_nf=0 the model at `nf_load_path`, and the options with its architecture."""
    if config.train_nf or not config.nf_load_path:
        return config, None
    model = ConditionalFlow.load(config.nf_load_path, device)
    config = take_architecture(config, model.facts(), given, config.nf_load_path)
    check_model(model, config)
    return config, model


def check_model(model: ConditionalFlow, config: Config) -> None:
    """Raise UserError when loaded weights are of another image size or number of classes than the configuration."""
    info, architecture, source = config.dataset, model.flow.config, config.nf_load_path
    rows = model.codes.rows if model.codes else 0
    if (architecture.channels, architecture.height - rows, architecture.width) != (info.ch, info.h, info.w):
        shape = f"{architecture.channels} x {architecture.height} x {architecture.width}"
        raise UserError(f"{source}: a flow of {shape} images, not {config.dataset_name}'s")
    if model.classes != info.num_classes:
        raise UserError(f"{source}: {model.classes} classes, {config.dataset_name} has {info.num_classes}")
    if config.train_classifier and not model.knows_classes and config.classifier_nf_strategy != "do_not_use":
        raise UserError(f"{source} has no classes to generate: add train_classifier=0")


def report(results: dict) -> None:
    """Print the figures of all stages."""
    for name, value in results.get("nf", {}).items():
        print(f"nf {name} {value:.6g}")
    for temperature, value in results.get("cnn", {}).items():
        print(f"cnn T={temperature} accuracy {value:.4f}")
    print(f"results: {results['folder']}/results.json")


# ---------------------------------------------------------------- the command line


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
    if {"-h", "--help"} & set(flags) or "help" in stray:
        print(help_text(composed(folder, name, overrides), __doc__))
        return
    if stray and not asks:
        raise UserError(f"cannot read '{stray[0]}': options are written key=value")
    state, multirun = None, bool({"-m", "--multirun"} & set(flags))
    given = override_names(overrides)
    if not asks and multirun:  # refuse what is wrong in any job before the first one starts
        for job_overrides in sweep(overrides):
            config = resolve(folder, name, job_overrides)
            check_files(config)
            if config.nf_ckpt_path:
                raise UserError("nf_ckpt_path resumes one run: leave --multirun out, or use resume=auto")
    elif not asks:
        config = resolve(folder, name, overrides)
        if config.dry_run:
            dry_run(config, given)
            return
        state = resumed_state(config)
        if state is not None:  # in the folder of the run, whatever this call's options would name it
            own = Path(config.nf_ckpt_path).resolve().parent.parent.parent
            overrides = [*overrides, f"hydra.run.dir={json.dumps(str(own), ensure_ascii=False)}"]
    failures: list[BaseException] = []

    def job(values: DictConfig) -> None:
        # hydra would turn these into a traceback and exit code 1
        if any(isinstance(failure, KeyboardInterrupt) for failure in failures):
            return
        try:
            config = judge(values, name)
            if config.dry_run:
                dry_run(config, given)
                return
            experiment(config, Path(HydraConfig.get().runtime.output_dir), given, state or resumed_state(config))
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
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra would print its own mistakes as tracebacks and leave
    try:
        GlobalHydra.instance().clear()
        hydra.main(version_base="1.3", config_path=str(folder), config_name=name)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error).splitlines()[0]) from error
    except OSError as error:
        if disk_full(error):
            raise
        raise UserError(f"cannot write the output folder {error.filename}: {error.strerror}") from error
    finally:
        sys.argv = before
    if failures:
        raise failures[0]


def dry_run(config: Config, given: Iterable[str]) -> None:
    """Check what needs neither data nor training, and print the options as JSON."""
    pick_device(config.device)
    check_files(config)
    for line in without_effect(config, given):
        print(line, file=sys.stderr)
    config, _ = loaded_model(config, given, "cpu")
    resumed_state(config)
    print(json.dumps(config.as_dict(), indent=2))


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
