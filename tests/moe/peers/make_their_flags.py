"""The flags of Megatron-Core, DeepSpeed and ST-MoE that concern MoE, read from checkouts; nothing of theirs is run.

    python tests/moe/peers/make_their_flags.py MEGATRON_LM DEEPSPEED MEGATRON_DEEPSPEED ST_MOE_PYTORCH

writes their_flags.json beside itself: {"system": {"commit": …, "flags": [names, sorted]}}. A name with dashes is a
flag of the command line; one with underscores an argument of a constructor or a field that no flag sets.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

ABOUT = re.compile(r"moe|expert|(^|[_-])ep([_-]|$)")
ABOUT_DEEPSPEED = re.compile(r"moe|expert|mlp-type|--topk|tutel|--mos$")


def tree(folder: Path, file: str) -> ast.Module:
    return ast.parse((folder / file).read_text(encoding="utf-8"))


def named(module: ast.AST, kind: type, name: str) -> ast.AST:
    (found,) = (node for node in ast.walk(module) if isinstance(node, kind) and node.name == name)
    return found


def added_arguments(module: ast.AST) -> set[str]:
    """The first name of every add_argument call."""
    calls = (node for node in ast.walk(module) if isinstance(node, ast.Call) and node.args)
    added = (c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument")
    return {c.args[0].value for c in added if isinstance(c.args[0], ast.Constant)}


def dataclass_fields(node: ast.ClassDef) -> dict[str, object]:
    """{name: its default, where that is a constant}."""
    fields = (x for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name))
    return {f.target.id: f.value.value if isinstance(f.value, ast.Constant) else None for f in fields}


def parameters(module: ast.AST, owner: str, function: str = "__init__") -> set[str]:
    arguments = named(named(module, ast.ClassDef, owner), ast.FunctionDef, function).args
    return {a.arg for a in (*arguments.args, *arguments.kwonlyargs)} - {"self"}


def megatron(folder: Path) -> set[str]:
    """Its flags are written down, or made from the fields of two dataclasses but for an `exclude` list."""
    module = tree(folder, "megatron/training/arguments.py")
    flags = {name for name in added_arguments(module) if ABOUT.search(name)}
    (exclude,) = (
        ast.literal_eval(node.value)
        for node in ast.walk(named(module, ast.FunctionDef, "_add_network_size_args"))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "exclude"
    )
    core = "megatron/core"
    fields = dataclass_fields(
        named(tree(folder, f"{core}/transformer/transformer_config.py"), ast.ClassDef, "TransformerConfig")
    ) | dataclass_fields(
        named(tree(folder, f"{core}/model_parallel_config.py"), ast.ClassDef, "ModelParallelConfig")
    )
    for name, default in fields.items():
        if ABOUT.search(name):
            flag = ("--no-" if default is True else "--") + name.replace("_", "-")
            made = name not in exclude or flag in flags
            flags.add(flag if made else name)
    return flags


def deepspeed(folder: Path) -> set[str]:
    return parameters(tree(folder, "deepspeed/moe/layer.py"), "MoE")


def megatron_deepspeed(folder: Path) -> set[str]:
    flags = added_arguments(tree(folder, "megatron/arguments.py"))
    return {name for name in flags if ABOUT_DEEPSPEED.search(name)}


def st_moe(folder: Path) -> set[str]:
    module = tree(folder, "st_moe_pytorch/st_moe_pytorch.py")
    found = {
        name
        for owner in ("MoE", "SparseMoEBlock", "TopNGating", "Expert")
        for name in parameters(module, owner)
    }
    return found | parameters(module, "MoE", "forward") - {"x"}


SYSTEMS = {
    "Megatron-Core": megatron,
    "DeepSpeed": deepspeed,
    "Megatron-DeepSpeed": megatron_deepspeed,
    "ST-MoE": st_moe,
}


def main() -> None:
    if len(sys.argv) != 1 + len(SYSTEMS):
        sys.exit(__doc__)
    found = {}
    for (system, read), folder in zip(SYSTEMS.items(), map(Path, sys.argv[1:]), strict=True):
        commit = subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        found[system] = {"commit": commit.stdout.strip(), "flags": sorted(read(folder))}
    Path(__file__).with_name("their_flags.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
