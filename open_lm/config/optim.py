"""Steps, batch, learning rate, precision."""

from dataclasses import dataclass
from typing import Literal

PrecisionName = Literal["amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation."""

    batch_size: int | None = None
    """Sequences per rank and step, before --accum-freq slices them. May be given with --global-batch-size
    if the two agree."""

    global_batch_size: int | None = None
    """Sequences per step over all ranks. Default: 64."""

    accum_freq: int = 1
    """Micro-batches per step; the gradient is that of the whole batch."""

    epochs: int = 32
    """Checkpoint intervals of --train-num-samples tokens (not passes over the data)."""

    max_steps: int | None = None
    """End after this many steps, with a checkpoint to resume from; the schedule is still the whole run's."""

    optimizer: Literal["adamw"] = "adamw"
    """AdamW; no weight decay on norms and biases."""

    lr: float = 5e-4
    """Peak learning rate."""

    beta1: float = 0.9
    """Adam's beta1."""

    beta2: float = 0.95
    """Adam's beta2."""

    eps: float = 1e-8
    """Adam's epsilon."""

    wd: float = 0.2
    """Weight decay."""

    warmup: int = 10000
    """Steps of linear warm-up: lr * (step + 1) / warmup."""

    lr_scheduler: Literal["cosine", "const", "const-cooldown"] = "cosine"
    """After the warm-up: cosine to --lr-cooldown-end, constant, or constant and then a cool-down."""

    lr_cooldown_end: float = 0.0
    """Learning rate at the end of the decay."""

    lr_decay_steps: int | None = None
    """Step at which the decay ends, warm-up included; the learning rate then stays at the end's. May be beyond the
    run's end. Default: the run's end."""

    lr_cooldown_power: float = 1.0
    """const-cooldown: exponent of the decay; 1 is linear."""

    epochs_cooldown: int | None = None
    """const-cooldown: how many of the last --epochs decay; with --lr-decay-steps, of the last before it."""

    force_min_lr: float = 0.0
    """After the warm-up the learning rate never falls below this."""

    skip_scheduler: bool = False
    """Keep the learning rate at --lr from the first step on."""

    grad_clip_norm: float | None = None
    """Clip the gradient's global norm to this."""

    z_loss_coefficient: float = 0.0
    """Adds coefficient * mean(logsumexp(logits) ** 2) to the objective; not part of the reported loss."""

    precision: PrecisionName = "amp"
    """amp: fp16 autocast with loss scaling. amp_bf16, amp_bfloat16: bf16 autocast. fp32: fp32.
    bf16: weights, gradients and Adam's moments in bf16. fp16: forward and backward wholly in fp16, fp32
    master weights, loss scaling."""

    seed: int = 0
    """Of the initialisation and of the data order."""

    max_skipped_updates: int = 100
    """Updates skipped in a row (loss or gradient not finite, or a spike of the loss) that end the run, with an
    error and a state to debug in LOGS/NAME/debug, at the step that makes the row full."""

    skip_loss_spikes: float | None = None
    """Skip the update of a step whose loss is above median + this times the scaled median absolute deviation of the
    last accepted losses; 6 skips what noise hardly ever does. The loss alone, without z-loss and router losses.
    The losses are part of the checkpoint, so a resumed run decides the same."""

    loss_spike_window: int = 100
    """--skip-loss-spikes: how many losses are looked back on; nothing is skipped before there are as many."""

    deterministic: bool = False
    """On a GPU: the same flags on the same machine give the same bits. Deterministic algorithms alone (an
    operation that has none is an error), cuBLAS with a fixed workspace, no cuDNN attention, and nothing tuned by
    timing. On the CPU runs repeat anyway."""
