"""The training loop and one step, to be read from top to bottom.

Shapes: B sequences of this rank's batch, S positions.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from open_lm.averaging import Average, averaged_loss
from open_lm.config.model import ModelConfig
from open_lm.config.optim import OptimConfig
from open_lm.config.schedule import Batch as BatchPlan
from open_lm.config.schedule import Schedule
from open_lm.data.batches import Batch
from open_lm.data.errors import DataError, of_data
from open_lm.data.waiting import LEFT, Left, waiting
from open_lm.debug import end_skipping
from open_lm.log import Log, logger
from open_lm.loss import IGNORE_INDEX, real_positions
from open_lm.metrics import Clock, Progress, Skips, StepResult, Window, describe
from open_lm.model import documents_of
from open_lm.moe.balance import update_bias_
from open_lm.moe.stats import RouterStats, pack, router_loss, unpack
from open_lm.nn.documents import Documents
from open_lm.optim import (
    LossScale,
    LossSpikes,
    clip_,
    grad_norm,
    is_finite,
    learning_rate,
    scale_gradients_,
    set_learning_rate_,
    update_,
)
from open_lm.parallel.mesh import World, sum_over_ranks_
from open_lm.parallel.plan import autocast, no_sync, routers
from open_lm.parallel.transfer import to_device
from open_lm.parallel.watch import StopAsked
from open_lm.skips import BadSamples, keep_statistics, look_at


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
    agreed: "Agreed | None" = None,
    compiling: bool = False,
) -> StepResult:
    """Gradients of the whole batch's objective: mean cross-entropy over its tokens (+ z-loss), and the router
    losses as means over MoE layers and micro-batches. Equal to one large batch, whatever the slicing.

    Padding (`real_positions`) is routed to no expert and counts in no router loss. `agreed` is what `agree` found.
    """
    at = world.watch.at
    tokens, n_bad, _ = agreed or agree(batch, stops=False)
    if tokens == 0:
        if batch.bad:
            raise DataError(
                f"a batch has not one token to train on: all its samples are bad; the first: {batch.bad[0]}"
            )
        raise DataError(
            "a batch has not one token to train on: all its samples are shorter than the model's "
            f"{config.seq_len} + 1 tokens, unreadable or masked: give longer ones, or fewer masks"
        )
    # DDP and FSDP average gradients over ranks; each rank's share of the token sum is undone by world_size.
    per_token = world.world_size / tokens
    sums: list[Tensor] = []
    stats: tuple[RouterStats, ...] = ()
    chosen: list[Tensor] | None = None  # how often each expert was, so far
    real_BS = real_positions(batch.targets_BS) if config.moe.enabled else None  # on the CPU, too
    sent = (batch.tokens_BS, batch.targets_BS, real_BS)
    whole = [None if x is None else to_device(x, world.device) for x in sent]
    micro_batches = [
        [None if x is None else x[first : first + plan.micro_sequences] for x in whole]
        for first in range(0, len(batch.tokens_BS), plan.micro_sequences)
    ]
    documents = [
        None if found is None else Documents(*(to_device(x, world.device) for x in found))
        for found in (documents_of(x, config, x.device) for x in batch.tokens_BS.split(plan.micro_sequences))
    ]
    for i, (tokens_BS, targets_BS, real_BS) in enumerate(micro_batches):
        at("compiling" if compiling else "forward")
        with no_sync(model, i < len(micro_batches) - 1):
            with autocast(optim.precision, world.device):
                output = model(
                    tokens_BS,
                    targets_BS,
                    real_BS=real_BS,
                    documents=documents[i],
                    z_loss_coefficient=optim.z_loss_coefficient,
                )
            loss, stats = output.loss, output.router_stats
            objective = loss.objective_sum * per_token
            of_router = torch.zeros((), device=world.device)
            if stats:
                if "global" in config.moe.losses:
                    chosen = add_counts(chosen, stats)
                of_router = router_loss(stats, config.moe, chosen)
                objective = objective + of_router / len(micro_batches)
            clock.lap("forward_time")
            at("compiling" if compiling else "backward")
            (objective * loss_scale).backward()
            clock.lap("backward_time")
        of_router = of_router.detach().double()
        sums.append(torch.cat((loss.sums(), of_router[None], *([pack(stats)] if stats else []))))
    at("summing")
    flat = sum_over_ranks_(torch.stack(sums).sum(0))
    batches = len(micro_batches) * world.world_size
    losses = torch.cat((flat[:2] / tokens, flat[2:4] / batches))
    clock.lap("sync_time")
    return StepResult(losses, tokens, n_bad, flat[4:], stats, batches)


class Agreed(NamedTuple):
    """What every step begins with, summed over the ranks."""

    tokens: int
    """Targets of the whole batch."""
    n_bad: int
    """Masked samples of the whole batch."""
    stops: bool
    """Whether any rank has heard a signal: none takes the step."""


def agree(batch: Batch | Literal[Left.LEFT], stops: bool) -> Agreed:
    """Collective, on the CPU: nothing waits for a GPU. A rank that left its wait for data has no batch."""
    counts = torch.tensor([0, 0, int(stops)])
    if batch is not LEFT:
        counts[0], counts[1] = (batch.targets_BS != IGNORE_INDEX).sum(), batch.n_bad
    tokens, n_bad, asked = sum_over_ranks_(counts).tolist()
    return Agreed(tokens, n_bad, asked > 0)


def add_counts(counts: Sequence[Tensor] | None, stats: Sequence[RouterStats]) -> list[Tensor]:
    """`counts` of the micro-batches before, and those of `stats` over all ranks: one (E,) per MoE layer.

    Collective, once per micro-batch. Their shares are a running mean over micro-batches (--moe-balance global).
    """
    own = [layer.choice_count_E.detach() for layer in stats]
    everyones = sum_over_ranks_(torch.cat(own)).split([len(count_E) for count_E in own])
    return [a + b for a, b in zip(counts, everyones, strict=True)] if counts else list(everyones)


def balance_(model: nn.Module, result: StepResult, rate: float | Tensor) -> None:
    """--moe-balance bias: each router's bias after a step, from the loads of its whole batch. No host sync.

    All ranks have the same loads, so their biases stay equal.
    """
    for router, layer in zip(routers(model), unpack(result.router, result.like), strict=True):
        if router.bias_E is not None:
            update_bias_(router.bias_E, layer.count_E, rate)


def log_averaged_losses(
    model: nn.Module,
    batch: Batch,
    averages: Sequence[Average],
    step: int,
    *,
    plan: BatchPlan,
    optim: OptimConfig,
    world: World,
    log: Log,
) -> None:
    """`train/NAME_loss` of each average on this step's batch, as a line of its own. Collective."""
    losses = {
        average.name: averaged_loss(
            model,
            average,
            batch,
            micro_sequences=plan.micro_sequences,
            precision=optim.precision,
            world=world,
        )
        for average in averages
    }
    log.metrics({f"train/{name}_loss": loss for name, loss in losses.items()}, step)
    shown = " | ".join(f"{name} loss {loss:.4f}" for name, loss in losses.items())
    logger.info(f"step {step:,}, averaged weights | {shown}")


