"""Contradictions between flags: one clear error, before any work."""

import importlib.util
import math
import re
from collections.abc import Collection
from dataclasses import fields

from open_lm.config.averaging import AveragingConfig, coefficients_of, parse_averagers
from open_lm.config.checkpoint_check import check_checkpoint
from open_lm.config.data import DATA_KEYS, DataConfig
from open_lm.config.distributed import DistributedConfig
from open_lm.config.eval import EvalConfig
from open_lm.config.later import LaterConfig
from open_lm.config.log import LogConfig
from open_lm.config.optim import OptimConfig
from open_lm.config.run import RunConfig
from open_lm.config.survival import check_survival

REPORT_TARGETS = ("wandb", "tensorboard", "all")
NOT_NEGATIVE = ("lr", "wd", "warmup", "eps", "lr_cooldown_end", "lr_cooldown_power", "force_min_lr",
                "z_loss_coefficient")  # fmt: skip

# What each flag of LaterConfig says. "Not yet" is an error; anything else one warning line.
NOT_YET = "not yet"
LATER = {
    "data_tolerate_error_p": "does nothing: exactly the requested tokens are read",
    "data_tolerate_num_ckpts": "does nothing: exactly the requested tokens are read",
    "hf_model": NOT_YET,
    "hf_seq_len": NOT_YET,
    "hf_fsdp_block": NOT_YET,
    "torchscript": "does nothing: use --torchcompile",
    "trace": "does nothing: use --torchcompile",
    "use_bn_sync": "does nothing: there is no batch norm",
    "moe_weight_parallelism": "does nothing: --fsdp shards the experts' weights",
    "moe_expert_model_parallelism": NOT_YET,
    "fsdp_use_orig_params": "does nothing: FSDP2 always keeps the original parameters",
    "fsdp_backward_prefetch": "does nothing: FSDP2 always prefetches the next block in the backward pass",
    "fsdp_limit_all_gathers": "does nothing: FSDP2 bounds its gathered memory by itself",
    "fsdp_checkpoint": "does nothing, as in open_lm: use --grad-checkpointing",
    "distill_model": NOT_YET,
    "distill_pretrained": NOT_YET,
    "use_bnb_linear": NOT_YET,
}


def trains(run: RunConfig) -> bool:
    """Whether the flags name training data."""
    return bool(run.data.train_data or run.data.dataset_manifest) or run.data.dataset_type == "synthetic"


def starts_from_checkpoint(run: RunConfig) -> bool:
    """Whether a checkpoint may complete the model that the flags describe."""
    return bool(run.checkpoint.resume or run.checkpoint.pretrained or run.averaging.average)


def check(run: RunConfig, given: Collection[str]) -> list[str]:
    """Raises ValueError on the first contradiction; returns one warning line per flag that does nothing."""
    warnings = _check_later(run.later)
    _check_data(run.data)
    _check_eval(run.eval)
    if run.eval.val_max_pop_ci is not None and not (run.eval.val_seq_ci or run.eval.val_tok_ci):
        warnings.append("--val-max-pop-ci does nothing without --val-seq-ci or --val-tok-ci")
    for name in ("val_seq_ci", "val_tok_ci", "val_num_samples"):
        if getattr(run.eval, name) and not run.eval.val_data:
            warnings.append(f"--{name.replace('_', '-')} does nothing without --val-data")
    if run.checkpoint.remote_sync and not trains(run):
        warnings.append("--remote-sync copies nothing in an evaluation without training")
    _check_optim(run.optim, given)
    _check_distributed(run.distributed, run.optim, given)
    check_checkpoint(run.checkpoint, trains(run))
    _check_purpose(run)
    warnings += _check_averaging(run)
    _check_log(run.log)
    warnings += check_survival(run, given)
    if run.model.experimental_meta_device and run.model.disable_meta_device:
        raise ValueError("--experimental-meta-device and --disable-meta-device are both given")
    if run.model.experimental_meta_device:
        warnings.append("--experimental-meta-device does nothing: models are always built on the meta device")
    return warnings


