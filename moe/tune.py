"""Time the kernels of --moe-backend triton with many tiles: where `backends/triton/table.py` has its numbers from.

    python moe/tune.py 160m 41m --kernels up rows --output tiles.jsonl

Compiles all candidates side by side first. Beside them, F.grouped_mm where it does the same product, and beside the
specialised kernels the ones that they stand in for (`else`). up_backward is timed with and without the activation
saved by forward, and the fastest tile of each also in place.
"""

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).parent))
from bench import SHAPES, Shape  # type: ignore
from open_lm.moe.backends.triton import launch, specialized
from open_lm.moe.backends.triton.table import HOPPER, Tile, block_rows

DEVICE = "cuda"
KERNELS = (
    "up",
    "up_backward",
    "up_specialized",
    "up_backward_specialized",
    "down",
    "down_backward",
    "dw1",
    "dw2",
)


def candidates(kernel: str, shape: Shape) -> list[Tile]:
    """Tiles worth a try; of thin layers, narrow ones too."""
    gated, thin = shape.ffn_type == "swiglu", shape.dim < 512
    yes_or_no = (False, True)
    if kernel == "up" and gated:
        found = [Tile(128, 64, 8, s, 1, 8, p) for s, p in product((3, 4), (2, 4))]
        found += [Tile(64, 64, 8, 3, 2, 8, p, registers=128) for p in (1, 2)]
        return [*found, Tile(64, 64, 4, 3, 2, 8, 1)]
    if kernel == "up":
        found = [Tile(256, 64, 8, s, 1, 8, p) for s, p in product((3, 4), (2, 4))]
        found += [Tile(128, 64, 8, 3, 2, 8, p, registers=128) for p in (1, 2, 4)]
        found += [Tile(128, 64, 8, 3, 2, 16, 2, registers=128), Tile(128, 64, 4, 3, 2, 8, 1)]
        thinner = [Tile(128, 32, 4, s, 2, 8, p) for s, p in product((4, 6), (1, 2))]
        thinner += [Tile(128, 32, 8, s, 2, 8, p, registers=128) for s, p in product((4, 6), (1, 2))]
        return found + (thinner if thin else [])
    if kernel == "up_backward":
        found = [
            Tile(128, 64, 8, 3, 2, 8, p, early=e, gathered=g, registers=128)
            for p, e, g in product((4, 8), yes_or_no, yes_or_no)
        ]
        found += [Tile(128, 64, 8, 3, 2, 16, 4, gathered=g, registers=128) for g in yes_or_no]
        found += [Tile(128, 64, 4, 3, 2, 8, 4, early=e, gathered=g) for e, g in product(yes_or_no, yes_or_no)]
        if gated:
            found += [
                Tile(128, 64, 8, 4, 1, 8, p, early=True, gathered=g) for p, g in product((2, 4), yes_or_no)
            ]
        else:
            found += [
                Tile(256, 64, 8, s, 1, 8, 4, early=s == 3, gathered=g) for s, g in product((3, 4), yes_or_no)
            ]
        thinner = [Tile(128, 32, 4, 4, 2, 8, 4, early=True, gathered=g) for g in yes_or_no]
        thinner += [
            Tile(128, 32, 8, 4, 2, 8, p, early=e, registers=128) for p, e in product((4, 8), yes_or_no)
        ]
        found += thinner if thin else []
        # with one store less, a large tile for all registers may win again
        found += [Tile(256, 64, 8, s, 1, 8, 8, gathered=True) for s in (3, 4) if not gated]
        return [tile._replace(saves_activation=saves) for tile in found for saves in yes_or_no]
    if kernel.endswith("_specialized"):
        if gated or specialized.gluon() is None:
            return []
        if kernel == "up_specialized":
            found = [Tile(256, d, 4, s, gathered=True, registers=240) for d, s in ((64, 4), (32, 8))]
            found += [Tile(256, d, 4, s, registers=232) for d, s in ((64, 4), (32, 8))]
        else:
            found = [Tile(256, d, 4, s, registers=240) for d, s in ((64, 4), (32, 8))]
            found += [Tile(128, d, 4, s, registers=240, take_turns=True) for d, s in ((64, 5), (32, 10))]
        return [tile for tile in found if specialized.fits(tile, shape.dim, shape.width)]
    if kernel in ("down", "down_backward"):
        found = [Tile(256, 64, 8, s, 1, 8, flatten=f) for s, f in product((3, 4), (False, True))]
        found += [
            Tile(256, 64, 8, 3, 1, 8, store=True),
            Tile(128, 64, 8, 4, 1, 8),
            Tile(128, 64, 4, 3, 2, 8, flatten=True),
        ]
        thinner = [
            Tile(64, 64, 4, s, p, g, flatten=f)
            for (s, p), g, f in product(((3, 3), (4, 2)), (8, 4), (False, True))
        ]
        thinner += [Tile(32, 64, 4, 4, 2, 8, flatten=True), Tile(128, 64, 4, 3, 2, 4, flatten=True)]
        return found + (thinner if thin else [])
    found = [Tile(128, 64, 4, s, group=4) for s in (3, 4)] + [Tile(256, 64, 8, 4, group=4)]
    thinner = [Tile(64, 64, 4, 4, group=4, rows=128), Tile(128, 64, 4, 4, group=4, rows=64),
               Tile(32, 64, 4, 4, group=4, rows=128), Tile(128, 64, 4, 4, group=4, rows=32),
               Tile(256, 64, 4, 4, group=4, rows=32), Tile(32, 64, 4, 4, group=4, rows=256)]  # fmt: skip
    thinner += [tile._replace(chunks=c) for tile in (*found[:1], *thinner[:2]) for c in (4, 6, 16)]
    return found + (thinner if thin else [])


