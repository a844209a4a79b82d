"""The whole: plan → tokenizer → units → buckets → shards → manifest, each step only where it is not done yet."""

import json
import os
import posixpath
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from open_lm.data.cache import FULL
from open_lm.tokenize.complete import BAD, HELD_OUT, INFO, MANIFEST, find_damages, folder_of
from open_lm.tokenize.counts import Vocabulary, count_sources, describe_part, name_bad, to_lines
from open_lm.tokenize.engines import Engine, open_engine
from open_lm.tokenize.folder import Folder
from open_lm.tokenize.inputs import IN_TARS, find_repeats
from open_lm.tokenize.lock import locked
from open_lm.tokenize.mapping import BadDocument, Block, Encode
from open_lm.tokenize.ownership import remove_partials, remove_work
from open_lm.tokenize.packing import share_out
from open_lm.tokenize.places import is_inside
from open_lm.tokenize.plan import SHOWN, Plan, claim, make_plan
from open_lm.tokenize.progress import Progress
from open_lm.tokenize.readers import How, count_lines, name_place
from open_lm.tokenize.reducing import Pack, Rows, Tails, WriteShard
from open_lm.tokenize.settings import TokenizeConfig
from open_lm.tokenize.split import PARTS
from open_lm.tokenize.vocabulary import (
    TOKENIZER,
    U16_IDS,
    count_ids,
    find_end_of_text,
    find_token,
    parse,
    train,
)


def tokenize(config: TokenizeConfig, progress: Progress | None = None) -> dict[str, dict]:
    """Writes the output, or what is missing of it; returns info.json of each part.

    ValueError: flags, inputs or documents (BadDocument); FileNotFoundError and OSError name what cannot be read.
    """
    plan = make_plan(config)
    output = Folder(absolute(config.output), config.patience)
    work = Folder(absolute(config.work) if config.work else output.locate("work"), config.patience)
    parts = [part for part, buckets in zip(PARTS, plan.split.buckets, strict=True) if buckets]
    work_is_new = config.work is None or (work.path is not None and not work.path.exists())
    with ExitStack() as stack:
        progress = progress or stack.enter_context(Progress(config.progress_seconds))
        stack.enter_context(locked(output, "--output", config.take_over))
        if config.work is not None:
            stack.enter_context(locked(work, "--work", config.take_over))
        claim(output, plan, "--output")
        for line in find_repeats(config.inputs, plan.files):
            progress.say(f"warning: {line}")
        if plan.passed:
            names = ", ".join(plan.passed[:SHOWN]) + (", …" if plan.passed[SHOWN:] else "")
            progress.say(
                f"warning: --inputs: {len(plan.passed):,} files in its folders are passed over, as their endings "
                f"are not those of documents there ({names}): name a file, or a pattern, to have it read"
            )
        complete = MANIFEST in output.names()
        if complete and (damages := find_damages(output, plan, parts)):
            more = f" and {len(damages) - SHOWN:,} more" if len(damages) > SHOWN else ""
            progress.say(
                f"{config.output} was complete and is not: {'; '.join(damages[:SHOWN])}{more}: made again"
            )
            output.delete({MANIFEST, TOKENIZER})
            complete = False
        if complete:
            progress.say(f"{config.output}: complete, by the same plan; nothing to do")
        else:
            claim(work, plan, "--work")
            try:
                Run(config, plan, output, work, progress).write(parts)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise describe_full(error, config, work) from None
        remove_work(work, plan, remove_folder=work_is_new)
        remove_partials(output)
        return {part: json.loads(output.read(folder_of(part) + INFO)) for part in parts}


def absolute(url: str) -> str:
    """A local path from the root, as workers elsewhere need it."""
    return url if "://" in url else os.path.abspath(url)


def describe_full(error: OSError, config: TokenizeConfig, work: Folder) -> OSError:
    """The same, with the flag of the folder that is full and the way out."""
    flag, folder = "--output", config.output
    if error.filename and is_inside(error.filename, work.url):
        flag, folder = "--work", config.work or work.url
    return OSError(
        f"{error.filename or folder}: {error.strerror}, in {flag} {folder}: make room there; started again with "
        "the same flags, the run goes on (intermediate files are about as large as the output; --work DIR puts "
        "them on another disk)"
    )


