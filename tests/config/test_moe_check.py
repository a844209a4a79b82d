"""The mixture's flags: every refusal with its sentence, the command line, files, checkpoints, later tokens."""

import ast
import inspect
import json
import shlex
import traceback
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from open_lm.config import moe_check, moe_layers, moe_types
from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.config.moe_check import check_moe, sees_later_tokens, without_idle
from open_lm.config.parse import config_text, flag_values, parse
from open_lm.config.resolve import reconcile, resolve_model

# flags of a layer among 8 experts in a model of 12 layers, and the sentence
REFUSED: list[tuple[dict, str]] = [
    ({"num_groups": 0}, "--moe-num-groups 0: expected more than 0"),
    ({"weight_scale": 0.0}, "--moe-weight-scale 0.0: expected more than 0"),
    ({"weight_scale": float("nan")}, "--moe-weight-scale nan: expected more than 0"),
    ({"threshold": -1.0}, "--moe-threshold -1.0: expected more than 0"),
    ({"router": "threshold", "top_k": 3, "threshold": (0.2,)}, "--moe-threshold 0.2: 1 numbers for the 2 choices"),
    ({"hidden_dim": 0}, "--moe-hidden-dim 0: expected more than 0"),
    ({"dim": 0}, "--moe-dim 0: expected more than 0"),
    ({"capacity_factor": -1.0}, "--moe-capacity-factor -1.0: expected 0 or more"),
    ({"capacity_factor": float("inf")}, "--moe-capacity-factor inf: expected 0 or more"),
    ({"min_capacity": -4}, "--moe-min-capacity -4: expected 0 or more"),
    ({"z_loss_weight": -0.1}, "--moe-z-loss-weight -0.1: expected 0 or more"),
    ({"first_dense": -1}, "--moe-first-dense -1: expected 0 or more"),
    ({"shared_hidden_dim": -1}, "--moe-shared-hidden-dim -1: expected 0 or more"),
    ({"jitter": 1.0}, "--moe-jitter 1.0: expected 0 <= jitter < 1"),
    ({"top_k": 0}, "--moe-top-k 0: expected at least 1"),
    ({"num_experts": 0}, "--moe-num-experts 0: expected at least 1"),
    ({"num_experts": (8,) * 5 + (1,)}, "--moe-top-k 2 > --moe-num-experts 1: a token cannot go to more"),
    ({"num_groups": 3}, "--moe-num-experts 8 is not divisible into --moe-num-groups 3"),
    ({"top_groups": 2}, "--moe-top-groups 2 > --moe-num-groups 1: a token cannot use more"),
    ({"num_groups": 2, "top_groups": 2}, "--moe-top-groups 2 of --moe-num-groups 2: a token may use every"),
    ({"num_groups": 8}, "--moe-top-k 2, but --moe-top-groups 1 of --moe-num-groups 8 leave a token only 1 of 8"),
    ({"num_groups": 4, "top_groups": 2, "top_k": 3}, "--moe-top-k 3 is not divisible by --moe-top-groups 2"),
    ({"threshold": 0.3}, "--moe-threshold 0.3 needs --moe-router threshold or coordinate_descent: add it, or drop"),
    ({"eval_threshold": 0.2}, "--moe-eval-threshold 0.2 needs --moe-router threshold"),
    ({"bias_rate": 0.01}, "--moe-bias-rate 0.01 needs --moe-balance bias"),
    ({"balance": ("none",), "loss_weight": 0.01}, "--moe-loss-weight 0.01 needs a loss in --moe-balance"),
    ({"router": "sinkhorn", "loss_weight": 0.01}, "--moe-loss-weight 0.01 needs a loss in --moe-balance"),
    ({"score": "sigmoid", "score_order": "after"}, "--moe-score sigmoid --moe-score-order after: a sigmoid"),
    ({"router": "quantile", "score": "sigmoid"}, "--moe-score sigmoid belong to --moe-router top_k, not quantile"),
    (
        {"router": "hash", "num_groups": 2, "noise": "rsample", "score_order": "after"},
        "--moe-score-order after, --moe-num-groups, --moe-noise rsample belong to --moe-router top_k, not hash",
    ),
    ({"noise": "second_expert", "top_k": 1}, "--moe-noise second_expert with --moe-top-k 1: there is no second"),
    ({"router": "threshold", "top_k": 1}, "--moe-router threshold with --moe-top-k 1: the one weight is 1"),
    ({"normalize_weights": True, "top_k": 1}, "--moe-normalize-weights with --moe-top-k 1 makes every weight 1"),
    ({"normalize_after_drops": True, "top_k": 1}, "--moe-normalize-after-drops with --moe-top-k 1 makes every"),
    ({"score_order": "after", "top_k": 1}, "--moe-score-order after with --moe-top-k 1 makes every weight 1"),
    (
        {"router": "expert_choice", "normalize_after_drops": True},
        "--moe-normalize-after-drops with --moe-router expert_choice: a token may get no expert at all",
    ),
    (
        {"normalize_weights": True, "normalize_after_drops": True},
        "--moe-normalize-weights and --moe-normalize-after-drops are both given: use one",
    ),
    (
        {"weight_scale": 2.5, "normalize_after_drops": True},
        "--moe-weight-scale 2.5 with --moe-normalize-after-drops, which makes",
    ),
    ({"router": "hash", "jitter": 0.1}, "--moe-jitter 0.1 with --moe-router hash, whose experts and weights"),
    ({"router": "hash", "z_loss_weight": 0.1}, "--moe-z-loss-weight 0.1 with --moe-router hash"),
    ({"router": "hash", "straight_through": True}, "--moe-straight-through True with --moe-router hash"),
    ({"balance": ()}, "--moe-balance has no value: name a method, or none"),
    ({"balance": ("aux", "none")}, "--moe-balance aux none: none stands alone"),
    ({"balance": ("aux", "bias", "aux")}, "--moe-balance aux bias aux: a method is named twice"),
    (
        {"router": "uniform", "balance": ("aux", "global")},
        "--moe-balance aux global with --moe-router uniform, whose loads do not follow",
    ),
    ({"router": "threshold", "balance": ("bias",)}, "--moe-balance bias with --moe-router threshold: the bias"),
    ({"balance": ("bias",), "score_order": "after"}, "--moe-balance bias with --moe-score-order after: the bias"),
    ({"balance": ("bias",), "noise": "rsample"}, "--moe-noise rsample with --moe-balance bias: noise"),
    (
        {"balance": ("sequence", "bias"), "loss_weight": (0.1, 0.2)},
        "--moe-loss-weight 0.1 0.2: 2 weights for the 1 losses of --moe-balance (sequence); give one for all, or "
        "one each (bias takes none)",
    ),
    ({"loss_weight": -0.1}, "--moe-loss-weight -0.1: expected 0 or more"),
    ({"balance": ("aux", "global"), "loss_weight": (0.1, float("inf"))}, "--moe-loss-weight inf: expected 0 or"),
    *(
        ({"capacity_factor": 0.0, name: value}, f"{flag} {value} with --moe-capacity-factor 0 (dropless): there")
        for flag, name, value in (
            ("--moe-drop-policy", "drop_policy", "probs"),
            ("--moe-pad-to-capacity", "pad_to_capacity", True),
            ("--moe-min-capacity", "min_capacity", 4),
            ("--moe-capacity-per", "capacity_per", "sequence"),
            ("--moe-capacity-rounding", "capacity_rounding", "up"),
        )
    ),
    ({"router": "expert_choice", "capacity_factor": 0.0}, "--moe-capacity-factor 0 with --moe-router expert"),
    (
        {"router": "expert_choice", "eval_capacity_factor": 0.0},
        "--moe-eval-capacity-factor 0 with --moe-router expert_choice: each expert takes",
    ),
    ({"router": "expert_choice", "drop_policy": "probs"}, "--moe-drop-policy probs with --moe-router expert"),
    ({"router": "expert_choice_causal", "capacity_per": "sequence"}, "--moe-capacity-per batch"),
    ({"router": "expert_choice_causal", "pad_to_capacity": True}, "--moe-pad-to-capacity with --moe-router"),
    ({"shared_mix": "olmo"}, "--moe-shared-mix olmo without a shared expert: add --moe-shared-hidden-dim"),
    # placement
    ({"freq": -1}, "--moe-freq -1: expected 0 or more"),
    ({"layers": (1,)}, "--moe-freq and --moe-layers are both given: use one"),
    ({"layer_pattern": "[1]*12"}, "--moe-freq and --moe-layer-pattern are both given"),
    ({"freq": 0}, "--moe-num-experts given, but --moe-freq is 0 (a dense model): add --moe-freq N, or drop them"),
    ({"num_experts": None}, "--moe-freq 2 needs --moe-num-experts"),
    ({"freq": 0, "layers": (3,), "num_experts": None}, "--moe-layers (3,) needs --moe-num-experts"),
    ({"first_dense": 12}, "--moe-freq, --moe-first-dense 12: none of 12 layers is an MoE"),
    ({"freq": 0, "layer_pattern": "[0]*12"}, "none of 12 layers is an MoE"),
    (
        {"num_experts": (32, 64)},
        "--moe-num-experts 32 64: 2 numbers for 6 MoE layers (0, 2, 4, 6, 8, 10); give one for all, or one each",
    ),
    ({"freq": 0, "layers": (3, 12)}, "--moe-layers 12: the model's layers are 0 to 11"),
    ({"freq": 0, "layers": (-1,)}, "--moe-layers -1: the model's layers are 0 to 11"),
    ({"freq": 0, "layers": (3,), "first_dense": 1}, "--moe-first-dense with --moe-layers: the list alone"),
    ({"freq": 0, "layers": (5, 3)}, "--moe-layers 5 3: expected increasing numbers, each once"),
    ({"freq": 0, "layers": (3, 3)}, "--moe-layers 3 3: expected increasing numbers, each once"),
    ({"freq": 0, "layer_pattern": "[1]*11"}, "--moe-layer-pattern [1]*11 has 11 entries, the model 12 layers"),
    ({"freq": 0, "layer_pattern": "[2]*12"}, '--moe-layer-pattern [2]*12: expected a list of 0 and 1 as Megatron'),
    # types, which the command line holds by itself, but a model's JSON and a library's user do not
    ({"router": "topk"}, "--moe-router 'topk': expected top_k, expert_choice, "),
    ({"router": "topk"}, "; did you mean top_k?"),
    ({"balance": ("aux", "sequences")}, "--moe-balance 'sequences': expected a list of aux, "),
    ({"balance": "aux"}, "--moe-balance 'aux': expected a list of aux, "),
    ({"top_k": "2"}, "--moe-top-k '2': expected int"),
    ({"top_k": 2.0}, "--moe-top-k 2.0: expected int"),
    ({"top_k": True}, "--moe-top-k True: expected int"),
    ({"normalize_weights": 1}, "--moe-normalize-weights 1: expected bool"),
    ({"num_experts": [32, 64]}, "--moe-num-experts [32, 64]: expected int or a list of int or None"),
]  # fmt: skip


