"""`common.cuda_graph` without a GPU: a stand-in records calls as a graph would, and replays them."""

import pytest
import torch
from stand_in_graph import StandIn
from torch import Tensor, nn

from common.cuda_graph import MOST, WARM_UP, CudaGraph, detached
from common.errors import UserError
from common.launch import Distributed

CPU = Distributed(torch.device("cpu"))


def problem(kind=StandIn):
    """A regression with dropout, its optimiser, and its step as it is and in graphs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def gradients(x: Tensor, weight: Tensor, power: int) -> tuple[Tensor, Tensor]:
        y = model(x)
        loss = weight * (y - x.sum(1, keepdim=True)).abs().pow(power).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return detached((loss, y))

    return model, optimizer, kind(gradients, model.parameters(), CPU)


def calls() -> list[tuple[Tensor, Tensor, int]]:
    """Twenty batches: every seventh is short, and the power changes."""
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(3 if i % 7 == 6 else 5, 3, generator=rng), torch.rand((), generator=rng), 1 + i // 9 % 2)
            for i in range(20)]  # fmt: skip


def trained(kind) -> tuple[list[Tensor], list[Tensor], CudaGraph]:
    model, optimizer, graph = problem(kind)
    kept = []
    for batch in calls():
        kept.append(graph(*batch))
        optimizer.step()
    return [part for out in kept for part in out], [p.detach() for p in model.parameters()], graph


def test_a_training_in_graphs_is_the_training_without():
    """Losses, kept outputs and weights; batches of another shape and other plain arguments among them."""
    out, weights, graph = trained(StandIn)
    plain_out, plain_weights, plain = trained(CudaGraph)
    assert not plain.active and sum(made.replays for made in graph.made) >= 6
    for one, other in zip([*out, *weights], [*plain_out, *plain_weights], strict=True):
        assert torch.equal(one, other)


def test_real_batches_warm_up_a_kind_and_then_it_is_captured_once():
    model, _, graph = problem()
    x, weight = torch.randn(5, 3), torch.tensor(1.0)
    for _ in range(6):
        graph(x, weight, 1)
    assert graph.order == ["aside"] * WARM_UP + ["captured"] and graph.made[0].replays == 6 - WARM_UP
    graph(x[:2], weight, 1)  # another shape
    graph(x, weight, 2)  # another plain argument
    assert graph.order[-2:] == ["aside"] * 2
    gradients = [p.grad for p in model.parameters()]
    out = graph(x + 1, weight, 1)  # the first kind again, with other numbers
    assert len(graph.made) == 1 and all(p.grad is not g for p, g in zip(model.parameters(), gradients, strict=True))
    expected = problem(CudaGraph)[2](x + 1, weight, 1)
    torch.testing.assert_close(out, expected)


def test_few_kinds_are_kept():
    _, _, graph = problem()
    for power in range(1, MOST + 3):
        for _ in range(WARM_UP + 1):
            graph(torch.randn(5, 3), torch.tensor(1.0), power)
    assert len(graph._kinds) == MOST and len(graph.made) == MOST + 2


@pytest.mark.parametrize("device, world, said", [("cpu", 1, "on cpu"), ("cuda", 2, "in several processes")])
def test_elsewhere_the_step_runs_as_it_is_and_says_so(device, world, said):
    lines = []
    graph = CudaGraph(lambda x: x + 1, (), Distributed(torch.device(device), 0, world), True, lines.append)
    assert graph(1) == 2 and lines == [f"CUDA graph: no effect {said}"]
    CudaGraph(lambda x: x, (), Distributed(torch.device(device), 0, world), False, lines.append)
    assert len(lines) == 1  # not asked for


def test_a_step_that_reads_its_device_is_refused_in_one_line(monkeypatch):
    class Refusing:
        def __init__(self, *_, **__):
            raise RuntimeError("operation not permitted when stream is capturing\nwith a long trace")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Refusing)
    graph = CudaGraph(lambda: None, (), Distributed(torch.device("cuda")))
    assert graph.active
    monkeypatch.setattr(graph, "_aside", lambda call: call())
    for _ in range(WARM_UP):
        graph()
    with pytest.raises(UserError, match=r"^this step cannot be a CUDA graph \(operation not .* leave the option out$"):
        graph()


@pytest.mark.gpu
def test_a_training_in_graphs_on_a_gpu():
    """Random numbers, losses and weights are those of a training without graphs."""
    dist, found = Distributed(torch.device("cuda")), []
    for wanted in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 1)).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)

        def gradients(x: Tensor, model=model, optimizer=optimizer) -> Tensor:
            loss = model(x).square().mean() + torch.rand_like(x).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            return detached(loss)

        step = CudaGraph(gradients, model.parameters(), dist, wanted)
        losses = []
        for i in range(12):
            losses.append(step(torch.randn(7 if i % 5 == 4 else 32, 8, device="cuda")))
            optimizer.step()
        found.append([*losses, *model.state_dict().values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
