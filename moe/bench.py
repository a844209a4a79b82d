"""Time one MoE layer, forward + backward, per backend, beside a dense FFN of the same active FLOPs; or whole steps.

    python moe/bench.py --device cuda --dtype bf16 160m olmoe
    python moe/bench.py 41m 160m --compile --graph --routing random zipf --backends triton megablocks
    python moe/bench.py steps --models 41m 160m --experts 1 8 32 --record moe/records/speed.jsonl

`steps` is speed.py: the training command's tokens/s, MFU and memory, per model and number of experts.

Routing is what a fresh router does to random tokens, or with `--routing zipf` such that expert i is chosen about
1/i times as often as the first; dropless unless --capacity-factor is given. With --graph the step is replayed as a
CUDA graph where the layer allows it: what the host takes to launch it does not count. TFLOP/s counts the experts'
matrix products, 6 * tokens * k * matrices * d * width; the time has everything.

`--plans` are ways of the triton backend through backward: as its table of tiles says, or `recompute` the
activation, `save` it in forward, `+in_place`: gradients in the memory of what was saved.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from open_lm.config.moe import MoEConfig
from open_lm.log import commit
from open_lm.moe.backends import BACKENDS
from open_lm.moe.layer import MoE


class Shape(NamedTuple):
    """One MoE layer and the tokens of one step through it."""

    tokens: int
    dim: int
    width: int
    experts: int
    top_k: int
    ffn_type: str

    @property
    def flops(self) -> int:
        """Multiply-adds times two of the experts' products, forward and backward."""
        matrices = {"gelu": 2, "swiglu": 3}[self.ffn_type]
        return 6 * self.tokens * self.top_k * matrices * self.dim * self.width


SHAPES = {
    "demo": Shape(2048, 192, 768, 8, 2, "gelu"),
    "41m": Shape(65536, 288, 1152, 8, 2, "gelu"),
    "87m": Shape(65536, 488, 1952, 8, 2, "gelu"),
    "160m": Shape(65536, 768, 3072, 8, 2, "gelu"),
    "160m_32e": Shape(65536, 768, 3072, 32, 2, "gelu"),
    "410m": Shape(32768, 1024, 4096, 8, 2, "gelu"),
    "830m": Shape(32768, 1536, 6144, 8, 2, "gelu"),
    "olmoe": Shape(32768, 2048, 1024, 64, 8, "swiglu"),
    "qwen3_moe": Shape(32768, 2048, 768, 128, 8, "swiglu"),
    "mixtral": Shape(16384, 4096, 14336, 8, 2, "swiglu"),
}

# Name: (dtype of the weights, dtype of autocast or None).
DTYPES = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp32": (torch.float32, None),
    "amp_bf16": (torch.float32, torch.bfloat16),
}


# --plans: (forward saves the activation, backward works in place)
PLANS = {"table": None, "recompute": (False, False), "recompute+in_place": (False, True), "save": (True, False),
         "save+in_place": (True, True)}  # fmt: skip


@contextmanager
def planned(plan: str) -> Iterator[None]:
    """Within it the triton backend goes through backward by this plan."""
    if not (flags := PLANS[plan]):
        yield
        return
    from open_lm.moe.backends.triton import launch

    usual = launch.plan
    launch.plan = torch.compiler.assume_constant_result(lambda *_: flags)
    try:
        yield
    finally:
        launch.plan = usual


class Dense(nn.Module):
    """The FFN that a token would see if its k experts were one: no routing at all, same FLOPs."""

    def __init__(self, shape: Shape):
        super().__init__()
        width = shape.top_k * shape.width
        self.gated = shape.ffn_type == "swiglu"
        self.up = nn.Linear(shape.dim, width * (1 + self.gated), bias=False)
        self.down = nn.Linear(width, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if not self.gated:
            return self.down(nn.functional.gelu(h, approximate="tanh"))
        gate, value = h.chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * value)


