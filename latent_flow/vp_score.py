"""VP score (variation predictability, Zhu et al. 2020): can a small network tell which flow moved a pair of images?

Pairs dec(z_0), dec(z_T) with a uniformly drawn flow; a classifier sees a small share of them and is tested on the rest.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from latent_flow.model import LatentFlow
from latent_flow.rollout import constant_coefficients, rollout


@torch.no_grad()
def make_pairs(model: LatentFlow, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` pairs of uint8 images side by side in channels (n, 2C, N, N) on the CPU, and their flows (n,)."""
    config = model.config
    device = next(model.parameters()).device
    flows = model.stacked(config.steps)
    images, labels = [], []
    for start in range(0, count, 250):
        size = min(250, count - start)
        z = torch.randn(size, config.latent_size, generator=generator).to(device)
        label = torch.randint(config.flows, (size,), generator=generator)
        c = constant_coefficients(label.to(device), config.flows, config.steps, z.dtype)
        path = rollout(flows, z, c, c if model.support_sets.rotation is not None else None)
        ends = torch.cat([model.vae.inference(path.z[0]), model.vae.inference(path.z[-1])], dim=1)
        images.append((ends * 255).round().byte().cpu())
        labels.append(label)
    return torch.cat(images), torch.cat(labels)


def classifier(channels: int, size: int, count: int) -> nn.Sequential:
    """Convolutions k4 s2 p1 of 32, 64, 128, 256 channels (as many as fit the image), then one linear layer."""
    layers: list[nn.Module] = []
    before = channels
    for width in (32, 64, 128, 256):
        if size < 2:
            break
        layers += [nn.Conv2d(before, width, 4, 2, 1), nn.ReLU()]
        before, size = width, size // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * size * size, count))


def fit_and_test(
    pairs: Tensor, labels: Tensor, share: float, seed: int, count: int, device, epochs: int = 100
) -> float:
    """Test accuracy of a classifier trained on `share` of the pairs, with early stopping on a tenth of those."""
    order = torch.from_numpy(np.random.default_rng([seed, 7]).permutation(len(pairs)))
    shown = max(int(share * len(pairs)), 20)
    held = max(shown // 10, 2)
    stop_rows, train_rows, test_rows = order[:held], order[held:shown], order[shown:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = classifier(pairs.shape[1], pairs.shape[-1], count).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    shuffle = torch.Generator().manual_seed(seed)

    def logits(rows: Tensor) -> Tensor:
        return torch.cat([net(pairs[part].to(device).float() / 255) for part in rows.split(500)])

    best, best_loss, patience = copy.deepcopy(net.state_dict()), float("inf"), 0
    for _ in range(epochs):
        for part in train_rows[torch.randperm(len(train_rows), generator=shuffle)].split(64):
            loss = F.cross_entropy(net(pairs[part].to(device).float() / 255), labels[part].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            loss = F.cross_entropy(logits(stop_rows), labels[stop_rows].to(device)).item()
        patience = 0 if loss < best_loss else patience + 1
        if loss < best_loss:
            best, best_loss = copy.deepcopy(net.state_dict()), loss
        if patience == 10:
            break
    net.load_state_dict(best)
    with torch.no_grad():
        return (logits(test_rows).argmax(-1).cpu() == labels[test_rows]).float().mean().item()


def vp_score(
    model: LatentFlow, pairs: int = 40_000, shares: tuple[float, ...] = (0.01, 0.1), seeds: int = 3, seed: int = 0
) -> dict:
    """VP scores at each share of shown pairs: mean and deviation over `seeds` classifiers; chance is 1/K.

    Raises UserError below 100 pairs.
    """
    if pairs < 100:
        raise UserError(f"a VP score needs at least 100 pairs (got {pairs})")
    device = next(model.parameters()).device
    images, labels = make_pairs(model, pairs, torch.Generator().manual_seed(seed))
    result: dict = {"pairs": pairs, "chance": 1 / model.config.flows, "seeds": seeds, "start": "z_0 ~ N(0, I)"}
    result["classifier"] = (
        "conv k4 s2 32-64-128-256 + linear, Adam 1e-3, batch 64, early stop on 10 % of the shown pairs"
    )
    for share in shares:
        scores = [fit_and_test(images, labels, share, seed + i, model.config.flows, device) for i in range(seeds)]
        result[f"share_{share}"] = {"mean": float(np.mean(scores)), "std": float(np.std(scores))}
    return result