def config(**flags) -> MoEConfig:
    return MoEConfig(**({"freq": 2, "num_experts": 8} | flags))  # type: ignore[arg-type]


@pytest.mark.parametrize(("flags", "sentence"), REFUSED, ids=lambda v: str(v)[:60])
def test_refusal(flags: dict, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_moe(config(**flags), n_layers=12)
    assert sentence in str(caught.value)


def test_every_refusal_is_tested() -> None:
    met = set()
    for flags, _ in REFUSED:
        try:
            check_moe(config(**flags), n_layers=12)
        except ValueError as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            met.add((Path(frame.filename).name, frame.lineno))
    written = {
        (Path(str(module.__file__)).name, node.lineno)
        for module in (moe_check, moe_layers, moe_types)
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }
    assert written == met


def test_the_defaults_and_the_published_settings_are_accepted() -> None:
    for flags in (
        {},
        {"num_experts": 64, "top_k": 8, "capacity_factor": 0.0, "loss_weight": 0.01, "z_loss_weight": 1e-3},
        {"num_experts": 256, "top_k": 8, "score": "sigmoid", "normalize_weights": True, "weight_scale": 2.5,
         "num_groups": 8, "top_groups": 4, "balance": ("sequence", "bias"), "loss_weight": 1e-4,
         "capacity_factor": 0.0, "shared_hidden_dim": 2048, "first_dense": 3, "freq": 1},
        {"top_k": 1, "noise": "rsample", "drop_policy": "random", "capacity_rounding": "up", "min_capacity": 4},
        {"router": "threshold", "straight_through": True, "drop_policy": "choice", "capacity_per": "sequence"},
        {"router": "sinkhorn", "top_k": 1, "capacity_factor": 0.0},
        {"num_experts": (32, 32, 32, 32, 64, 64), "residual": True, "normalize_after_drops": True},
        {"capacity_factor": 0.0, "eval_capacity_factor": 2.0, "drop_policy": "probs"},
    ):  # fmt: skip
        check_moe(config(**flags), n_layers=12)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"moe_threshold"}, "--moe-threshold 0.2 needs --moe-router threshold"),
        ({"moe_bias_rate"}, "--moe-bias-rate 0.001 needs --moe-balance bias"),
        ({"moe_top_groups"}, "--moe-top-groups 1 needs --moe-num-groups"),
    ],
)
def test_a_flag_given_at_its_default_is_refused_where_nothing_reads_it(given, sentence) -> None:
    check_moe(config(), n_layers=12)
    with pytest.raises(ValueError, match=sentence):
        check_moe(config(), given, n_layers=12)


