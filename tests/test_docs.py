"""Every command in the documents parses; the smallest runs; the tables are those of the records."""

import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import tyro

from open_lm.config.check import check
from open_lm.config.parse import flag_types, parse
from open_lm.config.resolve import resolve_model
from open_lm.tokenize.settings import TokenizeConfig
from open_lm.tokenize.settings import flag as flag_of

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "MOE.md", "moe/README.md", "docs/architecture.md", "docs/running.md")
DOCUMENTS = [ROOT / name for name in NAMES]


def commands(document: Path) -> list[str]:
    """Each command of the ```bash blocks, continued lines joined, comments gone."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s#.*", "", line).strip() for line in lines) if line]


COMMANDS = [(document.name, command) for document in DOCUMENTS for command in commands(document)]


def check_main(words: list[str]) -> None:
    run, given = parse(words)
    check(run, given)
    resolve_model(run.model, run.moe, given)


def check_module(module: str, words: list[str]) -> None:
    if module == "open_lm.main":
        check_main(words)
    elif module == "open_lm.tokenize.corpus":
        tyro.cli(importlib.import_module(module).CorpusConfig, args=words)
    else:
        helped = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True
        )
        assert all(w in helped.stdout for w in words if w.startswith("--")), (
            f"{module} lacks a flag of {words}"
        )


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=lambda x: x[:40])
def test_commands_parse(document: str, command: str) -> None:
    words = shlex.split(command)
    while re.match(r"[A-Z]+=", words[0]):
        words = words[1:]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] in ("torchrun", "python"):
        if "-m" in words:
            at = words.index("-m") + 1 + (words[words.index("-m") + 1] == "--")
            check_module(words[at], words[at + 1 :])
        else:
            script = ROOT / words[1]
            assert script.is_file()
            flags = [w for w in words[2:] if w.startswith("--")]
            if flags:
                helped = subprocess.run(
                    [sys.executable, script, "--help"], capture_output=True, text=True, check=True
                )
                assert all(flag in helped.stdout for flag in flags), f"{words[1]} lacks one of {flags}"
    elif words[0] == "bash":  # tests/moe/test_recipes.py runs it
        assert (ROOT / words[1]).is_file()
    else:
        pytest.fail(f"{document}: no test for `{words[0]}`")


def test_the_published_commands_are_in_the_documents() -> None:
    """The two of open_lm's MOE.md; paths and the evaluation's number of experts differ."""
    text = " ".join(c for _, c in COMMANDS)
    for flag in (
        "--batch-size 8 --accum-freq 4",
        "--disable-meta-device",
        "--moe-loss-weight 0.1",
        "--resume latest",
        "--lr-cooldown-end 0.00001",
        "pipe:aws s3 cp",
    ):
        assert flag in text


def test_flags_named_in_the_documents_exist() -> None:
    known = {"--" + name.replace("_", "-") for name in flag_types()} | {"--config", "--help"}
    others = {"--no-", "--nproc-per-node", "--extra-index-url", "--logs-specs", "--output", "--seq-len"}
    others |= {flag_of(field.name) for field in fields(TokenizeConfig)}
    switches = {f"--no-{name.replace('_', '-')}" for name, kind in flag_types().items() if kind is bool}
    others |= {"--tiny", "--print-flags"}  # of moe/recipes
    others |= {"--nnodes", "--rdzv-backend", "--max-restarts"}  # of torchrun
    for document in DOCUMENTS:
        prose = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        prose = re.sub(r"`(python|torchrun|make|pip)[^`]*`", "", prose)
        theirs = re.compile(r"<!-- theirs.*?<!-- end of theirs", re.DOTALL)
        prose = theirs.sub(lambda m: re.sub(r"^\|[^|]*\|", "", m[0], flags=re.MULTILINE), prose)
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", prose):
            assert flag in known | others | switches, f"{document.name}: {flag}"


def test_links_and_files_exist() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
        for path in re.findall(r"`((?:open_lm|moe|tests|docs)/[\w./]*)`", text):
            assert (ROOT / path).exists(), f"{document.name}: {path}"


def test_tables_are_those_of_the_records() -> None:
    done = subprocess.run(
        [sys.executable, "moe/tables.py", "check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
