"""up and up_backward for Hopper in Gluon: warps that load, and two warpgroups that multiply and activate in turn.

What `rows.up_kernel` and `rows.up_backward_kernel` compute, of ungated experts without biases, in 16 bits. There the
activation and its stores wait for the product and the product for them. Here a producer fills a ring of tiles in
shared memory, and of the two consumers one multiplies while the other activates: TAKE_TURNS, each has every second
tile of the program, 128 rows; else each has 64 of a tile's 128 rows and one may be ahead of the other by what the
ring holds. Results leave through shared memory, by tensor descriptors, in the background.

Shapes: T tokens, D model width, E experts, F expert width, R rows, M tiles of rows.
"""

# Kernels are in Gluon's language, which only looks like Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from open_lm.moe.backends.triton.activations import activate, activate_and_slope
from open_lm.moe.backends.triton.rows import _tile

PIECE = gl.constexpr(64)
"""Columns of a tile that go through the activation at a time: 128 bytes, what a descriptor's swizzle spans."""


@gluon.jit
def _produce(
    a, token_ptr, w, tile_ptr, M, R, a_ring, w_ring, full, empty,
    D: gl.constexpr, F: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, TRANSPOSED: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Fills the ring with a's rows and the expert's weight."""
    NT: gl.constexpr = F // BN
    tiles_m = gl.load(tile_ptr + 3 * M)
    total = gl.load(tile_ptr + 3 * M + 1)
    step, tiles = gl.num_programs(0), tiles_m * NT
    lag: gl.constexpr = 2  # gathered copies that are under way
    w_bytes: gl.constexpr = BK * BN * 2
    filled = 0
    for tile in range(gl.program_id(0), tiles, step):
        e, row0, end, nt = _tile(tile_ptr, tile, tiles, tiles_m, M, R, NT, GROUP)
        if GATHER:
            layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BK, BK // 8], [4, 1], [1, 0])
            row = row0 + gl.arange(0, BM, gl.SliceLayout(1, layout))
            token = gl.load(token_ptr + row, mask=row < gl.minimum(end, total), other=0)
            a_ptrs = a + token.to(gl.int64)[:, None] * D + gl.arange(0, BK, gl.SliceLayout(0, layout))[None, :]
        for k0 in range(0, D, BK):
            slot = filled % STAGES
            mbarrier.wait(empty.index(slot), (filled // STAGES & 1) ^ 1)
            bar = full.index(slot)
            if GATHER:
                mbarrier.expect(bar, w_bytes)
            else:
                mbarrier.expect(bar, w_bytes + BM * BK * 2)
                tma.async_copy_global_to_shared(a, [row0, k0], bar, a_ring.index(slot))
            if TRANSPOSED:
                tma.async_copy_global_to_shared(w, [e * F + nt * BN, k0], bar, w_ring.index(slot))
            else:
                tma.async_copy_global_to_shared(w, [e * D + k0, nt * BN], bar, w_ring.index(slot))
            if GATHER:
                async_copy.async_copy_global_to_shared(a_ring.index(slot), a_ptrs + k0)
                async_copy.commit_group()
                async_copy.wait_group(lag)
                fence_async_shared()
                mbarrier.arrive(full.index((filled + STAGES - lag) % STAGES), pred=filled >= lag)
            filled += 1
    if GATHER:
        async_copy.wait_group(0)
        fence_async_shared()
        for i in gl.static_range(lag):
            mbarrier.arrive(full.index((filled + STAGES - lag + i) % STAGES), pred=filled >= lag)


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
                _fetch_piece(h, row0, nt * BN + piece * PIECE, ring_0, ready_0, free_0, filled + piece, PIECES)
            if other < tiles:
                for piece in gl.static_range(BN // PIECE):
                    _fetch_piece(h, row1, nt1 * BN + piece * PIECE, ring_1, ready_1, free_1, filled + piece, PIECES)
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
def _product(
    a_ring, w_ring, full, empty, used, CONSUMER: gl.constexpr, ROWS: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, K_TILES: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """(ROWS, BN) float32 of the next K_TILES of the ring, which it frees."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    acc = gl.zeros((ROWS, BN), gl.float32, layout)
    for k in range(K_TILES):
        slot = used % STAGES
        mbarrier.wait(full.index(slot), used // STAGES & 1)
        a = a_ring.index(slot)
        if ROWS < BM:
            a = a.slice(CONSUMER * ROWS, ROWS)
        w = w_ring.index(slot)
        if TRANSPOSED:
            w = w.permute((1, 0))
        acc = warpgroup_mma(a, w, acc, use_acc=k > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), pred=k > 0)
        used += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES))
    return acc, used


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
def _store_rows(ptr, x, row0, end, n0, F: gl.constexpr):
    """A piece where an expert's rows end: up to row `end`."""
    layout: gl.constexpr = x.type.layout
    row = row0 + gl.arange(0, x.shape[0], gl.SliceLayout(1, layout))
    n = n0 + gl.arange(0, x.shape[1], gl.SliceLayout(0, layout))
    gl.store(ptr + row.to(gl.int64)[:, None] * F + n[None, :], x, mask=(row < end)[:, None])


