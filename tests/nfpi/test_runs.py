"""What a user meets off the documented path: resuming, own data, checkpoints of other shape, signals, the device."""

import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from option_table import run_inside
from torch.overrides import TorchFunctionMode

from common import training
from common.checkpoint import load_state, load_weights, read_json, save_state
from common.released import released
from nfpi import cnn, data, main, sample
from nfpi.conditional import STATE_KIND, ConditionalFlow
from nfpi.ema import PowerEma
from nfpi.model import FlowConfig, MultiScaleFlow
from nfpi.train import FlowTraining

ROOT = Path(main.__file__).resolve().parents[1]
DIGITS = [
    "--config_path=___configs/digits", "--config-name=smoke", "device=cpu", "num_flows=[1,1]", "hidden_channels=[4,4]",
    "train.batch_size=40", "train.init_batch_size=60", "dataset_info.items_per_class_train=12",
    "dataset_info.items_per_class_val=12", "save_every_n_epochs=0", "temperature_sampling_for_results=0",
    "test_every_n_epochs=5",
]  # fmt: skip
FLOW_ONLY = ["test_nf_alone=0", "train_classifier=0"]
BASE = Path("outputs/digits/smoke/1000_1000/_")
pytestmark = pytest.mark.usefixtures("undrawn", "narrow_cnn")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words, code=0):
    found = run_inside(main.main, [*DIGITS, *words])
    assert found.code == code, found
    return found


@contextmanager
def stopped_after(monkeypatch, steps):
    """The run in this block is stopped, as by a signal, after so many steps."""

    class Stop(training.StopSignal):
        count = 0

        def __bool__(self):
            Stop.count += 1
            return Stop.count == steps

    with monkeypatch.context() as patch:
        patch.setattr(training, "StopSignal", Stop)
        yield


def newest(folder):
    return max((folder / "checkpoints").glob("state_*.pt"))


