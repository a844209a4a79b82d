"""Which layers are mixtures of experts: a frequency, a list, or Megatron's pattern."""

import ast
from collections.abc import Collection
from dataclasses import fields
from itertools import pairwise

from open_lm.config.moe import MoEConfig

MAX_LAYERS = 10_000  # of a pattern: more is a slip of the pen, and must not fill the memory


def check_placement(moe: MoEConfig, given: Collection[str], n_layers: int) -> bool:
    """Whether there are MoE layers; raises ValueError where the flags that place them disagree."""
    ways = {"--moe-freq": moe.freq != 0, "--moe-layers": moe.layers is not None,
            "--moe-layer-pattern": moe.layer_pattern is not None}  # fmt: skip
    chosen = [name for name, on in ways.items() if on]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} are both given: use one to say which layers are MoE")
    if not chosen:
        changed = {f"moe_{f.name}" for f in fields(MoEConfig) if getattr(moe, f.name) != f.default}
        stray = (changed | {name for name in given if name.startswith("moe_")}) - {"moe_freq", "moe_dim"}
        if stray:
            raise ValueError(
                f"{', '.join(sorted(flag(n[4:]) for n in stray))} given, but --moe-freq is 0 (a dense model): add "
                "--moe-freq N, or drop them"
            )
        return False
    if moe.num_experts is None:
        value = getattr(moe, chosen[0][6:].replace("-", "_"))
        raise ValueError(f"{chosen[0]} {value} needs --moe-num-experts")
    placed = layer_numbers(moe, n_layers)
    if not placed:
        raise ValueError(
            f"{chosen[0]}, --moe-first-dense {moe.first_dense}: none of {n_layers} layers is an MoE"
        )
    if isinstance(moe.num_experts, tuple) and len(moe.num_experts) != len(placed):
        raise ValueError(
            f"--moe-num-experts {' '.join(map(str, moe.num_experts))}: {len(moe.num_experts)} numbers for "
            f"{len(placed)} MoE layers ({', '.join(map(str, placed))}); give one for all, or one each"
        )
    return True


def layer_numbers(moe: MoEConfig, n_layers: int) -> tuple[int, ...]:
    """The numbers of the MoE layers. Raises ValueError where --moe-layers or the pattern do not fit."""
    if moe.layers is not None:
        if wrong := [n for n in moe.layers if not 0 <= n < n_layers]:
            raise ValueError(f"--moe-layers {wrong[0]}: the model's layers are 0 to {n_layers - 1}")
        if moe.first_dense:
            raise ValueError("--moe-first-dense with --moe-layers: the list alone says which; drop one")
        if any(a >= b for a, b in pairwise(moe.layers)):
            raise ValueError(
                f"--moe-layers {' '.join(map(str, moe.layers))}: expected increasing numbers, each once; so a list "
                "in --moe-num-experts goes from the first layer to the last"
            )
        return moe.layers
    if moe.layer_pattern is not None:
        pattern = read_pattern(moe.layer_pattern)
        if len(pattern) != n_layers:
            raise ValueError(
                f"--moe-layer-pattern {moe.layer_pattern} has {len(pattern)} entries, the model {n_layers} layers"
            )
        return tuple(n for n, on in enumerate(pattern) if on and n >= moe.first_dense)
    return tuple(n for n in range(n_layers) if moe.freq > 0 and n % moe.freq == 0 and n >= moe.first_dense)


def read_pattern(text: str) -> list[int]:
    """Megatron's list expression of 0 and 1, of lists, + and *; nothing is executed."""

    def short(pattern: list[int]) -> list[int]:
        if len(pattern) > MAX_LAYERS:
            raise ValueError
        return pattern

    def value(node: ast.expr) -> list[int] | int:
        match node:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                return number
            case ast.List(elts=entries):
                found = [value(entry) for entry in entries]
                if all(entry in (0, 1) for entry in found):
                    return [int(entry) for entry in found if isinstance(entry, int)]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                a, b = value(left), value(right)
                if isinstance(a, list) and isinstance(b, list):
                    return short(a + b)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                a, b = value(left), value(right)
                if isinstance(a, int):
                    a, b = b, a
                if isinstance(a, list) and isinstance(b, int) and 0 <= b * len(a) <= MAX_LAYERS:
                    return a * b
        raise ValueError

    try:
        pattern = value(ast.parse(text.strip(), mode="eval").body)
        if isinstance(pattern, list):
            return pattern
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    shown = text if len(text) <= 100 else text[:100] + "…"
    raise ValueError(
        f'--moe-layer-pattern {shown}: expected a list of 0 and 1 as Megatron writes it, such as "[0]*3+[1]*24"'
    )


def flag(name: str) -> str:
    """`--moe-top-k` of `top_k`."""
    return "--moe-" + name.replace("_", "-")