def case(kernel: str, shape: Shape, tokens: int, dtype: torch.dtype) -> tuple[Callable, Callable | None]:
    """(the kernel as a function of its tile, torch's way or None), on random numbers and routing."""
    torch.manual_seed(0)
    D, width, E, K = shape.dim, shape.width, shape.experts, shape.top_k
    gated, kind, R = shape.ffn_type == "swiglu", shape.ffn_type, tokens * K

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE, dtype=dtype) * 0.1

    expert_R = torch.rand(tokens, E, device=DEVICE).topk(K, dim=1).indices.flatten().sort(stable=True)
    token_R = (expert_R.indices // K).int()
    end_E = torch.searchsorted(expert_R.values, torch.arange(E, device=DEVICE), right=True).int()
    table = launch.schedule(end_E, R, block_rows(dtype))
    x, h = random(tokens, D), random(R, width)
    w1, v1, w2 = random(E, D, width), random(E, D, width) if gated else None, random(E, width, D)
    u = random(R, width) if gated else None
    weight_R = torch.rand(R, device=DEVICE)
    if kernel == "up":
        # the weights: where the activation is saved
        return lambda tile: launch.up(
            x, token_R, w1, v1, None, None, None, table, kind, weight_R=weight_R, tile=tile
        ), None
    if kernel == "up_backward":
        # torch's product for dw2 needs the gathered rows anyhow
        free = launch.choose("dw2", x.device, dtype, D, width) is None
        gathered = launch.gather(x, token_R, end_E)

        a = random(R, width)

        def with_gather(tile: Tile):
            into = a if tile.saves_activation else h  # as the operator has it
            x_RD = (gathered if free else launch.gather(x, token_R, end_E)) if tile.gathered else None
            return launch.up_backward(
                x, token_R, w2, None, weight_R, h, u, table, kind, x_RD, tile, not tile.saves_activation,
                *((into, u) if tile.in_place else ()),
            )  # fmt: skip

        return with_gather, None
    if kernel == "up_specialized":
        up = partial(specialized.up, token_R=token_R, w=w1, table=table, kind=kind, save=True, activate=True,
                     weight_R=weight_R)  # fmt: skip
        tile_else = launch.choose("up", x.device, dtype, D, width)
        return (
            lambda tile: up(launch.gather(x, token_R, end_E) if tile.gathered else x, tile=tile),
            lambda: launch.up(
                x, token_R, w1, None, None, None, None, table, kind, weight_R=weight_R, tile=tile_else
            ),
        )
    if kernel == "up_backward_specialized":
        # with gathered rows, which dw2 needs anyhow, and into other memory than h's, as the operator has it
        g_RD, dh = launch.gather(x, token_R, end_E), random(R, width)
        tile_else = launch.choose("up_backward", x.device, dtype, D, width)
        return (
            lambda tile: specialized.up_backward(g_RD, w2, weight_R, h, table, kind, dh, tile),
            lambda: launch.up_backward(
                x, token_R, w2, None, weight_R, h, None, table, kind, g_RD, tile_else, False, dh
            ),
        )
    if kernel == "down":
        ours = lambda tile: launch.rows(h, w2, None, None, None, end_E, table, False, tile=tile)
        return ours, lambda: F.grouped_mm(h, w2, offs=end_E)
    if kernel == "down_backward":
        ours = lambda tile: launch.rows(h, w1, u, v1, None, end_E, table, True, tile=tile)
        return ours, lambda: [
            F.grouped_mm(h, w.transpose(1, 2), offs=end_E) for w in (w1, v1) if w is not None
        ]
    left = kernel == "dw1"
    ours = lambda tile: launch.weights(x, token_R, None, h, end_E, left, False, tile=tile)
    if left:
        return ours, lambda: F.grouped_mm(x[token_R].t(), h, offs=end_E)
    return ours, lambda: F.grouped_mm(h.t(), x[token_R], offs=end_E)


def update(kernel: str, shape: Shape, tile: Tile | None) -> None:
    """Puts a tile, without what is at its default, into the table."""
    table = json.loads(HOPPER.read_text()) if HOPPER.exists() else {}
    rows = [row for row in table.get(kernel, []) if row[:2] != [shape.dim, shape.width]]
    defaults = Tile._field_defaults
    fields = tile and {k: v for k, v in tile._asdict().items() if k not in defaults or v != defaults[k]}
    table[kernel] = sorted([*rows, [shape.dim, shape.width, fields]], key=lambda row: row[:2])
    lines = [
        f"  {json.dumps(k)}: [\n    " + ",\n    ".join(map(json.dumps, table[k])) + "\n  ]"
        for k in sorted(table)
    ]
    HOPPER.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def milliseconds_of(function: Callable) -> float:
    return do_bench(function, warmup=10, rep=40, return_mode="median")  # type: ignore


def compile_one(task: tuple[str, str, Tile]) -> str | None:
    name, kernel, tile = task
    try:
        case(kernel, SHAPES[name], 256, torch.bfloat16)[0](tile)
        torch.cuda.synchronize()
    except Exception as error:  # too large for the device, say
        return f"{type(error).__name__}: {str(error)[:120]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--best", type=int, default=5, help="lines per kernel to print")
    parser.add_argument("--output", help="append one JSON line per candidate to this file")
    parser.add_argument(
        "--write", action="store_true", help="put the fastest tiles into the table of this device"
    )
    chosen = parser.parse_args()
    tasks = [
        (name, kernel, tile)
        for name in chosen.shapes
        for kernel in chosen.kernels
        for tile in candidates(kernel, SHAPES[name])
    ]
    with ProcessPoolExecutor(chosen.processes, get_context("spawn")) as pool:
        failures = dict(zip(tasks, pool.map(compile_one, tasks), strict=True))
    for name, kernel in product(chosen.shapes, chosen.kernels):
        shape = SHAPES[name]
        gated = shape.ffn_type == "swiglu"
        products = 2 if gated and kernel in ("up", "down_backward") else 1
        flops = 2 * shape.tokens * shape.top_k * shape.dim * shape.width * products
        if not candidates(kernel, shape):
            continue
        other = "else" if kernel.endswith("_specialized") else "grouped_mm"
        ours, torchs = case(kernel, shape, shape.tokens, torch.bfloat16)
        times = []
        if torchs is not None:
            times.append((milliseconds_of(torchs), other))
        for tile in candidates(kernel, shape):
            if failure := failures[name, kernel, tile]:
                times.append((float("inf"), f"{tuple(tile)} {failure}"))
            else:
                times.append((milliseconds_of(partial(ours, tile)), tuple(tile)))
        times.sort(key=lambda pair: pair[0])
        if kernel == "up_backward":
            tiles = [Tile(*what) for _, what in times if isinstance(what, tuple)]
            for saves in (False, True):
                of_this = [tile._replace(in_place=True) for tile in tiles if tile.saves_activation == saves]
                for tile in of_this[:1]:
                    times.append((milliseconds_of(partial(ours, tile)), tuple(tile)))
            times.sort(key=lambda pair: pair[0])
        told = [pair for pair in times[chosen.best :] if pair[1] == other]
        if kernel == "up_backward":  # the fastest of each way
            ways = {Tile(*what)[-2:]: (ms, what) for ms, what in reversed(times) if isinstance(what, tuple)}
            told += [pair for pair in ways.values() if pair not in times[: chosen.best]]
        for milliseconds, what in times[: chosen.best] + told:
            rate = flops / milliseconds / 1e9
            print(f"{name:<9} {kernel:<13} {milliseconds:7.3f} ms {rate:6.0f} TFLOP/s {what}", flush=True)
        if chosen.output:
            with open(chosen.output, "a") as file:
                for milliseconds, what in times:
                    record = {"shape": name, "kernel": kernel, "milliseconds": milliseconds, "tile": what}
                    file.write(json.dumps(record) + "\n")
        if chosen.write:
            best = times[0][1]
            key = kernel + ("_gated" if gated and kernel in ("up", "up_backward") else "")
            update(key, shape, None if best == other else Tile(*best))
        del ours, torchs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