def metrics(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- resuming


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_resumed_run_is_the_same_run():
    run(*FLOW_ONLY, "train.epochs=1")
    version, before = BASE / "version_0", snapshot(Path("outputs"))
    state = newest(version)
    changed = {"val.gmm.fpi_info.lambda_fpi_mu": 5, "train.batch_size": 7, "seed": 3, "bits": 5,
               "dataset_info.items_per_class_train": 30}  # fmt: skip
    words = [f"{name}={value}" for name, value in changed.items()]
    found = run(*FLOW_ONLY, f"nf_ckpt_path={state}", "val.gmm.fpi_info.lambda_fpi_sigma=5", *words, code=2)
    for name, value in changed.items():
        assert f"{name} (" in found.err and f"{value} here)" in found.err
    assert snapshot(Path("outputs")) == before  # nothing written, no other folder
    more = ("train.epochs=2", "train.lr=0.02", "extra=other_name")
    found = run(*FLOW_ONLY, f"nf_ckpt_path={state}", *more)
    assert "changed train.epochs: 1 -> 2" in found.err and "changed train.lr: 0.01 -> 0.02" in found.err
    assert not (BASE.parent / "other_name").exists() and not (BASE / "version_1").exists()
    assert read_json(version / "config.json")["train"]["epochs"] == 2
    rows = [row for row in metrics(version) if row["loss"]]
    assert [row["step"] for row in rows] == [str(i) for i in range(1, 7)]
    assert float(rows[3]["lr"]) == pytest.approx(0.02 * 4 / 10)  # the warm-up to the new rate
    stray = Path("elsewhere.pt")
    stray.write_bytes(newest(version).read_bytes())
    found = run(*FLOW_ONLY, f"nf_ckpt_path={stray}", "train.epochs=2", "train.lr=0.02", code=2)
    assert "checkpoints" in found.err and not Path("config.json").exists()


def test_resume_auto_goes_on_or_starts(monkeypatch):
    run(*FLOW_ONLY, "train.epochs=3", "extra=whole")
    auto = [*FLOW_ONLY, "train.epochs=3", "resume=auto"]
    with stopped_after(monkeypatch, 5):
        found = run(*auto, code=130)
    assert "resume=auto" in found.err and "nf_ckpt_path=" in found.err
    run(*FLOW_ONLY, "train.epochs=3", "seed=7")  # another command in the same place, finished
    run(*auto)
    assert {p.name for p in BASE.glob("version_*")} == {"version_0", "version_1"}
    parts, whole = (load_weights(folder / "version_0/checkpoints/flow.safetensors")[0]
                    for folder in (BASE, BASE.with_name("whole")))  # fmt: skip
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
    assert metrics(BASE / "version_0") == metrics(BASE.with_name("whole") / "version_0")
    before = snapshot(BASE / "version_0")
    assert "is finished" in run(*auto).out
    assert snapshot(BASE / "version_0") == before
    run(*FLOW_ONLY, "train.epochs=4", "resume=auto")  # more epochs: the same run goes on
    assert max(int(row["epoch"]) for row in metrics(BASE / "version_0")) == 3


def test_resume_auto_takes_the_folder_that_the_engine_made():
    (BASE / "version_0").mkdir(parents=True)  # for version_0/results.json, which its manifest names
    run(*FLOW_ONLY, "train.epochs=1", "resume=auto")
    found = read_json(BASE / "version_0/results.json")
    assert found["finished"] and found["folder"] == str(BASE / "version_0")  # no path of this machine
    assert not (BASE / "version_1").exists()
    (BASE / "version_1").mkdir()
    run(*FLOW_ONLY, "train.epochs=1", "seed=7")  # without resume: a folder of its own
    assert not list((BASE / "version_1").iterdir()) and (BASE / "version_2/results.json").is_file()


def test_resume_auto_starts_again_what_stopped_before_its_first_state():
    run(*FLOW_ONLY, "train.epochs=1")
    version = BASE / "version_0"
    for path in (version / "results.json", *(version / "checkpoints").iterdir()):
        path.unlink()
    run(*FLOW_ONLY, "train.epochs=1", "resume=auto")
    assert (version / "results.json").exists() and not (BASE / "version_1").exists()


@pytest.mark.parametrize("steps", [4, 6])  # inside epoch 1; after its last step, before the work at its end
def test_states_of_the_earlier_layout_go_on(monkeypatch, steps):
    run(*FLOW_ONLY, "train.epochs=3", "extra=whole", "val.gmm.merge_datasets_after=2")
    open_epoch = FlowTraining.epoch_figures
    with stopped_after(monkeypatch, steps), monkeypatch.context() as patch:
        if steps == 6:  # the state that the earlier loop wrote here: all batches of epoch 1, and no work at its end

            def stop_here(self):
                if self.epoch == 1:
                    self.flush()
                    self._next = training.Place(self.step, 1, 120)
                    self.save()
                    raise KeyboardInterrupt
                return open_epoch(self)

            patch.setattr(FlowTraining, "epoch_figures", stop_here)
        run(*FLOW_ONLY, "train.epochs=3", "val.gmm.merge_datasets_after=2", code=130)
    path = newest(BASE / "version_0")
    state = load_state(path, STATE_KIND)
    place, sums = state.pop("place"), state.pop("extra")["sums"]
    config = state.pop("options")
    for name in ("rng", "tf32", "cuda_graph", "resume", "dry_run"):
        (config if name in config else state).pop(name)  # which the earlier program did not have
    earlier = {"epoch": place["epoch"], "batch": place["images"] // 40, "step": place["step"], "sums": sums}
    save_state(path, STATE_KIND, **state, **earlier, config=config)
    run(*FLOW_ONLY, "train.epochs=3", "val.gmm.merge_datasets_after=2", f"nf_ckpt_path={path}")
    parts, whole = (load_weights(folder / "version_0/checkpoints/flow.safetensors")[0]
                    for folder in (BASE, BASE.with_name("whole")))  # fmt: skip
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
    assert metrics(BASE / "version_0") == metrics(BASE.with_name("whole") / "version_0")


def test_two_processes_do_not_share_a_run():
    run(*FLOW_ONLY, "train.epochs=1")
    state = newest(BASE / "version_0")
    with holding(BASE / "version_0"):
        found = run(*FLOW_ONLY, "train.epochs=2", f"nf_ckpt_path={state}", code=2)
    assert "is at work in" in found.err


@contextmanager
def holding(folder):
    lock = training.FolderLock(folder)
    yield
    lock.release()


# ---------------------------------------------------------------- data and checkpoints


def test_held_out_images_join_the_training_when_the_gaussians_are_fixed():
    run(*FLOW_ONLY, "val.gmm.use_train_dataset=0", "train.epochs=3", "val.gmm.merge_datasets_after=2",
        "dataset_info.items_per_class_val=8")  # fmt: skip
    rows = [int(row["epoch"]) for row in metrics(BASE / "version_0") if row["loss"]]
    assert [rows.count(epoch) for epoch in range(3)] == [3, 3, 5]  # 120 images, then 200, in batches of 40


MINE = "{ch: 3, h: 8, w: 8, train_size: 30, num_classes: 3, train_ratio: 0.9, augmentation: cifar, cnn: cifar}"


def own_set(root):
    rng = torch.Generator().manual_seed(0)
    part = {"data": torch.randint(0, 256, (60, 3, 8, 8), generator=rng, dtype=torch.uint8),
            "targets": torch.arange(60) % 3}  # fmt: skip
    data.write_pickle(root / "mine/mine.pickle", {"train": part, "test": part, "classes": ["a", "b", "c"]})


def test_a_data_set_of_one_s_own():
    own_set(Path("sets"))
    words = [f"++dataset_info.mine={MINE}", "dataset_name=mine", "data_path=sets", "train.epochs=1",
             "train.warmup_steps=100000", "only_T=1", "classification.stem=imagenet"]  # fmt: skip
    found = run(*words, code=2)
    assert "classification.mine is missing" in found.err and not Path("outputs").exists()
    run(*words, "++classification.mine={epochs: 1, batch_size: 10, imgs_per_class: 0}")
    results = read_json("outputs/mine/smoke/1000_1000/_/version_0/results.json")
    assert results["finished"] and set(results["cnn"]) == {"1.0"} and 0 < results["nf"]["bpd"] < 20
    assert "classes" in run(*words[:1], "++dataset_info.mine.num_classes=0", "dataset_name=mine", code=2).err


def test_a_missing_set_of_one_s_own_names_its_place_and_the_command():
    words = [f"++dataset_info.mine={MINE}", "++classification.mine={epochs: 1, batch_size: 10, imgs_per_class: 0}"]
    found = run(*words, "dataset_name=mine", "data_path=sets", code=2)
    assert "sets/mine/mine.pickle" in found.err and "extract_dataset.py mine --folder" in found.err


def test_pickled_sets_are_found_from_the_script_s_own_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DATA_ROOT", raising=False)
    own_set(tmp_path / "repository")
    monkeypatch.setattr("common.datasets.REPOSITORY_DATA", tmp_path / "repository")
    monkeypatch.chdir(ROOT / "nfpi")
    assert len(data.load_split("mine", None, "train")) == 60


def test_a_loaded_flow_keeps_its_architecture_and_bits():
    run(*FLOW_ONLY, "train.epochs=1", "bits=5")
    weights = BASE / "version_0/checkpoints/flow.safetensors"
    load = [f"nf_load_path={weights}", "train_nf=0", "train_classifier=0", "extra=test"]
    small = ["num_flows=[1,1]", "hidden_channels=[4,4]"]
    for word in ("bits=8", "num_flows=[2,1]", "level_method=spcb", "conv_type=standard", "use_attention_after=1"):
        found = run_inside(main.main, [*DIGITS[:3], *load, *small, word])
        assert found.code == 2 and word.split("=")[0] in found.err and "was made with" in found.err, word
    found = run_inside(main.main, ["--config-path=___configs/digits", "--config-name=mean", "device=cpu", *load])
    assert found.code == 0, found.err  # the file's own settings are no contradiction
    config = read_json(next(Path("outputs").glob("digits/mean/*/test/version_0/config.json")))
    assert config["bits"] == 5 and config["num_flows"] == [1, 1] and config["hidden_channels"] == [4, 4]


def test_finished_figures_are_kept_and_resume_does_the_rest(monkeypatch):
    trained = []

    def fails_once(model, config, images, test, temperature, *rest):
        trained.append(temperature)
        if trained == [1.2, 1.1]:
            raise KeyboardInterrupt
        return temperature / 2

    monkeypatch.setattr(cnn, "train_cnn", fails_once)
    words = ["train.epochs=1", "only_T=0", "num_imgs_scale=0.05", "resume=auto"]
    run(*words, code=130)
    first = read_json(BASE / "version_0/results.json")
    assert first["cnn"] == {"1.2": 0.6} and first["nf"]["bpd"] > 0 and first["finished"] is False
    monkeypatch.setattr(main, "repeated", None)  # the test of the flow is not repeated
    run(*words)
    results = read_json(BASE / "version_0/results.json")
    assert trained == [1.2, 1.1, 1.1, 1.0, 0.9, 0.8, 0.7] and results["finished"] and results["nf"] == first["nf"]
    assert results["cnn"] == {f"{t:.1f}": t / 2 for t in trained if t}
    run(*words, "only_T=1", "T=0.75")  # a stage that has not run, and only that
    assert trained[7:] == [0.75] and not (BASE / "version_1").exists()


def test_a_changed_option_repeats_the_stages_that_depend_on_it(monkeypatch):
    trained = []
    monkeypatch.setattr(cnn, "train_cnn", lambda *how: trained.append(how[4]) or 0.5)
    run("train.epochs=1", "only_T=1", "resume=auto")
    run("train.epochs=1", "only_T=1", "resume=auto")
    assert len(trained) == 1
    run("train.epochs=2", "only_T=1", "resume=auto")
    assert len(trained) == 2 and len(metrics(BASE / "version_0")) > 6


def test_a_test_of_weights_is_resumed_and_never_taken_for_a_training():
    run(*FLOW_ONLY, "train.epochs=1")
    weights = BASE / "version_0/checkpoints/flow.safetensors"
    load = ["train_nf=0", f"nf_load_path={weights}", "train_classifier=0", "resume=auto"]
    run(*load)
    first = read_json(BASE / "version_1/results.json")
    assert first["nf"]["bpd"] > 0 and "is finished" in run(*load).out
    run(*FLOW_ONLY, "train.epochs=2", "resume=auto")
    assert len([row for row in metrics(BASE / "version_0") if row["loss"]]) == 6  # not in the folder of the test
    assert read_json(BASE / "version_1/results.json") == first
    run(*load)  # the weights are others now
    assert read_json(BASE / "version_1/results.json")["nf"]["bpd"] != first["nf"]["bpd"]


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(
    "script", ["main", "sample", "synthetic_2d", "convert_checkpoint", "extract_dataset", "benchmark"]
)
def test_a_signal_during_the_imports_ends_with_130(script):
    child = subprocess.Popen([sys.executable, f"{script}.py", "--help"], cwd=ROOT / "nfpi", stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)  # fmt: skip
    status, caught = Path(f"/proc/{child.pid}/status"), 0
    while not caught & 1 << signal.SIGTERM - 1:  # until the first line that matters has run
        caught = int(next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))[7:], 16)
        time.sleep(0.005)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 130


