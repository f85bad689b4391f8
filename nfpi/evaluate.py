"""The flow on the test set: bits a dimension, accuracy of Bayes' rule."""

import numpy as np
import torch

from common.launch import Distributed
from common.run import Run
from nfpi.conditional import ConditionalFlow, marginal_nll
from nfpi.config import Config
from nfpi.data import Images, Stream, Use
from nfpi.gaussians import bits_per_dim, top_k_correct


def test_stream(images: Images, config: Config, dist: Distributed) -> Stream:
    """The test images in batches, without random transforms."""
    batch_size = dist.world * max(1, config.test.batch_size // dist.world)
    return Stream(images, config, dist, Use.TEST, batch_size)


@torch.no_grad()
def evaluate(model: ConditionalFlow, stream: Stream, dist: Distributed, repeat: int = 0) -> dict[str, float]:
    """Test set figures: `bpd` = -log2 p(x | y)/D of the true class, `bpd_marginal` = -log2 p(x)/D under a uniform class
    prior, `acc` and `top5` of Bayes' rule. One draw of dequantisation noise, another for every `repeat`.

    Without classes in the model (`one`): `bpd` only.
    """
    totals = torch.zeros(5, dtype=torch.float64)  # images, nats given the class, nats, correct, in the top five
    with model.evaluating():
        for x, y, noise, _ in stream.epoch(repeat):
            if model.knows_classes:
                scores, labels = model.scores(x, noise).cpu(), y.cpu()
                given = -scores.gather(1, labels[:, None])[:, 0]
                hits = [top_k_correct(scores, labels, k) for k in (1, 5)]
                figures = (given, marginal_nll(scores), *hits)
            else:
                nll = model.nll(x, y, noise)[0].cpu()
                figures = (nll, nll, torch.zeros_like(nll), torch.zeros_like(nll))
            totals += torch.stack([torch.tensor(len(y), dtype=torch.float64), *(f.double().sum() for f in figures)])
    totals = dist.sum(totals.to(dist.device) if dist.world > 1 else totals).cpu()
    means = totals[1:] / totals[0]
    bits = bits_per_dim(means[:2], model.dim).tolist()
    if not model.knows_classes:
        return {"bpd": bits[0]}
    return {"bpd": bits[0], "bpd_marginal": bits[1], "acc": float(means[2]), "top5": float(means[3])}


def repeated(model: ConditionalFlow, stream: Stream, repeats: int, dist: Distributed, run: Run) -> dict[str, float]:
    """Mean and standard deviation of the test figures over `repeats` draws of the dequantisation noise."""
    rows = [evaluate(model, stream, dist, repeat) for repeat in range(repeats)]
    figures: dict[str, float] = {"repeats": len(rows)}
    for name in rows[0]:
        values = [row[name] for row in rows]
        figures[name] = float(np.mean(values))
        figures[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    run.info(f"test over {len(rows)} draw(s): " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
    return figures
