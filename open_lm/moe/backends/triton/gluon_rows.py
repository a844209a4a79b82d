"""up for Hopper in Gluon: warps that load, and two warpgroups that multiply and activate at the same time.

What `rows.up_kernel` computes, of ungated experts without biases, in bfloat16, and to the bit. There a tile's
activation and stores wait for its product, and the next product for them. Here a producer fills a ring of tiles in
shared memory, and each of two consumers has half of a tile's rows. It multiplies and, while the tensor cores are at
it, does the activation of the tile before, whose numbers wait in bfloat16, two in a register. Results leave
through shared memory, by tensor descriptors, in the background.

Shapes: T tokens, D model width, E experts, F expert width, R rows, M tiles of rows.
"""

# Kernels are in Gluon's language, which only looks like Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAssignmentType=false

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
def multiply(
    a_ring, w_ring, full, empty, acc, used, K_FIRST: gl.constexpr, K_LAST: gl.constexpr, CONSUMER: gl.constexpr,
    STAGES: gl.constexpr, TRANSPOSED: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """acc plus the next tiles of the ring, K_FIRST to K_LAST of a product: the last is under way at the return."""
    ROWS: gl.constexpr = acc.shape[0]
    for k in range(K_FIRST, K_LAST):
        slot = used % STAGES
        mbarrier.wait(full.index(slot), used // STAGES & 1)
        if GATHER:
            fence_async_shared()
        a = a_ring.index(slot)
        if a_ring.shape[1] > ROWS:
            a = a.slice(CONSUMER * ROWS, ROWS)
        w = w_ring.index(slot)
        if TRANSPOSED:
            w = w.permute((1, 0))
        acc = warpgroup_mma(a, w, acc, use_acc=k > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), pred=k > 0)
        used += 1
    return acc, used


@gluon.jit
def finish(acc, empty, used, STAGES: gl.constexpr):
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES))
    return acc


