"""What a run has done and measured: progress, the sums behind a log line, and the line for people."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from open_lm.config.model import ModelConfig
from open_lm.config.schedule import Schedule
from open_lm.flops import flops_per_token, peak_flops
from open_lm.moe.placement import moe_layers
from open_lm.moe.stats import RouterStats, summarize, unpack
from open_lm.parallel.mesh import World


@dataclass
class Progress:
    """What a run has done, apart from its weights; part of every checkpoint."""

    step: int = 0
    """Optimizer steps done, skipped updates included: what the data order and the schedule count."""
    tokens: int = 0
    """Targets trained on."""
    skipped_updates: int = 0
    """Steps whose loss or gradient was not finite, so that nothing was changed."""
    skipped_spikes: int = 0
    """Steps whose loss was a spike (--skip-loss-spikes), so that nothing was changed."""
    skipped_in_a_row: int = 0
    """Of both kinds, up to now."""
    accepted_losses: list[float] = field(default_factory=list)
    """The last ones, oldest first, that --skip-loss-spikes looks back on."""
    bad_samples: int = 0
    """Samples that were masked: too short, or unreadable under --ignore-parse-errors; of all ranks."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class StepResult(NamedTuple):
    """Of one step's whole batch, over all ranks and micro-batches; on the device, so that nothing waits."""

    losses: Tensor
    """(4,) float64: means of the negative log-likelihood in nats per token, without any auxiliary term; of
    logsumexp(logits)², unweighted; of all logits; and what the routers added to the objective, 0 without any."""
    tokens: int
    """Targets."""
    n_bad: int
    """Samples that were masked as too short or unreadable."""
    router: Tensor
    """The router statistics of all layers, summed and packed (`moe.stats.pack`)."""
    like: tuple[RouterStats, ...]
    """The statistics of one micro-batch: what `router` unpacks to."""
    batches: int
    """Micro-batches of all ranks, which the router losses in `router` are sums over."""


class Skips:
    """Counts updates that were skipped, on the device."""

    def __init__(self, progress: Progress, device: torch.device) -> None:
        counts = progress.skipped_updates, progress.skipped_spikes, progress.skipped_in_a_row
        self.counts = torch.tensor(counts, device=device)

    def add_(self, finite: Tensor, accepted: Tensor) -> None:
        """Count a step: whether it was finite, and no spike either."""
        updates, spikes, row = self.counts
        self.counts = torch.stack(
            (
                updates + 1 - finite.long(),
                spikes + (finite & ~accepted).long(),
                (row + 1) * (1 - accepted.long()),
            )
        )

    def read(self, progress: Progress) -> None:
        """Brings `progress` up to date; waits for the device."""
        progress.skipped_updates, progress.skipped_spikes, progress.skipped_in_a_row = self.counts.tolist()


