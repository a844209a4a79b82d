"""Command line and --config file → `RunConfig`: a file's entries are flags placed before the line's own."""

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
import yaml

from open_lm.config.redact import redacted
from open_lm.config.run import RunConfig

PROGRAM = "open_lm.main"
NO_FLAGS = ("dim",)  # MoEConfig's, for a layer by itself; a model's comes from its JSON

# Groups of flags that decide what is trained; those of them that do not
TRAINS = ("model", "moe", "data", "optim", "averaging")
TRAINS_NOT = ("workers", "max_steps", "torchcompile", "grad_checkpointing", "average", "average_coefficients")


def parse(arguments: Sequence[str]) -> tuple[RunConfig, frozenset[str]]:
    """Returns the configuration and the names (`moe_num_experts`) of the flags that were given.

    The command line wins over --config. Raises ValueError on an unreadable file or an unknown key in it;
    an unknown or malformed flag ends the process with status 2 and the nearest flag's name.
    """
    tokens = _with_config_file(list(arguments))
    given = {t.split("=", 1)[0][2:].replace("-", "_") for t in tokens if t.startswith("--")}
    names = flag_types()
    given |= {name.removeprefix("no_") for name in given if name.removeprefix("no_") in names}
    run = tyro.cli(
        RunConfig,
        prog=PROGRAM,
        args=tokens,
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=True,
    )
    return run, frozenset(given & names.keys())


def flag_types() -> dict[str, Any]:
    """Type of every flag, by its name with underscores: {"moe_num_experts": int | None, …}."""
    types: dict[str, Any] = {}
    for group in fields(RunConfig):
        group_class = get_type_hints(RunConfig)[group.name]
        for name, hint in get_type_hints(group_class, include_extras=True).items():
            if name in NO_FLAGS:
                continue
            if get_origin(hint) is Annotated:
                hint, *extras = get_args(hint)
                name = next(x.name for x in extras if getattr(x, "name", None)).replace("-", "_")
            types[name] = hint
    return types


def flag_values(run: RunConfig) -> dict[str, Any]:
    """Every flag's value, by its name with underscores, in the order of --help; plain JSON types, for writing:
    without secrets in URLs and the like."""
    values: dict[str, Any] = {}
    names = iter(flag_types())
    for group in fields(RunConfig):
        part = getattr(run, group.name)
        for field in (f for f in fields(part) if f.name not in NO_FLAGS):
            value = getattr(part, field.name)
            values[next(names)] = redacted(value)
    return values


def changed_flags(run: RunConfig, before: Mapping[str, Any]) -> list[str]:
    """`--lr 0.001 -> 0.01` of each flag that training depends on and that had another value `before`, which is an
    earlier run's `flag_values`."""
    changed = []
    names, now = iter(flag_types()), flag_values(run)
    for group in fields(RunConfig):
        part = getattr(run, group.name)
        for name in [next(names) for f in fields(part) if f.name not in NO_FLAGS]:
            if (
                group.name in TRAINS
                and name not in TRAINS_NOT
                and name in before
                and redacted(before[name]) != now[name]  # older runs kept the arguments of commands
            ):
                changed.append(f"--{name.replace('_', '-')} {before[name]} -> {now[name]}")
    return changed


def config_text(run: RunConfig, given: Collection[str]) -> str:
    """YAML for --config that makes `parse` return `run` and `given` again: what was given, nothing else."""
    values = {name: value for name, value in flag_values(run).items() if name in given}
    return "# Again, elsewhere: python -m open_lm.main --config THIS_FILE --name OTHER\n" + (
        yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else ""
    )


def _with_config_file(tokens: list[str]) -> list[str]:
    """Replaces `--config FILE` by the file's entries, moved to the front so that later flags win."""
    path = None
    rest = []
    i = 0
    while i < len(tokens):
        if tokens[i] == "--config":
            if i + 1 == len(tokens):
                raise ValueError("--config needs a file: --config FILE.yaml or FILE.json")
            path, i = tokens[i + 1], i + 2
        elif tokens[i].startswith("--config="):
            path, i = tokens[i].removeprefix("--config="), i + 1
        else:
            rest.append(tokens[i])
            i += 1
    return rest if path is None else _file_tokens(Path(path)) + rest


def _file_tokens(path: Path) -> list[str]:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"--config {path}: expected a .yaml, .yml or .json file")
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"--config {path}: expected `flag: value` entries, found {type(entries).__name__}")
    names = flag_types()
    tokens: list[str] = []
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {nearest[0].replace('_', '-')}?" if nearest else "; see --help"
            raise ValueError(f"--config {path}: unknown flag {key!r}{hint}")
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            tokens.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list):
            tokens += [flag, *map(str, value)]
        elif value is not None:
            tokens.append(f"{flag}={value}")
        elif type(None) in get_args(names[name]):
            tokens += [flag, "None"]
    return tokens
