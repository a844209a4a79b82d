"""What a run has done and measured: progress, the sums behind a log line, and the line for people."""

import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from open_lm.config.model import ModelConfig
from open_lm.config.schedule import Schedule
from open_lm.moe.placement import moe_layers
from open_lm.moe.stats import RouterStats, add, summarize


@dataclass
class Progress:
    """What a run has done, apart from its weights; part of every checkpoint."""

    step: int = 0
    """Optimizer steps done, skipped updates included: what the data order and the schedule count."""
    tokens: int = 0
    """Targets trained on."""
    skipped_updates: int = 0
    """Steps whose loss or gradient was not finite, so that nothing was changed."""
    bad_samples: int = 0
    """Samples that were masked: too short, or unreadable under --ignore-parse-errors (this rank's)."""

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class StepResult(NamedTuple):
    """Of one step's whole batch, over all ranks and micro-batches."""

    loss: Tensor
    """Mean negative log-likelihood, nats per token; without any auxiliary term."""
    z_loss: Tensor
    """Mean logsumexp(logits)² per token, unweighted."""
    tokens: int
    router_stats: list[RouterStats]
    """One per MoE layer: counts summed over ranks and micro-batches, the two losses averaged."""


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
    """Sums over the steps since the last log line."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.restart()

    def restart(self) -> None:
        self.clock.restart()
        self.steps = self.tokens = 0
        self.nll = self.z = 0.0
        self.finite_tokens = 0
        self.stats: list[RouterStats] = []
        self.fullest: list[float] = []

    def add(self, result: StepResult, finite: bool) -> None:
        self.steps += 1
        self.tokens += result.tokens
        if finite:  # one NaN must not hide the window's other losses
            self.finite_tokens += result.tokens
            self.nll += result.loss.item() * result.tokens
            self.z += result.z_loss.item() * result.tokens
        stats = result.router_stats
        self.stats = add(self.stats, stats) if self.stats else stats
        # per step: experts that are crowded in turn look even over many steps
        fullest = [(s.count_E.max() / s.count_E.mean()).item() for s in stats]
        self.fullest = (
            [a + b for a, b in zip(self.fullest, fullest, strict=True)] if self.fullest else fullest
        )

    @property
    def loss(self) -> float:
        return self.nll / self.finite_tokens if self.finite_tokens else float("nan")

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(time.perf_counter() - self.clock.since, 1e-9)

    def entry(
        self, progress: Progress, rate: float, norm: Tensor, world_size: int, config: ModelConfig
    ) -> dict[str, Any]:
        """The window's metrics by open_lm's names; times are seconds per step."""
        seconds = time.perf_counter() - self.clock.since
        speed = self.tokens / max(seconds, 1e-9)
        entry: dict[str, Any] = {
            "tokens": progress.tokens,
            "train/loss": self.loss,
            "train/z_loss": self.z / self.finite_tokens if self.finite_tokens else float("nan"),
            "train/grad_norm": norm.item(),
            "train/lr": rate,
            "train/tokens": progress.tokens,
            "train/skipped_updates": progress.skipped_updates,
            "train/bad_samples": progress.bad_samples,
            # open_lm's "samples" are tokens
            "train/samples_per_second": speed,
            "train/samples_per_second_per_gpu": speed / world_size,
            "train/tokens_per_second": speed,
            "train/batch_time": seconds / self.steps,
        }
        entry |= {f"train/{part}": s / self.steps for part, s in self.clock.seconds.items()}
        if self.stats:
            n = len(self.stats) * self.steps
            entry["train/load_balancing_loss"] = sum(s.balance_loss.item() for s in self.stats) / n
            entry["train/router_z_loss"] = sum(s.z_loss.item() for s in self.stats) / n
            entry["router"] = summarize(self.stats, moe_layers(config))
            for layer, fullest in zip(entry["router"], self.fullest, strict=True):
                layer["fullest_over_mean"] = fullest / self.steps
        return entry


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
    if "router" in entry:
        fullest = max(layer["fullest_over_mean"] for layer in entry["router"])
        dropped = max(layer["dropped_share"] for layer in entry["router"])
        parts.append(f"balance {entry['train/load_balancing_loss']:.3f}")
        parts.append(f"fullest expert {fullest:.2f}x mean")
        parts.append(f"dropped {dropped:.1%}")
    if progress.skipped_updates:
        parts.append(f"{progress.skipped_updates} updates skipped")
    if progress.bad_samples:
        parts.append(f"{progress.bad_samples} bad samples")
    return " | ".join(parts)
