"""`wandb` of every paper that offers it: where it is missing, what it is given, and its own offline mode.

A stand-in with wandb's documented behaviour notes what it is given, so that this is judged where wandb is not
installed; where it is, the same commands run with it, offline.
"""

import csv
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import pytest
from option_table import run_inside

from common.errors import UserError
from common.run import Run

INV_FLOW = "--smoke --block_size 1 --n_train 100 --n_test 30 --epochs 2 --n_samples 4 --log_interval 1 --wandb "
GLANCENET = (
    "--alg GlanceNet --dset_name sprites --sprites_sizes 3 1 1 3 3 --encoder ShallowGaussianLinear --z_dim 7 "
    "--decoder ShallowLinear --batch_size 5 --warmup_epochs 0 --max_iter 3 --all_iter 1 --file_save false "
    "--use_wandb true --log_dir logs --ckpt_dir checkpoints --train_output_dir pictures --dset_dir . --name one "
    "--out_path one"
)
NFPI = (
    "--config-path=___configs/digits --config-name=smoke num_flows=[1,1] hidden_channels=[4,4] train.batch_size=40 "
    "train.init_batch_size=60 dataset_info.items_per_class_train=12 dataset_info.items_per_class_val=12 "
    "save_every_n_epochs=0 temperature_sampling_for_results=0 only_T=1 num_imgs_scale=0.015 "
    "classification.stem=imagenet classification.digits.epochs=2 classification.digits.batch_size=10 wandb=mine"
)
LBAE = (
    "dataset=digits width=2 zsize=24 batch_size=16 batch_size_test=12 epochs_max=2 dec_in_channels=4 train_images=96 "
    "test_images=24 exp=exp wandb=mine"
)
# the script, its words, the project, and the folders of its runs
COMMANDS = {
    "lbae": ("lbae.mnist", f"{LBAE} device=cpu", "mine", 1),
    "glancenet": ("glancenet.main", f"{GLANCENET} --device cpu", "glancenet", 1),
    "inv_flow": ("inv_flow.inv_flow_mnist", f"{INV_FLOW} --wandb_project mine --out run --device cpu", "mine", 1),
    "nfpi": ("nfpi.main", f"{NFPI} device=cpu", "mine", 2),  # the flow, and a CNN on its images
}


class NotLoggedIn(Exception):
    pass


class StandIn(types.ModuleType):
    """What wandb's documentation says of `init`, `log` and `finish`."""

    Error = NotLoggedIn

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs, self.offline = [], True

    def init(self, reinit="default", **how):
        if not self.offline:
            raise NotLoggedIn("No API key configured. Use `wandb login` to log in.")
        active = [run for run in self.runs if not run.finished]
        if active and reinit != "create_new":
            return active[-1]
        self.runs.append(types.SimpleNamespace(how=how, rows=[], finished=False))
        run = self.runs[-1]
        run.log, run.finish = (
            (lambda values, step: self.log(run, values, step)),
            lambda: vars(run).update(finished=True),
        )
        return run

    @staticmethod
    def log(run, values, step):
        assert not run.finished
        if not run.rows or step >= run.rows[-1][0]:  # a step that is past is dropped
            run.rows.append((step, values))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_paper(paper: str):
    name, words, *_ = COMMANDS[paper]
    return run_inside(importlib.import_module(name).main, words.split())


@pytest.mark.parametrize("paper", COMMANDS)
def test_where_it_is_missing_one_line_says_so_and_nothing_is_written(paper, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now raises ImportError
    found = run_paper(paper)
    assert found.code == 2 and "wandb" in found.err and "pip install wandb, or leave the option out" in found.err
    assert len(found.err.strip().splitlines()) == 1 and list(here.iterdir()) == []


@pytest.mark.parametrize("paper", COMMANDS)
def test_every_run_gives_it_its_rows(paper, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", client := StandIn())
    assert run_paper(paper).code == 0
    _, _, project, number = COMMANDS[paper]
    assert len({run.how["dir"] for run in client.runs}) == len(client.runs) == number
    for run in client.runs:
        assert run.finished and run.how["project"] == project
        with open(Path(run.how["dir"]) / "metrics.csv", newline="") as file:
            written = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        assert written == [{"step": float(step), **values} for step, values in run.rows]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb, which is optional, is not installed")
@pytest.mark.parametrize("paper", COMMANDS)
def test_its_own_offline_mode(paper, here, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run_paper(paper).code == 0
    records = list(here.rglob("wandb/offline-run-*/*.wandb"))
    assert len(records) == COMMANDS[paper][3]
    assert all((record.parents[2] / "metrics.csv").is_file() and record.stat().st_size for record in records)
    said = "".join(capfd.readouterr())
    assert "ignored" not in said and "WARNING" not in said


def test_what_does_not_start_is_one_line_and_the_earlier_run_stays(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", client := StandIn())
    with Run("run", {}, wandb="mine") as run:
        run.log(1, loss=0.5)
    client.offline = False
    with pytest.raises(UserError, match=r"wandb does not start \(No API key .* log in, set WANDB_MODE=offline"):
        Run("run", {}, wandb="mine", overwrite=True)
    assert "0.5" in Path("run/metrics.csv").read_text()
