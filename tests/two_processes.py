"""`Distributed` in one of two processes: sums, gradients, batch normalisation, and no thread left behind."""

from pathlib import Path

import torch

from common.launch import Distributed, StopSignal, normalise_over_processes


def main(argv: list[str]) -> None:
    dist = Distributed.start("cpu")
    assert dist.world == 2 and dist.is_main == (dist.rank == 0)
    rows = torch.full((dist.rank + 1, 2), float(dist.rank))
    together = dist.gather(rows)
    assert together.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]], together
    assert float(dist.sum(float(dist.rank + 1))) == 3.0
    assert float(dist.mean(torch.tensor(2.0 * dist.rank))) == 1.0
    assert dist.any(dist.rank == 1) and not dist.any(False) and not dist.any(StopSignal())
    torch.manual_seed(0)
    model = dist.wrap(torch.nn.Linear(2, 1))
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    model(x[dist.rank : dist.rank + 1]).sum().backward()
    assert torch.allclose(model.module.weight.grad, x.mean(0, keepdim=True))
    images, share, whole = torch.rand(4, 3, 2, 2), torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    mine = slice(2 * dist.rank, 2 * dist.rank + 2)
    assert torch.allclose(normalise_over_processes(share, dist)(images[mine]), whole(images)[mine], atol=1e-6)
    for name, value in whole.state_dict().items():  # the statistics of evaluation too: of the whole batch, unbiased
        assert torch.allclose(share.state_dict()[name], value, atol=1e-6), name
    dist.barrier()
    dist.close()
    threads = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads  # they would run on while the interpreter ends
    print(f"rank {dist.rank} fine")