class Run:
    """One start of the command: its folders, its engine, and the results of tasks that an earlier start left."""

    def __init__(
        self, config: TokenizeConfig, plan: Plan, output: Folder, work: Folder, progress: Progress
    ) -> None:
        self.config, self.plan, self.progress = config, plan, progress
        self.output, self.work = output, work
        self.finished = {name for name in work.names() if name.endswith(".json")}

    def write(self, parts: Sequence[str]) -> None:
        """Everything; the manifest last."""
        vocabulary = self.prepare_tokenizer()
        length = self.config.seq_len + 1
        rows = Rows(
            length,
            vocabulary.dtype,
            self.config.packing,
            vocabulary.pad,
            self.config.seed,
            self.config.patience,
        )
        with open_engine(self.config.engine, self.config.processes, self.config.ray_address) as engine:
            encoded = self.encode(engine, vocabulary)
            self.say_passed(encoded)
            self.check_enough(parts, encoded)
            packed = {part: self.pack(engine, part, encoded, rows) for part in parts}
            manifests = {part: self.write_shards(engine, part, *packed[part][:2], rows) for part in parts}
        counts = count_sources(self.plan.units, encoded, len(self.config.inputs))
        bad = list(name_bad(self.plan.units, encoded))
        if bad:
            self.output.write(BAD, to_lines(bad))
        for part in reversed(parts):  # train's manifest is the last file
            dropped = packed[part][2]
            info = describe_part(
                part, self.config, self.plan, vocabulary, counts, packed[part][1], dropped, manifests[part]
            )
            folder = folder_of(part)
            if folder:
                self.output.write(folder + TOKENIZER, self.output.read(TOKENIZER))
            self.output.write(folder + INFO, (json.dumps(info, indent=1) + "\n").encode())
            self.output.write(folder + MANIFEST, to_lines(manifests[part]))

    def prepare_tokenizer(self) -> Vocabulary:
        """Puts tokenizer.json into the output, trained if need be."""
        config, content = self.config, self.plan.tokenizer
        if content is None and TOKENIZER in self.output.names():
            content = self.output.read(TOKENIZER)
        else:
            if content is None:
                limit_bytes = config.train_tokenizer_megabytes * 1e6
                assert config.train_tokenizer is not None
                self.progress.say(f"training a tokenizer of {config.train_tokenizer:,} ids")
                how = How(config.text_key, config.txt_documents, config.patience)
                content = train(
                    list(self.plan.units),
                    how,
                    self.plan.split,
                    config.train_tokenizer,
                    limit_bytes,
                    config.seed,
                )
            self.output.write(TOKENIZER, content)
        tokenizer = parse(content, config.tokenizer or "trained")
        size, end = count_ids(tokenizer), find_end_of_text(tokenizer, config.end_of_text)
        pad = end if config.pad_token is None else find_token(tokenizer, config.pad_token, "--pad-token")
        dtype = "<u2" if size <= U16_IDS else "<u4"
        return Vocabulary(size, end, str(tokenizer.id_to_token(end)), pad, dtype)

    def run(
        self,
        engine: Engine,
        title: str,
        tasks: Sequence[Any],
        size_of: Callable,
        seen: Callable | None = None,
    ) -> list[dict]:
        """Results of the tasks in their order, those of an earlier start read back. `size_of`: bytes of a task."""
        results: dict[str, dict] = {}
        for task in tasks:
            if f"{task.name}.json" in self.finished:
                results[task.name] = json.loads(self.work.read(f"{task.name}.json"))
                if seen:
                    seen(task, results[task.name])
        left = [task for task in tasks if task.name not in results]
        sizes = {task.name: size_of(task) for task in tasks}
        if results:
            self.progress.say(f"{title}: {len(results):,} of {len(tasks):,} tasks were done before")
        self.progress.start(title, sum(sizes.values()), sum(sizes[name] for name in results))
        for task, result in engine.run(sorted(left, key=lambda task: -sizes[task.name])):  # the largest first
            results[task.name] = result
            self.progress.advance(sizes[task.name], result.get("counts", {}).get("encoded_bytes", 0))
            if seen:
                seen(task, result)
        return [results[task.name] for task in tasks]

    def encode(self, engine: Engine, vocabulary: Vocabulary) -> list[dict]:
        """`mapping.encode_unit` of all units. BadDocument: more than --on-bad and --max-bad allow."""
        config, bad = self.config, 0

        def watch(task: Encode, result: dict) -> None:
            nonlocal bad
            bad += len(result["bad"])
            if bad > (config.max_bad if config.on_bad == "skip" else 0):
                member, line, problem = result["bad"][-1]
                before = count_lines(task.unit, config.patience) if line else 0
                place = name_place(task.unit, member, line, before)
                raise BadDocument(
                    f"{place}: {problem}, the last of {bad:,} bad documents (--on-bad {config.on_bad}, --max-bad "
                    f"{config.max_bad})"
                )

        how, mark = How(config.text_key, config.txt_documents, config.patience), self.plan.mark
        tasks = [
            Encode(
                f"unit_{i:06d}_{mark}", self.work.url, self.output.url, unit, how, self.plan.split,
                vocabulary.end_of_text, vocabulary.dtype, config.on_bad, config.max_bad,
            )
            for i, unit in enumerate(self.plan.units)
        ]  # fmt: skip
        return self.run(engine, "tokenize", tasks, lambda task: task.unit.bytes, watch)

    def say_passed(self, encoded: Sequence[dict]) -> None:
        """Warns of members of tars that are not read."""
        count = sum(result["counts"].get("passed", 0) for result in encoded)
        if count:
            named = [name for result in encoded for name in result.get("passed", ())][:SHOWN]
            self.progress.say(
                f"warning: --inputs: {count:,} members of its tars are passed over, as their endings are not those "
                f"of documents ({', '.join(named)}{', …' if count > len(named) else ''}; known there: {IN_TARS})"
            )

    def check_enough(self, parts: Sequence[str], encoded: Sequence[dict]) -> None:
        """ValueError: the training part fills no sequence. A held-out part that does not is said, and empty."""
        config, length = self.config, self.config.seq_len + 1
        for part in parts:
            documents, tokens = (
                sum(r["counts"].get(f"{part}_{k}", 0) for r in encoded) for k in ("documents", "tokens")
            )
            if documents if config.packing == "best-fit" else tokens >= length:
                continue
            short = (
                f"{documents:,} documents of {tokens:,} tokens, which does not fill one sequence of {length:,} ids "
                f"(--seq-len {config.seq_len})"
            )
            if part == "train":
                raise ValueError(
                    f"the training part has {short}, with --held-out-share {config.held_out_share} and the given "
                    f"--sampling-rates: give more text or a smaller --seq-len, and another --output"
                )
            self.progress.say(
                f"warning: the held-out part (--held-out-share {config.held_out_share}) has {short}: "
                f"{self.output.locate(HELD_OUT)} gets an empty manifest; a larger share or more text helps"
            )

    def pack(
        self, engine: Engine, part: str, encoded: Sequence[dict], rows: Rows
    ) -> tuple[list[str], list[dict], int]:
        """Rows of all buckets of a part → (their files, their results, tokens dropped)."""
        train_buckets, held_out_buckets = self.plan.split.buckets
        first, count = (0, train_buckets) if part == "train" else (train_buckets, held_out_buckets)
        tasks = []
        for bucket in range(count):
            found = [Block(*b) for result in encoded for b in result["blocks"].get(str(first + bucket), [])]
            if found:
                name = f"pack_{part}_{bucket:06d}_{self.plan.mark}"
                tasks.append(Pack(name, self.work.url, rows, part, bucket, tuple(found)))
        width = int(rows.dtype[2:])
        results = self.run(
            engine, f"pack {part}", tasks, lambda task: width * sum(b.tokens for b in task.blocks)
        )
        names = [f"{task.name}.rows" for task in tasks]
        left = [
            (name, result["rows"] * rows.length * width, result["tail"])
            for name, result in zip(names, results, strict=True)
            if result["tail"]
        ]
        if not left:
            return names, results, 0
        task = Tails(f"pack_{part}_tails_{self.plan.mark}", self.work.url, rows, part, tuple(left))
        joined = self.run(engine, f"join {part}", [task], lambda task: width * sum(t[2] for t in task.tails))
        return [*names, f"{task.name}.rows"], results + joined, joined[0]["tail"]

    def write_shards(
        self, engine: Engine, part: str, names: Sequence[str], packed: Sequence[dict], rows: Rows
    ) -> list[dict]:
        """The shards' lines of the manifest. None where the text fills no sequence."""
        output = Folder(posixpath.join(self.output.url, folder_of(part)), self.config.patience)
        output.make()
        counts = [result["rows"] for result in packed]
        total, size = sum(counts), self.config.sequences_per_shard
        tasks, before = [], share_out(counts, 0)
        for number, start in enumerate(range(0, total, size)):
            after = share_out(counts, min(start + size, total))
            slices = tuple((n, a, b - a) for n, a, b in zip(names, before, after, strict=True) if b > a)
            name = f"shard_{part}_{number:08d}_{self.plan.mark}"
            tasks.append(
                WriteShard(name, self.work.url, output.url, rows, part, number, slices, self.config.format)
            )
            before = after
        return self.run(
            engine, f"write {part}", tasks, lambda task: sum(s[2] for s in task.slices) * rows.length
        )
