"""The training loop and one step, to be read from top to bottom.

Shapes: B sequences of this rank's batch, S positions.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from open_lm.config.model import ModelConfig
from open_lm.config.optim import OptimConfig
from open_lm.config.schedule import Batch as BatchPlan
from open_lm.config.schedule import Schedule
from open_lm.data.loader import Batch
from open_lm.log import Log, logger
from open_lm.loss import IGNORE_INDEX, cross_entropy
from open_lm.metrics import Clock, Progress, StepResult, Window, describe
from open_lm.moe.stats import RouterStats, pack, unpack
from open_lm.optim import (
    LossScale,
    clip_,
    grad_norm,
    is_finite,
    learning_rate,
    scale_gradients_,
    set_learning_rate_,
)
from open_lm.parallel.mesh import World, sum_over_ranks_
from open_lm.parallel.plan import autocast, no_sync

MAX_SKIPS = 100  # non-finite steps in a row that end a run


def accumulate_gradients(
    model: nn.Module,
    batch: Batch,
    *,
    plan: BatchPlan,
    optim: OptimConfig,
    config: ModelConfig,
    world: World,
    loss_scale: float,
    clock: Clock,
) -> StepResult:
    """Gradients of the whole batch's objective: mean cross-entropy over its tokens (+ z-loss), and the router
    losses as means over MoE layers and micro-batches. Equal to one large batch, whatever the slicing.
    """
    device = world.device
    tokens = int(sum_over_ranks_((batch.targets_BS != IGNORE_INDEX).sum().to(device)))
    if tokens == 0:
        raise ValueError(
            f"a batch has not one token to train on: all its samples are shorter than the model's "
            f"{config.seq_len} + 1 tokens, or unreadable"
        )
    # DDP and FSDP average gradients over ranks; each rank's share of the token sum is undone by world_size.
    per_token = world.world_size / tokens
    sums: list[Tensor] = []
    stats: tuple[RouterStats, ...] = ()
    micro_batches = list(
        zip(
            batch.tokens_BS.split(plan.micro_sequences),
            batch.targets_BS.split(plan.micro_sequences),
            strict=True,
        )
    )
    for i, (tokens_BS, targets_BS) in enumerate(micro_batches):
        tokens_BS = tokens_BS.to(device, non_blocking=True)
        targets_BS = targets_BS.to(device, non_blocking=True)
        with no_sync(model, i < len(micro_batches) - 1):
            with autocast(optim.precision, device):
                output = model(tokens_BS)
            loss = cross_entropy(output.logits_BSV, targets_BS)
            objective = loss.nll_sum * per_token
            if optim.z_loss_coefficient:
                objective = objective + optim.z_loss_coefficient * loss.z_sum * per_token
            if output.router_stats:
                objective = objective + router_loss(output.router_stats, config) / len(micro_batches)
            clock.lap("forward_time")
            (objective * loss_scale).backward()
            clock.lap("backward_time")
        stats = output.router_stats
        token_sums = torch.stack((loss.nll_sum, loss.z_sum)).detach().double()
        sums.append(torch.cat((token_sums, pack(stats))) if stats else token_sums)
    flat = sum_over_ranks_(torch.stack(sums).sum(0))
    clock.lap("sync_time")
    loss, z_loss = flat[:2] / tokens
    n = len(micro_batches) * world.world_size
    layers = unpack(flat[2:], stats) if stats else []
    means = [s._replace(balance_loss=s.balance_loss / n, z_loss=s.z_loss / n) for s in layers]
    return StepResult(loss, z_loss, tokens, means)


def router_loss(stats: tuple[RouterStats, ...], config: ModelConfig) -> Tensor:
    """Weighted load-balancing and z-loss, each the mean over the MoE layers."""
    balance = torch.stack([s.balance_loss for s in stats]).mean()
    z = torch.stack([s.z_loss for s in stats]).mean()
    return config.moe.loss_weight * balance + config.moe.z_loss_weight * z


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    progress: Progress,
    *,
    config: ModelConfig,
    optim: OptimConfig,
    schedule: Schedule,
    plan: BatchPlan,
    world: World,
    log: Log,
    log_every_n_steps: int,
    loss_scale: LossScale | None,
    end_interval: Callable[[int], None],
) -> None:
    """Trains from `progress.step` to `schedule.end_step`; `batches` are this rank's, one a step.

    `end_interval(n)` is called when interval n is complete, and when the run ends inside it: it saves and
    evaluates. A step whose loss or gradient norm is not finite changes no weight and no moment, on all ranks;
    RuntimeError after MAX_SKIPS such steps in a row.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    window = Window()
    clock = window.clock
    show = log.progress(schedule.end_step, progress.step)
    skipped_in_a_row = 0
    model.train()
    for batch in batches:
        step = progress.step
        clock.lap("data_time")
        rate = learning_rate(step, optim, schedule.total_steps, schedule.interval_end(1))
        set_learning_rate_(optimizer, rate)
        scale = loss_scale.value if loss_scale else 1.0
        result = accumulate_gradients(
            model, batch, plan=plan, optim=optim, config=config, world=world, loss_scale=scale, clock=clock
        )
        scale_gradients_(parameters, 1.0 / scale)
        norm = grad_norm(parameters)
        finite = is_finite(result.loss, norm)  # both are global, so all ranks decide alike
        if finite:
            if optim.grad_clip_norm is not None:
                clip_(parameters, norm, optim.grad_clip_norm)
            optimizer.step()
            skipped_in_a_row = 0
        else:
            progress.skipped_updates += 1
            skipped_in_a_row += 1
            if loss_scale is None or scale <= 1.0:  # else it is the scale being found
                logger.warning(
                    "step %d: loss %.4g, gradient norm %.4g: update skipped on all ranks (%d so far)",
                    step + 1, result.loss.item(), norm.item(), progress.skipped_updates,
                )  # fmt: skip
            if skipped_in_a_row == MAX_SKIPS:
                raise RuntimeError(
                    f"step {step + 1}: loss or gradient was not finite {MAX_SKIPS} times in a row, loss "
                    f"{result.loss.item():.4g}, gradient norm {norm.item():.4g}; lower --lr, or resume earlier"
                )
        if loss_scale:
            loss_scale.update_(finite)
        optimizer.zero_grad(set_to_none=True)
        clock.lap("optim_step_time")

        progress.step += 1
        progress.tokens += result.tokens
        if batch.n_bad and not progress.bad_samples:
            logger.warning("step %d: %d samples too short or unreadable: ignored", step + 1, batch.n_bad)
        progress.bad_samples += batch.n_bad
        window.add(result, finite)
        interval = schedule.interval_of(step)
        ends = progress.step in (schedule.interval_end(interval), schedule.end_step)
        show(progress.step, f"loss {window.loss:.3f} · {window.tokens_per_second:,.0f} tokens/s")
        if progress.step % log_every_n_steps == 0 or step == 0 or ends:
            entry = window.entry(progress, rate, norm, world.world_size, config)
            log.metrics(entry, progress.step)
            logger.info(describe(entry, progress, schedule))
            window.restart()
        if ends:
            end_interval(interval)
            model.train()
            window.restart()
    log.end_progress()
