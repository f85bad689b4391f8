"""The converter on files written in the published checkpoints' layout, and on files that are not."""

import pickle
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from option_table import run_inside

import nfpi
from common.checkpoint import load_weights
from common.errors import UserError
from nfpi import convert_checkpoint
from nfpi.conditional import ConditionalFlow
from nfpi.gaussians import ClassGaussians
from nfpi.model import FlowConfig, MultiScaleFlow


class LabelEncoder:
    """Stands for the foreign objects that Lightning pickles with its hyper-parameters."""

    def __init__(self):
        self.codes = {"a": [1, 2]}


def published(config, classes=3, averaged=True, seed=0):
    """(state_dict in the published layout, online flow, averaged flow, means, variances)."""
    torch.manual_seed(seed)
    online, average = MultiScaleFlow(config), MultiScaleFlow(config)
    mean, var = torch.randn(classes, config.latent_dim), 0.5 + torch.rand(classes, config.latent_dim)
    rows = torch.tensor([config.latent_shape] * len(config.flows))
    state = {"K_arr": torch.zeros(classes, classes), "tau_arr": torch.zeros(classes), "nf_loss_min_max": torch.zeros(2)}
    for prefix, flow in (("flow.", online), ("ema.online_model.", online), ("ema.ema_model.", average)):
        state |= {prefix + k: v for k, v in flow.state_dict().items()}
        state[f"{prefix}level_out_shape_arr"] = rows
        for k in range(classes):
            # the average never follows the Gaussians: its copies are stale
            stale = 0 if prefix == "flow." else 7
            state[f"{prefix}mu_arr.{k}"] = torch.nn.Parameter(mean[k] + stale, requires_grad=False)
            state[f"{prefix}cov_lower_arr.{k}"] = torch.nn.Parameter(var[k] + stale, requires_grad=False)
            state[f"{prefix}scale_tril_arr.{k}"] = torch.nn.Parameter(var[k].sqrt() + stale, requires_grad=False)
    state |= {"ema.initted": torch.tensor(averaged), "ema.step": torch.tensor(5)}
    return state, online, average, mean, var


def write(path, state):
    content = {
        "epoch": 499,
        "global_step": 49000,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "optimizer_states": [{"state": {0: {"exp_inf": torch.ones(3)}}}],
        "hyper_parameters": {"cfg": LabelEncoder(), "label_encoder": LabelEncoder()},
    }
    torch.save(content, path)


CONFIGS = {
    "all_levels": {"attention": True},
    "spcb": {"level_method": "spcb"},
    "idx": {"level_method": "all_levels_idx", "level_idx": 2},
    "affine": {"flow_type": "affine", "conv_type": "decomposition"},
}


def architecture(**options):
    small = {
        "channels": 1,
        "height": 8,
        "width": 8,
        "flows": (2, 1),
        "blocks": (1, 2),
        "hidden": (6, 4),
        "level_idx": 1,
    }
    return FlowConfig(**{**small, **options})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("averaged", [True, False])
def test_published_layout_is_converted(tmp_path, capsys, name, averaged):
    config = architecture(**CONFIGS[name])
    state, online, average, mean, var = published(config, averaged=averaged)
    source, target = tmp_path / "epoch=499-step=49000.ckpt", tmp_path / "out" / "flow.safetensors"
    write(source, state)
    convert_checkpoint.main([str(source), str(target)])
    assert "wrote" in capsys.readouterr().out
    model = ConditionalFlow.load(target)
    expected = average if averaged else online
    assert model.flow.config.level_method == config.level_method
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.flow.state_dict().items())
    assert torch.equal(model.gaussians.mean, mean) and torch.equal(model.gaussians.var, var)
    # it computes what the original modules compute
    x = torch.rand(4, 1, 8, 8)
    y = torch.tensor([0, 1, 2, 0])
    want = ConditionalFlow(expected, ClassGaussians(mean, var)).nll(x, y, 0.5)[0]
    torch.testing.assert_close(model.nll(x, y, 0.5)[0], want)
    convert_checkpoint.main([str(source), str(target), "--online"])
    assert torch.equal(
        ConditionalFlow.load(target).flow.state_dict()["blocks.0.0.actnorm.shift"],
        online.state_dict()["blocks.0.0.actnorm.shift"],
    )