class Clock:
    """Seconds spent in each part of the steps since `restart`. On a GPU these are the host's seconds:
    kernels run on behind it, and only tokens per second and batch_time span whole, finished steps."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = {}
        self.since = self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now


class Window:
    """Sums over the steps since the last log line, on the device: `entry` is the one place that waits for it."""

    def __init__(
        self,
        config: ModelConfig,
        world: World,
        log_logit_mean: bool = False,
        biases: Sequence[Tensor | None] = (),
    ) -> None:
        """`biases` are the routers', one per MoE layer, of which `entry` says the size."""
        self.clock = Clock()
        self.layers = moe_layers(config)
        self.biases = biases
        self.world = world
        self.log_logit_mean = log_logit_mean
        self.flops_per_token = flops_per_token(config)
        self.restart()

    def restart(self) -> None:
        self.clock.restart()
        self.steps = self.tokens = self.batches = 0
        self.losses: Tensor | float = 0.0
        self.finite_tokens: Tensor | float = 0.0
        self.router: Tensor | None = None
        self.fullest_L: Tensor | float = 0.0
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def add_(self, result: StepResult, finite: Tensor) -> None:
        """Count a step; one that is not finite in everything but the loss."""
        self.steps += 1
        self.tokens += result.tokens
        self.batches += result.batches
        self.finite_tokens = self.finite_tokens + finite * result.tokens
        # one NaN must not hide the window's other losses
        self.losses = self.losses + (result.losses * result.tokens).where(finite, 0)
        if not result.like:
            return
        self.like = result.like
        self.router = result.router if self.router is None else self.router + result.router
        # per step: experts that are crowded in turn look even over many steps
        counts = [layer.count_E for layer in unpack(result.router, result.like)]
        self.fullest_L = self.fullest_L + torch.stack([count.max() / count.mean() for count in counts])

    def entry(self, progress: Progress, rate: float, norm: Tensor) -> dict[str, Any]:
        """The window's metrics by open_lm's names; times are seconds per step."""
        loss, z_loss, logit_mean, router_loss = (self.losses / self.finite_tokens).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        seconds = time.perf_counter() - self.clock.since  # after the wait: all the steps' kernels are in it
        speed = self.tokens / max(seconds, 1e-9)
        entry: dict[str, Any] = {
            "tokens": progress.tokens,
            "train/loss": loss,
            "train/z_loss": z_loss,
            "train/grad_norm": norm.item(),
            "train/lr": rate,
            "train/tokens": progress.tokens,
            "train/skipped_updates": progress.skipped_updates,
            "train/skipped_spikes": progress.skipped_spikes,
            "train/bad_samples": progress.bad_samples,
            # open_lm's "samples" are tokens
            "train/samples_per_second": speed,
            "train/samples_per_second_per_gpu": speed / self.world.world_size,
            "train/tokens_per_second": speed,
            "train/batch_time": seconds / self.steps,
        }
        entry |= {"train/logit_mean": logit_mean} if self.log_logit_mean else {}
        entry |= {f"train/{part}": s / self.steps for part, s in self.clock.seconds.items()}
        entry |= efficiency(speed / self.world.world_size, self.flops_per_token, self.world.device)
        if self.router is not None:
            stats = unpack(self.router.cpu(), self.like)
            n = len(stats) * self.batches
            entry["train/load_balancing_loss"] = sum(s.balance_loss.item() for s in stats) / n
            entry["train/router_z_loss"] = sum(s.z_loss.item() for s in stats) / n
            entry["train/router_loss"] = router_loss
            entry["router"] = summarize(stats, self.layers)
            for layer, fullest in zip(entry["router"], self.fullest_L.tolist(), strict=True):  # pyright: ignore[reportAttributeAccessIssue]
                layer["fullest_over_mean"] = fullest / self.steps
            for layer, bias_E in zip(entry["router"], self.biases, strict=False):
                if bias_E is not None:
                    layer["largest_bias"] = bias_E.abs().max().item()
        return entry


def efficiency(tokens_per_second: float, flops_per_token: float, device: torch.device) -> dict[str, float]:
    """On a GPU: the share of its peak that the model's FLOPs take, and the window's largest memory in GiB."""
    if device.type != "cuda":
        return {}
    entry = {
        "train/memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "train/memory_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }
    peak = peak_flops(torch.cuda.get_device_name(device))
    return entry | ({"train/mfu": tokens_per_second * flops_per_token / peak} if peak else {})


def describe(entry: dict[str, Any], progress: Progress, schedule: Schedule) -> str:
    """A log line for people."""
    parts = [
        f"step {progress.step:,}/{schedule.total_steps:,}",
        f"tokens {progress.tokens:,}",
        f"loss {entry['train/loss']:.4f}",
        f"grad norm {entry['train/grad_norm']:.3f}",
        f"lr {entry['train/lr']:.3g}",
        f"{entry['train/tokens_per_second']:,.0f} tokens/s",
    ]
    if "train/mfu" in entry:
        parts.append(f"MFU {entry['train/mfu']:.1%}")
    if "train/memory_gib" in entry:
        parts.append(f"{entry['train/memory_gib']:.1f} GiB")
    if "router" in entry:
        fullest = max(layer["fullest_over_mean"] for layer in entry["router"])
        dropped = max(layer["dropped_share"] for layer in entry["router"])
        parts.append(f"balance {entry['train/load_balancing_loss']:.3f}")
        parts.append(f"fullest expert {fullest:.2f}x mean")
        parts.append(f"dropped {dropped:.1%}")
    if progress.skipped_updates:
        parts.append(f"{progress.skipped_updates} updates skipped")
    if progress.skipped_spikes:
        parts.append(f"{progress.skipped_spikes} spikes skipped")
    if progress.bad_samples:
        parts.append(f"{progress.bad_samples} bad samples")
    return " | ".join(parts)
