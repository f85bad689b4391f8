"""Each paper's training with its option for CUDA graphs, with a stand-in for them: the same tables as without, and a
run begun in graphs goes on without.
"""

import csv
import importlib
import signal

import pytest
from front.children import TRAINERS, finish, start, train
from front.commands import EPOCH, PAPERS, output, resume, run

OPTION = {
    "lbae": ["cuda_graph=1"],
    "glancenet": ["--cuda_graph", "true"],
    "latent_flow": ["--cuda-graph"],
    "inv_flow": ["--cuda_graph"],
    "nfpi": ["cuda_graph=1"],
}
LOOPS = {"lbae": "lbae.train", "glancenet": "glancenet.main", "latent_flow": "latent_flow.train",
         "inv_flow": "inv_flow.train.experiment", "nfpi": "nfpi.train"}  # fmt: skip


def train_in_graphs(paper: str, argv: list[str], folder: str, stop: tuple[int, int]):
    """`train` with `StandIn` in the paper's loop; says what was captured and replayed."""
    from stand_in_graph import Replayed, StandIn

    importlib.import_module(TRAINERS[paper])
    importlib.import_module(LOOPS[paper]).CudaGraph = StandIn
    replay = Replayed.replay

    def counted(self):
        replay(self)
        print("replayed", flush=True)

    Replayed.replay = counted
    train(paper, argv, folder, stop)


def table(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("paper", PAPERS)
def test_a_run_begun_in_graphs_is_the_run_without(tmp_path, paper):
    assert run(paper, tmp_path / "plain") == 0, output(tmp_path / "plain")
    at = ((EPOCH + 2) * PAPERS[paper].step, int(signal.SIGTERM))
    words = [*PAPERS[paper].command(0), *OPTION[paper]]
    code = finish(start(train_in_graphs, paper, words, str(tmp_path / "graphs"), at))
    assert code == 130 and "replayed" in output(tmp_path / "graphs"), output(tmp_path / "graphs")
    assert resume(paper, tmp_path / "graphs", killed=False) == 0, output(tmp_path / "graphs")
    for name in (name for name in PAPERS[paper].tables if name.endswith(".csv")):
        one, other = table(tmp_path / "plain" / name), table(tmp_path / "graphs" / name)
        assert len(one) == len(other) > 0
        for a, b in zip(one, other, strict=True):
            assert a.keys() == b.keys()
            for column in a:
                assert a[column] == b[column] or float(a[column]) == pytest.approx(float(b[column]), rel=1e-4), column


@pytest.mark.parametrize("paper", PAPERS)
def test_on_a_cpu_the_option_says_that_it_has_no_effect(tmp_path, paper):
    assert run(paper, tmp_path, *OPTION[paper]) == 0
    assert output(tmp_path).count("CUDA graph: no effect on cpu") == 1
