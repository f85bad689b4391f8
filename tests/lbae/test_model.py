"""The networks: the paper's sizes, initialisation, the straight-through gradient, precision."""

import math

import pytest
import torch

from common.errors import UserError
from lbae import celeba, cifar10, mnist
from lbae.model import LBAE, build_model, losses, parameter_counts, quantise
from lbae.options import Params

# encoder, decoder, total of the published networks
COUNTS = {
    "mnist_bae": (1_910_792, 572_368, 2_483_160),
    "cifar10_bae": (3_550_744, 2_061_248, 5_611_992),
    "celeba_bae": (9_467_804, 9_470_400, 18_938_204),
    "mnist_vae": (1_255_272, 569_488, 1_824_760),
    "cifar10_vae": (2_141_376, 1_094_592, 3_235_968),
    "celeba_vae": (3_846_720, 3_588_544, 7_435_264),
}
BUFFERS = {"mnist": 1287, "cifar10": 1287, "celeba": 2826}  # batch-norm entries of each net


@pytest.mark.parametrize("name", COUNTS)
def test_published_configurations_have_the_published_sizes(name):
    configs = mnist.CONFIGS | cifar10.CONFIGS | celeba.CONFIGS
    assert set(configs) == set(COUNTS)
    with torch.device("meta"):
        model = build_model(Params(cfg=name, **configs[name]))
    assert tuple(parameter_counts(model).values()) == COUNTS[name]
    for net in (model.enc, model.gen):
        assert sum(buffer.numel() for buffer in net.buffers()) == BUFFERS[name.split("_")[0]]
    assert len(model.enc.state_dict()) == (45 if "celeba" not in name else 63) + 2 * ("vae" in name)


def test_initialisation():
    torch.manual_seed(0)
    model = LBAE(32, 3, 40, width=32)
    convolutions = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    weights = torch.cat([conv.weight.flatten() for conv in convolutions])
    assert abs(float(weights.detach().std()) - 0.02) < 2e-4
    assert all(conv.bias is None for conv in convolutions)
    for linear in (model.enc.l0l, model.gen.l1l):
        bound = 1 / math.sqrt(linear.in_features)
        assert 0.95 * bound < float(linear.weight.detach().abs().max()) <= bound


def test_gradient_passes_the_sign_and_vanishes_where_tanh_saturates():
    logits = torch.tensor([[-9.0, -0.3, 0.0, 0.2, 9.0]], dtype=torch.float64, requires_grad=True)
    code = quantise(torch.tanh(logits))
    assert code.tolist() == [[-1, -1, 1, 1, 1]]
    (code * torch.arange(1.0, 6.0)).sum().backward()
    torch.testing.assert_close(logits.grad, torch.arange(1.0, 6.0).double() * (1 - torch.tanh(logits.detach()) ** 2))


def test_rounded_latents():
    model = LBAE(32, 1, 8, width=2, zround=1).eval()
    code = model(torch.rand(3, 1, 32, 32))[1].code.detach()
    torch.testing.assert_close(code * 10, (code * 10).round())
    assert float(code.abs().max()) <= 1


@pytest.mark.parametrize(("size", "vae"), [(32, False), (32, True), (64, False), (64, True)])
def test_every_parameter_gets_a_gradient(size, vae):
    torch.manual_seed(0)
    model = LBAE(size, 3, 12, width=2, vae=vae)
    x = torch.rand(4, 3, size, size)
    xr, encoded = model(x)
    losses(xr, x, encoded, binary=False, kl_weight=1.0)["loss"].mean().backward()
    assert xr.shape == x.shape
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def test_bfloat16_keeps_code_and_loss_in_float32():
    torch.manual_seed(0)
    model = LBAE(32, 1, 12, width=4).eval()
    x = torch.rand(4, 1, 32, 32)
    with torch.no_grad():
        plain, encoded = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half, coded = model(x)
    assert coded.logits.dtype == half.dtype == torch.float32
    assert set(coded.code.unique().tolist()) <= {-1.0, 1.0}
    # convolutions differ by bfloat16's eight bits, not more
    assert 0 < float((encoded.logits - coded.logits).abs().max()) < 0.05 * float(encoded.logits.abs().max())
    assert float((plain - half).abs().max()) < 0.05


def test_other_image_sizes_are_refused():
    with pytest.raises(UserError, match="img_size=28"):
        LBAE(28, 1, 8)