def make_moe(shape: Shape, backend: str, capacity_factor: float) -> MoE:
    moe = MoEConfig(
        dim=shape.dim,
        num_experts=shape.experts,
        top_k=shape.top_k,
        capacity_factor=capacity_factor,
        ffn_type=shape.ffn_type,  # type: ignore[arg-type]
        hidden_dim=shape.width,
        backend=backend,  # type: ignore[arg-type]
    )
    return MoE(moe)


def step_of(module: nn.Module, shape: Shape, device: str, dtype: str) -> Callable[[], None]:
    """One forward and backward of `module` on random tokens; gradients are dropped before each."""
    weights, autocast = DTYPES[dtype]
    x_BSD = torch.randn(1, shape.tokens, shape.dim, device=device, dtype=weights, requires_grad=True)
    gradient = torch.randn_like(x_BSD)

    def step() -> None:
        x_BSD.grad = None
        module.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=autocast) if autocast else nullcontext():
            out = module(x_BSD)
        y_BSD, losses = (out, []) if isinstance(out, Tensor) else (out[0], [out[1].loss])
        torch.autograd.backward([y_BSD, *losses], [gradient.to(y_BSD.dtype), *(None for _ in losses)])

    return step


class Skewed(nn.Module):
    """A router whose choices are drawn, expert i's chance in proportion to 1 / i (Zipf's law)."""

    def __init__(self, router: nn.Module, shape: Shape):
        super().__init__()
        self.router = router
        self.bias_E = None
        rank_E = torch.arange(1, shape.experts + 1)
        # Gumbel's noise makes the largest of the logarithms of weights a draw by these weights
        noise_TE = -torch.empty(shape.tokens, shape.experts).exponential_().log()
        self.register_buffer("offset_TE", noise_TE - rank_E.log())

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.router(x_TD) + self.offset_TE.float()


def forward_of(module: nn.Module, shape: Shape, device: str, dtype: str) -> Callable[[], None]:
    """One forward without gradients, on random tokens."""
    weights, autocast = DTYPES[dtype]
    x_BSD = torch.randn(1, shape.tokens, shape.dim, device=device, dtype=weights)

    def step() -> None:
        with torch.no_grad(), torch.autocast(device, dtype=autocast) if autocast else nullcontext():
            module(x_BSD)

    return step


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """`step` as a replay of the CUDA graph that it makes; raises RuntimeError where it waits for the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def blocks_at_peak(step: Callable[[], None]) -> list[float]:
    """MiB of what `step` has allocated and is alive at its peak, the largest first."""
    torch.cuda.memory._record_memory_history(context=None)
    step()
    events: Any = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]  # type: ignore
    torch.cuda.memory._record_memory_history(enabled=None)
    return peak_of([(event["action"], event["addr"], event["size"]) for event in events])


def peak_of(events: list[tuple[str, int, int]]) -> list[float]:
    """The blocks, MiB, that are alive when they are the most, of the allocator's (action, address, bytes)."""
    alive, peak, most = {}, [], 0
    for action, address, size in events:
        if action == "alloc":
            alive[address] = size
        elif action == "free_completed":
            alive.pop(address, None)
        if sum(alive.values()) > most:
            most, peak = sum(alive.values()), list(alive.values())
    return sorted((size / 2**20 for size in peak), reverse=True)


