"""moe/recipes: parameter counts against other libraries and formulas, the tiny forms trained, the table of flags.

D model width, F hidden width, E experts, L layers, V vocabulary, S positions.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from open_lm.config import ModelConfig
from open_lm.config.check import check
from open_lm.config.parse import flag_types, parse
from open_lm.config.resolve import SIZE_KEYS, resolve_model
from open_lm.config.schedule import plan_steps
from open_lm.main import main
from open_lm.model import count_parameters
from open_lm.moe.placement import moe_layers

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "moe" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.sh") if path.stem != "launch")
THEIRS = json.loads(Path(__file__).with_name("peers").joinpath("their_flags.json").read_text())
MOE_MD = (ROOT / "MOE.md").read_text(encoding="utf-8")


def flags(name: str, *arguments: str, **environment: str) -> list[str]:
    """What the script would give to open_lm.main."""
    command = ["bash", str(RECIPES / f"{name}.sh"), "--print-flags", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return shlex.split(done.stdout)


def resolve(words: list[str]) -> ModelConfig:
    run, given = parse(words)
    assert check(run, given) == []
    return resolve_model(run.model, run.moe, given)


def model(name: str) -> ModelConfig:
    return resolve(flags(name))


def total(name: str) -> int:
    return count_parameters(model(name)).total


def count_theirs(family: str, **sizes: object) -> int:
    """Of transformers' model, on the meta device."""
    config = getattr(transformers, f"{family}Config")(**sizes)
    with torch.device("meta"):
        network = getattr(transformers, f"{family}ForCausalLM")(config)
    return sum(p.numel() for p in network.parameters())


def rounds_to(number: int, published: str) -> bool:
    """Whether "46.7B" is what `number` is printed as with as many digits."""
    digits = len(published.rstrip("BM").partition(".")[2])
    scale = {"B": 1e9, "M": 1e6}[published[-1]]
    return f"{number / scale:.{digits}f}" == published[:-1]


# Counts


QWEN3 = {"num_hidden_layers": 48, "head_dim": 128}
QWEN3_SMALL = {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "head_dim": 128,
               "num_key_value_heads": 4, "num_experts": 64, "moe_intermediate_size": 384}  # fmt: skip
DEEPSEEK = {"num_mtp_layers": 0}
DEEPSEEK_SMALL = {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 8,
                  "q_lora_rank": 384, "kv_lora_rank": 256, "intermediate_size": 2560, "first_k_dense_replace": 1,
                  "n_routed_experts": 64, "moe_intermediate_size": 512, "num_mtp_layers": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "family", "sizes"),
    [
        ("mixtral_8x7b", "Mixtral", {}),
        ("mixtral_8x7b_sinkhorn", "Mixtral", {}),
        ("olmoe_1b_7b", "Olmoe", {"intermediate_size": 1024}),
        ("qwen3_moe_small", "Qwen3Moe", QWEN3_SMALL),
        ("deepseek_v3_small", "DeepseekV3", DEEPSEEK_SMALL),
    ],
)
def test_counts_are_those_of_transformers(name: str, family: str, sizes: dict) -> None:
    assert total(name) == count_theirs(family, **sizes)


@pytest.mark.parametrize(
    ("name", "family", "theirs", "entries", "extra", "published"),
    [
        ("qwen3_moe_small", "Qwen3Moe", QWEN3, {"hidden_dim": 2048, "n_layers": 48, "n_heads": 32},
         "--moe-num-experts 128 --moe-hidden-dim 768", ("30.5B", "3.3B")),
        ("deepseek_v3_small", "DeepseekV3", DEEPSEEK,
         {"hidden_dim": 7168, "n_layers": 61, "n_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
          "ffn_hidden_dim": 18432},
         "--moe-first-dense 3 --moe-num-experts 256 --moe-hidden-dim 2048 --moe-shared-hidden-dim 2048",
         ("671B", "37B")),
    ],
)  # fmt: skip
def test_small_recipes_have_the_published_count_at_the_published_size(
    tmp_path, name: str, family: str, theirs: dict, entries: dict, extra: str, published: tuple[str, str]
) -> None:
    """So the options are the system's own: only sizes differ.

    The published active weights are held within one of their last digit: DeepSeek-V3's are 36.6 billion without the
    embedding and 37.6 with it, and Qwen3's 3.353 are printed as 3.3.
    """
    file = tmp_path / "published.json"
    file.write_text(json.dumps(json.loads((RECIPES / f"{name}.json").read_text()) | entries))
    config = resolve([*flags(name), "--model", str(file), *extra.split()])
    count = count_parameters(config)
    assert count.total == count_theirs(family, **theirs)
    assert rounds_to(count.total, published[0])
    unit = 0.1e9 if "." in published[1] else 1e9
    assert abs(count.active - float(published[1][:-1]) * 1e9) < unit


