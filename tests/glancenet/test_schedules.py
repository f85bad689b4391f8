"""Learning rates, weight schedules and stopping beyond the reference vectors."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from glancenet.schedules import EarlyStopping, LearningRate, LinearWeight, parse_scheduler_args, warmup_rates

CASES = {
    "ReduceLROnPlateau": ["mode=min", "factor=0.5", "patience=0"],
    "StepLR": ["step_size=2", "gamma=0.5"],
    "MultiStepLR": ["milestones=1,3", "gamma=0.1"],
    "ExponentialLR": ["gamma=0.8"],
    "CosineAnnealingLR": ["T_max=5"],
    "CyclicLR": ["base_lr=0.001", "max_lr=0.01", "step_size_up=2"],
    "LambdaLR": ["total=10", "start=2"],
}


def make(name=None, words=(), warmup=3, lr=0.01):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return LearningRate(optimizer, lr, warmup, name, list(words)), optimizer


def run(rate, optimizer, epochs, start=0, metric=1.0):
    rates = []
    for epoch in range(start, epochs):
        rate.start_epoch(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
        rate.step(metric)
    return rates


def test_warm_up_then_decay():
    """Warm-up of 3 epochs to lr, then lr gamma^(epoch - 3): edits of the warm-up and the decay do not mix."""
    rates = run(*make("ExponentialLR", ["gamma=0.8"]), 8)
    np.testing.assert_allclose(rates[:3], [1e-7, np.sqrt(1e-7 * 0.01), 0.01], rtol=1e-12)
    np.testing.assert_allclose(rates[3:], 0.01 * 0.8 ** np.arange(5), rtol=1e-12)
    assert len(warmup_rates(0.01, 0)) == 0


@pytest.mark.parametrize("name", CASES)
def test_every_scheduler_follows_torch_after_the_warm_up(name):
    rates = run(*make(name, CASES[name]), 9)[3:]
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    args = parse_scheduler_args(CASES[name])
    if name == "LambdaLR":
        expected = [0.01 * (1 - max(0, k - 2) / 8) for k in range(6)]
    else:
        if name == "CyclicLR":
            args["cycle_momentum"] = False
        scheduler = getattr(torch.optim.lr_scheduler, name)(plain, **args)
        expected = []
        for _ in range(6):
            expected.append(plain.param_groups[0]["lr"])
            plain.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    np.testing.assert_allclose(rates, expected, rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_state_continues_a_schedule(name):
    whole = run(*make(name, CASES[name]), 9)
    rate, optimizer = make(name, CASES[name])
    first = run(rate, optimizer, 5)
    again, optimizer = make(name, CASES[name])
    again.restore(rate.state())
    np.testing.assert_allclose(first + run(again, optimizer, 9, start=5), whole, rtol=1e-12)


def test_plateau_factor_survives_the_scheduler():
    rate, optimizer = make("ExponentialLR", ["gamma=0.5"], warmup=0)
    run(rate, optimizer, 2)
    rate.plateaued()
    assert rate.current() == pytest.approx(0.01 * 0.25 / 1.11)
    rate.step(0.0)
    assert rate.current() == pytest.approx(0.01 * 0.125 / 1.11)


def test_scheduler_mistakes_are_named():
    with pytest.raises(UserError, match="ExponentialLR"):
        make("ExponentialLR", ["gama=0.9"])
    with pytest.raises(UserError, match="name=value"):
        parse_scheduler_args(["0.9"])
    with pytest.raises(UserError, match="needs --lr_scheduler"):
        make(None, ["gamma=0.9"])


def test_linear_weight_clips_at_its_target():
    weight = LinearWeight(1.0, 0.2, 4)
    np.testing.assert_allclose([weight.step() for _ in range(6)], [0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_unsupervised_runs_do_not_stop_on_the_latent_loss():
    """masking_fact = 0: only the class loss counts (the published rule also counts an undefined latent loss)."""
    ours = EarlyStopping(1, 1, supervised=False)
    published = EarlyStopping(1, 1, supervised=False)
    published.count_latent = True
    for t in range(20):
        for rule in (ours, published):
            rule.record(0.0, latent=float(t), bce=1.0)
            rule.update()
    assert ours.wait == 0 and ours.save
    assert published.wait > 5 and not published.save


def test_stopping_needs_more_than_ten_bad_validations():
    rule = EarlyStopping(1, 1, supervised=True)
    stops = []
    for t in range(14):
        rule.record(0.0, latent=1.0, bce=1.0 + t)
        stops.append(rule.update())
    assert stops.index(True) == 11 and rule.wait >= 11


def test_stopping_state_round_trip():
    rule = EarlyStopping(2, 3, supervised=True)
    for value in (3.0, 2.0, 2.5):
        rule.record(1.0, value, value)
        rule.update()
    again = EarlyStopping(2, 3, supervised=True)
    again.restore(rule.state())
    for one in (rule, again):
        one.record(1.0, 2.6, 2.7)
        one.update()
    assert (rule.wait, rule.save, rule.total) == (again.wait, again.save, again.total)
