"""Losses and algorithms against closed forms, float64 gradients and each other."""

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import UserError
from glancenet import algorithms, losses
from glancenet.main import train_step
from glancenet.options import LOSS_TERMS, parse

torch.set_default_dtype(torch.float32)


def options(*words: str):
    base = [
        "--dset_name",
        "sprites",
        "--dset_dir",
        ".",
        "--encoder",
        "PadlessGaussianConv64",
        "--decoder",
        "ShallowLinear",
    ]
    return parse([*base, "--alg", "GlanceNet", *words])


def shape(n_concepts: int = 7, n_classes: int = 2, channels: int = 1) -> algorithms.Shape:
    return algorithms.Shape(channels, n_concepts, n_classes, (3, 2), 100)


def make_batch(n: int = 6, n_concepts: int = 7, n_classes: int = 2, channels: int = 1, seed: int = 0) -> losses.Batch:
    g = torch.Generator().manual_seed(seed)
    return losses.Batch(
        torch.rand(n, channels, 64, 64, generator=g), torch.rand(n, n_concepts, generator=g),
        torch.randint(n_classes, (n,), generator=g), (torch.arange(n) % 2 == 0).float(),
        torch.stack([torch.randint(3, (n,), generator=g), torch.randint(2, (n,), generator=g)], 1),
    )  # fmt: skip


