"""Data that grow between two parts of a run: each sequence still comes once in the pass."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.config import DataConfig
from open_lm.data.loader import TrainData
from open_lm.data.order import Change, Order
from open_lm.data.source_order import SourceOrder

SEQ_LEN = 4
lengths_lists = st.lists(st.integers(0, 40), min_size=1, max_size=5)


@settings(deadline=None, max_examples=80)
@given(
    first=lengths_lists.filter(any),
    appends=st.lists(st.tuples(lengths_lists, st.integers(0, 150)), min_size=1, max_size=4),
    shuffle=st.booleans(),
)
def test_every_sequence_comes_once_in_the_pass_that_grew_and_in_later_ones(first, appends, shuffle):
    """A model: a bag of what the pass has left; an append adds to it, an empty bag is filled with everything."""
    lengths, history, count, taken = list(first), [], 0, []
    for more, gap in appends:
        count += gap
        history.append((count, len(lengths)))
        lengths += more
    source = SourceOrder(lengths, seed=1, source=0, shuffle=shuffle, resampled=False, history=history)
    end = count + 2 * sum(lengths)
    taken = source.locate(np.arange(end))
    for cut in (0, count // 2, count, count + 3):  # from anywhere, and blind to what comes later
        assert source.locate(np.arange(cut, end)) == taken[cut:]
    shorter = SourceOrder(
        lengths[: history[-1][1]], seed=1, source=0, shuffle=shuffle, resampled=False, history=history[:-1]
    )
    assert shorter.locate(np.arange(count)) == taken[:count]

    def all_of(begin, stop):
        return {(shard, i) for shard in range(begin, stop) for i in range(lengths[shard])}

    changes, bag, shards = [*history], set(), history[0][1]
    for k, place in enumerate(taken):
        while changes and changes[0][0] == k:
            changes.pop(0)
            grown = changes[0][1] if changes else len(lengths)
            if bag:
                bag |= all_of(shards, grown)
            shards = grown
        bag = bag or all_of(0, shards)
        assert place in bag, (k, place)
        bag.remove(place)


def test_new_sequences_are_spread_evenly_over_the_rest():
    source = SourceOrder([300, 100], seed=0, source=0, shuffle=True, resampled=False, history=[(200, 1)])
    is_new = [shard == 1 for shard, _ in source.locate(np.arange(200, 400))]
    assert {sum(is_new[i : i + 10]) for i in range(0, 200, 10)} == {5}  # 100 old ones are left


@settings(deadline=None, max_examples=30)
@given(step=st.integers(0, 30), batch=st.integers(1, 9), after=st.integers(1, 9))
def test_a_change_of_batch_and_weights_repeats_nothing(step, batch, after):
    lengths = [[90, 110], [400]]  # more than all steps need: one pass
    before = Order(lengths, (1, 2), batch, seed=4)
    change = Change(step, tuple(before.counts(step)), (2, 1))
    order = Order(lengths, (1, 1), after, seed=4, history=[change])
    seen = [p for t in range(step) for p in before.batch(t)] + [
        p for t in range(step, step + 10) for p in order.batch(t)
    ]
    assert len(set(seen)) == len(seen)
    assert order.counts(step) == before.counts(step)
    if step:
        with pytest.raises(ValueError, match="begins at the last change"):
            order.counts(step - 1)


@pytest.fixture
def grow(write_source):
    """`grow(folder, lengths)`: (re)writes a source whose old shards stay as they are."""
    return lambda folder, lengths, first=0: write_source(folder, lengths, first=first)


def open_data(manifests, *, rank=0, world_size=1, global_batch=8, seed=3, **changes):
    config = DataConfig(
        dataset_manifest=manifests, data_key="json", workers=0, multiple_data_passes=True, **changes
    )
    return TrainData(config, SEQ_LEN, 1000, rank, world_size, global_batch, seed)


def read(data, start, end):
    return [i for batch in data.batches(start, end) for i in batch.tokens_BS[:, 0].tolist()]


def saved(data):
    return json.loads(json.dumps(data.fingerprint()))


def test_a_run_grows_twice_and_resumes_on_any_ranks(grow, tmp_path):
    manifests = (grow(tmp_path / "a", [40, 30]),)
    data = open_data(manifests)
    seen = read(data, 0, 5)  # 40 of 70
    state = saved(data)
    grow(tmp_path / "a", [40, 30, 26])
    data = open_data(manifests, append_data=True)
    assert data.resume(state, 5) == []
    seen += read(data, 5, 8)  # 64 of 96
    state = saved(data)
    plain = open_data(manifests)
    assert plain.resume(state, 8) == []  # the history is the checkpoint's
    assert read(plain, 8, 12) == read(data, 8, 12)
    grow(tmp_path / "a", [40, 30, 26, 16])
    data = open_data(manifests, append_data=True)
    assert data.resume(state, 8) == []
    seen += read(data, 8, 14)
    assert sorted(seen) == list(range(112))
    assert sorted(read(data, 14, 28)) == list(range(112))
    ranks = [open_data(manifests, append_data=True, rank=rank, world_size=2) for rank in (0, 1)]
    for rank in ranks:
        assert rank.resume(state, 8) == []
    parts = [read(rank, 8, 9) for rank in ranks]
    assert parts[0] + parts[1] == read(data, 8, 9)


def test_upsampled_sources_grow(grow, tmp_path):
    manifests = (grow(tmp_path / "a", [40]), grow(tmp_path / "b", [20], first=500))
    factors = {"train_data_upsampling_factors": ("1", "2")}
    data = open_data(manifests, **factors)
    seen = read(data, 0, 5)
    state = saved(data)
    grow(tmp_path / "a", [40, 40])
    data = open_data(manifests, append_data=True, **factors)
    assert data.resume(state, 5) == []
    assert data.order.counts(5) == [20, 20]
    seen += read(data, 5, 15)
    first = [i for i in seen if i < 500]
    assert len(set(first)) == len(first)


def test_a_changed_manifest_is_told_by_shards_and_sequences(grow, tmp_path):
    manifests = (grow(tmp_path / "a", [40, 30]),)
    state = saved(open_data(manifests))
    grow(tmp_path / "a", [40, 31])
    (text,) = open_data(manifests, append_data=True).resume(state, 5)
    assert "2 shards (shard_00000000.tar … shard_00000001.tar), 70 sequences there" in text
    assert "71 sequences here; the first shard that differs is number 1 (shard_00000001.tar)" in text
    grow(tmp_path / "a", [40, 30, 5])
    (text,) = open_data(manifests).resume(state, 5)
    assert text.endswith("it has grown at its end: --append-data takes that in")
    grow(tmp_path / "a", [40])
    (text,) = open_data(manifests).resume(state, 5)
    assert text.endswith("shards are missing at the end")


def test_a_checkpoint_from_before_the_shards_were_described_resumes_and_grows(grow, tmp_path):
    manifests = (grow(tmp_path / "a", [40, 30]),)
    state = saved(open_data(manifests))
    state["sources"] = [{key: source[key] for key in ("sha256", "sequences")} for source in state["sources"]]
    assert open_data(manifests).resume(state, 5) == []
    grow(tmp_path / "a", [40, 30, 9])
    data = open_data(manifests, append_data=True)
    assert data.resume(state, 5) == []
    assert [change.shards for change in data.history] == [(2,)]


def test_another_batch_goes_on_where_the_sources_were(grow, tmp_path):
    manifests = (grow(tmp_path / "a", [40, 30]),)
    data = open_data(manifests)
    seen = read(data, 0, 5)
    state = saved(data)
    data = open_data(manifests, global_batch=10)
    (text,) = data.resume(state, 5)
    assert text == "--global-batch-size: 8 there, 10 here"
    assert sorted(seen + read(data, 5, 8)) == list(range(70))
    (text,) = open_data(manifests, disable_buffer=True).resume(state, 5)
    assert text == "not --disable-buffer: True there, False here"


@pytest.mark.parametrize("append_data", [False, True])
@pytest.mark.parametrize("newline", ["there", "here"])
def test_the_last_newline_of_a_manifest_is_no_difference(grow, tmp_path, newline, append_data):
    manifests = (grow(tmp_path / "a", [40, 30]),)
    path, text = Path(manifests[0]), Path(manifests[0]).read_text().rstrip("\n")
    path.write_text(text + "\n" * (newline == "there"))
    state = saved(open_data(manifests))
    path.write_text(text + "\n" * (newline == "here"))
    data = open_data(manifests, append_data=append_data)
    assert data.resume(state, 5) == []
    assert data.history == ()
    grow(tmp_path / "a", [40, 30, 5])
    assert open_data(manifests, append_data=True).resume(state, 5) == []
    (text,) = open_data(manifests).resume(state, 5)
    assert text.endswith("it has grown at its end: --append-data takes that in")
