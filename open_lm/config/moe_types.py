"""Whether a MoEConfig holds what its fields declare: a model's JSON and a library's user may say anything."""

import difflib
import types
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from open_lm.config.moe import MoEConfig
from open_lm.config.moe_layers import flag


def check_types(moe: MoEConfig, routers: Collection[str] = ()) -> None:
    """Raises ValueError on the first value that is of another type than its flag, or none of the flag's names;
    `routers` are names of further ones."""
    for name, hint in get_type_hints(MoEConfig).items():
        value = getattr(moe, name)
        if fits(value, hint) or (name == "router" and value in routers):
            continue
        known = names_in(hint)
        wrong = [v for v in value if v not in known] if isinstance(value, tuple) else [value]
        nearest = [] if wrong[0] in known else difflib.get_close_matches(str(wrong[0]), known, n=1)
        raise ValueError(
            f"{flag(name)} {wrong[0]!r}: expected {describe(hint)}"
            + (f"; did you mean {nearest[0]}?" if nearest else "")
        )


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as fields declare it; an integer is a float too, True is no number."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in parts
    if kind in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if kind is tuple:
        return isinstance(value, tuple) and all(fits(v, parts[0]) for v in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def names_in(hint: Any) -> list[str]:
    """The names that a value of this type may be, or may be made of."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [name for part in get_args(hint) if part is not ... for name in names_in(part)]


def describe(hint: Any) -> str:
    """The type in words: "a list of aux, sequence, … or None"."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return ", ".join(parts)
    if kind in (Union, types.UnionType):
        return " or ".join(describe(part) for part in parts)
    if kind is tuple:
        return f"a list of {describe(parts[0])}"
    return "None" if hint is type(None) else hint.__name__
