"""AdamW, the learning rate as a function of the step, gradient norms and the fp16 loss scale."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from open_lm.config.optim import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over `model`'s parameters, sharded ones too.

    Weight decay acts on everything with two or more dimensions: projections, embeddings (as open_lm),
    routers and the (E, D, F) expert weights; never on norms and biases.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(name, p) for name, p in named if p.ndim >= 2], "weight_decay": config.wd},
        {"params": [(name, p) for name, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def learning_rate(step: int, config: OptimConfig, total_steps: int, steps_per_interval: int) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`; at and past the end it stays at the end's.

    With --lr-decay-steps the decay ends there, not with the run. `steps_per_interval` is the unit of
    --epochs-cooldown.
    """
    if config.skip_scheduler:
        return config.lr
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    end = config.lr_decay_steps or total_steps
    start, decay = SCHEDULES[config.lr_scheduler](config, end, steps_per_interval)
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    # written so that decay 1 gives exactly lr
    rate = config.lr - (1 - decay(progress)) * (config.lr - config.lr_cooldown_end)
    return max(rate, config.force_min_lr)


def _cosine(config: OptimConfig, end: int, steps_per_interval: int):
    return config.warmup, lambda progress: 0.5 * (1 + math.cos(math.pi * progress))


def _const(config: OptimConfig, end: int, steps_per_interval: int):
    return config.warmup, lambda progress: 1.0


def _const_cooldown(config: OptimConfig, end: int, steps_per_interval: int):
    if config.epochs_cooldown is None:
        raise ValueError("--lr-scheduler const-cooldown needs --epochs-cooldown")
    start = end - config.epochs_cooldown * steps_per_interval
    return start, lambda progress: (1 - progress) ** config.lr_cooldown_power


# (config, step where the decay ends, steps_per_interval) → (first step of the decay, decay of progress in [0, 1])
SCHEDULES = {"cosine": _cosine, "const": _const, "const-cooldown": _const_cooldown}


def set_learning_rate_(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next `optimizer.step()` use `rate`, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _local(gradients: list[Tensor]) -> list[Tensor]:
    """The parts of the gradients that this rank holds, sharing their memory."""
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


@torch.no_grad()
def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together, over all ranks that hold shards: a 0-d fp32 tensor.

    Sharded gradients are reduced over their own device mesh, so every rank of it must call this.
    """
    by_mesh: dict[Any, list[Tensor]] = defaultdict(list)
    for gradient in _gradients(parameters):
        by_mesh[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(gradient)
    norms = []
    for gradients in by_mesh.values():
        each = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(each))
        if isinstance(norm, DTensor):
            # gradients offloaded to host memory: what is summed over ranks goes to the mesh's device
            local = norm.to_local().to(norm.device_mesh.device_type)
            norm = DTensor.from_local(local, norm.device_mesh, norm.placements, run_check=False).full_tensor()
        norms.append(norm)
    if not norms:
        return torch.zeros(())
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def clip_(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients, whose global norm is `norm`, so that it is at most `max_norm`; no host sync."""
    local = _local(_gradients(parameters))
    if local:
        torch._foreach_mul_(local, torch.clamp(max_norm / (norm + 1e-6), max=1.0).to(local[0].device))


@torch.no_grad()
def scale_gradients_(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients by `factor` (undoes a loss scale before norm, clipping and step)."""
    local = _local(_gradients(parameters))
    if local and factor != 1.0:
        torch._foreach_mul_(local, factor)


def is_finite(*tensors: Tensor) -> Tensor:
    """A 0-d bool: no element of any tensor is NaN or infinite. No host sync.

    Give it values that are equal on all ranks (a summed loss, a global norm), and all ranks agree.
    """
    return torch.stack([t.detach().isfinite().all() for t in tensors]).all()


def update_(optimizer: torch.optim.Optimizer, accepted: Tensor) -> None:
    """`optimizer.step()` where `accepted` (0-d bool) holds; else no weight, moment or count changes. No host sync,
    unless the weights are offloaded to host memory.

    The fused optimizers read `found_inf` on the device, as torch's GradScaler has them do.
    """
    # torch's own copy to the host would not wait for the value
    found_inf = (~accepted).float().to(optimizer.param_groups[0]["params"][0].device)
    optimizer.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()


class LossSpikes:
    """Which losses are spikes: above median + `factor` * 1.4826 * MAD of the last `window` accepted ones.

    1.4826 * MAD is the standard deviation where the losses scatter normally. All is on the device, in float64, of
    losses that are equal on all ranks, so all decide alike and nothing waits. Nothing is a spike until the window
    is full.
    """

    LEAST_SPREAD = 1e-4  # of the median: losses that hardly differ have no spikes within rounding

    def __init__(
        self, factor: float, window: int, device: torch.device, losses: Sequence[float] = ()
    ) -> None:
        """`losses`: the last accepted ones of a run that goes on, oldest first."""
        self.factor, self.window = factor, window
        kept = list(losses)[-window:]
        self.losses_W = torch.full((window,), math.nan, dtype=torch.float64, device=device)
        if kept:
            self.losses_W[window - len(kept) :] = torch.tensor(kept, dtype=torch.float64, device=device)

    def is_spike(self, loss: Tensor) -> Tensor:
        """A 0-d bool of a step's mean loss. No host sync."""
        median = _middle(self.losses_W)
        spread = 1.4826 * _middle((self.losses_W - median).abs())
        limit = median + self.factor * torch.maximum(spread, self.LEAST_SPREAD * median.abs())
        return loss.to(limit.dtype) > limit  # never of a window that holds NaN

    def add_(self, loss: Tensor, accepted: Tensor) -> None:
        """The step's loss joins the window where it was `accepted` (0-d bool), and the oldest leaves it."""
        moved_W = torch.cat((self.losses_W[1:], loss.detach().to(self.losses_W.dtype)[None]))
        self.losses_W = torch.where(accepted, moved_W, self.losses_W)

    def read(self) -> list[float]:
        """The accepted losses, oldest first; waits for the device."""
        return [loss for loss in self.losses_W.tolist() if not math.isnan(loss)]


def _middle(x_W: Tensor) -> Tensor:
    """The median; NaN of values that hold one. By a sort: torch's median has no deterministic kernel for GPUs."""
    sorted_W = x_W.sort().values
    low, high = (len(x_W) - 1) // 2, len(x_W) // 2
    return torch.where(x_W.isnan().any(), math.nan, (sorted_W[low] + sorted_W[high]) / 2)


class LossScale:
    """Dynamic loss scale for fp16 gradients (Micikevicius et al. 2018, section 3.2).

    Multiply the loss by `value`, the gradients by 1 / `value`; skip the step when they are not finite.
    """

    def __init__(self, value: float = 2.0**16, growth_steps: int = 2000):
        self.value = value
        self.growth_steps = growth_steps
        self.good_steps = 0

    def update_(self, finite: bool) -> None:
        """After each step: halved if it was not finite, doubled after `growth_steps` finite ones in a row."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps == self.growth_steps:
            self.value *= 2
            self.good_steps = 0

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict()`."""
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