@gluon.jit
def _send(desc, ptr, x, out, whole, row0, end, n0, F: gl.constexpr):
    """Stores a piece through `out`, shared memory, whose last piece but one is on its way."""
    if whole:
        tma.store_wait(1)
        out.store(x)
        fence_async_shared()
        tma.async_copy_shared_to_global(desc, [row0, n0], out)
    else:
        _store_rows(ptr, x, row0, end, n0, F)


@gluon.jit
def _activated(
    acc, weight, h, h_ptr, a, a_ptr, h_out, a_out, whole, row0, end, n0, F: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Stores the pre-activation and the activation, PIECE columns at a time."""
    if acc.shape[1] > PIECE:
        left, right = _halves(acc)
        _activated(left, weight, h, h_ptr, a, a_ptr, h_out, a_out, whole, row0, end, n0, F, KIND)
        _activated(
            right, weight, h, h_ptr, a, a_ptr, h_out, a_out, whole, row0, end, n0 + acc.shape[1] // 2, F, KIND
        )
    else:
        # the activation is that of the number which is saved
        low = acc.to(h_out.dtype)
        if h is not None:
            _send(h, h_ptr, low, h_out, whole, row0, end, n0, F)
        if a is not None:
            value = activate(low.to(gl.float32), KIND, True)
            if weight is not None:
                value *= gl.convert_layout(weight, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)[
                    :, None
                ]
            _send(a, a_ptr, value.to(a_out.dtype), a_out, whole, row0, end, n0, F)


@gluon.jit
def _consume_up(
    h, h_ptr, a, a_ptr, weight_ptr, tile_ptr, M, R, a_ring, w_ring, out, full, empty,
    CONSUMER: gl.constexpr, D: gl.constexpr, F: gl.constexpr, KIND: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, TAKE_TURNS: gl.constexpr,
):  # fmt: skip
    NT: gl.constexpr = F // BN
    K_TILES: gl.constexpr = D // BK
    ROWS: gl.constexpr = BM if TAKE_TURNS else BM // 2
    tiles_m = gl.load(tile_ptr + 3 * M)
    total = gl.load(tile_ptr + 3 * M + 1)
    step, tiles = gl.num_programs(0), tiles_m * NT
    first = gl.program_id(0)
    used = 0
    if TAKE_TURNS:
        first += CONSUMER * step
        used = CONSUMER * K_TILES
        step *= 2
    h_out, a_out = out.index(2 * CONSUMER), out.index(2 * CONSUMER + 1)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    for tile in range(first, tiles, step):
        e, row0, end, nt = _tile(tile_ptr, tile, tiles, tiles_m, M, R, NT, GROUP)
        if not TAKE_TURNS:
            row0 += CONSUMER * ROWS
        weight = None
        if weight_ptr is not None:
            # long before it is needed
            row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            weight = gl.load(weight_ptr + row, mask=row < gl.minimum(end, total), other=0.0)
        acc, used = _product(
            a_ring, w_ring, full, empty, used, CONSUMER, ROWS, BM, BN, K_TILES, STAGES, False
        )
        if TAKE_TURNS:
            used += K_TILES  # the other's
        _activated(
            acc, weight, h, h_ptr, a, a_ptr, h_out, a_out, row0 + ROWS <= end, row0, end, nt * BN, F, KIND
        )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "R"])
def up_kernel(
    x, token_ptr, w, h, h_ptr, a, a_ptr, weight_ptr, tile_ptr, M, R,
    D: gl.constexpr, F: gl.constexpr, KIND: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, TAKE_TURNS: gl.constexpr, GATHER: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """h_RF = x[token] w, a_RF = its activation, times weight if there.

    x is a pointer, or if not GATHER a descriptor of the gathered rows; w a descriptor of (E D, F), h and a (or None)
    of (R, F).
    """
    low: gl.constexpr = w.dtype
    ROWS: gl.constexpr = BM if TAKE_TURNS else BM // 2
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], low)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, PIECE], low)
    a_ring = gl.allocate_shared_memory(low, [STAGES, BM, BK], a_layout)
    w_ring = gl.allocate_shared_memory(low, [STAGES, BK, BN], w.layout)
    out = gl.allocate_shared_memory(low, [4, ROWS, PIECE], out_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2 if GATHER else 1)
        mbarrier.init(empty.index(i), count=1 if TAKE_TURNS else 2)
    of_tiles = (tile_ptr, M, R)
    gl.warp_specialize(
        [
            (
                _consume_up,
                (h, h_ptr, a, a_ptr, weight_ptr, tile_ptr, M, R, a_ring, w_ring, out, full, empty, 0, D, F, KIND,
                 BM, BN, BK, STAGES, GROUP, TAKE_TURNS),
            ),
            (
                _consume_up,
                (h, h_ptr, a, a_ptr, weight_ptr, tile_ptr, M, R, a_ring, w_ring, out, full, empty, 1, D, F, KIND,
                 BM, BN, BK, STAGES, GROUP, TAKE_TURNS),
            ),
            (
                _produce,
                (x, token_ptr, w, tile_ptr, M, R, a_ring, w_ring, full, empty, D, F, BM, BN, BK, STAGES, GROUP, False,
                 GATHER),
            ),
        ],
        [4, 4 if GATHER else 1],
        [REGISTERS, 40 if GATHER else 24],
    )  # fmt: skip


@gluon.jit
def _through_slope(
    p, weight, dh, dh_ptr, part, ring, ready, free, taken, whole, row0, last, end, n0, N: gl.constexpr,
    PIECES: gl.constexpr, F: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Stores dh, PIECE columns at a time, each in the place of h's piece in the ring; (part + sum_f p_f a_f, taken)."""
    if p.shape[1] > PIECE:
        left, right = _halves(p)
        part, taken = _through_slope(
            left, weight, dh, dh_ptr, part, ring, ready, free, taken, whole, row0, last, end, n0, N, PIECES, F, KIND
        )
        part, taken = _through_slope(
            right, weight, dh, dh_ptr, part, ring, ready, free, taken, whole, row0, last, end,
            n0 + p.shape[1] // 2, N, PIECES, F, KIND,
        )  # fmt: skip
    else:
        layout: gl.constexpr = p.type.layout
        slot = taken % PIECES
        mbarrier.wait(ready.index(slot), taken // PIECES & 1)
        h = ring.index(slot).load(layout)
        a, slope = activate_and_slope(h.to(gl.float32), KIND, True)
        part += gl.convert_layout(gl.sum(p * a, 1), part.type.layout, assert_trivial=True)
        scaled = gl.convert_layout(weight, gl.SliceLayout(1, layout), assert_trivial=True)[:, None]
        value = (p * slope * scaled).to(h.dtype)
        if whole:
            ring.index(slot).store(value)
            fence_async_shared()
            tma.async_copy_shared_to_global(dh, [row0, n0], ring.index(slot))
            # all but this one have left the ring
            tma.store_wait(1)
        else:
            row = row0 + gl.arange(0, p.shape[0], gl.SliceLayout(1, layout))
            value = gl.where((row < last)[:, None], value, 0.0)
            tma.store_wait(0)
            _store_rows(dh_ptr, value, row0, end, n0, F)
        mbarrier.arrive(free.index((taken + PIECES - 1) % PIECES), pred=taken % (N // PIECE) > 0)
        taken += 1
    return part, taken


@gluon.jit
def _consume_up_backward(
    dh, dh_ptr, weight_ptr, partial_ptr, tile_ptr, M, R, a_ring, w_ring, full, empty, ring, ready, free,
    CONSUMER: gl.constexpr, D: gl.constexpr, F: gl.constexpr, KIND: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, PIECES: gl.constexpr, GROUP: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
):  # fmt: skip
    NT: gl.constexpr = F // BN
    K_TILES: gl.constexpr = D // BK
    ROWS: gl.constexpr = BM if TAKE_TURNS else BM // 2
    tiles_m = gl.load(tile_ptr + 3 * M)
    total = gl.load(tile_ptr + 3 * M + 1)
    step, tiles = gl.num_programs(0), tiles_m * NT
    first = gl.program_id(0)
    used = 0
    taken = 0
    if TAKE_TURNS:
        first += CONSUMER * step
        used = CONSUMER * K_TILES
        step *= 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    for tile in range(first, tiles, step):
        e, row0, end, nt = _tile(tile_ptr, tile, tiles, tiles_m, M, R, NT, GROUP)
        if not TAKE_TURNS:
            row0 += CONSUMER * ROWS
        last = gl.minimum(end, total)
        row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        weight = gl.load(weight_ptr + row, mask=row < last, other=0.0)
        p, used = _product(a_ring, w_ring, full, empty, used, CONSUMER, ROWS, BM, BN, K_TILES, STAGES, True)
        if TAKE_TURNS:
            used += K_TILES  # the other's
        part = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, layout))
        part, taken = _through_slope(
            p, weight, dh, dh_ptr, part, ring, ready, free, taken, row0 + ROWS <= last, row0, last, end, nt * BN, BN,
            PIECES, F, KIND,
        )  # fmt: skip
        part = gl.where(row < last, part, 0.0)
        gl.store(partial_ptr + nt.to(gl.int64) * R + row, part, mask=row < end)
        tma.store_wait(0)
        mbarrier.arrive(free.index((taken + PIECES - 1) % PIECES))


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
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1 if TAKE_TURNS else 2)
    for i in gl.static_range(PIECES):
        mbarrier.init(ready_0.index(i), count=1)
        mbarrier.init(ready_1.index(i), count=1)
        mbarrier.init(free_0.index(i), count=1)
        mbarrier.init(free_1.index(i), count=1)
    gl.warp_specialize(
        [
            (
                _consume_up_backward,
                (dh, dh_ptr, weight_ptr, partial_ptr, tile_ptr, M, R, g_ring, w_ring, full, empty, ring_0, ready_0,
                 free_0, 0, D, F, KIND, BM, BN, BK, STAGES, PIECES, GROUP, TAKE_TURNS),
            ),
            (
                _consume_up_backward,
                (dh, dh_ptr, weight_ptr, partial_ptr, tile_ptr, M, R, g_ring, w_ring, full, empty, ring_1, ready_1,
                 free_1, 1, D, F, KIND, BM, BN, BK, STAGES, PIECES, GROUP, TAKE_TURNS),
            ),
            (
                _produce,
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
