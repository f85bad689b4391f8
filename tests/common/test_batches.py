import pytest
import torch
from torch.utils.data import TensorDataset

from common.batches import Batches
from common.errors import UserError


class Memory:
    """Images whose grey level is their index."""

    def __init__(self, n):
        self.targets = torch.arange(n)
        self.images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.images[i], self.targets[i]

    def images_at(self, index):
        return self.images[index]

    def arrays(self):
        return self.images, self.targets


class Noisy(Memory):
    is_random = True

    def __getitem__(self, i):
        return self.images[i].float() + torch.rand(1, 1, 1), self.targets[i]


def targets(batches):
    return [batch[1].tolist() for batch in batches]


@pytest.mark.parametrize("kind", ["direct", "held", "items"])
def test_order_is_a_function_of_seed_and_epoch_and_resumes(kind):
    data = TensorDataset(*Memory(23).arrays()) if kind == "items" else Memory(23)
    batches = Batches(data, 5, seed=3, hold=kind == "held")
    epoch = targets(batches.epoch(2))
    assert len(epoch) == len(batches) == 4
    assert epoch == targets(Batches(data, 5, seed=3).epoch(2))
    assert epoch[3:] == targets(batches.epoch(2, start=3))
    assert epoch != targets(batches.epoch(1))
    assert epoch != targets(Batches(data, 5, seed=4).epoch(2))
    for images, labels in batches.epoch(0):
        assert torch.equal(images.flatten().long(), labels)


def test_last_batch_and_plain_order():
    batches = Batches(Memory(7), 3, shuffle=False, drop_last=False)
    assert targets(batches.epoch(0)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(batches) == 3


def test_ranks_share_each_batch():
    whole = targets(Batches(Memory(22), 6, seed=1, drop_last=False).epoch(0))
    parts = [targets(Batches(Memory(22), 6, seed=1, drop_last=False, rank=r, world=2).epoch(0)) for r in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_random_items_do_not_depend_on_workers_start_or_the_global_stream():
    def draws(start=0, epoch=1, seed=5, **options):
        batches = Batches(Noisy(12), 4, seed=seed, **options)
        return torch.cat([x.flatten() for x, _ in batches.epoch(epoch, start)])

    before = torch.random.get_rng_state()
    alone = draws()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(alone, draws(workers=2))
    assert torch.equal(alone[8:], draws(start=2))
    noise = (alone % 1).tolist()
    assert len(set(noise)) == 12
    # another epoch augments every image anew, and so does another seed
    assert not set(noise) & set((draws(epoch=2) % 1).tolist())
    assert not set(noise) & set((draws(seed=6) % 1).tolist())


def test_a_held_set_is_asked_no_more():
    data, asked = Memory(6), []
    data.images_at = lambda index: asked.append(len(index)) or data.images[index]
    held = targets(Batches(data, 3, hold=True).epoch(0))
    assert not asked
    assert held == targets(Batches(data, 3).epoch(0)) and asked == [3, 3]


def test_a_set_that_draws_is_never_held():
    """Holding it would repeat the first epoch's draws for ever."""
    batches = Batches(Noisy(4), 4, hold=True)
    first, second = (next(batches.epoch(epoch))[0].sort(0).values for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_refusals():
    with pytest.raises(UserError, match="multiple of the 2 process"):
        Batches(Memory(10), 3, world=2)
    with pytest.raises(UserError, match="exceeds the 10 items"):
        Batches(Memory(10), 11)
    with pytest.raises(UserError, match="empty"):
        Batches(Memory(0), 1)
