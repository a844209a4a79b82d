"""Time one MoE layer, forward + backward, per backend, beside a dense FFN of the same active FLOPs.

    python moe/bench.py --device cuda --dtype bf16 160m olmoe
    python moe/bench.py demo --output records.jsonl

Routing is what a fresh router does to random tokens, and dropless unless --capacity-factor is given.
TFLOP/s counts the experts' matrix products, 6 * tokens * k * matrices * d * width; the time has everything.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

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


def measure(step: Callable[[], None], device: str, repeats: int) -> tuple[float, float]:
    """(median seconds of a step, peak MiB allocated on a GPU or NaN)."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else float("nan")
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
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", help="append one JSON line per row to this file")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.shapes if name not in SHAPES]:
        parser.error(f"no shape {unknown[0]!r}; there are {', '.join(SHAPES)}")

    print(f"{'shape':<10} {'layer':<12} {'ms':>9} {'tokens/s':>12} {'TFLOP/s':>8} {'peak MiB':>9}")
    for name in chosen.shapes:
        shape = SHAPES[name]._replace(**({"tokens": chosen.tokens} if chosen.tokens else {}))
        for layer in ("dense", *chosen.backends):
            torch.manual_seed(0)
            module = Dense(shape) if layer == "dense" else make_moe(shape, layer, chosen.capacity_factor)
            module = module.to(chosen.device, DTYPES[chosen.dtype][0])
            if chosen.compile and layer != "reference":
                module.compile(fullgraph=True)
            step = step_of(module, shape, chosen.device, chosen.dtype)
            seconds, peak = measure(step, chosen.device, chosen.repeats)
            speed, rate = shape.tokens / seconds, shape.flops / seconds / 1e12
            row = f"{name:<10} {layer:<12} {1e3 * seconds:>9.3f} {speed:>12,.0f} {rate:>8.2f} {peak:>9.0f}"
            print(row, flush=True)
            if chosen.output:
                record = {
                    "shape": name,
                    **shape._asdict(),
                    "layer": layer,
                    "dtype": chosen.dtype,
                    "capacity_factor": chosen.capacity_factor,
                    "compiled": chosen.compile and layer != "reference",
                    "milliseconds": 1e3 * seconds,
                    "tokens_per_second": speed,
                    "tflops": rate,
                    "peak_mib": None if peak != peak else peak,
                    "device": torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu",
                    "torch": torch.__version__,
                    "commit": commit(),
                }
                with open(chosen.output, "a") as file:
                    file.write(json.dumps(record) + "\n")
            del module, step


if __name__ == "__main__":
    main(sys.argv[1:])
