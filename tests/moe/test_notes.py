"""What a run says of its MoE layers at its start."""

from open_lm.config.moe import MoEConfig
from open_lm.moe.notes import notes


def test_nothing_is_left_to_say():
    assert notes(MoEConfig()) == []
    assert notes(MoEConfig(freq=1, num_experts=4, backend="reference")) == []


def test_defaults_are_said():
    assert notes(MoEConfig(freq=1, num_experts=4)) == ["--moe-backend auto: grouped_mm"]
    said = notes(MoEConfig(layers=(0,), num_experts=4, router="sinkhorn", backend="reference"))
    assert said == [
        "--moe-router sinkhorn sees later tokens in training; evaluation is causal",
        "--moe-balance none: --moe-router sinkhorn needs no balancing",
    ]
    given = notes(MoEConfig(freq=1, num_experts=4, router="hash", backend="reference", balance=("none",)))
    assert given == []
