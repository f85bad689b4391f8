"""The shares of a step, on a clock that the test turns."""

import pytest
import torch

from common import profile
from common.cuda_graph import CudaGraph
from common.errors import UserError
from common.launch import Distributed
from common.options import Options
from common.training import Training


class Batches:
    """`n` batches an epoch, one of which takes a second to come."""

    batch_size = 1

    def __init__(self, n: int, tick):
        self.n, self.tick = n, tick

    def __len__(self) -> int:
        return self.n

    def epoch(self, epoch: int, start: int = 0):
        for i in range(start, self.n):
            self.tick(1)
            yield i


def trained(folder, n: int, tick) -> None:
    """Two epochs of steps with 5 s in the network, 3 in the optimiser, 1 elsewhere, and a long end of an epoch."""
    model, dist = torch.nn.Linear(1, 1), Distributed(torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.register_step_post_hook(lambda *_: tick(3))
    step = CudaGraph(lambda: tick(5), model.parameters(), dist, False)
    with Training(folder, "test", Options(), dist, tensorboard=False) as training:
        for _ in training.steps(Batches(n, tick), epochs=2):
            step()
            optimizer.step()
            tick(1)
            if training.epoch_ends:
                tick(1000)


@pytest.fixture
def tick(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(profile, "clock", lambda: seconds[0])

    def turn(by: float) -> None:
        seconds[0] += by

    return turn


def test_every_part_has_its_share_and_the_end_of_an_epoch_none(tmp_path, tick):
    with profile.Profile() as found:
        trained(tmp_path, 6, tick)
    count, seconds, shares = found.shares()
    assert (count, seconds) == (2 * 5 - profile.FIRST, 10.0)
    assert shares == pytest.approx({"networks": 0.5, "optimiser": 0.3, "batch": 0.1, "rest": 0.1})


def test_a_training_is_itself_again(tmp_path, tick):
    steps, call = Training.steps, CudaGraph.__call__
    with pytest.raises(ZeroDivisionError), profile.Profile() as found:
        trained(tmp_path, 1, lambda by: 1 / 0)
    assert (Training.steps, CudaGraph.__call__) == (steps, call)
    with pytest.raises(UserError, match="no step to measure"):
        found.shares()


@pytest.mark.parametrize("words", [[], ["nope"], ["common.errors"], ["../x.py"]])
def test_words_that_name_no_training_are_one_line(words):
    with pytest.raises(UserError, match="is no module of a training"):
        profile.main(words)
