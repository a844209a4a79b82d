import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from open_lm.report import write_report
from open_lm.report.chart import Series, heat_map, line_chart, spread, thin, ticks
from open_lm.report.page import short_entries
from open_lm.report.runs import (
    ALL,
    Evaluation,
    find_evaluation,
    observations,
    perplexities,
    perplexity_curve,
    read_run,
)

VOID = {"meta", "br", "link", "img", "input", "hr"}


def training(step: int, loss: float, speed: float, router: list | None = None) -> dict:
    line = {"step": step, "tokens": step * 2048, "train/loss": loss, "train/tokens_per_second": speed}
    return line | ({"router": router} if router else {})


def evaluation(step: int, entry: str, loss: float, tokens: int) -> dict:
    return {
        "step": step,
        "tokens": step * 2048,
        "val_data": entry,
        "valid/loss": loss,
        "valid/perplexity": math.exp(min(loss, 700)),
        "valid/tokens": tokens,
    }


def result(step: int, entry: str, loss: float, tokens: int) -> dict:
    """A line of results.jsonl, by open_lm's names."""
    line = {"step": step, "train_tokens": step * 2048, "val_data": [entry], "loss": loss, "tokens": tokens}
    return line | {"model": "open_lm_test_tiny"}


def router(share: list[float], layer: int, dead: int = 0) -> dict:
    return {
        "layer": layer,
        "share": share,
        "entropy": 1.25,
        "fullest_over_mean": max(share) * len(share),
        "dropped_share": 0.031,
        "dead_experts": dead,
    }


def write_run(folder: Path, facts: dict, lines: list[dict], results: list[dict] = ()) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    everything = [{"run": {"name": folder.name, **facts}}, *lines]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in everything))
    (folder / "checkpoints" / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """A dense run and an MoE, evaluated on two sources of a corpus whose yardstick is known."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    known = {"prose": 684.25, "code": 514.75, "all": 748.5}
    (corpus / "corpus.json").write_text(json.dumps({"held_out_unigram_perplexity": known}))
    a, b = (str(corpus / source / "held_out" / "manifest.jsonl") for source in ("prose", "code"))
    dense = write_run(
        tmp_path / "dense",
        {"parameters": 5312345, "active_parameters": 5312345, "commit": "abc1234", "flags": {"lr": 0.003}},
        [training(10, 9.0, 100.0), training(20, 7.0, 12_000.0), training(30, 6.0, 12_500.0)],
        [evaluation(30, a, math.log(300), 3000), evaluation(30, b, math.log(200), 1000)],
    )
    shares = [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]
    moe = write_run(
        tmp_path / "moe",
        {
            "parameters": 15_000_001,
            "active_parameters": 7_000_003,
            "flags": {"model": "<script>alert(1)</script>"},
        },
        [
            training(20, 7.5, 6000.0, [router(shares[1], 0), router(shares[1], 2)]),
            training(30, 6.5, 6250.0, [router(shares[0], 0, dead=1), router(shares[1], 2)]),
        ],
        [evaluation(30, a, math.log(330), 3000), evaluation(30, b, math.log(220), 1000)],
    )
    return [dense, moe]


class Page(HTMLParser):
    """Checks that tags nest and collects the text, the tags and every address the page names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.words, self.addresses = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_page_shows_the_numbers_and_needs_nothing_else(runs, tmp_path):
    write_report(runs, tmp_path / "new" / "report.html", "Dense & MoE")
    source = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert not page.addresses
    assert "://" not in source
    assert "url(" not in source
    assert "@import" not in source
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text, "the text of a flag, escaped"
    together = [math.exp(0.75 * math.log(x) + 0.25 * math.log(y)) for x, y in ((300, 200), (330, 220))]
    for number in ("5,312,345", "15,000,001", "7,000,003", "61,440", "12,000", "684.2", "514.8", "748.5"):
        assert number in page.text
    for value in (*together, 300, 200, 330, 220):
        assert f"{value:,.1f}" in page.text
    assert "moe is behind dense by 10.0% in perplexity, at equal tokens (61.4K, one run each)" in page.text
    assert f"{748.5 / together[0]:.2f} times below the unigram perplexity" in page.text
    assert "fullest expert gets 2.00 times the mean (layer 0)" in page.text
    assert "1 of 8 experts is dead" in page.text
    assert "Layer 0" in page.text
    assert "Layer 2" in page.text
    assert "commit abc1234" in page.text
    for piece in source.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + piece.split("</svg>")[0] + "</svg>")
    write_report(runs, tmp_path / "again.html", "Dense & MoE")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == source


def test_perplexity_is_weighted_by_tokens(runs):
    values = perplexities(read_run(runs[0]))
    assert values[ALL] == pytest.approx(math.exp((3000 * math.log(300) + 1000 * math.log(200)) / 4000))
    assert list(values.values())[1:] == pytest.approx([300, 200])