@gluon.jit
def pack(acc):
    """Four int32 tensors of (ROWS, columns / 8), each of a quarter of the columns, two bfloat16 in a register."""
    ROWS: gl.constexpr = acc.shape[0]
    even, odd = acc.reshape((ROWS, acc.shape[1] // 2, 2)).split()
    packed = gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )
    left, right = packed.reshape((ROWS, 2, acc.shape[1] // 4)).permute((0, 2, 1)).split()
    p0, p1 = left.reshape((ROWS, 2, acc.shape[1] // 8)).permute((0, 2, 1)).split()
    p2, p3 = right.reshape((ROWS, 2, acc.shape[1] // 8)).permute((0, 2, 1)).split()
    return p0, p1, p2, p3


@gluon.jit
def unpack(packed):
    """(ROWS, N) float32, where `multiply` would have it, of what `pack` made of N columns."""
    ROWS: gl.constexpr = packed.shape[0]
    N: gl.constexpr = packed.shape[1] * 2
    even, odd = gl.inline_asm_elementwise(
        "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.bf16 $0, l; cvt.f32.bf16 $1, h; }",
        "=f,=f,r", [packed], dtype=(gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    return gl.convert_layout(gl.join(even, odd).reshape((ROWS, N)), layout, assert_trivial=True)


@gluon.jit
def store_rows(ptr, out, row0, end, n0, F: gl.constexpr):
    """A piece in shared memory, up to row `end`, where an expert's rows end. 16 rows at a time: few registers."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PIECE, PIECE // 8], [4, 1], [1, 0])
    n = n0 + gl.arange(0, PIECE, gl.SliceLayout(0, layout))
    for i in gl.static_range(out.shape[0] // 16):
        row = row0 + 16 * i + gl.arange(0, 16, gl.SliceLayout(1, layout))
        x = out.slice(16 * i, 16).load(layout)
        gl.store(ptr + row.to(gl.int64)[:, None] * F + n[None, :], x, mask=(row < end)[:, None])


@gluon.jit
def _send(desc, ptr, x, out, row0, end, n0, OUTS: gl.constexpr, F: gl.constexpr):
    """Stores a piece through `out`, one of OUTS pieces of shared memory that take turns."""
    if row0 + x.shape[0] <= end:
        tma.store_wait(OUTS - 1)
        out.store(x)
        fence_async_shared()
        tma.async_copy_shared_to_global(desc, [row0, n0], out)
    else:
        tma.store_wait(0)
        out.store(x)
        store_rows(ptr, out, row0, end, n0, F)


@gluon.jit
def _activated(
    packed, weight, h, h_ptr, a, a_ptr, outs, row0, end, n0, AT: gl.constexpr, F: gl.constexpr,
    KIND: gl.constexpr, WEIGHTED: gl.constexpr,
):  # fmt: skip
    """Stores PIECE columns of a tile, from its column AT on: the pre-activation and the activation."""
    OUTS: gl.constexpr = outs.shape[0]
    sent: gl.constexpr = AT // PIECE * (2 if h is not None and a is not None else 1)
    # the activation is that of the number which is saved
    x = unpack(packed)
    if h is not None:
        _send(h, h_ptr, x.to(outs.dtype), outs.index(sent % OUTS), row0, end, n0 + AT, OUTS, F)
    if a is not None:
        value = activate(x, KIND, True)
        if WEIGHTED:
            per_row: gl.constexpr = gl.SliceLayout(1, x.type.layout)
            value *= gl.convert_layout(weight, per_row, assert_trivial=True)[:, None]
        out = outs.index((sent + (1 if h is not None else 0)) % OUTS)
        _send(a, a_ptr, value.to(outs.dtype), out, row0, end, n0 + AT, OUTS, F)


@gluon.jit
def _consume(
    h, h_ptr, a, a_ptr, weight_ptr, tile_ptr, M, R, a_ring, w_ring, outs, full, empty,
    CONSUMER: gl.constexpr, D: gl.constexpr, F: gl.constexpr, KIND: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """Half of a tile's rows: its product, and meanwhile the activation of the tile before, a quarter at a time."""
    gl.static_assert(BN == 4 * PIECE)
    NT: gl.constexpr = F // BN
    K: gl.constexpr = D // BK
    ROWS: gl.constexpr = BM // 2
    WEIGHTED: gl.constexpr = weight_ptr is not None
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    tiles_m = gl.load(tile_ptr + 3 * M)
    total = gl.load(tile_ptr + 3 * M + 1)
    step, tiles = gl.num_programs(0), tiles_m * NT
    used = 0
    # the tile before the first: none of its rows is stored
    row0, end, n0 = 0, 0, 0
    weight = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, layout))
    p0, p1, p2, p3 = pack(gl.zeros((ROWS, BN), gl.float32, layout))
    for tile in range(gl.program_id(0), tiles, step):
        _, next_row0, next_end, nt = _tile(tile_ptr, tile, tiles, tiles_m, M, R, NT, GROUP)
        next_row0 += CONSUMER * ROWS
        next_weight = weight
        if WEIGHTED:
            row = next_row0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            next_weight = gl.load(weight_ptr + row, mask=row < gl.minimum(next_end, total), other=0.0)
        acc = gl.zeros((ROWS, BN), gl.float32, layout)
        acc, used = multiply(
            a_ring, w_ring, full, empty, acc, used, 0, K // 4, CONSUMER, STAGES, False, GATHER
        )
        _activated(p0, weight, h, h_ptr, a, a_ptr, outs, row0, end, n0, 0, F, KIND, WEIGHTED)
        acc, used = multiply(
            a_ring, w_ring, full, empty, acc, used, K // 4, K // 2, CONSUMER, STAGES, False, GATHER
        )
        _activated(p1, weight, h, h_ptr, a, a_ptr, outs, row0, end, n0, PIECE, F, KIND, WEIGHTED)
        acc, used = multiply(
            a_ring, w_ring, full, empty, acc, used, K // 2, K * 3 // 4, CONSUMER, STAGES, False, GATHER
        )
        _activated(p2, weight, h, h_ptr, a, a_ptr, outs, row0, end, n0, 2 * PIECE, F, KIND, WEIGHTED)
        acc, used = multiply(
            a_ring, w_ring, full, empty, acc, used, K * 3 // 4, K, CONSUMER, STAGES, False, GATHER
        )
        _activated(p3, weight, h, h_ptr, a, a_ptr, outs, row0, end, n0, 3 * PIECE, F, KIND, WEIGHTED)
        p0, p1, p2, p3 = pack(finish(acc, empty, used, STAGES))
        row0, end, n0 = next_row0, next_end, nt * BN
        weight = next_weight
    _activated(p0, weight, h, h_ptr, a, a_ptr, outs, row0, end, n0, 0, F, KIND, WEIGHTED)
    _activated(p1, weight, h, h_ptr, a, a_ptr, outs, row0, end, n0, PIECE, F, KIND, WEIGHTED)
    _activated(p2, weight, h, h_ptr, a, a_ptr, outs, row0, end, n0, 2 * PIECE, F, KIND, WEIGHTED)
    _activated(p3, weight, h, h_ptr, a, a_ptr, outs, row0, end, n0, 3 * PIECE, F, KIND, WEIGHTED)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "R"])
def up_kernel(
    x, token_ptr, w, h, h_ptr, a, a_ptr, weight_ptr, tile_ptr, M, R,
    D: gl.constexpr, F: gl.constexpr, KIND: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, OUTS: gl.constexpr, GROUP: gl.constexpr,
    GATHER: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """h_RF = x[token] w, a_RF = its activation, times weight if there.

    x is a pointer, or if not GATHER a descriptor of the gathered rows; w a descriptor of (E D, F), h and a (or
    None) of (R, F). OUTS pieces of results are on their way at a time.
    """
    low: gl.constexpr = w.dtype
    ROWS: gl.constexpr = BM // 2
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, PIECE], low)
    a_ring = gl.allocate_shared_memory(
        low, [STAGES, BM, BK], gl.NVMMASharedLayout.get_default_for([BM, BK], low)
    )
    w_ring = gl.allocate_shared_memory(low, [STAGES, BK, BN], w.layout)
    outs_0 = gl.allocate_shared_memory(low, [OUTS, ROWS, PIECE], out_layout)
    outs_1 = gl.allocate_shared_memory(low, [OUTS, ROWS, PIECE], out_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    init(full, STAGES, 1 + 128 if GATHER else 1)
    init(empty, STAGES, 2)
    gl.warp_specialize(
        [
            (
                _consume,
                (h, h_ptr, a, a_ptr, weight_ptr, tile_ptr, M, R, a_ring, w_ring, outs_0, full, empty, 0, D, F,
                 KIND, BM, BN, BK, STAGES, GROUP, GATHER),
            ),
            (
                _consume,
                (h, h_ptr, a, a_ptr, weight_ptr, tile_ptr, M, R, a_ring, w_ring, outs_1, full, empty, 1, D, F,
                 KIND, BM, BN, BK, STAGES, GROUP, GATHER),
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
