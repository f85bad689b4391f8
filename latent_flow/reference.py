"""The published training step, transcribed plainly: the `_ref` of the fast step, for tests and the benchmark.

Nested autograd for every derivative of a potential, one decoder call a frame, one index-encoder call a pair, a Python
loop over flows, vectorised Jacobians for divergences, convolutions as convolutions. Same formulas as
`training_step(..., objective "upstream")`; only the order of the work differs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_flow.encoders import ImageVAE, gumbel_softmax, relaxed_bernoulli
from latent_flow.fields import PotentialMLP, RotationMLP, sinusoidal_embedding
from latent_flow.model import LatentFlow, Noise
from latent_flow.objective import normal_log_prob, upstream_spike_loss
from latent_flow.spikes import laplace_kl, slab_statistics


def layers_ref(layers, x: Tensor) -> Tensor:
    """Run a stack of layers with plain convolutions in place of the matrix products."""
    for layer in layers:
        if isinstance(layer, torch.nn.ConvTranspose2d):
            x = F.conv_transpose2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
        elif isinstance(layer, torch.nn.Conv2d):
            x = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
        elif isinstance(layer, torch.nn.ReLU):
            x = F.relu(x)
        else:
            x = layer(x)
    return x


def potential_ref(net: PotentialMLP, z: Tensor, t: Tensor) -> Tensor:
    """u(z, t) (B, 1) for z (B, D) and a shared time t (1,)."""
    embedding = net.layer_time(sinusoidal_embedding(t, z.shape[1]))
    time = net.layer_time2(F.gelu(embedding))
    h = torch.tanh(net.layer_fusion(torch.tanh(net.layer_x(z)) + time))
    return torch.tanh(net.layer_out(h))


def derivatives_ref(net: PotentialMLP, z: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """grad u (B, D), the row sums of its Hessian (B, D), and d_t u summed over the batch, by nested autograd."""
    z = z.clone()
    if not z.requires_grad:
        z.requires_grad_()
    t = torch.full((1,), float(step), dtype=z.dtype, device=z.device, requires_grad=True)
    u = potential_ref(net, z, t)
    grad, u_t = torch.autograd.grad(u.sum(), (z, t), create_graph=True)
    row_sums = torch.autograd.grad(grad.sum(), z, create_graph=True)[0]
    return grad, row_sums, u_t.sum()


def rotation_ref(net: RotationMLP, z: Tensor) -> Tensor:
    """r(z) (B, D) or (D,)."""
    return torch.tanh(net.layer_out(torch.tanh(net.layer_x(z))))


def divergence_ref(net: RotationMLP, z: Tensor) -> Tensor:
    """div r (B,): traces of the reverse-mode Jacobians of all samples, vectorised."""
    jacobians = torch.func.vmap(torch.func.jacrev(lambda x: rotation_ref(net, x)))(z)  # (B, D, D)
    return jacobians.diagonal(dim1=1, dim2=2).sum(-1)


def vae_ref(vae: ImageVAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (B, D)."""
    features = layers_ref(vae.encoder.encoder, x).flatten(1)
    return vae.encoder.linear_means(features), vae.encoder.linear_log_var(features)


def bce_ref(vae: ImageVAE, z: Tensor, x: Tensor) -> Tensor:
    """Binary cross-entropy of one frame, sum over pixels, mean over the batch."""
    images = layers_ref(vae.decoder.decoder, z)
    return F.binary_cross_entropy(images, x, reduction="sum") / len(x)