def test_compiled_names_are_understood(tmp_path):
    state, _, _, mean, _ = published(architecture())
    renamed = {k.replace("flow.", "flow._orig_mod.", 1) if k.startswith("flow.") else k: v for k, v in state.items()}
    write(tmp_path / "c.ckpt", renamed)
    convert_checkpoint.convert(tmp_path / "c.ckpt", tmp_path / "c.safetensors", online=True)
    assert torch.equal(ConditionalFlow.load(tmp_path / "c.safetensors").gaussians.mean, mean)


def test_standard_convolutions_can_be_named(tmp_path):
    config = architecture(conv_type="standard")
    write(tmp_path / "s.ckpt", published(config)[0])
    assert (
        convert_checkpoint.convert(tmp_path / "s.ckpt", tmp_path / "s.safetensors")["flow"]["conv_type"] == "standard"
    )
    named = convert_checkpoint.convert(tmp_path / "s.ckpt", tmp_path / "s.safetensors", conv_type="matrixexp")
    assert named["flow"]["conv_type"] == "matrixexp"


class Evil:
    def __reduce__(self):
        return open, ("PWNED", "w")


def test_foreign_and_damaged_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = published(architecture())[0]
    write(tmp_path / "whole.ckpt", state)
    whole = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "legacy.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    torch.save({"state_dict": {"encoder.weight": torch.ones(2)}}, tmp_path / "other.ckpt")
    torch.save({"model": 1}, tmp_path / "none.ckpt")
    del state["flow.blocks.0.1.conv1x1.weight"], state["ema.ema_model.blocks.0.1.conv1x1.weight"]
    write(tmp_path / "holes.ckpt", state)
    for name in ("cut", "text", "legacy", "other", "none", "holes", "absent"):
        with pytest.raises(UserError, match=rf"{name}\.ckpt"):
            convert_checkpoint.convert(tmp_path / f"{name}.ckpt", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    torch.save({"state_dict": {"flow.x": torch.ones(1)}, "hyper_parameters": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError):
        convert_checkpoint.convert(tmp_path / "evil.ckpt", tmp_path / "x.safetensors")
    assert not (tmp_path / "PWNED").exists()
    with pytest.raises(UserError, match="convert_checkpoint"):
        ConditionalFlow.load(tmp_path / "whole.ckpt")
    with pytest.raises(UserError, match="safetensors"):
        convert_checkpoint.main([str(tmp_path / "whole.ckpt"), str(tmp_path / "x.pt")])


@pytest.mark.parametrize("saved", ["hydra", "plain", "none"])
def test_a_converted_checkpoint_keeps_its_bits(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = published(architecture())[0]
    cfg = {"hydra": OmegaConf.create({"bits": 5, "train": {"lr": 0.1}}), "plain": {"bits": 5}, "none": {}}[saved]
    torch.save({"state_dict": state, "hyper_parameters": {"cfg": cfg}}, "a.ckpt")
    convert_checkpoint.main(["a.ckpt", "a.safetensors"])
    told = "does not say how many bits" in capsys.readouterr().out
    assert load_weights("a.safetensors")[1]["bits"] == (8 if saved == "none" else 5) and told is (saved == "none")
    assert load_weights("a.safetensors")[1]["pixel_noise"] == 0
    run_inside(convert_checkpoint.main, ["a.ckpt", "noisy.safetensors", "--pixel_noise", "0.05"])
    assert nfpi.load("noisy.safetensors").conditional.pixel_noise == 0.05
    found = run_inside(convert_checkpoint.main, ["a.ckpt", "b.safetensors", "--bits", "6"])
    if saved == "none":
        assert load_weights("b.safetensors")[1]["bits"] == 6
    else:
        assert found.code == 2 and "--bits 6" in found.err and not Path("b.safetensors").exists()
