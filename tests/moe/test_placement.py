"""Which layers are mixtures, and of how many experts: frequency, list, Megatron's pattern, pyramids."""

import random
from dataclasses import replace

import pytest
import torch

from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.config.moe_check import check_moe
from open_lm.config.moe_layers import MAX_LAYERS, read_pattern
from open_lm.model import Transformer
from open_lm.moe.layer import MoE
from open_lm.moe.placement import layer_config, moe_layers


def model(n_layers: int = 8, **flags) -> ModelConfig:
    moe = MoEConfig(**({"num_experts": 4, "hidden_dim": 8} | flags))
    return ModelConfig(dim=16, n_layers=n_layers, n_heads=2, seq_len=8, vocab_size=11, moe=moe)


@pytest.mark.parametrize(
    ("flags", "layers"),
    [
        ({}, ()),
        ({"freq": 1}, (0, 1, 2, 3, 4, 5, 6, 7)),
        ({"freq": 2}, (0, 2, 4, 6)),
        ({"freq": 3}, (0, 3, 6)),
        ({"freq": 9}, (0,)),
        ({"freq": 1, "first_dense": 3}, (3, 4, 5, 6, 7)),
        ({"freq": 2, "first_dense": 3}, (4, 6)),
        ({"freq": 2, "first_dense": 4}, (4, 6)),
        ({"layers": (7,)}, (7,)),
        ({"layers": (1, 2, 5)}, (1, 2, 5)),
        ({"layer_pattern": "[0]*3+[1]*5"}, (3, 4, 5, 6, 7)),
        ({"layer_pattern": "([0]+[1])*4"}, (1, 3, 5, 7)),
        ({"layer_pattern": "[1]*8", "first_dense": 6}, (6, 7)),
    ],
)
def test_layers(flags: dict, layers: tuple[int, ...]) -> None:
    config = model(**flags)
    assert moe_layers(config) == layers
    if layers:
        check_moe(config.moe, n_layers=8)


@pytest.mark.parametrize(
    "text",
    ["[0]*3+[1]*24", "([0]+[1])*12", "[1, 0, 0]*4", "[0,1,1]", "3*[1]", "([1]+[0]*11)*5", " [0] * 2 + [1] ",
     "[0]+([1]+[0])*2+[1]", "[1,]", "[0]*0+[1]", "\n[1]\n", "((([1])))"],
)  # fmt: skip
def test_a_pattern_is_what_python_makes_of_it(text: str) -> None:
    assert read_pattern(text) == eval(text.strip())


def test_any_pattern_of_lists_sums_and_products() -> None:
    rng = random.Random(0)

    def expression(depth: int) -> str:
        if not depth or rng.random() < 0.2:
            return "[" + ",".join(rng.choice("01") for _ in range(rng.randint(1, 4))) + "]"
        if rng.random() < 0.5:
            return f"({expression(depth - 1)})*{rng.randint(0, 3)}"
        return f"({expression(depth - 1)}+{expression(depth - 1)})"

    for _ in range(200):
        text = expression(4)
        assert read_pattern(text) == eval(text)


EXECUTES = [
    "__import__('os').system('touch TOUCHED')",
    "[__import__('pathlib').Path('TOUCHED').touch() or 1]",
    "open('TOUCHED', 'w')",
    "[1 for _ in [open('TOUCHED', 'w')]]",
    "(lambda: [1])()",
    "[1]*len([1])",
    "[x := 1]",
    "exec('1')",
    "f'{open(1)}'",
    "[1].__class__",
    "[1]; import os",
    "import os",
]
NONSENSE = ["", "[]*2*", "[0,1", "1", "0", "[2]*3", "[-1]", "[0.0]", "[True]", "[1.0]", "['1']", "[[1]]", "(1,0)",
            "{1}", "[1]*-1", "[1]-[0]", "[1]/2", "[1]*[1]", "[0]+1", "2*3", "[1]**2", "[1]*2.0", "[1]*True",
            "[*[1]]", "[1][0]", "[1] if 1 else [0]", "None", "...", "[1]\x00", "[1] [0]", "\u0661",
            "0,1"]  # fmt: skip
# each would fill the memory or the stack
HUGE = [
    "[1]*1000000000000",
    "[0]*10000*10000*10000",
    "([1]*9999+[1]*9999)*9999",
    "[1]*" + "9" * 5000,
    "(" * 5000 + "[1]" + ")" * 5000,
    "+".join(["[1]"] * 50_000),
    "[" * 3000 + "1" + "]" * 3000,
]


@pytest.mark.parametrize("text", EXECUTES + NONSENSE + HUGE, ids=lambda text: text[:30].encode().hex()[:24])
def test_other_texts_are_refused_and_nothing_is_executed(text: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--moe-layer-pattern .*expected a list of 0 and 1") as caught:
        read_pattern(text)
    assert list(tmp_path.iterdir()) == []
    assert len(str(caught.value)) < 300


def test_a_pattern_may_be_as_long_as_any_model() -> None:
    assert read_pattern(f"[1]*{MAX_LAYERS}") == [1] * MAX_LAYERS


def test_a_pyramids_layers_have_their_own_numbers_of_experts() -> None:
    # PR-MoE's shape (2201.05596, table 4): every second layer, more experts in the last two
    config = model(freq=2, num_experts=(2, 2, 4, 8))
    assert [layer_config(config, n).num_experts for n in (0, 2, 4, 6)] == [2, 2, 4, 8]
    config = model(layers=(1, 6), num_experts=(4, 8))
    assert [layer_config(config, n).num_experts for n in (1, 6)] == [4, 8]
    config = model(freq=2)
    assert {layer_config(config, n).num_experts for n in (0, 2, 4, 6)} == {4}
    assert layer_config(config, 2) == replace(config.moe, dim=16)


@pytest.mark.parametrize(
    ("flags", "experts"),
    [
        ({"freq": 2, "num_experts": (2, 2, 4, 8)}, {0: 2, 2: 2, 4: 4, 6: 8}),
        ({"freq": 2, "first_dense": 3, "num_experts": (4, 8)}, {4: 4, 6: 8}),
        ({"layers": (1, 6), "num_experts": (4, 8)}, {1: 4, 6: 8}),
        ({"layer_pattern": "[0]*6+[1]*2", "num_experts": 3}, {6: 3, 7: 3}),
    ],
)
def test_the_model_is_built_so(flags: dict, experts: dict[int, int]) -> None:
    config = model(**flags)
    check_moe(config.moe, n_layers=8)
    with torch.device("meta"):
        network = Transformer(config)
    built = {
        number: block.feed_forward.experts.mlp.w1.shape[0]
        for number, block in enumerate(network.layers)
        if isinstance(block.feed_forward, MoE)
    }
    assert built == experts


@pytest.mark.parametrize("numbers", [(2, 2, 4), (2, 2, 4, 8, 8)])
def test_a_pyramid_of_another_length_is_refused(numbers) -> None:
    with pytest.raises(ValueError, match=rf"{len(numbers)} numbers for 4 MoE layers \(0, 2, 4, 6\)"):
        check_moe(model(freq=2, num_experts=numbers).moe, n_layers=8)