def _check_later(later: LaterConfig) -> list[str]:
    """Only values unlike the default say anything: `--remote-sync-frequency 300` asks for nothing."""
    warnings = []
    for field in fields(later):
        if getattr(later, field.name) == field.default:
            continue
        flag, says = "--" + field.name.replace("_", "-"), LATER[field.name]
        if says.startswith(NOT_YET):
            raise ValueError(f"{flag}: {says}")
        warnings.append(f"{flag} {says}")
    return warnings


def _check_log(log: LogConfig) -> None:
    for name in filter(None, map(str.strip, log.report_to.split(","))):
        if name not in REPORT_TARGETS:
            raise ValueError(f"--report-to {log.report_to}: expected {', '.join(REPORT_TARGETS)}")
    for name in sorted(log.targets):
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--report-to {log.report_to}: {name} is missing; install it: pip install {name}"
            )
    if log.log_every_n_steps < 1:
        raise ValueError(f"--log-every-n-steps {log.log_every_n_steps}: expected at least 1")


def _check_data(data: DataConfig) -> None:
    if data.train_data and data.dataset_manifest:
        raise ValueError(
            f"--train-data {data.train_data[0]} and --dataset-manifest {data.dataset_manifest[0]} are both "
            "given: use one"
        )
    sources = data.train_data or data.dataset_manifest or ()
    if data.dataset_type == "synthetic" and sources:
        raise ValueError(f"--dataset-type synthetic reads no data, but {sources[0]} is given: drop one")
    weights = data.train_data_mix_weights
    if weights is not None:
        shown = " ".join(map(str, weights))
        if len(weights) != len(sources):
            raise ValueError(
                f"--train-data-mix-weights {shown}: {len(weights)} weights for {len(sources)} sources"
            )
        if any(not 0 <= w < float("inf") for w in weights) or sum(weights) == 0:
            raise ValueError(f"--train-data-mix-weights {shown}: expected weights >= 0, not all zero")
    factors = data.upsampling_factors
    if factors and weights is not None:
        raise ValueError(
            f"--train-data-upsampling-factors {'::'.join(factors)} and --train-data-mix-weights "
            f"{' '.join(map(str, weights))} are both given: use one"
        )
    if factors and len(factors) != len(sources):
        raise ValueError(
            f"--train-data-upsampling-factors {'::'.join(factors)}: {len(factors)} factors for "
            f"{len(sources)} sources"
        )
    if data.bad_sample_limit is not None and not (data.ignore_parse_errors and data.bad_sample_limit >= 0):
        raise ValueError(
            f"--bad-sample-limit {data.bad_sample_limit}: expected 0 or more, with --ignore-parse-errors"
        )
    if data.train_num_samples is not None and data.train_num_samples < 1:
        raise ValueError(f"--train-num-samples {data.train_num_samples}: expected at least 1 token")
    if data.workers < 0:
        raise ValueError(f"--workers {data.workers}: expected 0 or more")
    if data.data_retries < 0:
        raise ValueError(f"--data-retries {data.data_retries}: expected 0 or more")
    if not 0 < data.data_timeout < math.inf:
        raise ValueError(f"--data-timeout {data.data_timeout:g}: expected seconds, more than 0")
    if not 0 <= data.data_cache_gib < math.inf:
        raise ValueError(f"--data-cache-gib {data.data_cache_gib:g}: expected 0 or more")
    if data.data_key not in DATA_KEYS:
        raise ValueError(f"--data-key {data.data_key}: expected one of {', '.join(DATA_KEYS)}")
    if data.squash_mask_left and None in (data.target_mask_left, data.target_mask_individual):
        raise ValueError(
            f"--squash-mask-left takes out --target-mask-left ({data.target_mask_left}) and pads with "
            f"--target-mask-individual ({data.target_mask_individual}): give both"
        )