@pytest.mark.parametrize(("losses", "says"), [((6.0, 5.9), "is ahead of"), ((6.0, 6.0), "is level with")])
def test_who_is_ahead_is_computed(tmp_path, losses, says):
    folders = [
        write_run(tmp_path / name, {}, [training(10, 6.0, 1.0)], [evaluation(10, "v", loss, 10)])
        for name, loss in zip(("one", "two"), losses, strict=True)
    ]
    said = observations([read_run(folder) for folder in folders], {})
    assert any(f"two {says} one" in sentence for sentence in said)


def test_resumed_run_counts_repeated_steps_once_and_a_cut_line_is_left_out(tmp_path):
    first = [training(10, 9.0, 1.0), training(20, 8.0, 1.0), training(30, 7.0, 1.0)]
    again = [{"run": {"commit": "second"}}, training(20, 7.75, 1.0), training(30, 6.75, 1.0)]
    folder = write_run(tmp_path / "run", {"commit": "first"}, first + again)
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 40, "tok')
    run = read_run(folder)
    assert [(line["step"], line["train/loss"]) for line in run.training] == [
        (10, 9.0),
        (20, 7.75),
        (30, 6.75),
    ]
    assert run.facts["commit"] == "second"


def test_evaluation_in_log_and_results_is_one(tmp_path):
    lines = [evaluation(10, "v", 5.0, 7), evaluation(20, "v", 4.0, 7)]
    run = read_run(write_run(tmp_path / "run", {}, [training(20, 4.5, 1.0), *lines], lines[1:]))
    assert [(e.step, e.loss) for e in run.evaluations] == [(10, 5.0), (20, 4.0)]
    assert run.last()["v"].loss == 4.0


def test_a_resumed_run_has_one_value_a_step(tmp_path):
    """It died after step 40, resumed after 20 and has reached 30: what it found at 40 is gone, and said to be."""
    early = [training(n, 5.0, 1.0) for n in (10, 20, 30, 40)]
    evaluations = [evaluation(20, "v", 4.0, 7), evaluation(40, "v", 3.0, 7)]
    again = [{"run": {"commit": "new"}}, {"resumed": 20}, training(30, 4.5, 1.0)]
    run = read_run(write_run(tmp_path / "run", {}, [*early, *evaluations, *again], evaluations))
    assert [(x["step"], x["train/loss"]) for x in run.training] == [(10, 5.0), (20, 5.0), (30, 4.5)]
    assert [(e.step, e.loss) for e in run.evaluations] == [(20, 4.0)]
    assert (run.resumed, run.superseded, run.facts["commit"]) == ((20,), 3, "new")
    write_report([tmp_path / "run"], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "run was resumed after step 20; 3 log lines of steps that it did again are left out." in page.text


def test_speed_memory_and_averages_are_shown(tmp_path):
    lines = [
        training(n, 5.0, 100.0 * n) | {"train/mfu": 0.4 + n / 1000, "train/memory_gib": 11.5}
        for n in (10, 20, 30)
    ]
    found = []
    for step, loss in ((10, 5.0), (20, 4.0), (30, 3.0)):
        for entry in ("prose", "code"):
            one = evaluation(step, entry, loss, 100)
            found.append(one)
            averaged = evaluation(step, entry, loss - 0.1, 100) | {"average": "ema_0.9_1"}
            found.append({k.replace("valid/", "valid/ema_0.9_1/"): v for k, v in averaged.items()})
    folder = write_run(tmp_path / "run", {}, lines, found)
    run = read_run(folder)
    assert perplexities(run)[ALL] == pytest.approx(math.exp(3.0))
    assert perplexities(run, "ema_0.9_1")[ALL] == pytest.approx(math.exp(2.9))
    assert perplexity_curve(run, "code") == [
        (n * 2048, pytest.approx(math.exp(6 - n / 10))) for n in (10, 20, 30)
    ]
    write_report([folder], tmp_path / "r.html")
    source = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(source)
    for text in (
        "MFU",
        "42.0%",
        "GiB",
        "11.5",
        "run, ema_0.9_1",
        "Model FLOPs utilisation",
        "Tokens per second",
    ):
        assert text in page.text, text
    assert f"ema_0.9_1 of run reached {math.exp(2.9):.1f}, 9.5% below its own weights." in page.text
    assert source.count("<figcaption>prose</figcaption>") == 1
    for piece in source.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + piece.split("</svg>")[0] + "</svg>")