def seed_randomness_(seed: int, step: int, rank: int) -> None:
    """Makes what `step` draws on `rank` (dropout, routers' noise) depend on nothing before it: a resume goes on
    exactly."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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
    log_logit_mean: bool,
    loss_scale: LossScale | None,
    end_interval: Callable[[int], None],
    save_state: Callable[[str], None],
    save_if_due: Callable[[Callable[[], None]], None] = lambda update: None,
    before_update: Callable[[], None] = lambda: None,
    name_samples: Callable[[int], Sequence[str]] = lambda step: (),
    averages: Sequence[Average] = (),
    averaged_loss_every: int = 0,
    bad_sample_limit: int | None = None,
) -> None:
    """Trains from `progress.step` to `schedule.end_step`; `batches` are this rank's, one a step.

    `end_interval(n)` is called when interval n is complete, and when the run ends inside it: it saves and
    evaluates; after every other step `save_if_due(update)`, which calls `update` before it saves;
    `before_update()` before anything that a save holds changes. A step whose loss or gradient norm is not finite,
    or whose loss is a spike (--skip-loss-spikes), changes no weight and no moment, on all ranks; RuntimeError,
    with LOGS/NAME/debug written, where a look finds that --max-skipped-updates such steps or more, the last one
    among them, were in a row. Between log lines nothing waits for the GPU. Every `averaged_loss_every` steps (0:
    never) the loss of the averages before the step, on its batch, is logged. Where any rank has heard a signal all
    leave before the same step, after `save_state(reason)`, with StopAsked.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    biases = [router.bias_E for router in routers(model)]
    window = Window(config, world, log_logit_mean, biases)
    clock, watch = window.clock, world.watch
    bad_samples = BadSamples(bad_sample_limit)
    skips = Skips(progress, world.device)
    spikes = None
    if optim.skip_loss_spikes is not None:
        kept = progress.accepted_losses
        spikes = LossSpikes(optim.skip_loss_spikes, optim.loss_spike_window, world.device, kept)
    begun = progress.step
    # Whether updates are skipped is known to the device: to look waits for it. No row can be full before this step.
    look_due = progress.step + optim.max_skipped_updates - progress.skipped_in_a_row
    show = log.progress(schedule.end_step, progress.step)
    model.train()
    watch.at("starting", progress.step)
    for batch in waiting(of_data(batches), watch.asked):
        step = progress.step
        clock.lap("data_time")
        watch.at("agreeing", step)
        agreed = agree(batch, watch.asked())
        if agreed.stops or batch is LEFT:
            keep_statistics(progress, skips, spikes)
            log.end_progress()
            save_state(watch.why())
            raise StopAsked
        progress.bad_samples += agreed.n_bad
        bad_samples.add_(agreed.n_bad, batch.bad, step + 1, progress.bad_samples)
        if averaged_loss_every and (step + 1) % averaged_loss_every == 0:
            before_update()  # averages take the weights' place for a moment
            log_averaged_losses(
                model, batch, averages, step + 1, plan=plan, optim=optim, world=world, log=log
            )
            clock.lap("averaged_loss_time")
        rate = learning_rate(step, optim, schedule.total_steps, schedule.interval_end(1))
        set_learning_rate_(optimizer, rate)
        seed_randomness_(optim.seed, step, world.rank)
        scale = loss_scale.value if loss_scale else 1.0
        result = accumulate_gradients(
            model, batch, plan=plan, optim=optim, config=config, world=world, loss_scale=scale, clock=clock,
            agreed=agreed, compiling=step == begun,
        )  # fmt: skip
        watch.at("updating")
        scale_gradients_(parameters, 1.0 / scale)
        norm = grad_norm(parameters)
        finite = is_finite(result.losses, norm)  # both are global, so all ranks decide alike
        accepted = finite & ~spikes.is_spike(result.losses[0]) if spikes else finite
        if optim.grad_clip_norm is not None:
            clip_(parameters, norm, optim.grad_clip_norm)
        before_update()
        update_(optimizer, accepted)
        if "bias" in config.moe.balances:
            balance_(model, result, config.moe.bias_rate * accepted)
        for average in averages:
            average.step_()
        optimizer.zero_grad(set_to_none=True)
        if loss_scale:
            loss_scale.update_(bool(finite))
        if spikes:
            spikes.add_(result.losses[0], accepted)
        skips.add_(finite, accepted)
        window.add_(result, finite)
        progress.step += 1
        progress.tokens += result.tokens
        clock.lap("optim_step_time")

        interval = schedule.interval_of(step)
        ends = progress.step in (schedule.interval_end(interval), schedule.end_step)
        logs = progress.step % log_every_n_steps == 0 or step == 0 or ends
        if logs or progress.step >= look_due:
            look_at(skips, progress, finding_scale=loss_scale is not None and scale > 1.0)
            look_due = progress.step + optim.max_skipped_updates - progress.skipped_in_a_row
            clock.lap("look_time")  # the wait for the GPU is not one for data
            if progress.skipped_in_a_row >= optim.max_skipped_updates:
                seed_randomness_(optim.seed, step, world.rank)
                randomness = torch.get_rng_state()
                again = accumulate_gradients(
                    model, batch, plan=plan, optim=optim, config=config, world=world, loss_scale=scale,
                    clock=Clock(),
                )  # fmt: skip
                end_skipping(
                    log.folder / "debug", model, batch, again, randomness, progress, world=world,
                    loss_scale=scale, samples=name_samples(step), limit=optim.max_skipped_updates,
                )  # fmt: skip
        if logs:
            entry = window.entry(progress, rate, norm)
            log.metrics(entry, progress.step)
            logger.info(describe(entry, progress, schedule))
            show(
                progress.step,
                f"loss {entry['train/loss']:.3f} · {entry['train/tokens_per_second']:,.0f} tokens/s",
            )
            window.restart()
        else:
            show(progress.step, None)
        if ends:
            keep_statistics(progress, skips, spikes)
            end_interval(interval)
            model.train()
            window.restart()
        else:
            save_if_due(lambda: keep_statistics(progress, skips, spikes))
        watch.at("waiting for data", progress.step)
    log.end_progress()