def _check_eval(evaluation: EvalConfig) -> None:
    keys, entries = evaluation.val_data_key, evaluation.val_data or ()
    if keys is not None and len(keys) != len(entries):
        raise ValueError(f"--val-data-key has {len(keys)} keys for the {len(entries)} entries of --val-data")
    for key in keys or ():
        if key not in DATA_KEYS:
            raise ValueError(f"--val-data-key {key}: expected one of {', '.join(DATA_KEYS)}")
    names = evaluation.val_data_name
    if names is not None:
        shown = " ".join(names)
        if len(names) != len(entries):
            raise ValueError(
                f"--val-data-name {shown}: {len(names)} names for {len(entries)} --val-data entries"
            )
        if len(set(names)) != len(names) or not all(re.fullmatch(r"[\w.-]+", name) for name in names):
            raise ValueError(
                f"--val-data-name {shown}: expected different names of letters, digits and _ . -"
            )
    for name in (
        "val_num_samples",
        "val_frequency",
        "global_val_batch_size",
        "val_max_pop_ci",
        "val_iter_ci",
    ):
        value = getattr(evaluation, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")


def _check_optim(optim: OptimConfig, given: Collection[str]) -> None:
    for name in ("batch_size", "global_batch_size", "accum_freq", "epochs", "max_steps", "lr_decay_steps"):
        value = getattr(optim, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(optim, name) < math.inf:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(optim, name)}: expected 0 or more, and finite"
            )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            raise ValueError(f"--{name} {getattr(optim, name)}: expected 0 <= {name} < 1")
    if optim.grad_clip_norm is not None and not optim.grad_clip_norm > 0:
        raise ValueError(f"--grad-clip-norm {optim.grad_clip_norm}: expected more than 0")
    if optim.lr_scheduler == "const-cooldown":
        if optim.epochs_cooldown is None:
            raise ValueError("--lr-scheduler const-cooldown needs --epochs-cooldown")
        if optim.epochs_cooldown < 0:
            raise ValueError(f"--epochs-cooldown {optim.epochs_cooldown}: expected 0 or more")
        if optim.epochs_cooldown > optim.epochs:
            raise ValueError(f"--epochs-cooldown {optim.epochs_cooldown} > --epochs {optim.epochs}")
    elif optim.epochs_cooldown is not None:
        raise ValueError(f"--epochs-cooldown needs --lr-scheduler const-cooldown, not {optim.lr_scheduler}")
    if optim.lr_decay_steps is not None:
        constant = "--skip-scheduler" if optim.skip_scheduler else "--lr-scheduler const"
        if optim.skip_scheduler or optim.lr_scheduler == "const":
            raise ValueError(
                f"--lr-decay-steps {optim.lr_decay_steps}, but {constant} has no decay: drop one"
            )
        if optim.lr_decay_steps <= optim.warmup:
            raise ValueError(
                f"--lr-decay-steps {optim.lr_decay_steps} <= --warmup {optim.warmup}: the decay would end before "
                "it begins; raise one or lower the other"
            )
    if optim.skip_scheduler and "lr_scheduler" in given:
        raise ValueError(
            f"--skip-scheduler keeps the learning rate constant, but --lr-scheduler {optim.lr_scheduler} is "
            "given: drop one"
        )


def _check_distributed(parallel: DistributedConfig, optim: OptimConfig, given: Collection[str]) -> None:
    if parallel.fsdp_amp and parallel.fsdp_pure_bf16:
        raise ValueError("--fsdp-amp and --fsdp-pure-bf16 are both given: use one")
    for name in ("fsdp_amp", "fsdp_pure_bf16"):
        flag = "--" + name.replace("_", "-")
        if getattr(parallel, name):
            if not parallel.fsdp:
                raise ValueError(f"{flag} needs --fsdp")
            if "bf" not in optim.precision:
                raise ValueError(
                    f"{flag} computes in bf16, but --precision is {optim.precision}: use amp_bfloat16"
                )
    for name in ("fsdp_hybrid", "fsdp_hybrid_o2", "fsdp_cpu_offload"):
        if getattr(parallel, name) and not parallel.fsdp:
            raise ValueError(f"--{name.replace('_', '-')} needs --fsdp")
    if parallel.fsdp_hybrid and parallel.fsdp_hybrid_o2:
        raise ValueError("--fsdp-hybrid and --fsdp-hybrid-o2 are both given: use one")
    if parallel.preset_world_size is not None and parallel.preset_world_size < 1:
        raise ValueError(f"--preset-world-size {parallel.preset_world_size}: expected at least 1")
    if not parallel.dist_url.startswith(("env://", "tcp://", "file://")):
        raise ValueError(f"--dist-url {parallel.dist_url}: expected env://, tcp://HOST:PORT or file:///PATH")
    if parallel.ddp_static_graph and parallel.fsdp:
        raise ValueError("--ddp-static-graph is DDP's, but --fsdp is given: drop one")
    if parallel.ddp_static_graph and optim.accum_freq > 1:
        raise ValueError(
            f"--ddp-static-graph with --accum-freq {optim.accum_freq}: torch's static graph allows no accumulation "
            "over micro-batches; drop one"
        )