def test_lines_of_evaluations_in_all_their_forms():
    """log.jsonl's, of one entry and of one among several; results.jsonl's; none of a sum of checkpoints."""
    facts = {"step": 3, "checkpoint_path": "a/epoch_1.pt", "average": "none"}
    forms = [
        {"tokens": 9, "val_data": "v", "valid/loss": 4.0, "valid/tokens": 7},
        {"tokens": 9, "val_data": "v", "valid/prose/loss": 4.0, "valid/prose/tokens": 7},
        {"train_tokens": 9, "val_data": ["v"], "loss": 4.0, "tokens": 7},
    ]
    for form in forms:
        assert find_evaluation(facts | form) == Evaluation(3, 9, "v", 4.0, 7)
        assert find_evaluation(facts | form | {"soup": []}) is None
        assert find_evaluation(facts | form | {"average": "ema_1_1"}).average == "ema_1_1"
        assert find_evaluation(facts | form | {"checkpoint_path": "a/ema_1_1_3.pt"}) is None
    assert find_evaluation({"step": 3, "train/epoch": 1}) is None


def test_odd_runs_still_make_a_page(tmp_path):
    bare = write_run(tmp_path / "bare", {}, [training(10, float("nan"), 1.0)])
    only_evaluated = write_run(tmp_path / "evaluated", {}, [evaluation(5, "pipe:cat a.tar", 800.0, 10)])
    diverged = write_run(tmp_path / "diverged", {}, [evaluation(5, "pipe:cat a.tar", float("nan"), 10)])
    write_report([only_evaluated, bare, diverged], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "bare trained on 20.5K tokens and was not evaluated" in page.text
    assert "diverged saw 10.2K tokens and reached held-out perplexity nan." in page.text
    assert "diverged is" not in page.text
    with pytest.raises(ValueError, match="nothing"):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "report.html")


def test_entries_are_named_by_what_differs():
    a, b = "corpus/prose/held_out/manifest.jsonl", "corpus/code/held_out/manifest.jsonl"
    assert short_entries([a, b]) == {a: "prose", b: "code", ALL: ALL}
    assert short_entries([a])[a] == "prose/held_out"


def test_chart_arithmetic():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.31, 0.94) == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert thin([(i, 2.0 * i) for i in range(10)], 5) == [(0.5, 1), (2.5, 5), (4.5, 9), (6.5, 13), (8.5, 17)]
    assert thin([(0, math.nan), (1, 3.0)]) == [(1, 3.0)]
    assert spread([50, 51, 10], 15, 0, 60) == [45, 60, 10]


def test_heat_map_colours_what_is_uneven():
    drawn = ElementTree.fromstring(heat_map("t", [(1, [0.5, 0.25, 0.25, 0.0])], x_label="tokens"))
    rects = [(r.get("class"), r.get("fill-opacity")) for r in drawn.iter("rect")]
    assert rects == [("frame", None), ("over", "1.00"), ("under", "1.00")]


def test_line_chart_puts_values_where_they_belong():
    drawn = ElementTree.fromstring(
        line_chart(
            "t",
            [Series("a<b", 0, [(0, 0.0), (50, 1.0), (100, 4.0)])],
            x_label="x",
            y_label="y",
            from_zero=True,
        )
    )
    line = next(p for p in drawn.iter("path") if "line" in p.get("class"))
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split()) for p in line.get("d")[1:].split("L"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.15)
    assert (y0 - y1) * 4 == pytest.approx(y0 - y2, abs=0.5)
    assert "a<b" in {text.text for text in drawn.iter("text")}


def test_command_line(runs, tmp_path):
    command = [sys.executable, "-m", "open_lm.report", *map(str, runs), "--output", str(tmp_path / "r.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "r.html" in done.stdout
    assert "dense" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_lines_of_several_entries_and_results_say_the_same(tmp_path):
    named = []
    for name, loss in (("books", 3.0), ("code", 2.0)):
        line = {"step": 30, "tokens": 30 * 2048, "val_data": f"/{name}/m.jsonl", "val_name": name}
        named.append(line | {f"valid/{name}/loss": loss, f"valid/{name}/tokens": 100})
    results = [result(30, "/books/m.jsonl", 3.0, 100), result(30, "/code/m.jsonl", 2.0, 100)]
    averaged = results[0] | {"average": "ema_0.9_1", "loss": 1.0}
    runs = [
        read_run(write_run(tmp_path / "log", {}, [training(30, 6.0, 1.0), *named])),
        read_run(write_run(tmp_path / "results", {}, [training(30, 6.0, 1.0)], [*results, averaged])),
        read_run(write_run(tmp_path / "both", {}, [training(30, 6.0, 1.0), *named], results)),
    ]
    for run in runs:
        assert [e for e in run.evaluations if not e.average] == runs[0].evaluations
        assert perplexities(run) == pytest.approx(
            {ALL: math.exp(2.5), "/books/m.jsonl": math.exp(3), "/code/m.jsonl": math.exp(2)}
        )
        assert run.tokens == 30 * 2048