def measure(step: Callable[[], None], device: str, repeats: int, graph: bool = False) -> tuple[float, float]:
    """(median seconds of a step, peak MiB allocated on a GPU or NaN); as a CUDA graph's replay if `graph`."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else float("nan")
    if graph:
        step = captured(step)
        step()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), peak


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "shapes", nargs="*", default=["demo"], metavar="SHAPE", help=f"of {', '.join(SHAPES)}"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=["reference", "grouped_mm"])
    parser.add_argument("--tokens", type=int, help="instead of the shape's")
    parser.add_argument("--capacity-factor", type=float, default=0.0)
    parser.add_argument("--compile", action="store_true", help="torch.compile everything except `reference`")
    parser.add_argument(
        "--graph", action="store_true", help="replay CUDA graphs, but for `reference`, `megablocks`"
    )
    parser.add_argument("--routing", nargs="+", choices=["random", "zipf"], default=["random"])
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=["table"], help="of triton's backward")
    parser.add_argument(
        "--blocks", type=int, default=0, help="print so many of the largest blocks at the peak"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", help="append one JSON line per row to this file")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.shapes if name not in SHAPES]:
        parser.error(f"no shape {unknown[0]!r}; there are {', '.join(SHAPES)}")

    print(f"{'shape':<10} {'layer':<12} {'routing':<7} {'ms':>9} {'forward':>9} {'tokens/s':>12} {'TFLOP/s':>8} "
          f"{'of dense':>8} {'peak MiB':>9}")  # fmt: skip
    for name in chosen.shapes:
        shape = SHAPES[name]._replace(**({"tokens": chosen.tokens} if chosen.tokens else {}))
        dense = None
        layers = [("dense", "", "table")]
        for backend in chosen.backends:
            plans = chosen.plans if backend == "triton" else ["table"]
            layers += [(backend, routing, plan) for plan in plans for routing in chosen.routing]
        for layer, routing, plan in layers:
            try:
                with planned(plan):
                    record = time_layer(shape, layer, routing, chosen)
            except ValueError as error:  # a backend that is not installed
                print(f"{name:<10} {layer:<12} {error}", flush=True)
                continue
            dense = dense or record["tflops"]
            record = {"shape": name, **record, "of_dense": record["tflops"] / dense}
            if plan != "table":
                record["plan"] = plan
            print(f"{name:<10} {layer:<12} {routing:<7} {record['milliseconds']:>9.3f} "
                  f"{record['forward_milliseconds']:>9.3f} {record['tokens_per_second']:>12,.0f} "
                  f"{record['tflops']:>8.2f} {record['of_dense']:>8.2f} {record['peak_mib'] or float('nan'):>9.0f}"
                  + f" {plan}" * (plan != "table"),
                  flush=True)  # fmt: skip
            if chosen.output:
                with open(chosen.output, "a") as file:
                    file.write(json.dumps(record) + "\n")


def time_layer(shape: Shape, layer: str, routing: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """The record of one row."""
    if chosen.compile:
        torch.compiler.reset()  # it counts how often a function is compiled
    before = 0.0
    if chosen.device == "cuda":
        gc.collect()  # the rows before, whose compiled functions refer to themselves
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated() / 2**20
    torch.manual_seed(0)
    module = Dense(shape) if layer == "dense" else make_moe(shape, layer, chosen.capacity_factor)
    module = module.to(chosen.device, DTYPES[chosen.dtype][0])
    if routing == "zipf":
        module.router = Skewed(module.router, shape).to(chosen.device)  # type: ignore
    compiled = chosen.compile and layer != "reference"
    if compiled:
        module.compile(fullgraph=layer != "megablocks")
    graph = chosen.graph and chosen.device == "cuda" and layer not in ("reference", "megablocks")
    step = step_of(module, shape, chosen.device, chosen.dtype)
    if chosen.blocks and chosen.device == "cuda":
        step()
        for mib in blocks_at_peak(step)[: chosen.blocks]:
            print(f"    {mib:8.1f} MiB alive at the peak")
    seconds, peak = measure(step, chosen.device, chosen.repeats, graph)
    forward, _ = measure(
        forward_of(module, shape, chosen.device, chosen.dtype), chosen.device, chosen.repeats, graph
    )
    return {
        **shape._asdict(),
        "layer": layer,
        "dtype": chosen.dtype,
        "capacity_factor": chosen.capacity_factor,
        "routing": routing,
        "compiled": compiled,
        "graph": graph,
        "milliseconds": 1e3 * seconds,
        "forward_milliseconds": 1e3 * forward,
        "tokens_per_second": shape.tokens / seconds,
        "tflops": shape.flops / seconds / 1e12,
        "peak_mib": None if peak != peak else peak - before,
        "device": torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": commit(),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["steps"]:
        import speed  # beside this file

        speed.command(sys.argv[2:])
    else:
        main(sys.argv[1:])
