import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from open_lm.tokenize.packing import best_fit, join, share_out

documents = st.lists(st.integers(1, 25), min_size=1, max_size=40).map(
    lambda lengths: [np.arange(n, dtype=np.uint16) + 100 * (i + 1) for i, n in enumerate(lengths)]
)


@given(documents, st.integers(2, 9))
def test_join_is_the_stream(given_documents, length):
    rows_NL, rest = join(given_documents, length)
    stream = [i for document in given_documents for i in document]
    assert rows_NL.ravel().tolist() + rest.tolist() == stream
    assert len(rest) < length


@given(documents, st.integers(2, 30))
def test_best_fit_cuts_only_what_is_longer_than_a_row(given_documents, length):
    rows_NL, padding = best_fit(given_documents, length, pad=0)
    found = {}
    for row in rows_NL.tolist():
        ids = [i for i in row if i]
        assert row == ids + [0] * (length - len(ids)), "padding is at the end"
        for i in ids:
            found.setdefault(i // 100, []).append(ids)
    assert padding == (rows_NL == 0).sum()
    assert sorted(rows_NL[rows_NL > 0].tolist()) == sorted(i for d in given_documents for i in d.tolist())
    for number, document in enumerate(given_documents, 1):
        if len(document) <= length:
            (row,) = {tuple(row) for row in found[number]}
            start = row.index(document[0])
            assert list(row[start : start + len(document)]) == document.tolist()
    # First-fit decreasing and best-fit decreasing use at most 11/9 OPT + 1 rows; OPT is at least the size.
    pieces = [len(d[i : i + length]) for d in given_documents for i in range(0, len(d), length)]
    assert len(rows_NL) <= 2 * (-(-sum(pieces) // length))


def test_best_fit_takes_the_fullest_row():
    lengths = [7, 6, 4, 3]
    rows_NL, padding = best_fit([np.full(n, n) for n in lengths], 10, pad=0)
    assert [sorted(set(row) - {0}) for row in rows_NL.tolist()] == [[3, 7], [4, 6]]
    assert padding == 0


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.data())
def test_share_out_is_exact_and_never_shrinks(rows_B, data):
    first = data.draw(st.integers(0, sum(rows_B)))
    taken = share_out(rows_B, first)
    assert sum(taken) == first
    places = sorted(((r + 0.5) / n, b) for b, n in enumerate(rows_B) for r in range(n))[:first]
    assert taken == [sum(bucket == b for _, bucket in places) for b in range(len(rows_B))]