def test_a_dense_model_has_no_use_for_the_mixtures_flags() -> None:
    check_moe(MoEConfig(), {"moe_freq", "lr"}, n_layers=12)
    with pytest.raises(ValueError, match=r"--moe-top-k given, but --moe-freq is 0"):
        check_moe(MoEConfig(), {"moe_top_k"}, n_layers=12)
    with pytest.raises(ValueError, match=r"--moe-expert-bias, --moe-num-experts given, but --moe-freq is 0"):
        check_moe(MoEConfig(expert_bias=True, num_experts=8), n_layers=12)


# --- the command line and files


def run_of(line: str):
    return parse(shlex.split(line))


def resolved(line: str) -> tuple[ModelConfig, frozenset[str]]:
    run, given = run_of(line)
    return resolve_model(run.model, run.moe, given), given


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("--moe-num-experts 8", {"num_experts": 8}),
        ("--moe-num-experts 32 32 64 64", {"num_experts": (32, 32, 64, 64)}),
        ("--moe-layers 3", {"layers": (3,)}),
        ("--moe-layers 3 5 7 --moe-freq 0", {"layers": (3, 5, 7)}),
        ("--moe-layer-pattern '[0]*3+[1]*24'", {"layer_pattern": "[0]*3+[1]*24"}),
        ("--moe-layer-pattern=[0,1]*6", {"layer_pattern": "[0,1]*6"}),
        ("--moe-balance sequence bias", {"balance": ("sequence", "bias")}),
        ("--moe-balance none", {"balance": ("none",)}),
        ("--moe-loss-weight 0.01 0.001", {"loss_weight": (0.01, 0.001)}),
        ("--moe-loss-weight 1", {"loss_weight": 1.0}),
        ("--moe-eval-capacity-factor 0", {"eval_capacity_factor": 0.0}),
        ("--moe-eval-capacity-factor None --moe-eval-threshold .3", {"eval_threshold": 0.3}),
        ("--no-moe-output-bias --moe-expert-bias", {"output_bias": False, "expert_bias": True}),
        ("--moe-router expert_choice --moe-noise second_expert", {"router": "expert_choice",
                                                                  "noise": "second_expert"}),
    ],
)  # fmt: skip
def test_command_line(line: str, flags: dict, tmp_path) -> None:
    run, given = run_of(line)
    assert run.moe == MoEConfig(**flags)
    assert all(f"moe_{name}" in given for name in flags)
    moe_types.check_types(run.moe)
    # the same through a file that the run itself would write, and through one of all flags
    for name, text in {
        "given.yaml": config_text(run, given),
        "all.json": json.dumps(flag_values(run)),
    }.items():
        (tmp_path / name).write_text(text)
        assert run_of(f"--config {tmp_path / name}")[0].moe == run.moe
    assert run_of(f"--config {tmp_path / 'given.yaml'}")[1] == given