def double(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


def test_gradients_of_the_losses():
    """float64 finite differences of everything that is differentiated in training."""
    mu, logvar, z = double(4, 3), double(4, 3, seed=1), double(4, 3, seed=2)
    labels, mask = torch.rand(4, 3, dtype=torch.float64), torch.tensor([1.0, 0, 1, 0])
    check = torch.autograd.gradcheck
    assert check(lambda a, b: losses.kl_divergence(a, b, z.detach()), (mu, logvar))
    assert check(losses.total_correlation, (z, mu, logvar))
    assert check(lambda a, b: losses.dip_vae_ii_loss(a, b, 2.0, 3.0), (mu, logvar))
    assert check(lambda a: losses.mmd(mu.detach(), a), (z,))
    for kind in ("MSE", "BCE"):
        assert check(lambda a, b, kind=kind: losses.concept_loss(a, labels, mask, kind, b).total, (z, mu))


def test_kl_of_shifted_normals_is_half_the_squared_distance():
    mu = torch.zeros(5, 3)
    target = torch.tensor([1.0, -2.0, 2.0]).expand(5, 3)
    assert losses.kl_divergence(mu, torch.zeros(5, 3), target).item() == pytest.approx(4.5)
    partial = losses.kl_divergence(mu + 7, torch.zeros(5, 3), losses.prior_target(target, 1))
    assert partial.item() == pytest.approx(0.5 * (36 + 49 + 49)), "free latents are pulled to 0"


def test_concept_loss_of_perfect_latents_vanishes_and_ignores_unsupervised_rows():
    labels = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    z = torch.tensor([[-40.0, 40.0], [40.0, -40.0], [99.0, 99.0]])
    mask = torch.tensor([1.0, 1.0, 0.0])
    for kind in ("MSE", "BCE"):
        found = losses.concept_loss(z, labels, mask, kind)
        assert found.total.item() == pytest.approx(0, abs=1e-6) and bool(found.any)
        assert losses.concept_loss(z, labels, torch.ones(3), kind).total > 0.1
    none = losses.concept_loss(z, labels, torch.zeros(3), "BCE")
    assert none.total.item() == 0 and not bool(none.any)


def test_one_supervised_row_weighs_as_a_full_batch():
    """The published normaliser: rows with labels, not the batch size."""
    z, labels = torch.randn(8, 3), torch.rand(8, 3)
    one = torch.zeros(8)
    one[5] = 1
    expected = losses.concept_errors(z[5:6], labels[5:6], "MSE").mean()
    torch.testing.assert_close(losses.concept_loss(z, labels, one, "MSE").total, expected)


def test_anchor_with_free_latents_uses_only_labelled_columns():
    """More latents than concepts: the anchor reads the first L columns (the published code fails here)."""
    z, means, labels = torch.randn(4, 9), torch.randn(4, 9), torch.rand(4, 3)
    mask = torch.ones(4)
    got = losses.concept_loss(z, labels, mask, "BCE", means).total - losses.concept_loss(z, labels, mask, "BCE").total
    expected = 100 * losses.concept_errors(means[:, :3], labels, "BCE").mean()
    torch.testing.assert_close(got, expected)


def test_total_correlation_finds_dependence():
    """Copies of one latent have a positive total correlation, independent latents nearly none."""
    n, g = 512, torch.Generator().manual_seed(0)
    independent = torch.randn(n, 3, generator=g)
    copied = independent[:, :1].expand(n, 3) + 0.1 * torch.randn(n, 3, generator=g)
    logvar = torch.full((n, 3), -3.0)
    values = []
    for mu in (independent, copied):
        constant = 2 * np.log(n * n)  # (D - 1) log(N B)
        values.append(float(losses.total_correlation(losses.reparametrize(mu, logvar), mu, logvar)) + constant)
    assert values[1] > values[0] + 1


def test_permuted_latents_keep_their_margins():
    z = torch.randn(50, 4)
    permuted = losses.permute_latents(z)
    assert torch.equal(permuted.sort(0).values, z.sort(0).values)
    assert not torch.equal(permuted, z)
    assert (np.corrcoef(permuted.T.numpy()) - np.eye(4)).max() < 0.6


SYSTEMS = [
    (["--encoder", "SimpleGaussianConv64", "--z_dim", "7"], shape(7, 2, 1), 3_792_884),
    (["--encoder", "PadlessGaussianConv64", "--z_dim", "21"], shape(21, 10, 3), 2_448_528),
    (["--encoder", "EncConv64", "--z_dim", "10"], shape(10, 4, 3), 19_275_957),
    (["--encoder", "SimpleGaussianConv64", "--z_dim", "5"], shape(5, 3, 1), 3_791_345),
]


@pytest.mark.parametrize("words, data, expected", SYSTEMS)
def test_parameters_of_the_published_systems(words, data, expected):
    model = algorithms.GlanceNet(options(*words, "--decoder", "SimpleConv64", "--conditional_prior", "true"), data)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_glancenet_terms_equal_the_published_formula_written_out():
    """The module's terms against the formulas of the paper, term by term, on real networks."""
    o = options(
        "--z_dim", "7", "--conditional_prior", "true", "--label_weight", "3", "--latent_weight", "2", "--w_kld", "4"
    )
    model, batch = algorithms.GlanceNet(o, shape()), make_batch()
    torch.manual_seed(5)
    terms, z = model.terms(batch, 0)
    mu, logvar = model.encoder(batch.x)
    torch.manual_seed(5)
    z_again = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
    torch.testing.assert_close(z, z_again)
    p = torch.sigmoid(model.decoder(z))
    recon = nn.functional.binary_cross_entropy(p, batch.x, reduction="sum") / len(z)
    torch.testing.assert_close(terms.recon, recon, rtol=1e-4, atol=1e-3)
    means = model.prior(nn.functional.one_hot(batch.y, 2).float())
    prior = torch.distributions.Normal(means, 1.0)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mu, torch.exp(logvar / 2)), prior).sum(1).mean()
    torch.testing.assert_close(terms.kld, 4 * kl)
    classes = nn.functional.cross_entropy(model.classifier(torch.tanh(z / 2)), batch.y)
    torch.testing.assert_close(terms.prediction, 3 * classes)
    rows = batch.mask == 1
    concept = ((torch.tanh(z / 2) - (2 * batch.labels - 1)) ** 2)[rows].mean()
    anchor = ((torch.tanh(means / 2) - (2 * batch.labels - 1)) ** 2)[rows].mean()
    torch.testing.assert_close(terms.latent, 2 * (concept + 100 * anchor))
    torch.testing.assert_close(terms.total, terms.recon + terms.kld + terms.prediction + terms.latent)


@pytest.mark.parametrize("name", LOSS_TERMS)
def test_plug_ins_are_added_with_their_weight(name):
    """Each term with weight w adds w times the same amount, and nothing else changes."""
    flag = {"BetaTCVAE": "--w_tc", "FACTORVAE": "--w_tc", "INFOVAE": "--w_infovae"}.get(name, "--w_dipvae")

    def plugins(weight: str) -> float:
        torch.manual_seed(1)
        o = options("--z_dim", "7", "--loss_terms", name.lower(), flag, weight, "--size_layer_disc", "8")
        model = algorithms.GlanceNet(o, shape())
        torch.manual_seed(2)
        return model.terms(make_batch(), 0)[0].plugins.item()

    base = 1.0 if name == "BetaTCVAE" else 0.0  # (w_tc - 1) TC
    once, thrice = plugins(f"{base + 1}"), plugins(f"{base + 3}")
    assert once != 0 and thrice == pytest.approx(3 * once, rel=1e-4)


