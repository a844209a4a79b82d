"""Documents to rows of L ids, and rows to shards: pure functions.

Legend: D documents, N rows, L ids in a row (seq_len + 1), B buckets.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def join(documents: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents one after the other, cut every `length` ids → (rows_NL, the rest: fewer than `length` ids).

    Rows do not overlap: a row's first id is no target, as in open_lm.
    """
    stream = np.concatenate(documents)
    rows = len(stream) // length
    return stream[: rows * length].reshape(rows, length), stream[rows * length :]


def best_fit(documents: Sequence[np.ndarray], length: int, pad: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing (Ding et al. 2024, https://arxiv.org/abs/2404.10830) → (rows_NL, ids of padding).

    Only documents longer than a row are cut: into whole rows and a rest that is packed like a document.
    """
    pieces = [d[i : i + length] for d in documents for i in range(0, len(d), length)]
    pieces.sort(key=len, reverse=True)  # stable: ties stay in order
    rows: list[list[np.ndarray]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit r is set if a row has room for exactly r ids
    for piece in pieces:
        wide_enough = rooms >> len(piece)
        if wide_enough:
            room = len(piece) + (wide_enough & -wide_enough).bit_length() - 1
            row = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
            rows[row].append(piece)
        else:
            room, row = length, len(rows)
            rows.append([piece])
        left = room - len(piece)
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    packed_NL = np.full((len(rows), length), pad, documents[0].dtype)
    for row_L, parts in zip(packed_NL, rows, strict=True):
        ids = np.concatenate(parts)
        row_L[: len(ids)] = ids
    return packed_NL, packed_NL.size - sum(map(len, documents))


def share_out(rows_B: Sequence[int], first: int) -> list[int]:
    """How many rows of each bucket are among the first `first` of all, when every bucket's rows are spread evenly.

    Row r of a bucket of n is at (r + 1/2) / n; ties go by bucket. It never shrinks as `first` grows, so that
    shards between two such cuts have exactly the size that is asked for, and a share of every bucket.
    """
    total = sum(rows_B)
    assert 0 <= first <= total
    if not total:
        return [0] * len(rows_B)
    # Below this point there are at most `first` rows, and at most about one per bucket fewer.
    point = max(Fraction(0), Fraction(2 * first - len(rows_B) - 1, 2 * total))
    taken = [min(n, max(0, -((1 - 2 * n * point) // 2))) for n in rows_B]  # rows r with (r + 1/2) / n < point
    waiting = [
        (Fraction(2 * t + 1, 2 * n), b) for b, (t, n) in enumerate(zip(taken, rows_B, strict=True)) if t < n
    ]
    heapq.heapify(waiting)
    for _ in range(first - sum(taken)):
        _, bucket = heapq.heappop(waiting)
        taken[bucket] += 1
        if taken[bucket] < rows_B[bucket]:
            heapq.heappush(waiting, (Fraction(2 * taken[bucket] + 1, 2 * rows_B[bucket]), bucket))
    return taken
