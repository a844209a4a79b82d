"""Flags, --config, and the errors that a contradiction ends in."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from open_lm.config.check import LATER, NOT_YET, check
from open_lm.config.moe import MoEConfig
from open_lm.config.parse import flag_types, flag_values, parse
from open_lm.config.resolve import flatten, model_names, reconcile, resolve_model
from open_lm.config.run import RunConfig

TRAIN = "--dataset-manifest A B --train-num-samples 1000000 "

# Every flag of open_lm (July 2024, and the two of its MoE.md that its own parser had dropped), with its default.
OPEN_LM = Path(__file__).with_name("open_lm_flags.txt").read_text().split()


def run_of(line: str) -> tuple[RunConfig, frozenset[str]]:
    return parse(shlex.split(line))


def test_every_flag_of_open_lm_is_known_with_its_default() -> None:
    values = flag_values(RunConfig())
    for entry in OPEN_LM:
        name, default = entry.split("=", 1)
        if name != "data-key":  # open_lm's txt is one of what ours, auto, finds
            assert str(values[name.replace("-", "_")]) == default, name
    # open_lm's default 64 and nccl depend on what else is given and on the machine: resolved later
    assert values["global_batch_size"] is None
    assert values["dist_backend"] is None


def test_field_and_flag_names_agree() -> None:
    run, given = run_of("--moe-freq 2 --moe-num-experts 8 --moe_top_k 1 --no-fsdp --lr 1e-3")
    assert run.moe == MoEConfig(freq=2, num_experts=8, top_k=1)
    assert given == {"moe_freq", "moe_num_experts", "moe_top_k", "fsdp", "lr"}
    assert set(flag_values(run)) == set(flag_types())
    assert flag_values(run)["moe_num_experts"] == 8
    assert flag_values(run)["lr"] == 1e-3


def test_config_file_and_command_line_win(tmp_path) -> None:
    entries = {
        "moe-freq": 2,
        "moe_num_experts": 8,
        "fsdp": True,
        "lr": "1e-3",
        "dataset-manifest": ["A", "B"],
        "grad-clip-norm": None,
        "train_data_mix_weights": [0.7, 0.3],
    }
    (tmp_path / "run.json").write_text(json.dumps(entries))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(entries))
    for file in ("run.json", "run.yaml"):
        run, given = run_of(f"--moe-num-experts 4 --config {tmp_path / file} --no-fsdp")
        assert run.moe.num_experts == 4
        assert not run.distributed.fsdp
        assert run.optim.lr == 1e-3
        assert run.data.dataset_manifest == ("A", "B")
        assert run.data.train_data_mix_weights == (0.7, 0.3)
        assert {"moe_freq", "lr", "fsdp"} <= given
    (tmp_path / "bad.yaml").write_text("moe-nun-experts: 3")
    with pytest.raises(ValueError, match=r"bad\.yaml.*'moe-nun-experts'.*moe-num-experts"):
        run_of(f"--config {tmp_path / 'bad.yaml'}")


def test_flags_of_a_run_are_a_config_file(tmp_path) -> None:
    run, _ = run_of(TRAIN + "--train-data-mix-weights .7 .3 --fsdp --precision fp32 --moe-freq 2")
    (tmp_path / "flags.json").write_text(json.dumps(flag_values(run)))
    assert run_of(f"--config {tmp_path / 'flags.json'}")[0] == run


def test_unknown_flag_names_the_nearest(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run_of("--moe-nun-experts 3")
    assert stop.value.code == 2
    printed = "".join(capsys.readouterr())
    assert "--moe-nun-experts" in printed
    assert "--moe-num-experts" in printed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset-manifest A --train-data B", "--train-data B and --dataset-manifest A"),
        ("--train-data-mix-weights .5 .5 .1", "3 weights for 2 sources"),
        ("--train-data-mix-weights -1 2", "expected weights >= 0"),
        ("--train-data-mix-weights 0 0", "not all zero"),
        ("--dataset-type synthetic", "synthetic reads no data, but A"),
        ("--fsdp-amp", "--fsdp-amp needs --fsdp"),
        ("--fsdp --fsdp-amp --fsdp-pure-bf16", "use one"),
        ("--fsdp --fsdp-amp --precision fp32", "--precision is fp32"),
        ("--fsdp --ddp-static-graph", "--ddp-static-graph"),
        ("--fsdp-hybrid", "--fsdp-hybrid needs --fsdp"),
        ("--lr-decay-steps 0", "--lr-decay-steps 0: expected at least 1"),
        ("--lr-decay-steps 100 --warmup 100", "--lr-decay-steps 100 <= --warmup 100"),
        ("--lr-decay-steps 9 --warmup 1 --lr-scheduler const", "--lr-scheduler const has no decay"),
        ("--lr-decay-steps 9 --warmup 1 --skip-scheduler", "--skip-scheduler has no decay"),
        ("--fsdp-hybrid-o2", "--fsdp-hybrid-o2 needs --fsdp"),
        ("--fsdp-cpu-offload", "--fsdp-cpu-offload needs --fsdp"),
        ("--fsdp --fsdp-hybrid --fsdp-hybrid-o2", "--fsdp-hybrid and --fsdp-hybrid-o2 are both given"),
        ("--preset-world-size 0", "--preset-world-size 0: expected at least 1"),
        ("--dist-url localhost:1234", "--dist-url localhost:1234: expected env"),
        ("--resume y.pt --pretrained x.pt", "use one"),
        ("--ddp-static-graph --accum-freq 2 --batch-size 4", "--ddp-static-graph with --accum-freq 2"),
        ("--lr inf", "--lr inf: expected 0 or more, and finite"),
        ("--lr-scheduler const-cooldown", "needs --epochs-cooldown"),
        ("--lr-scheduler const-cooldown --epochs-cooldown 40", "--epochs-cooldown 40 > --epochs 32"),
        ("--epochs-cooldown 4", "const-cooldown, not cosine"),
        ("--skip-scheduler --lr-scheduler cosine", "drop one"),
        ("--report-to tensorbord", "--report-to tensorbord"),
        ("--epochs 0", "--epochs 0"),
        ("--lr nan", "--lr nan"),
        ("--workers -1", "--workers -1"),
        ("--data-key parquet", "--data-key parquet"),
        ("--val-data a b --val-data-key json", "1 keys for the 2 entries"),
        ("--val-data a b --val-data-name x", "--val-data-name x: 1 names for 2"),
        ("--val-data a b --val-data-name x x", "--val-data-name x x: expected different names"),
        ("--val-data a --val-data-name x/y", "--val-data-name x/y: expected"),
        ("--val-num-samples 0", "--val-num-samples 0"),
        ("--val-frequency 0", "--val-frequency 0"),
        ("--global-val-batch-size 0", "--global-val-batch-size 0"),
        ("--val-iter-ci 0", "--val-iter-ci 0"),
        ("--val-max-pop-ci 0", "--val-max-pop-ci 0"),
        ("--squash-mask-left --target-mask-left 3", r"--target-mask-individual \(None\): give both"),
    ],
)
def test_contradictions(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(*run_of(TRAIN + line))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "nothing to do"),
        ("--val-data a", "give --resume, --pretrained or --average"),
        ("--dataset-manifest A", "--train-num-samples"),
        ("--train-data-mix-weights 1", "1 weights for 0 sources"),
    ],
)
def test_purpose(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(*run_of(line))


EXAMPLE = {
    "hf_model": "x",
    "hf_fsdp_block": "x",
    "remote_sync": "s3://b",
    "remote_sync_protocol": "fsspec",
    "average": "a",
    "average_coefficients": "1",
    "averagers": "ema_.9_1",
    "distill_model": "x",
    "distill_pretrained": "x",
    "use_bnb_linear": "x",
    "data_tolerate_error_p": "0.2",
}


@pytest.mark.parametrize("name", LATER)
def test_flags_without_work_say_so(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    value = "" if flag_types()[name] is bool else EXAMPLE.get(name, "7")
    run, given = run_of(f"{TRAIN} {flag} {value}")
    if LATER[name].startswith(NOT_YET):
        with pytest.raises(ValueError, match=f"{flag}: {NOT_YET}"):
            check(run, given)
    else:
        (warning,) = check(run, given)
        assert warning.startswith(flag + " does nothing")


def test_a_limit_without_an_interval_says_so() -> None:
    (warning,) = check(*run_of(TRAIN + "--val-max-pop-ci 9 --val-data V"))
    assert warning.startswith("--val-max-pop-ci does nothing")
    assert check(*run_of(TRAIN + "--val-max-pop-ci 9 --val-tok-ci --val-data V")) == []


def test_models_and_their_json(tmp_path) -> None:
    run, given = run_of(TRAIN + "--model open_lm_87m --moe-freq 2 --moe-num-experts 8")
    config = resolve_model(run.model, run.moe, given)
    assert (config.dim, config.n_layers, config.head_dim, config.swiglu_hidden_dim) == (488, 12, 40, 1536)
    assert len(model_names()) >= 17
    for name in model_names():
        resolve_model(run_of(f"--model {name}")[0].model, MoEConfig(), ())
    small = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "seq_len": 32, "vocab_size": 100}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small | {"model_norm": "rms_norm", "moe_freq": 2, "moe_num_experts": 4}))
    run, given = run_of(f"--model {path}")
    config = resolve_model(run.model, run.moe, given)
    assert (config.model_norm, config.moe.freq, config.moe.num_experts) == ("rms_norm", 2, 4)
    for line, message in {
        "--moe-num-experts 8": r"--moe-num-experts 8, but --model .*small\.json says moe_num_experts 4",
        "--model-norm gain_only_layer_norm": "says model_norm rms_norm",
    }.items():
        run, given = run_of(f"--model {path} {line}")
        with pytest.raises(ValueError, match=message):
            resolve_model(run.model, run.moe, given)
    path.write_text(json.dumps(small | {"n_head": 4}))
    with pytest.raises(ValueError, match=r"unknown key 'n_head'; did you mean 'n_heads'"):
        resolve_model(run.model, run.moe, ())
    with pytest.raises(ValueError, match="Did you mean open_lm_41m"):
        resolve_model(run_of("--model open_lm_41")[0].model, MoEConfig(), ())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--moe-top-k 4 --moe-num-experts 2", "--moe-top-k 4 > --moe-num-experts 2"),
        ("--moe-freq 2", "--moe-freq 2 needs --moe-num-experts"),
        ("--moe-num-experts 8", "--moe-freq is 0"),
        ("--moe-freq 2 --moe-num-experts 8 --moe-capacity-factor -1", "--moe-capacity-factor -1"),
        ("--moe-freq 2 --moe-num-experts 8 --moe-top-k 0", "--moe-top-k 0"),
        ("--attn-name custom_attn", "needs --attn-activation"),
        ("--attn-activation relu", "need --attn-name custom_attn"),
    ],
)
def test_model_contradictions(line: str, message: str) -> None:
    run, given = run_of("--model open_lm_41m " + line)
    with pytest.raises(ValueError, match=message):
        resolve_model(run.model, run.moe, given)


def test_checkpoint_and_flags() -> None:
    def config(line: str):
        run, given = run_of(line)
        return resolve_model(run.model, run.moe, given), given

    saved, _ = config(
        "--model open_lm_41m --moe-freq 2 --moe-num-experts 8 --moe-capacity-factor 0 --qk-norm"
    )
    # what is not given comes from the checkpoint …
    here, notes = reconcile(*(config("--model open_lm_41m")[0], flatten_nested(saved), {"model"}, "e.pt"))
    assert here == saved
    assert any("--moe-num-experts: 8, from e.pt" in note for note in notes)
    # … what is given and would make it another model is refused, naming both …
    current, given = config("--model open_lm_41m --moe-freq 2 --moe-num-experts 64")
    with pytest.raises(ValueError, match=r"--moe-num-experts 64, but e\.pt was trained with 8"):
        reconcile(current, flatten_nested(saved), given, "e.pt")
    current, given = config("--model open_lm_160m")
    with pytest.raises(ValueError, match=r"--model with dim 768, but e\.pt was trained with 288"):
        reconcile(current, flatten_nested(saved), given, "e.pt")
    # … and what is decided anew in every run wins.
    current, given = config("--moe-freq 2 --moe-num-experts 8 --moe-capacity-factor 2 --model open_lm_41m")
    here, _ = reconcile(current, flatten_nested(saved), given, "e.pt")
    assert here.moe.capacity_factor == 2


def flatten_nested(config) -> dict:
    assert flatten(config) == flatten(asdict(config))
    return asdict(config)


def test_flags_without_what_they_act_on_say_so() -> None:
    (warning,) = check(*run_of(TRAIN + "--val-seq-ci"))
    assert warning == "--val-seq-ci does nothing without --val-data"
    (warning,) = check(*run_of("--val-data V --resume epoch_1.pt --remote-sync s3://b"))
    assert warning.startswith("--remote-sync copies nothing")
