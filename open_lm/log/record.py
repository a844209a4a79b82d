"""What ran, kept in the run's folder: its flags and its code. Nothing that was kept earlier is overwritten."""

import contextlib
import errno
import logging
import os
import subprocess
from pathlib import Path

logger = logging.getLogger("open_lm")

PACKAGE = Path(__file__).parents[1]
MAX_FILE_BYTES = 1_000_000
MAX_CODE_BYTES = 50_000_000
# What is code or describes it, of files that git does not know
SOURCE_SUFFIXES = {".py", ".pyi", ".sh", ".md", ".txt", ".toml", ".yaml", ".yml", ".json", ".cfg", ".ini",
                   ".cu", ".cuh", ".cpp", ".h"}  # fmt: skip


def keep_flags(folder: Path, params: str, config: str) -> None:
    """Writes params.txt and config.yaml; where a resumed run has other flags, params-2.txt and config-2.yaml.

    `resume` itself and comments do not count as a difference.
    """

    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith(("#", "resume:"))]

    for stem, suffix, text in (("params", ".txt", params), ("config", ".yaml", config)):
        last, free = numbered(folder, stem, suffix)
        if last is None or lines(last.read_text(encoding="utf-8")) != lines(text):
            write_whole(free, text)


def write_whole(path: Path, text: str) -> None:
    """All of the file or nothing of it. OSError names it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        code = error.errno or errno.EIO
        raise OSError(code, f"cannot write {path}: {error.strerror or error}") from error


def numbered(folder: Path, stem: str, suffix: str = "") -> tuple[Path | None, Path]:
    """The last and the first free of NAME, NAME-2, NAME-3, …"""
    last, number = None, 1
    path = folder / f"{stem}{suffix}"
    while path.exists():
        last, number = path, number + 1
        path = folder / f"{stem}-{number}{suffix}"
    return last, path


def copy_code(folder: Path) -> None:
    """Copies the code that runs to `folder`/code, or code-2, … where a resumed run's differs.

    The open_lm package, and in a checkout everything beside it that git does not ignore, large files left
    out; COMMIT and changes.diff (against that commit) say what it is. What goes wrong is only warned of.
    """
    try:
        _copy_code(folder)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the code that runs could not be copied: %s", error)


def _copy_code(folder: Path) -> None:
    files, skipped = code_files()
    last, free = numbered(folder, "code")
    if last and {str(p.relative_to(last)): p.read_bytes() for p in last.rglob("*") if p.is_file()} == files:
        return
    for name, content in files.items():
        path = free / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    logger.info("the code that runs is kept in %s (%d files)", free, len(files))
    if skipped:
        logger.warning("too large to be kept with the code: %s", ", ".join(skipped[:10]))


def code_files() -> tuple[dict[str, bytes], list[str]]:
    """({path: content} of the code that runs, paths that were too large)."""
    root, files, skipped, total = PACKAGE.parent, {}, [], 0
    head = commit()
    if head is None:
        paths = [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    else:
        known = _git("ls-files", "-z").split("\0")
        new = [Path(n) for n in _git("ls-files", "-z", "--others", "--exclude-standard").split("\0")]
        new = [n for n in new if n.suffix in SOURCE_SUFFIXES and not any(p.startswith(".") for p in n.parts)]
        paths = [p for p in (root / n for n in (*known, *new)) if p.is_file() and not p.is_symlink()]
        files["COMMIT"] = f"{head}\n".encode()
        diff = _git("diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD", "--", ".")
        if len(diff) > MAX_FILE_BYTES:
            skipped.append("changes.diff")
        elif diff:
            files["changes.diff"] = (diff + "\n").encode()
    for path in sorted(paths, key=lambda p: (PACKAGE not in p.parents, p)):
        size = path.stat().st_size
        if size > MAX_FILE_BYTES or total + size > MAX_CODE_BYTES:
            skipped.append(str(path.relative_to(root)))
            continue
        total += size
        files[path.relative_to(root).as_posix()] = path.read_bytes()
    return files, skipped


def commit() -> str | None:
    """The commit of the package that runs, with `+` where it was changed; None outside a checkout."""
    try:
        _git("ls-files", "--error-unmatch", "open_lm/__init__.py")  # not some other project's venv
        head = _git("rev-parse", "--short", "HEAD")
        return head and head + ("+" if _git("status", "--porcelain", "--", "open_lm") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*command: str) -> str:
    git = ["git", "-C", str(PACKAGE.parent), *command]
    done = subprocess.run(git, capture_output=True, timeout=30, check=True)
    return done.stdout.decode(errors="replace").strip()