@pytest.mark.parametrize(
    ("name", "published"),
    [("mixtral_8x7b", ("46.7B", "12.9B")), ("olmoe_1b_7b", ("6.9B", "1.3B"))],
)
def test_published_counts(name: str, published: tuple[str, str]) -> None:
    count = count_parameters(model(name))
    assert rounds_to(count.total, published[0])
    assert rounds_to(count.active, published[1])


DEEPSPEED = {  # D, experts of the twelve MoE layers, residual, and table 2 and 5 of 2201.05596
    "deepspeed_350m_moe128": (1024, [128] * 12, False, "13B"),
    "deepspeed_350m_pr_moe": (1024, [32] * 10 + [64] * 2, True, "4B"),
    "deepspeed_1.3b_moe128": (2048, [128] * 12, False, "52B"),
    "deepspeed_1.3b_pr_moe": (2048, [64] * 10 + [128] * 2, True, "31B"),
}


@pytest.mark.parametrize("name", DEEPSPEED)
def test_counts_of_deepspeed(name: str) -> None:
    """GPT-2's layers, biases everywhere; a router without bias, a mixing coefficient with one."""
    D, experts, residual, published = DEEPSPEED[name]
    V, S, L = 50304, 2048, 24
    mlp = 2 * D * 4 * D + 4 * D + D
    attention = 4 * D * D + 4 * D
    norm = 2 * D
    shared = V * D + S * D + norm + L * (attention + 2 * norm)
    sparse = sum(E * mlp + D * E for E in experts)
    beside = len(experts) * (mlp + 2 * D + 2) if residual else 0
    count = total(name)
    assert count == shared + (L - len(experts)) * mlp + sparse + beside
    assert rounds_to(count, published)


def test_count_of_st_moe() -> None:
    """The published 4.1 billion are an encoder and a decoder without biases; ours is a decoder, whose networks
    have st-moe-pytorch's biases but not its multiplicative one."""
    D, F, E, L, V, sparse = 1024, 2816, 32, 27, 32128, 6
    attention, network, norm = 4 * D * D, 3 * D * F, D
    both = 2 * V * D + L * (3 * attention + 2 * network) + 2 * sparse * (E - 1) * network
    assert rounds_to(both, "4.1B")
    biases = 2 * F + D
    dense = network + biases
    ours = 2 * V * D + norm + L * (attention + 2 * norm) + (L - sparse) * dense
    ours += sparse * (E * dense + D * E + norm + dense)  # experts, router, and the dense network after them
    assert total("st_moe") == ours
    assert moe_layers(model("st_moe")) == (3, 7, 11, 15, 19, 23)


# As printed in open_lm's MOE.md, "Training Parameters"
OPEN_LM = {
    "8": {"41m": "68.9M", "87m": "165.4M", "160m": "360.6M", "410m": "1.1B", "830m": "2.4B"},
    "32": {"41m": "164.5M", "87m": "439.9M", "160m": "1.0B", "410m": "3.5B", "830m": "7.9B"},
}


@pytest.mark.parametrize(("experts", "size"), [(e, size) for e, cells in OPEN_LM.items() for size in cells])
def test_open_lms_table(experts: str, size: str) -> None:
    config = resolve(flags("open_lm", MODEL=size, EXPERTS=experts))
    assert rounds_to(count_parameters(config).total, OPEN_LM[experts][size])


def test_moe_md_has_these_counts() -> None:
    cells = r"\| ([\d,]+) \| ([\d,]+) \|"
    rows = dict(re.findall(r"^\| `moe/recipes/([\w.]+)\.sh` \|([^|]*\|.*)$", MOE_MD, re.MULTILINE))
    assert sorted(rows) == NAMES
    for name in set(NAMES) - {"open_lm"}:
        (found,) = re.findall(cells, rows[name])
        assert tuple(int(n.replace(",", "")) for n in found) == tuple(count_parameters(model(name))), name