def _check_purpose(run: RunConfig) -> None:
    """Train, or evaluate a checkpoint: the flags must say which."""
    start, pretrained = run.checkpoint.resume, run.checkpoint.pretrained
    # a preempted fine-tuning run is started again by the same command: `latest` wins where there is one
    if start and pretrained and not (start == "latest" and trains(run)):
        raise ValueError(
            f"--resume {start} continues a run, --pretrained {pretrained} starts a new one: use one"
        )
    if trains(run):
        if run.data.train_num_samples is None:
            raise ValueError("--train-num-samples (tokens in a checkpoint interval) is needed for training")
        return
    if run.data.train_data_mix_weights or run.optim.max_steps:
        raise ValueError(
            "no training data: give --dataset-manifest, --train-data or --dataset-type synthetic"
        )
    if not run.eval.val_data:
        raise ValueError(
            "nothing to do: give --dataset-manifest or --train-data to train, or --val-data with --resume to "
            "evaluate"
        )
    if not (start or pretrained or run.averaging.average):
        raise ValueError(
            "--val-data without training data evaluates a checkpoint: give --resume, --pretrained or --average"
        )


def _check_averaging(run: RunConfig) -> list[str]:
    averaging = run.averaging
    averagers = parse_averagers(averaging.averagers)
    every = averaging.log_avg_model_training_loss
    if every < 0:
        raise ValueError(f"--log-avg-model-training-loss {every}: expected 0 (never) or more")
    if every and not averagers:
        raise ValueError(f"--log-avg-model-training-loss {every} needs --averagers: no average is kept")
    if averaging.average is None:
        if averaging.average_coefficients is not None:
            raise ValueError("--average-coefficients needs --average: there are no checkpoints to add up")
        return []
    for flag, value in (("--resume", run.checkpoint.resume), ("--pretrained", run.checkpoint.pretrained)):
        if value and not (flag == "--resume" and value == "latest" and trains(run)):
            raise ValueError(f"--average starts from a sum of checkpoints, {flag} from {value}: use one")
    if averagers and not trains(run):
        raise ValueError(
            f"--averagers {averaging.averagers} evaluates files beside --resume, not beside --average: drop one"
        )
    return _check_soup(averaging, averaging.average)


def _check_soup(averaging: AveragingConfig, paths: tuple[str, ...]) -> list[str]:
    if len(paths) < 2:
        raise ValueError(
            f"--average {' '.join(paths)}: expected several checkpoints; for one use --pretrained"
        )
    coefficients = coefficients_of(averaging)
    shown = " ".join(map(str, coefficients))
    if len(coefficients) != len(paths):
        raise ValueError(
            f"--average-coefficients {shown}: {len(coefficients)} for the {len(paths)} checkpoints of --average"
        )
    if not all(math.isfinite(c) for c in coefficients):
        raise ValueError(f"--average-coefficients {shown}: expected finite numbers")
    if abs(sum(coefficients) - 1) > 1e-6:
        return [f"--average-coefficients {shown} sum to {sum(coefficients):g}, not 1: it is a sum, no mean"]
    return []


assert set(LATER) == {f.name for f in fields(LaterConfig)}