def test_a_signal_in_the_last_evaluation_ends_with_130(monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(main, "repeated", interrupted)
    found = run("train.epochs=1", "train_classifier=0", code=130)
    assert "Traceback" not in found.err and (BASE / "version_0/checkpoints/flow.safetensors").exists()


# ---------------------------------------------------------------- the device


class HostReads(TorchFunctionMode):
    """Counts where Python asks for a tensor's values; copies that were started without waiting do not count."""

    READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        result = function(*args, **(kwargs or {}))
        if name == "to" and (kwargs or {}).get("non_blocking"):
            result.arrived = True
        if name in self.READS and not getattr(args[0], "arrived", False):
            self.found.append(name)
        return result


def test_a_training_step_asks_the_device_for_nothing(monkeypatch):
    """Forward, loss, backward, optimiser and average of a step on a pretended GPU."""
    monkeypatch.setattr(torch.cuda, "Event", lambda: type("Event", (), {"record": int, "synchronize": int})())
    torch.manual_seed(0)
    flow = MultiScaleFlow(FlowConfig(channels=1, height=8, width=8, flows=(2, 1), blocks=(1, 1), hidden=(4, 4)))
    flow.reach = 0.04
    optimizer, ema = torch.optim.Adamax(flow.parameters(), 0.01, foreach=True), PowerEma(flow)
    x = torch.rand(6, 1, 8, 8)
    losses = []
    for _ in range(3):
        with HostReads() as reads:
            latent = flow(x)
            loss = latent.z.square().sum(1).mean() - latent.log_det.mean()
            optimizer.zero_grad()
            loss.backward()
        with HostReads() as average:
            ema.update(flow)
        assert not reads.found and average.found in ([], ["__float__"])  # the decay's own number lives on the host
        optimizer.step()
        losses.append(float(loss.detach()))
    exact = MultiScaleFlow(flow.config)
    exact.load_state_dict(flow.state_dict())
    torch.testing.assert_close(flow(x).log_det, exact(x).log_det, rtol=1e-5, atol=1e-5)  # a late bound is a bound
    assert losses[2] < losses[0]


def test_rows_wait_on_a_device_and_none_is_lost(monkeypatch):
    """With rows that wait, the record is the same as with rows that are written at once."""
    run(*FLOW_ONLY, "train.epochs=3", "extra=whole")

    def wait(self, loss, lr, z, y, count, real=FlowTraining.log_step):
        self.flush = lambda: None
        real(self, loss, lr, z, y, count)
        del self.flush

    monkeypatch.setattr(FlowTraining, "log_step", wait)
    with stopped_after(monkeypatch, 5):
        run(*FLOW_ONLY, "train.epochs=3", code=130)
    run(*FLOW_ONLY, "train.epochs=3", "resume=auto")
    assert metrics(BASE / "version_0") == metrics(BASE.with_name("whole") / "version_0")


def test_tf32_would_move_the_released_flow_s_likelihood(monkeypatch):
    """Why full float32 is the default: convolutions whose inputs are rounded to 10 bits of mantissa, as on a GPU."""
    model = ConditionalFlow.load(released("nfpi", sample.RELEASE).path)
    images, y = model.sample(torch.arange(10).repeat(4), 0.8, torch.Generator().manual_seed(0))
    x = model.input(images, y, 0.5)
    convolution = torch.nn.functional.conv2d

    def rounded(t):
        return ((t.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    with torch.no_grad():
        exact, errors = model.flow.double()(x.double()).log_det, {}
        for name in ("float32", "tf32"):
            if name == "tf32":
                monkeypatch.setattr(
                    torch.nn.functional,
                    "conv2d",
                    lambda x, w, *more, **how: convolution(rounded(x), rounded(w), *more, **how),
                )
            errors[name] = float((model.flow.float()(x).log_det - exact).abs().max())
    assert errors["float32"] < 0.005 and errors["tf32"] > 0.02, errors


def test_full_float32_is_the_default():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    run(*FLOW_ONLY, "train.epochs=1")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    run(*FLOW_ONLY, "train.epochs=1", "tf32=1")
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    weights = BASE / "version_0/checkpoints/flow.safetensors"
    assert run_inside(sample.main, ["--weights", str(weights), "--per-class", "1", "--device", "cpu"]).code == 0
    assert not torch.backends.cudnn.allow_tf32