def test_the_command_line_wins_over_a_files_list(tmp_path) -> None:
    entries = {"moe-num-experts": [32, 64], "moe_balance": ["aux", "bias"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(entries))
    run, _ = run_of(f"--config {tmp_path / 'run.yaml'} --moe-num-experts 8 --moe-balance none")
    assert run.moe == MoEConfig(num_experts=8, balance=("none",))


@pytest.mark.parametrize("line", ["--moe-balance sequences", "--moe-router topk", "--moe-num-experts 8.5",
                                  "--moe-drop-policy first", "--moe-dim 16"])  # fmt: skip
def test_the_command_line_knows_names_and_types(line: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run_of(line)
    assert stop.value.code == 2
    assert line.split()[0] in "".join(capsys.readouterr()).replace("\n", "")


SMALL = {"hidden_dim": 64, "n_layers": 4, "n_heads": 4, "seq_len": 32, "vocab_size": 100}


def model_file(folder: Path, **entries) -> Path:
    path = folder / "model.json"
    path.write_text(json.dumps(SMALL | entries))
    return path


def test_a_models_json_holds_lists(tmp_path) -> None:
    path = model_file(tmp_path, moe_layers=[1, 3], moe_num_experts=[4, 8], moe_balance=["sequence", "bias"],
                      moe_loss_weight=0.001)  # fmt: skip
    moe = resolved(f"--model {path}")[0].moe
    assert moe == MoEConfig(
        layers=(1, 3), num_experts=(4, 8), balance=("sequence", "bias"), loss_weight=0.001
    )
    # the same by hand is no contradiction, another is
    assert resolved(f"--model {path} --moe-num-experts 4 8 --moe-layers 1 3")[0].moe == moe
    with pytest.raises(ValueError, match=r"--moe-num-experts \(8, 8\), but .* says moe_num_experts \(4, 8\)"):
        resolved(f"--model {path} --moe-num-experts 8 8")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"moe_num_experts": 8}, "--moe-num-experts given, but --moe-freq is 0"),
        (
            {"moe_freq": 2, "moe_num_experts": 8, "moe_router": "top-k"},
            "'top-k': expected .*; did you mean top_k?",
        ),
        ({"moe_freq": 2, "moe_num_experts": "8"}, "--moe-num-experts '8': expected int or a list of int"),
        ({"moe_freq": 2, "moe_num_experts": 8, "moe_balance": "aux"}, "--moe-balance 'aux': expected a list"),
        ({"moe_dim": 64}, "unknown key 'moe_dim'"),
    ],
)
def test_a_models_json_is_checked(entries: dict, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(f"--model {model_file(tmp_path, **entries)}")


# --- checkpoints


def through_json(model: ModelConfig) -> dict:
    """What a checkpoint gives back: lists for tuples."""
    return json.loads(json.dumps(asdict(model)))


MOE = "--model open_lm_41m --moe-freq 2 --moe-num-experts "


@pytest.mark.parametrize(
    "line",
    [
        "--moe-freq 2 --moe-num-experts 8",
        "--moe-freq 6 --moe-num-experts 32 64 --moe-balance sequence bias --moe-loss-weight 0.01",
        "--moe-layers 1 3 --moe-num-experts 4 8 --moe-loss-weight 0.5 0.2 --moe-balance aux importance",
        "--moe-layer-pattern [0,1]*6 --moe-num-experts 4 --moe-router expert_choice --moe-eval-capacity-factor 2",
    ],
)
def test_a_checkpoints_own_flags_come_back(line: str) -> None:
    saved, given = resolved(f"--model open_lm_41m {line}")
    assert saved.n_layers == 12
    for stored in (asdict(saved), through_json(saved)):
        # with the same flags there is nothing to say, without any all of them are taken
        assert reconcile(saved, stored, given, "e.pt") == (saved, [])
        here, notes = reconcile(resolved("--model open_lm_41m")[0], stored, {"model"}, "e.pt")
        assert here == saved
        assert len(notes) == len(given - {"model"})


def test_lists_and_numbers_of_experts_do_not_mix_up() -> None:
    saved, _ = resolved(MOE + "8 8 8 8 8 16")
    for given, message in {
        "8": r"--moe-num-experts 8, but e\.pt was trained with \(8, 8, 8, 8, 8, 16\)",
        "8 8 8 8 8 8": r"--moe-num-experts \(8, 8, 8, 8, 8, 8\), but e\.pt was trained with \(8, 8, 8, 8, 8, 16\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            reconcile(*resolved_for(MOE + given, saved), "e.pt")
    assert reconcile(*resolved_for(MOE + "8 8 8 8 8 16", saved), "e.pt") == (saved, [])


def resolved_for(line: str, saved: ModelConfig):
    current, given = resolved(line)
    return current, through_json(saved), given


def test_an_old_checkpoint_does_not_know_the_new_flags() -> None:
    saved, _ = resolved(MOE + "8")
    stored = through_json(saved)
    old = {"freq", "num_experts", "top_k", "router", "normalize_weights", "capacity_factor", "loss_weight",
           "z_loss_weight", "ffn_type", "hidden_dim", "init", "backend"}  # fmt: skip
    stored["moe"] = {name: value for name, value in stored["moe"].items() if name in old}
    assert reconcile(resolved("--model open_lm_41m")[0], stored, {"model"}, "e.pt")[0] == saved
    # what it does not know was at its default: it is another network with it, or the same one run otherwise
    current, given = resolved(MOE + "8 --moe-expert-bias")
    with pytest.raises(ValueError, match=r"--moe-expert-bias True, but e\.pt was trained with False"):
        reconcile(current, stored, given, "e.pt")
    current, given = resolved(MOE + "8 --moe-drop-policy probs --moe-balance global")
    here, _ = reconcile(current, stored, given, "e.pt")
    assert (here.moe.drop_policy, here.moe.balance) == ("probs", ("global",))


def test_a_checkpoints_settings_without_work_give_way() -> None:
    """A given flag that switches something off does not fall over what the checkpoint says about it."""
    saved, _ = resolved(MOE + "8 --moe-loss-weight 0.01 --moe-drop-policy probs --moe-min-capacity 4")
    here, _ = reconcile(*resolved_for("--model open_lm_41m --moe-balance none --moe-freq 2 --moe-num-experts 8 "
                                      "--moe-capacity-factor 0", saved), "e.pt")  # fmt: skip
    assert here.moe == MoEConfig(freq=2, num_experts=8, balance=("none",), capacity_factor=0.0)
    current, given = resolved(MOE + "8 --moe-drop-policy choice")
    stored = through_json(resolved(MOE + "8 --moe-capacity-factor 0")[0])
    with pytest.raises(ValueError, match=r"--moe-drop-policy choice with --moe-capacity-factor 0"):
        reconcile(current, stored, given, "e.pt")
    kept = config(balance=("none",), loss_weight=0.3)
    assert without_idle(kept, {"moe_loss_weight"}) == kept


# --- later tokens


@pytest.mark.parametrize(
    ("flags", "sentences"),
    [
        ({}, []),
        ({"router": "threshold"}, []),
        ({"router": "coordinate_descent"}, []),
        ({"router": "expert_choice_causal"}, []),
        ({"router": "hash", "drop_policy": "probs"}, []),
        ({"router": "uniform", "drop_policy": "choice"}, []),
        ({"router": "expert_choice"}, ["--moe-router expert_choice sees later tokens in training and evaluation"]),
        ({"router": "quantile"}, ["--moe-router quantile sees later tokens in training and evaluation"]),
        ({"router": "sinkhorn"}, ["--moe-router sinkhorn sees later tokens in training; evaluation is causal"]),
        ({"drop_policy": "probs"}, ["--moe-drop-policy probs sees later tokens in training and evaluation: they "
                                    "may take a place"]),
        ({"drop_policy": "probs", "eval_capacity_factor": 0.0},
         ["--moe-drop-policy probs sees later tokens in training; evaluation is causal: they may take a place"]),
        ({"drop_policy": "probs", "capacity_factor": 0.0, "eval_capacity_factor": 1.0},
         ["--moe-drop-policy probs sees later tokens in evaluation alone: they may take a place"]),
        ({"drop_policy": "choice"}, ["--moe-drop-policy choice sees later tokens in training and evaluation: they "
                                     "may take a place"]),
        ({"drop_policy": "choice", "top_k": 1}, []),
        ({"drop_policy": "random", "top_k": 1},
         ["--moe-drop-policy random sees later tokens in training; evaluation is causal: they may take a place"]),
        ({"router": "sinkhorn", "drop_policy": "probs"},
         ["--moe-router sinkhorn sees later tokens in training; evaluation is causal",
          "--moe-drop-policy probs sees later tokens in training and evaluation: they may take a place"]),
    ],
)  # fmt: skip
def test_later_tokens(flags: dict, sentences: list[str]) -> None:
    check_moe(config(**flags), n_layers=12)
    assert sees_later_tokens(config(**flags)) == sentences


def test_help_texts_name_every_flag() -> None:
    """A field without text under it would have an empty --help."""
    source = ast.parse(Path(inspect.getfile(MoEConfig)).read_text(encoding="utf-8"))
    (body,) = [node.body for node in source.body if isinstance(node, ast.ClassDef)]
    documented = {
        a.target.id
        for a, b in pairwise(body)
        if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name) and isinstance(b, ast.Expr)
    }
    assert documented == {f.name for f in fields(MoEConfig)}