# Hyperparameters


STEPS = {  # steps of the whole run, tokens in a batch: worked out from the sources
    "mixtral_8x7b": (500_000, 256 * 4096),
    "mixtral_8x7b_sinkhorn": (500_000, 256 * 4096),
    "deepspeed_350m_moe128": (300_000_000_000 // (256 * 2048), 256 * 2048),
    "deepspeed_350m_pr_moe": (300_000_000_000 // (256 * 2048), 256 * 2048),
    "deepspeed_1.3b_moe128": (300_000_000_000 // (512 * 2048), 512 * 2048),
    "deepspeed_1.3b_pr_moe": (300_000_000_000 // (512 * 2048), 512 * 2048),
    "olmoe_1b_7b": (5_000_000_000_000 // (1024 * 4096), 1024 * 4096),
    "open_lm": (20_000_000_000 // (64 * 2048), 64 * 2048),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_the_published_ones(name: str) -> None:
    run, _ = parse(flags(name))
    assert run.optim.global_batch_size
    schedule = plan_steps(run.data, run.optim, run.optim.global_batch_size, model(name).seq_len)
    assert (schedule.total_steps, schedule.batch_tokens) == STEPS[name]


WARMUP_TOKENS = {"deepspeed_350m_moe128": 375e6, "deepspeed_350m_pr_moe": 375e6, "deepspeed_1.3b_moe128": 375e6,
                 "deepspeed_1.3b_pr_moe": 375e6, "olmoe_1b_7b": 10485760000}  # fmt: skip


@pytest.mark.parametrize("name", WARMUP_TOKENS)
def test_warmup_is_the_published_one(name: str) -> None:
    run, _ = parse(flags(name))
    assert run.optim.warmup == round(WARMUP_TOKENS[name] / STEPS[name][1])


# Their coefficient: of one layer, summed over layers. Ours: of the mean.
PER_LAYER = {"mixtral_8x7b": 1e-2, "deepspeed_350m_moe128": 1e-2, "deepspeed_350m_pr_moe": 1e-2,
             "deepspeed_1.3b_moe128": 1e-2, "deepspeed_1.3b_pr_moe": 1e-2, "st_moe": 1e-2,
             "deepseek_v3_small": 1e-4}  # fmt: skip


@pytest.mark.parametrize("name", PER_LAYER)
def test_summed_losses_have_the_weight_of_all_layers(name: str) -> None:
    config = model(name)
    (weight,) = config.moe.losses.values()
    assert math.isclose(weight, PER_LAYER[name] * len(moe_layers(config)))


# Tiny forms


@pytest.mark.parametrize("name", NAMES)
def test_tiny_forms_train(tmp_path, name: str) -> None:
    words = flags(name, "--tiny", LOGS=str(tmp_path))
    config = resolve(words)
    main(words)
    (log,) = tmp_path.glob("*/log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    assert all(math.isfinite(line["train/loss"]) for line in trained)
    for line in trained:
        assert [len(layer["share"]) for layer in line["router"]] == experts_of(config)


def experts_of(config: ModelConfig) -> list[int]:
    """Experts of each MoE layer."""
    number, layers = config.moe.num_experts, moe_layers(config)
    assert number
    assert layers
    return list(number) if isinstance(number, tuple) else [number] * len(layers)


SIZES = {"num_experts", "top_k", "hidden_dim", "layer_pattern", "layers", "num_groups", "top_groups",
         "shared_hidden_dim"}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_tiny_forms_have_the_full_ones_options(name: str) -> None:
    """Nothing but sizes differs, in the MoE and in the network around it."""
    full, tiny = model(name), resolve(flags(name, "--tiny"))
    for part in SIZES:
        full, tiny = (replace(c, moe=replace(c.moe, **{part: None})) for c in (full, tiny))
    assert full.moe == tiny.moe
    for key, field in SIZE_KEYS.items():
        assert (getattr(full, field) is None) == (getattr(tiny, field) is None), key
    for field in ("model_norm", "ffn_type", "ffn_bias", "attn_bias", "qk_norm", "qk_norm_per_head", "dropout",
                  "positional_embedding_type", "rope_theta", "init_std", "init_scaled_outputs", "weight_tying",
                  "norm_eps"):  # fmt: skip
        assert getattr(full, field) == getattr(tiny, field), field
    assert (full.n_heads != full.kv_heads) == (tiny.n_heads != tiny.kv_heads)


# The scripts themselves


def test_the_tiny_command_runs_as_documented(tmp_path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "LOGS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = ["bash", str(RECIPES / "olmoe_1b_7b.sh"), "--tiny", "--name", "mine"]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "mine" / "log.jsonl").exists()


def test_data_are_needed() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "DATA"}
    command = ["bash", str(RECIPES / "olmoe_1b_7b.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "set DATA" in done.stderr


def test_the_launcher_gets_processes_data_and_extra_flags(tmp_path) -> None:
    """With a `python` that prints its arguments: the command that would train."""
    printer = tmp_path / "python"
    printer.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    printer.chmod(0o755)
    environment = os.environ | {"PYTHON": str(printer), "DATA": "a/m.jsonl b/m.jsonl", "NPROC": "4", "LOGS": "runs",
                                "TORCHRUN": "--nnodes 2 --node-rank 1"}  # fmt: skip
    command = [
        "bash",
        str(RECIPES / "mixtral_8x7b.sh"),
        "--train-data-mix-weights",
        ".3",
        ".7",
        "--lr",
        "1e-5",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    at = words.index("open_lm.main")
    assert " ".join(words[:at]) == (
        "-m torch.distributed.run --nproc-per-node 4 --nnodes 2 --node-rank 1 -m --"
    )
    run, given = parse(words[at + 1 :])
    assert check(run, given) == []
    assert run.data.dataset_manifest == ("a/m.jsonl", "b/m.jsonl")
    assert run.data.train_data_mix_weights == (0.3, 0.7)
    assert (run.optim.lr, run.log.logs, run.log.name) == (1e-5, "runs", "mixtral_8x7b")
    assert run.distributed.fsdp


@pytest.mark.parametrize("name", NAMES)
def test_each_flag_of_the_comments_exists(name: str) -> None:
    """What stands right of the arrows, in a line or under it."""
    text = (RECIPES / f"{name}.sh").read_text(encoding="utf-8")
    ours = re.findall(r"→(.*)$", text, re.MULTILINE)
    named = [flag for part in ours for flag in re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", part)]
    assert named
    known = {"--" + flag.replace("_", "-") for flag in flag_types()}
    assert [f for f in named if f.replace("--no-", "--") not in known] == []


# Their flag → ours


def rows(system: str) -> list[tuple[str, str]]:
    (table,) = re.findall(rf"<!-- theirs: {system} -->\n(.*?)<!-- end of theirs -->", MOE_MD, re.DOTALL)
    found = re.findall(r"^\| (.+?) \| (.+) \|$", table, re.MULTILINE)
    assert found[0] == ("theirs", "ours")
    return found[1:]


@pytest.mark.parametrize("system", THEIRS)
def test_each_of_their_flags_has_one_row(system: str) -> None:
    named = [flag for left, _ in rows(system) for flag in re.findall(r"`([^`]+)`", left)]
    assert sorted(named) == THEIRS[system]["flags"]


@pytest.mark.parametrize("system", THEIRS)
def test_our_side_names_our_flags_or_says_why_not(system: str) -> None:
    known = {"--" + flag.replace("_", "-") for flag in flag_types()}
    for left, right in rows(system):
        named = re.findall(r"`([^`]+)`", right)
        assert [n for n in named if n not in known and n not in SIZE_KEYS] == [], left
        assert named or right.startswith(("not yet", "not here", "always")), left


@pytest.mark.parametrize("system", THEIRS)
def test_values_named_on_our_side_exist(system: str) -> None:
    """`--moe-drop-policy` probs: what follows a flag is one of its values."""
    choices = {"--" + name.replace("_", "-"): literals(hint) for name, hint in flag_types().items()}
    for left, right in rows(system):
        for flag, word in re.findall(r"`(--[\w-]+)` ([a-z_]+)(?=[,;]|$| or | with | with)", right):
            if choices.get(flag):
                assert word in choices[flag], (left, flag, word)


def literals(hint: object) -> set[str]:
    """All strings of a Literal, wherever it stands in a type."""
    inner = getattr(hint, "__args__", ())
    return {x for x in inner if isinstance(x, str)}.union(*(literals(x) for x in inner))
