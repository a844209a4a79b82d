"""Averages of a model's weights along a run: kept beside the parameters, sharded as they are.

Shapes: B sequences of this rank's batch, S positions.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from open_lm.config.averaging import DEFAULTS, Averager
from open_lm.config.optim import PrecisionName
from open_lm.data.batches import Batch
from open_lm.loss import IGNORE_INDEX, real_positions
from open_lm.parallel.mesh import World, sum_over_ranks_
from open_lm.parallel.plan import autocast, reshard_, unwrap


def ema(gamma: float, t: int) -> float:
    """Exponential moving average, from the initial weights."""
    return 1 - gamma


def poly(eta: float, t: int) -> float:
    """Polynomial decay (Shamir and Zhang 2013, eq. 10); eta 0 is the plain mean of all updates."""
    return (eta + 1) / (eta + t)


# (parameter, update t from 1) → weight w of the current weights: average = (1 - w) average + w current
METHODS: dict[str, Callable[[float, int], float]] = {f.__name__: f for f in (ema, poly)}
assert METHODS.keys() == DEFAULTS.keys()


class Average:
    """A running average of `model`'s parameters, tied ones once; it begins at the weights as they are.

    `weights` holds them by parameter name, as sharded as the parameters, in fp32 even where these are bf16:
    there, (1 - gamma) of a difference would vanish. `steps` counts the optimizer steps it has seen.
    """

    def __init__(self, averager: Averager, model: nn.Module) -> None:
        reshard_(model)
        self.averager = averager
        self.steps = 0
        self.parameters: dict[str, nn.Parameter] = dict(unwrap(model).named_parameters())
        self.weights = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in self.parameters.items()
        }

    @property
    def name(self) -> str:
        return self.averager.name

    def counters(self) -> dict[str, int]:
        """open_lm's: both from 1, the number of the next update and the step's place before it."""
        updates, rest = divmod(self.steps, self.averager.freq)
        return {"step_counter": updates + 1, "update_counter": rest + 1}

    @torch.no_grad()
    def step_(self) -> None:
        """After each optimizer step; every `freq` steps the average moves. No host sync.

        A step whose update was skipped as not finite counts like any other: the weights, which it left as
        they were, go into the average once more. So `steps` is the run's, whatever happened in it.
        """
        self.steps += 1
        update, rest = divmod(self.steps, self.averager.freq)
        if rest:
            return
        weight = METHODS[self.averager.method](self.averager.parameter, update)
        averages, current = _local(self.weights.values()), _local(self.parameters.values())
        # Not mul and add: gamma and 1 - gamma, each rounded to fp32, do not sum to 1, and it adds up
        if all(a.dtype == c.dtype for a, c in zip(averages, current, strict=True)):
            torch._foreach_lerp_(averages, current, weight)
        else:  # one tensor in fp32 at a time
            for a, c in zip(averages, current, strict=True):
                a.lerp_(c.to(a.dtype), weight)


@contextmanager
def averaged(model: nn.Module, average: Average) -> Iterator[None]:
    """Inside, `model` has the averaged weights; then its own again, bitwise. Collective under FSDP.

    Takes one copy of the weights, as sharded as they are. Where there are gradients, they are left alone.
    """
    reshard_(model)
    parameters = _local(average.parameters.values())
    own = [parameter.clone() for parameter in parameters]
    _copy_(parameters, _local(average.weights.values()))
    try:
        yield
    finally:
        reshard_(model)  # else the averaged weights that the root gathered would stay in use
        _copy_(parameters, own)


@torch.no_grad()
def averaged_loss(
    model: nn.Module,
    average: Average,
    batch: Batch,
    *,
    micro_sequences: int,
    precision: PrecisionName,
    world: World,
) -> float:
    """The averaged weights' mean loss (nats per token) over a step's whole batch, on all ranks. Collective."""
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)  # nll, tokens
    bare = unwrap(model)
    was_training = bare.training
    bare.eval()
    with averaged(model, average):
        slices = zip(
            batch.tokens_BS.split(micro_sequences), batch.targets_BS.split(micro_sequences), strict=True
        )
        for tokens_BS, targets_BS in slices:
            real_BS = real_positions(targets_BS) if bare.config.moe.enabled else None
            real_BS = None if real_BS is None else real_BS.to(world.device)
            targets_BS = targets_BS.to(world.device)
            with autocast(precision, world.device):
                output = bare(tokens_BS.to(world.device), targets_BS, real_BS=real_BS)
            assert output.loss is not None
            sums[0] += output.loss.nll_BS.double().sum()
            sums[1] += (targets_BS != IGNORE_INDEX).sum()
    bare.train(was_training)
    nll, tokens = sum_over_ranks_(sums).tolist()
    return nll / max(tokens, 1)


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The parts of the tensors that this rank holds, sharing their memory."""
    return [(t.to_local() if isinstance(t, DTensor) else t).detach() for t in tensors]


@torch.no_grad()
def _copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_copy_(targets, sources)
