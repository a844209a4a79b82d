"""up_backward for Hopper in Gluon: warps that load, and two warpgroups, of which one multiplies while the other
is at the activation.

What `rows.up_backward_kernel` computes, of ungated experts without biases, in bfloat16, where forward has saved
weight * activation. TAKE_TURNS: each of the two consumers has every second tile of the program, 128 rows by 128
columns, and the product of one runs during the activation of the other; the results are those of `rows` to the bit.
Else each has half the rows of a tile of 256 columns, and does the activation of one tile during the product of the
next, as in `gluon_rows`: p waits for it in bfloat16, to which it is rounded, as between torch's own products. This
loads less, and is the faster one of wide layers.

Shapes: D model width, E experts, F expert width, R rows, M tiles of rows.
"""

# Kernels are in Gluon's language, which only looks like Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAssignmentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from open_lm.moe.backends.triton.activations import activate_and_slope
from open_lm.moe.backends.triton.gluon_rows import (
    PIECE,
    finish,
    init,
    multiply,
    pack,
    produce,
    store_rows,
    unpack,
)
from open_lm.moe.backends.triton.rows import _tile


@gluon.jit
def _fetch(
    h, tile_ptr, M, R, ring_0, ready_0, free_0, ring_1, ready_1, free_1,
    F: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, PIECES: gl.constexpr, GROUP: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
):  # fmt: skip
    """Fills the consumers' rings with pieces of h."""
    NT: gl.constexpr = F // BN
    ROWS: gl.constexpr = BM if TAKE_TURNS else BM // 2
    tiles_m = gl.load(tile_ptr + 3 * M)
    step, tiles = gl.num_programs(0), tiles_m * NT
    filled = 0
    if TAKE_TURNS:
        step *= 2
    for tile in range(gl.program_id(0), tiles, step):
        _, row0, _, nt = _tile(tile_ptr, tile, tiles, tiles_m, M, R, NT, GROUP)
        if TAKE_TURNS:
            other = tile + gl.num_programs(0)
            _, row1, _, nt1 = _tile(tile_ptr, other, tiles, tiles_m, M, R, NT, GROUP)
            for piece in gl.static_range(BN // PIECE):
                _fetch_piece(
                    h, row0, nt * BN + piece * PIECE, ring_0, ready_0, free_0, filled + piece, PIECES
                )
            if other < tiles:
                for piece in gl.static_range(BN // PIECE):
                    _fetch_piece(
                        h, row1, nt1 * BN + piece * PIECE, ring_1, ready_1, free_1, filled + piece, PIECES
                    )
        else:
            for piece in gl.static_range(BN // PIECE):
                n0 = nt * BN + piece * PIECE
                _fetch_piece(h, row0, n0, ring_0, ready_0, free_0, filled + piece, PIECES)
                _fetch_piece(h, row0 + ROWS, n0, ring_1, ready_1, free_1, filled + piece, PIECES)
        filled += BN // PIECE


@gluon.jit
def _fetch_piece(h, row0, n0, ring, ready, free, i, PIECES: gl.constexpr):
    slot = i % PIECES
    mbarrier.wait(free.index(slot), (i // PIECES & 1) ^ 1)
    mbarrier.expect(ready.index(slot), ring.shape[1] * PIECE * 2)
    tma.async_copy_global_to_shared(h, [row0, n0], ready.index(slot), ring.index(slot))


@gluon.jit
def _product_in_turn(
    a_ring, w_ring, full, empty, turn, used, CONSUMER: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    K_TILES: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """(BM, BN) float32 of the next K_TILES of the ring; then it is the other consumer's turn."""
    # Until the other has all of its tile: a barrier's phase tells a filling from the last one, not the last two.
    mbarrier.wait(turn.index(CONSUMER), (used // (2 * K_TILES) & 1) ^ (1 - CONSUMER))
    acc = gl.zeros((BM, BN), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16]))
    acc, used = multiply(
        a_ring, w_ring, full, empty, acc, used, 0, K_TILES, CONSUMER, STAGES, TRANSPOSED, False
    )
    mbarrier.arrive(turn.index(1 - CONSUMER))
    return finish(acc, empty, used, STAGES), used + K_TILES


@gluon.jit
def _halves(x):
    """The left and the right half of the columns, in the registers where they are."""
    ROWS: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    left, right = x.reshape((ROWS, 2, N)).permute((0, 2, 1)).split()
    return gl.convert_layout(left, layout, assert_trivial=True), gl.convert_layout(
        right, layout, assert_trivial=True
    )


@gluon.jit
def _through_slope(
    p, weight, dh, dh_ptr, part, ring, ready, free, taken, row0, last, end, n0, F: gl.constexpr,
    KIND: gl.constexpr, RELEASE: gl.constexpr = True,
):  # fmt: skip
    """Stores dh of PIECE columns, in the place of h's piece in the ring; (part + sum_f p_f a_f, taken + 1).

    RELEASE: frees the place of the piece before.
    """
    PIECES: gl.constexpr = ring.shape[0]
    layout: gl.constexpr = p.type.layout
    slot = taken % PIECES
    mbarrier.wait(ready.index(slot), taken // PIECES & 1)
    h = ring.index(slot).load(layout)
    a, slope = activate_and_slope(h.to(gl.float32), KIND, True)
    part += gl.convert_layout(gl.sum(p * a, 1), part.type.layout, assert_trivial=True)
    scaled = gl.convert_layout(weight, gl.SliceLayout(1, layout), assert_trivial=True)[:, None]
    value = (p * slope * scaled).to(h.dtype)
    if row0 + p.shape[0] <= last:
        ring.index(slot).store(value)
        fence_async_shared()
        tma.async_copy_shared_to_global(dh, [row0, n0], ring.index(slot))
        # all but this one have left the ring
        tma.store_wait(1)
    else:
        row = row0 + gl.arange(0, p.shape[0], gl.SliceLayout(1, layout))
        value = gl.where((row < last)[:, None], value, 0.0)
        tma.store_wait(0)
        ring.index(slot).store(value)
        store_rows(dh_ptr, ring.index(slot), row0, end, n0, F)
        fence_async_shared()
    if RELEASE:
        mbarrier.arrive(free.index((taken + PIECES - 1) % PIECES), pred=taken > 0)
    return part, taken + 1


@gluon.jit
def _store_part(partial_ptr, part, row0, last, end, nt, R):
    row = row0 + gl.arange(0, part.shape[0], part.type.layout)
    gl.store(partial_ptr + nt.to(gl.int64) * R + row, gl.where(row < last, part, 0.0), mask=row < end)


@gluon.jit
def _consume_in_turn(
    dh, dh_ptr, weight_ptr, partial_ptr, tile_ptr, M, R, a_ring, w_ring, full, empty, turn, ring, ready, free,
    CONSUMER: gl.constexpr, D: gl.constexpr, F: gl.constexpr, KIND: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Every second tile: its product while the other consumer is at the activation, and the other way round."""
    gl.static_assert(BN == 2 * PIECE)
    NT: gl.constexpr = F // BN
    K: gl.constexpr = D // BK
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    tiles_m = gl.load(tile_ptr + 3 * M)
    total = gl.load(tile_ptr + 3 * M + 1)
    step, tiles = gl.num_programs(0), tiles_m * NT
    used, taken = CONSUMER * K, 0
    for tile in range(gl.program_id(0) + CONSUMER * step, tiles, 2 * step):
        _, row0, end, nt = _tile(tile_ptr, tile, tiles, tiles_m, M, R, NT, GROUP)
        last = gl.minimum(end, total)
        row = row0 + gl.arange(0, BM, gl.SliceLayout(1, layout))
        weight = gl.load(weight_ptr + row, mask=row < last, other=0.0)
        p, used = _product_in_turn(a_ring, w_ring, full, empty, turn, used, CONSUMER, BM, BN, K, STAGES, True)
        part = gl.zeros((BM,), gl.float32, gl.SliceLayout(1, layout))
        left, right = _halves(p)
        n0 = nt * BN
        part, taken = _through_slope(
            left, weight, dh, dh_ptr, part, ring, ready, free, taken, row0, last, end, n0, F, KIND, False
        )
        part, taken = _through_slope(
            right, weight, dh, dh_ptr, part, ring, ready, free, taken, row0, last, end, n0 + PIECE, F, KIND
        )
        _store_part(partial_ptr, part, row0, last, end, nt, R)
        # at once, not with the next tile's first piece: the next piece of h has this place
        tma.store_wait(0)
        mbarrier.arrive(free.index((taken + ring.shape[0] - 1) % ring.shape[0]))
    tma.store_wait(0)


@gluon.jit
def _consume(
    dh, dh_ptr, weight_ptr, partial_ptr, tile_ptr, M, R, a_ring, w_ring, full, empty, turn, ring, ready, free,
    CONSUMER: gl.constexpr, D: gl.constexpr, F: gl.constexpr, KIND: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Half of a tile's rows: its product, and meanwhile what is left of the tile before, a quarter at a time."""
    gl.static_assert(BN == 4 * PIECE)
    NT: gl.constexpr = F // BN
    K: gl.constexpr = D // BK
    ROWS: gl.constexpr = BM // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    tiles_m = gl.load(tile_ptr + 3 * M)
    total = gl.load(tile_ptr + 3 * M + 1)
    step, tiles = gl.num_programs(0), tiles_m * NT
    used, taken = 0, 0
    first = gl.program_id(0)
    _, row0, end, nt = _tile(tile_ptr, first, tiles, tiles_m, M, R, NT, GROUP)
    row0 += CONSUMER * ROWS
    last = gl.minimum(end, total)
    weight = _weights(weight_ptr, row0, last, ROWS, layout)
    if first < tiles:
        n0 = nt * BN
        acc = gl.zeros((ROWS, BN), gl.float32, layout)
        acc, used = multiply(a_ring, w_ring, full, empty, acc, used, 0, K, CONSUMER, STAGES, True, False)
        p0, p1, p2, p3 = pack(finish(acc, empty, used, STAGES))
        for tile in range(first + step, tiles, step):
            _, next_row0, next_end, next_nt = _tile(tile_ptr, tile, tiles, tiles_m, M, R, NT, GROUP)
            next_row0 += CONSUMER * ROWS
            next_last = gl.minimum(next_end, total)
            next_weight = _weights(weight_ptr, next_row0, next_last, ROWS, layout)
            part = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, layout))
            acc = gl.zeros((ROWS, BN), gl.float32, layout)
            acc, used = multiply(
                a_ring, w_ring, full, empty, acc, used, 0, K // 4, CONSUMER, STAGES, True, False
            )
            part, taken = _through_slope(
                unpack(p0), weight, dh, dh_ptr, part, ring, ready, free, taken, row0, last, end, n0, F,
                KIND,
            )  # fmt: skip
            acc, used = multiply(
                a_ring, w_ring, full, empty, acc, used, K // 4, K // 2, CONSUMER, STAGES, True, False
            )
            part, taken = _through_slope(
                unpack(p1), weight, dh, dh_ptr, part, ring, ready, free, taken, row0, last, end, n0 + PIECE, F,
                KIND,
            )  # fmt: skip
            acc, used = multiply(
                a_ring, w_ring, full, empty, acc, used, K // 2, K * 3 // 4, CONSUMER, STAGES, True, False
            )
            part, taken = _through_slope(
                unpack(p2), weight, dh, dh_ptr, part, ring, ready, free, taken, row0, last, end, n0 + 2 * PIECE, F,
                KIND,
            )  # fmt: skip
            acc, used = multiply(
                a_ring, w_ring, full, empty, acc, used, K * 3 // 4, K, CONSUMER, STAGES, True, False
            )
            part, taken = _through_slope(
                unpack(p3), weight, dh, dh_ptr, part, ring, ready, free, taken, row0, last, end, n0 + 3 * PIECE, F,
                KIND,
            )  # fmt: skip
            _store_part(partial_ptr, part, row0, last, end, nt, R)
            p0, p1, p2, p3 = pack(finish(acc, empty, used, STAGES))
            row0, last, end, nt, weight = next_row0, next_last, next_end, next_nt, next_weight
            n0 = nt * BN
        part = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, layout))
        part, taken = _through_slope(
            unpack(p0), weight, dh, dh_ptr, part, ring, ready, free, taken, row0, last, end, n0, F,
            KIND,
        )  # fmt: skip
        part, taken = _through_slope(
            unpack(p1), weight, dh, dh_ptr, part, ring, ready, free, taken, row0, last, end, n0 + PIECE, F,
            KIND,
        )  # fmt: skip
        part, taken = _through_slope(
            unpack(p2), weight, dh, dh_ptr, part, ring, ready, free, taken, row0, last, end, n0 + 2 * PIECE, F,
            KIND,
        )  # fmt: skip
        part, taken = _through_slope(
            unpack(p3), weight, dh, dh_ptr, part, ring, ready, free, taken, row0, last, end, n0 + 3 * PIECE, F,
            KIND,
        )  # fmt: skip
        _store_part(partial_ptr, part, row0, last, end, nt, R)
    tma.store_wait(0)


@gluon.jit
def _weights(weight_ptr, row0, last, ROWS: gl.constexpr, layout: gl.constexpr):
    row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    return gl.load(weight_ptr + row, mask=row < last, other=0.0)


@gluon.jit(do_not_specialize=["M", "R"])
def up_backward_kernel(
    g, w2, h, dh, dh_ptr, weight_ptr, partial_ptr, tile_ptr, M, R,
    D: gl.constexpr, F: gl.constexpr, KIND: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, PIECES: gl.constexpr, GROUP: gl.constexpr, TAKE_TURNS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """With p = g w2ᵀ: dh_RF = weight * p * the activation's slope at h, partial (F / BN, R) of sum_f p_f a_f.

    Descriptors: g (R, D), rows that are gathered; w2 of (E F, D); h and dh (R, F), which may be one memory.
    """
    low: gl.constexpr = w2.dtype
    ROWS: gl.constexpr = BM if TAKE_TURNS else BM // 2
    g_ring = gl.allocate_shared_memory(low, [STAGES, BM, BK], g.layout)
    w_ring = gl.allocate_shared_memory(low, [STAGES, BN, BK], w2.layout)
    ring_0 = gl.allocate_shared_memory(low, [PIECES, ROWS, PIECE], h.layout)
    ring_1 = gl.allocate_shared_memory(low, [PIECES, ROWS, PIECE], h.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_0 = gl.allocate_shared_memory(gl.int64, [PIECES, 1], mbarrier.MBarrierLayout())
    ready_1 = gl.allocate_shared_memory(gl.int64, [PIECES, 1], mbarrier.MBarrierLayout())
    free_0 = gl.allocate_shared_memory(gl.int64, [PIECES, 1], mbarrier.MBarrierLayout())
    free_1 = gl.allocate_shared_memory(gl.int64, [PIECES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    init(full, STAGES, 1)
    init(empty, STAGES, 1 if TAKE_TURNS else 2)
    init(turn, 2, 1)
    init(ready_0, PIECES, 1)
    init(ready_1, PIECES, 1)
    init(free_0, PIECES, 1)
    init(free_1, PIECES, 1)
    gl.warp_specialize(
        [
            (
                _consume_in_turn if TAKE_TURNS else _consume,
                (dh, dh_ptr, weight_ptr, partial_ptr, tile_ptr, M, R, g_ring, w_ring, full, empty, turn, ring_0,
                 ready_0, free_0, 0, D, F, KIND, BM, BN, BK, STAGES, GROUP),
            ),
            (
                _consume_in_turn if TAKE_TURNS else _consume,
                (dh, dh_ptr, weight_ptr, partial_ptr, tile_ptr, M, R, g_ring, w_ring, full, empty, turn, ring_1,
                 ready_1, free_1, 1, D, F, KIND, BM, BN, BK, STAGES, GROUP),
            ),
            (
                produce,
                (g, None, w2, tile_ptr, M, R, g_ring, w_ring, full, empty, D, F, BM, BN, BK, STAGES, GROUP, True,
                 False),
            ),
            (
                _fetch,
                (h, tile_ptr, M, R, ring_0, ready_0, free_0, ring_1, ready_1, free_1, F, BM, BN, PIECES, GROUP,
                 TAKE_TURNS),
            ),
        ],
        [4, 1, 1],
        [REGISTERS, 24, 24],
    )  # fmt: skip