def flow_terms_ref(model: LatentFlow, z: Tensor, step: int, c1: Tensor, c2: Tensor | None, only: list[int]):
    """Velocity, row sums (B, D) and the PDE loss of one step, flow by flow."""
    flows = model.support_sets
    velocity, rows, loss = torch.zeros_like(z), torch.zeros_like(z), torch.zeros((), dtype=z.dtype)
    for column, k in enumerate(only):
        grad, row_sums, u_t = derivatives_ref(flows.MLP_SET[k], z, step)
        velocity = velocity + c1[:, column, None] * grad
        rows = rows + c1[:, column, None] * row_sums
        scalar = u_t + 0.5 * (grad**2).mean()
        if flows.rotation is None:
            force = potential_ref(flows.FORCE_SET[k], z, torch.full((1,), float(step), dtype=z.dtype))
            residual = ((scalar + force**2) ** 2).mean()
        else:
            velocity = velocity + c2[:, column, None] * rotation_ref(flows.DIV_MLP[k], z)
            residual = scalar**2 + (divergence_ref(flows.DIV_MLP[k], z) ** 2).mean()
        loss = loss + c1[:, column].mean() * residual
        if step == 1 and column == len(only) - 1:
            start = (derivatives_ref(flows.MLP_SET[k], z, 0)[0] ** 2).mean()
            if flows.rotation is None:
                force = potential_ref(flows.FORCE_SET[k], z, torch.zeros(1, dtype=z.dtype))
                start = start + (force**2).mean()
            loss = loss + c1[:, column].mean() * start
    return velocity, rows, loss


def training_step_ref(
    model: LatentFlow, frames: Tensor, label: int | None, noise: Noise, slab_on: bool = False
) -> Tensor:
    """Total loss of one published training step on frames (T+1, B, C, N, N); `noise` must be complete."""
    config, steps = model.config, len(frames) - 1
    mean, log_var = vae_ref(model.vae, frames[0])
    z = mean + noise.eps * (0.5 * log_var).exp()
    total = bce_ref(model.vae, z, frames[0]) - 0.5 * (1 + log_var - mean**2 - log_var.exp()).sum() / len(mean)
    rho, rho_t = normal_log_prob(z), normal_log_prob(z, mean, log_var)
    only = [label] if config.variant == "supervised" else list(range(config.flows))
    c1, c2 = torch.ones(len(z), 1, dtype=z.dtype), None
    if config.variant == "weakly":
        encoder = model.reconstructor
        features = layers_ref(encoder.encoder, frames.transpose(0, 1).flatten(1, 2)).flatten(1)
        c1 = gumbel_softmax(encoder.linear1(features), noise.tau, noise.uniform)
        total = total - torch.log(c1.mean(0).max() + 1e-20)
    spikes, slabs = [], []
    for step in range(1, steps + 1):
        if config.variant == "unsupervised":
            encoder, pair = model.reconstructor, torch.cat([frames[step - 1], frames[step]], dim=1)
            features = layers_ref(encoder.encoder, pair).flatten(1)
            heads = [encoder.linear_y] if config.single_control else [encoder.linear_y1, encoder.linear_y2]
            y = torch.stack(
                [
                    relaxed_bernoulli(head(features), noise.tau, noise.uniform[step - 1, h], link="gumbel")
                    for h, head in enumerate(heads)
                ]
            )
            # the published code runs the speed encoder in both stages
            g = 2 * torch.sigmoid(encoder.linear_g(layers_ref(encoder.encoder_g, pair).flatten(1)))
            spikes.append(y)
            slabs.append(g)
            c1, c2 = y[0] * (g if slab_on else 1), y[-1] * (g if slab_on else 1)
        velocity, rows, pde = flow_terms_ref(model, z, step, c1, c2, only)
        prior = c1 if c2 is None or config.single_control else c1 + c2 - c1 * c2
        if step == 1:
            laplacians = torch.ones(len(only), dtype=z.dtype)
        else:
            laplacians = torch.stack([1 / (model.prior.MLP_SET[k].sigma[step - 1, 0] ** 2 + 1e-5) for k in only])
        rho_t = rho_t - torch.log((1 + rows).abs())
        rho = rho - torch.log((1 + prior @ laplacians).abs())[:, None]
        z = z + velocity
        target, log_input = torch.softmax(rho.exp(), dim=1), torch.log_softmax(rho_t.exp(), dim=1)
        total = total + pde + F.kl_div(log_input, target, reduction="batchmean") + bce_ref(model.vae, z, frames[step])
    if config.variant == "unsupervised":
        total = total + upstream_spike_loss(torch.stack(spikes), config.p_on, config.p_stay)
        if slab_on:
            total = total + laplace_kl(*slab_statistics(torch.stack(slabs))).mean()
    return total
