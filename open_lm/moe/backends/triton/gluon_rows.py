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

from open_lm.moe.backends.triton.activations import activate
from open_lm.moe.backends.triton.rows import _tile

PIECE = gl.constexpr(64)
"""Columns of a tile that go through the activation at a time: 128 bytes, what a descriptor's swizzle spans."""


@gluon.jit
def init(barriers, N: gl.constexpr, COUNT: gl.constexpr):
    for i in gl.static_range(N):
        mbarrier.init(barriers.index(i), count=COUNT)


@gluon.jit
def _tokens(token_ptr, row0, end, total, BM: gl.constexpr, layout: gl.constexpr):
    row = row0 + gl.arange(0, BM, gl.SliceLayout(1, layout))
    return gl.load(token_ptr + row, mask=row < gl.minimum(end, total), other=0)


@gluon.jit
def produce(
    a, token_ptr, w, tile_ptr, M, R, a_ring, w_ring, full, empty,
    D: gl.constexpr, F: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, TRANSPOSED: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Fills the ring with a's rows and the expert's weight."""
    NT: gl.constexpr = F // BN
    tiles_m = gl.load(tile_ptr + 3 * M)
    total = gl.load(tile_ptr + 3 * M + 1)
    step, tiles = gl.num_programs(0), tiles_m * NT
    w_bytes: gl.constexpr = BK * BN * 2
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BK, BK // 8], [4, 1], [1, 0])
    filled = 0
    # A tile's place in the table and its rows' tokens are fetched while the one before is loaded.
    e, row0, end, nt = _tile(tile_ptr, gl.program_id(0), tiles, tiles_m, M, R, NT, GROUP)
    if GATHER:
        k = gl.arange(0, BK, gl.SliceLayout(0, layout))[None, :]
        token = _tokens(token_ptr, row0, end, total, BM, layout)
    for tile in range(gl.program_id(0), tiles, step):
        next_e, next_row0, next_end, next_nt = _tile(tile_ptr, tile + step, tiles, tiles_m, M, R, NT, GROUP)
        if GATHER:
            a_ptrs = a + token.to(gl.int64)[:, None] * D + k
            token = _tokens(token_ptr, next_row0, next_end, total, BM, layout)
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
                # each thread arrives when its copies have: nobody waits for them here
                async_copy.mbarrier_arrive(bar, increment_count=False)
            filled += 1
        e, row0, end, nt = next_e, next_row0, next_end, next_nt


@gluon.jit
def product(
    a_ring, w_ring, full, empty, turn, used, CONSUMER: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    K_TILES: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr, GATHER: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
):  # fmt: skip
    """(ROWS, BN) float32 of the next K_TILES of the ring, which it frees."""
    ROWS: gl.constexpr = BM if TAKE_TURNS else BM // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    if TAKE_TURNS:
        # Until the other has all of its tile: a barrier's phase tells a filling from the last one, not the last two.
        mbarrier.wait(turn.index(CONSUMER), (used // (2 * K_TILES) & 1) ^ (1 - CONSUMER))
    acc = gl.zeros((ROWS, BN), gl.float32, layout)
    for k in range(K_TILES):
        slot = used % STAGES
        mbarrier.wait(full.index(slot), used // STAGES & 1)
        if GATHER:
            fence_async_shared()
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
    if TAKE_TURNS:
        mbarrier.arrive(turn.index(1 - CONSUMER))
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES))
    if TAKE_TURNS:
        used += K_TILES  # the other's
    return acc, used


@gluon.jit
def halves(x):
    """The left and the right half of the columns, in the registers where they are."""
    ROWS: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    left, right = x.reshape((ROWS, 2, N)).permute((0, 2, 1)).split()
    return gl.convert_layout(left, layout, assert_trivial=True), gl.convert_layout(
        right, layout, assert_trivial=True
    )


@gluon.jit
def store_rows(ptr, x, row0, end, n0, F: gl.constexpr):
    """A piece where an expert's rows end: up to row `end`."""
    layout: gl.constexpr = x.type.layout
    row = row0 + gl.arange(0, x.shape[0], gl.SliceLayout(1, layout))
    n = n0 + gl.arange(0, x.shape[1], gl.SliceLayout(0, layout))
    gl.store(ptr + row.to(gl.int64)[:, None] * F + n[None, :], x, mask=(row < end)[:, None])


@gluon.jit
def _send(desc, ptr, x, out, whole, row0, end, n0, OUTS: gl.constexpr, F: gl.constexpr):
    """Stores a piece through `out`, one of OUTS pieces of shared memory that take turns."""
    if whole:
        tma.store_wait(OUTS - 1)
        out.store(x)
        fence_async_shared()
        tma.async_copy_shared_to_global(desc, [row0, n0], out)
    else:
        store_rows(ptr, x, row0, end, n0, F)


@gluon.jit
def _activated(
    acc, weight, h, h_ptr, a, a_ptr, outs, whole, row0, end, n0, AT: gl.constexpr, OUTS: gl.constexpr,
    F: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Stores the pre-activation and the activation, PIECE columns at a time; acc is the tile from its column AT on."""
    if acc.shape[1] > PIECE:
        left, right = halves(acc)
        _activated(left, weight, h, h_ptr, a, a_ptr, outs, whole, row0, end, n0, AT, OUTS, F, KIND)
        _activated(
            right, weight, h, h_ptr, a, a_ptr, outs, whole, row0, end, n0, AT + acc.shape[1] // 2, OUTS, F, KIND
        )
    else:
        sent: gl.constexpr = AT // PIECE * (2 if h is not None and a is not None else 1)
        # the activation is that of the number which is saved
        low = acc.to(outs.dtype)
        if h is not None:
            _send(h, h_ptr, low, outs.index(sent % OUTS), whole, row0, end, n0 + AT, OUTS, F)
        if a is not None:
            value = activate(low.to(gl.float32), KIND, True)
            if weight is not None:
                per_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
                value *= gl.convert_layout(weight, per_row, assert_trivial=True)[:, None]
            out = outs.index((sent + (1 if h is not None else 0)) % OUTS)
            _send(a, a_ptr, value.to(outs.dtype), out, whole, row0, end, n0 + AT, OUTS, F)


@gluon.jit
def _consume(
    h, h_ptr, a, a_ptr, weight_ptr, tile_ptr, M, R, a_ring, w_ring, outs, full, empty, turn,
    CONSUMER: gl.constexpr, D: gl.constexpr, F: gl.constexpr, KIND: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, OUTS: gl.constexpr, GROUP: gl.constexpr,
    TAKE_TURNS: gl.constexpr, GATHER: gl.constexpr,
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
        acc, used = product(
            a_ring, w_ring, full, empty, turn, used, CONSUMER, BM, BN, K_TILES, STAGES, False, GATHER, TAKE_TURNS
        )
        whole = row0 + ROWS <= end
        _activated(acc, weight, h, h_ptr, a, a_ptr, outs, whole, row0, end, nt * BN, 0, OUTS, F, KIND)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "R"])
def up_kernel(
    x, token_ptr, w, h, h_ptr, a, a_ptr, weight_ptr, tile_ptr, M, R,
    D: gl.constexpr, F: gl.constexpr, KIND: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, OUTS: gl.constexpr, GROUP: gl.constexpr, TAKE_TURNS: gl.constexpr,
    GATHER: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """h_RF = x[token] w, a_RF = its activation, times weight if there.

    x is a pointer, or if not GATHER a descriptor of the gathered rows; w a descriptor of (E D, F), h and a (or None)
    of (R, F). OUTS pieces of results are on their way at a time.
    """
    low: gl.constexpr = w.dtype
    ROWS: gl.constexpr = BM if TAKE_TURNS else BM // 2
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, PIECE], low)
    a_ring = gl.allocate_shared_memory(
        low, [STAGES, BM, BK], gl.NVMMASharedLayout.get_default_for([BM, BK], low)
    )
    w_ring = gl.allocate_shared_memory(low, [STAGES, BK, BN], w.layout)
    outs_0 = gl.allocate_shared_memory(low, [OUTS, ROWS, PIECE], out_layout)
    outs_1 = gl.allocate_shared_memory(low, [OUTS, ROWS, PIECE], out_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    init(full, STAGES, 1 + 128 if GATHER else 1)
    init(empty, STAGES, 1 if TAKE_TURNS else 2)
    init(turn, 2, 1)
    gl.warp_specialize(
        [
            (
                _consume,
                (h, h_ptr, a, a_ptr, weight_ptr, tile_ptr, M, R, a_ring, w_ring, outs_0, full, empty, turn, 0, D,
                 F, KIND, BM, BN, BK, STAGES, OUTS, GROUP, TAKE_TURNS, GATHER),
            ),
            (
                _consume,
                (h, h_ptr, a, a_ptr, weight_ptr, tile_ptr, M, R, a_ring, w_ring, outs_1, full, empty, turn, 1, D,
                 F, KIND, BM, BN, BK, STAGES, OUTS, GROUP, TAKE_TURNS, GATHER),
            ),
            (
                produce,
                (x, token_ptr, w, tile_ptr, M, R, a_ring, w_ring, full, empty, D, F, BM, BN, BK, STAGES, GROUP,
                 False, GATHER),
            ),
        ],
        [4, 4 if GATHER else 1],
        [REGISTERS, 40 if GATHER else 24],
    )  # fmt: skip
