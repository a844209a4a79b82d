"""Schedules against literal values, groups, norms and clipping against torch's own."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from open_lm import optim
from open_lm.config.optim import OptimConfig
from open_lm.optim import LossSpikes

CONFIG = OptimConfig(lr=1.0, warmup=4, lr_cooldown_end=0.1)


def rates(config, steps, total=12, interval=3):
    return [round(optim.learning_rate(step, config, total, interval), 6) for step in steps]


def test_warmup_then_cosine():
    assert rates(CONFIG, range(5)) == [0.25, 0.5, 0.75, 1.0, 1.0]
    # halfway down the cosine, a quarter, the end, past the end
    assert rates(CONFIG, [8, 12, 99]) == [0.55, 0.1, 0.1]
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert rates(CONFIG, [6]) == [round(quarter, 6)]


def test_floor_holds_after_the_warmup_only():
    assert rates(replace(CONFIG, force_min_lr=0.6), [0, 8, 12]) == [0.25, 0.6, 0.6]


def test_const_and_cooldown():
    const = replace(CONFIG, lr_scheduler="const")
    assert rates(const, [0, 4, 11, 50]) == [0.25, 1.0, 1.0, 1.0]
    cooldown = replace(CONFIG, lr_scheduler="const-cooldown", epochs_cooldown=2)
    # the last 2 intervals of 3 steps: from step 6 on
    assert rates(cooldown, [4, 6, 9, 12]) == [1.0, 1.0, 0.55, 0.1]
    assert rates(replace(cooldown, lr_cooldown_power=2.0), [9]) == [0.325]
    with pytest.raises(ValueError, match="--epochs-cooldown"):
        optim.learning_rate(5, replace(cooldown, epochs_cooldown=None), 12, 3)


def test_a_decay_that_ends_before_or_after_the_run():
    """Of 12 steps, decay over the first 8, or over 20; the rate is a function of the step alone."""
    short = replace(CONFIG, lr_decay_steps=8)
    assert rates(short, [3, 4, 6, 8, 11, 99]) == [1.0, 1.0, 0.55, 0.1, 0.1, 0.1]
    assert rates(replace(CONFIG, lr_decay_steps=20), [4, 8, 12, 16, 20]) == [
        1.0,
        0.868198,
        0.55,
        0.231802,
        0.1,
    ]
    for total in (8, 12, 400):
        assert rates(short, range(12), total=total) == rates(CONFIG, range(12), total=8)
    cooldown = replace(CONFIG, lr_scheduler="const-cooldown", epochs_cooldown=1, lr_decay_steps=9)
    # one interval of 3 steps before step 9
    assert rates(cooldown, [4, 6, 7, 8, 9, 11]) == [1.0, 1.0, 0.7, 0.4, 0.1, 0.1]
    assert rates(replace(short, force_min_lr=0.3), [2, 8, 11]) == [0.75, 0.3, 0.3]


def test_skip_scheduler_and_degenerate_lengths():
    assert rates(replace(CONFIG, skip_scheduler=True), [0, 3, 11]) == [1.0, 1.0, 1.0]
    assert rates(replace(CONFIG, warmup=0), [0]) == [1.0]
    assert rates(CONFIG, [3, 4], total=2) == [1.0, 1.0]  # a run shorter than its warm-up


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4)
        self.w1 = nn.Parameter(torch.randn(2, 4, 4))
        self.bias = nn.Parameter(torch.zeros(4))
        self.output = nn.Linear(4, 8, bias=False)

    def forward(self, tokens):
        x = self.norm(self.tok_embeddings(tokens))
        return self.output(x @ self.w1.sum(0) + self.bias)


def toy(tied=False):
    torch.manual_seed(0)
    model = Toy()
    if tied:
        model.output.weight = model.tok_embeddings.weight
    return model


def test_decay_on_matrices_embeddings_and_experts_only():
    optimizer = optim.make_optimizer(toy(), OptimConfig(wd=0.3))
    decayed, rest = optimizer.param_groups
    assert decayed["param_names"] == ["w1", "tok_embeddings.weight", "output.weight"]
    assert rest["param_names"] == ["bias", "norm.weight", "norm.bias"]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert decayed["fused"] is True
    optim.set_learning_rate_(optimizer, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.125]


def test_tied_weights_are_stepped_once():
    names = [
        n for g in optim.make_optimizer(toy(tied=True), OptimConfig()).param_groups for n in g["param_names"]
    ]
    assert sorted(names) == ["bias", "norm.bias", "norm.weight", "tok_embeddings.weight", "w1"]


def test_one_step_is_adamw_by_the_formula():
    model, config = toy(), OptimConfig(lr=0.01, wd=0.3, beta1=0.9, beta2=0.95, eps=1e-8)
    model(torch.arange(8)).square().sum().backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optim.make_optimizer(model, config).step()
    for name, p in model.named_parameters():
        decay = 0.3 if p.ndim >= 2 else 0.0
        # after one step both bias-corrected moments are g and g²
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_norm_and_clipping_equal_torchs(max_norm):
    ours, torchs = toy(), toy()
    for model in (ours, torchs):
        model(torch.arange(8)).square().sum().backward()
    norm = optim.grad_norm(ours.parameters())
    optim.clip_(ours.parameters(), norm, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(torchs.parameters(), max_norm)
    assert norm.shape == ()
    assert torch.equal(norm, expected)
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_norm_of_bf16_gradients_is_fp32():
    p = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 1.0)
    norm = optim.grad_norm([p])
    assert norm.dtype == torch.float32
    assert abs(norm.item() - math.sqrt(1000)) < 1e-4


def test_no_gradients():
    assert optim.grad_norm(toy().parameters()) == 0
    optim.clip_(toy().parameters(), torch.zeros(()), 1.0)


def test_scale_gradients():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([2.0, 4.0, 8.0])
    optim.scale_gradients_([p], 0.5)
    assert p.grad.tolist() == [1.0, 2.0, 4.0]


def test_is_finite():
    fine = torch.ones(3)
    assert optim.is_finite(fine, torch.tensor(2.0))
    assert not optim.is_finite(fine, torch.tensor([1.0, math.nan]))
    assert not optim.is_finite(torch.tensor(-math.inf), fine)


def test_loss_scale_grows_and_shrinks():
    scale = optim.LossScale(1024.0, growth_steps=3)
    for finite in (True, True, False, True, True):
        scale.update_(finite)
    assert scale.value == 512
    again = optim.LossScale(growth_steps=3)
    again.load_state_dict(scale.state_dict())
    again.update_(True)
    assert again.value == 1024
    assert again.state_dict() == {"value": 1024.0, "good_steps": 0}


def test_loss_spikes_against_numpy() -> None:
    """Median and scaled MAD of the last accepted losses; a spike stays out of the window."""
    generator = np.random.default_rng(0)
    losses = [4 - 0.01 * i + 0.05 * generator.standard_normal() for i in range(60)]
    for step in (25, 40, 41):
        losses[step] += 2
    ours, accepted = LossSpikes(6.0, 16, torch.device("cpu")), []
    for step, loss in enumerate(losses):
        window = np.array(accepted[-16:])
        spread = 1.4826 * np.median(np.abs(window - np.median(window))) if len(window) else 0
        expected = len(window) == 16 and loss > np.median(window) + 6 * spread
        value = torch.tensor(loss, dtype=torch.float64)
        spike = ours.is_spike(value)
        assert bool(spike) == expected, step
        ours.add_(value, ~spike)
        accepted += [] if expected else [loss]
        if step == 33:  # as saved and restored
            ours = LossSpikes(6.0, 16, torch.device("cpu"), json.loads(json.dumps(ours.read())))
    assert len(accepted) == 57
    assert ours.read() == accepted[-16:]


def test_losses_before_a_full_window_and_constant_ones_are_no_spikes() -> None:
    spikes = LossSpikes(3.0, 8, torch.device("cpu"))
    for _ in range(8):
        assert not spikes.is_spike(torch.tensor(1e9))
        spikes.add_(torch.tensor(2.0), torch.tensor(True))
    assert not spikes.is_spike(torch.tensor(2.0))
    assert spikes.is_spike(torch.tensor(2.1))
    spikes.add_(torch.tensor(torch.nan), torch.tensor(False))  # a step that was not finite
    assert spikes.is_spike(torch.tensor(2.1))