def test_factor_vae_steps_train_their_own_network_only():
    """The VAE step leaves no gradient in the discriminator, the discriminator's step none in the encoder."""
    o = options("--z_dim", "7", "--loss_terms", "FACTORVAE", "--size_layer_disc", "8", "--lr_G", "0.1", "--lr_D", "0.1")
    model = algorithms.GlanceNet(o, shape())
    terms, z = model.terms(make_batch(), 0)
    terms.total.backward()
    assert all(p.grad is None for p in model.discriminator.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adversary = torch.optim.SGD(model.discriminator.parameters(), lr=0.1)
    ((name, loss),) = model.adversary_losses(z.detach(), make_batch(), make_batch(seed=1))
    loss.backward()
    adversary.step()
    assert name == "PermD"
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith("discriminator.") for key in changed)


def test_factor_vae_discriminator_learns_to_tell_dependent_latents():
    o = options("--z_dim", "7", "--loss_terms", "FACTORVAE", "--size_layer_disc", "32", "--num_layer_disc", "3")
    model = algorithms.GlanceNet(o, shape())
    optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=0.01)
    for _ in range(120):
        z = torch.randn(128, 1).expand(128, 7) + 0.2 * torch.randn(128, 7)
        permuted = losses.permute_latents(torch.randn(128, 1).expand(128, 7) + 0.2 * torch.randn(128, 7))
        loss = losses.factor_vae_discriminator_loss(model.discriminator(z), model.discriminator(permuted))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert losses.factor_vae_tc(model.discriminator(z), 1.0).item() > 1, "dependence is estimated as positive"


def test_ifcvae_adversary_is_stepped_on_its_own():
    words = [
        "--alg",
        "IFCVAE",
        "--encoder",
        "PadlessGaussianConv64",
        "PadlessConv64",
        "--size_layer_disc",
        "8",
        "--z_dim",
        "4",
    ]
    model = algorithms.IFCVAE(options(*words), shape())
    adversary = {id(p) for p in model.auxiliary.parameters()}
    assert not adversary & {id(p) for p in model.main_parameters()}
    optimizers = {
        "G": torch.optim.Adam(list(model.main_parameters()), lr=1e-3),
        "aux_D": torch.optim.Adam(model.auxiliary.parameters(), lr=1e-3),
    }
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_step(model, optimizers, make_batch())
    for part in ("encoder", "label_encoder", "decoder", "auxiliary"):
        assert any(key.startswith(f"{part}.") and not torch.equal(value, before[key])
                   for key, value in model.state_dict().items()), part  # fmt: skip


def test_cvae_reads_its_labels():
    """Encoder and decoder both see the labels: other labels, other outputs for the same image and z."""
    model = algorithms.CVAE(options("--alg", "CVAE", "--z_dim", "4"), shape())
    batch = make_batch()
    other = batch._replace(codes=(batch.codes + 1) % torch.tensor([3, 2]))
    assert not torch.allclose(model.encode(batch)[0], model.encode(other)[0])
    z = torch.randn(6, 4)
    assert not torch.allclose(model.decode(z, batch), model.decode(z, other))


def test_classes_only_step_uses_the_class_loss_alone():
    o = options("--z_dim", "7", "--conditional_prior", "true")
    model = algorithms.GlanceNet(o, shape())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_step(model, {"G": torch.optim.SGD(model.parameters(), lr=0.1)}, make_batch(), classes_only=True)
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"encoder", "classifier"}


def test_twice_named_term_is_refused():
    with pytest.raises(UserError, match="named twice"):
        algorithms.GlanceNet(options("--z_dim", "7", "--loss_terms", "INFOVAE", "infovae"), shape())


def test_bfloat16_is_for_the_networks_of_a_training_step_alone():
    """--amp: other losses by 1e-2, not by more; float32 gradients; the same evaluation to the bit."""
    words = ["--z_dim", "7", "--conditional_prior", "true", "--loss_terms", "BetaTCVAE", "--w_tc", "3"]
    plain, half = (algorithms.make_model(options(*words, "--amp", amp), shape()) for amp in ("false", "true"))
    half.load_state_dict(plain.state_dict())
    found = []
    for model in (plain, half):
        torch.manual_seed(0)
        terms, z = model.terms(make_batch(), 0)
        terms.total.backward()
        assert all(part.dtype == torch.float32 for part in (terms.total, terms.recon, z))
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
        found.append((terms.total.item(), next(model.decoder.parameters()).grad.norm()))
    assert found[0] != found[1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-2, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0.1, atol=0)
    with torch.no_grad():
        one, other = (model.eval().encode(make_batch())[0] for model in (plain, half))
    assert torch.equal(one, other)
