"""Products of ragged groups of rows with their experts' weights, gather and activation inside.

Persistent programs walk over the tiles of `tiles.schedule_kernel`'s table.

Shapes: T tokens, D model width, E experts, F expert width, R rows, M tiles of rows.
"""

# Kernels are in Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from open_lm.moe.backends.triton.activations import activate, activate_and_slope
from open_lm.moe.backends.triton.tiles import multiply_tile, place


@triton.jit
def _bias(ptr, e, n, N: tl.constexpr):
    return tl.load(ptr + e.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _tile(tile_ptr, tile, tiles, tiles_m, M, R, NT: tl.constexpr, GROUP: tl.constexpr):
    """A tile's expert, first row, end of the rows it may write, and column; of no tile: no rows."""
    m, nt = place(tile, tiles_m, NT, GROUP)
    there = tile < tiles
    e = tl.load(tile_ptr + m, mask=there, other=0)
    row0 = tl.load(tile_ptr + M + m, mask=there, other=0)
    end = tl.load(tile_ptr + 2 * M + m, mask=there, other=0)
    return e, row0, tl.minimum(end, R), nt


@triton.jit(do_not_specialize=["M", "R"])
def up_kernel(
    x_ptr, token_ptr, w, v, b_ptr, c_ptr, scale_ptr, weight_ptr, h_ptr, u_ptr, a_ptr, tile_ptr, M, R,
    D: tl.constexpr, F: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    GATED: tl.constexpr, BIASED: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """h_RF = scale x[token] w + b, u_RF = scale x[token] v + c if gated, a_RF = the activation of both.

    With weight_ptr a_RF is weight * the activation.
    """
    NT: tl.constexpr = (F + BN - 1) // BN
    tiles_m = tl.load(tile_ptr + 3 * M)
    total = tl.load(tile_ptr + 3 * M + 1)
    step, tiles = tl.num_programs(0), tiles_m * NT
    # A tile's indices are fetched one tile ahead, its place in the table two: nothing waits for them.
    e, row0, end, nt = _tile(tile_ptr, tl.program_id(0), tiles, tiles_m, M, R, NT, GROUP)
    next_e, next_row0, next_end, next_nt = _tile(
        tile_ptr, tl.program_id(0) + step, tiles, tiles_m, M, R, NT, GROUP
    )
    token = tl.load(
        token_ptr + row0 + tl.arange(0, BM), mask=row0 + tl.arange(0, BM) < tl.minimum(end, total), other=0
    )
    for tile in tl.range(tl.program_id(0), tiles, step, flatten=FLATTEN):
        row = row0 + tl.arange(0, BM)
        real = row < tl.minimum(end, total)
        next_row = next_row0 + tl.arange(0, BM)
        next_token = tl.load(token_ptr + next_row, mask=next_row < tl.minimum(next_end, total), other=0)
        after_e, after_row0, after_end, after_nt = _tile(
            tile_ptr, tile + 2 * step, tiles, tiles_m, M, R, NT, GROUP
        )
        token_64 = token.to(tl.int64)
        n0 = nt * BN
        n = n0 + tl.arange(0, BN)
        h = tl.zeros((BM, BN), tl.float32)
        u = h
        if GATED:
            # one loop with both products: x is read once
            h, u = _two_products(h, u, x_ptr, token_64, w, v, e, n0, D, F, PRECISION, TMA, BN, BK)
        else:
            h = multiply_tile(
                h, x_ptr, token_64, row0, w, e, n0, D, F, False, PRECISION, False, TMA, BM, BN, BK
            )
        if SCALED:
            scale = tl.load(scale_ptr + row, mask=real, other=0.0)[:, None]
            h *= scale
            if GATED:
                u *= scale
        if BIASED:
            h += _bias(b_ptr, e, n, F)
            if GATED:
                u += _bias(c_ptr, e, n, F)
        weight = None
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + row, mask=real, other=0.0)
        low = x_ptr.dtype.element_ty
        _store_activated(
            h, u, weight, h_ptr, u_ptr, a_ptr, row, end, n0, low, F, KIND, FAST, GATED, BM, BN, PARTS
        )
        token = next_token
        e, row0, end, nt = next_e, next_row0, next_end, next_nt
        next_e, next_row0, next_end, next_nt = after_e, after_row0, after_end, after_nt


@triton.jit
def _store_activated(
    h, u, weight, h_ptr, u_ptr, a_ptr, row, end, n0, low: tl.constexpr,
    F: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Stores h, u and the activation of BN columns, PARTS at a time for want of registers."""
    if PARTS > 1:
        left, right = _halves(h, BM, BN)
        u_left, u_right = left, right
        if GATED:
            u_left, u_right = _halves(u, BM, BN)
        _store_activated(
            left, u_left, weight, h_ptr, u_ptr, a_ptr, row, end, n0, low, F, KIND, FAST, GATED, BM, BN // 2,
            PARTS // 2,
        )  # fmt: skip
        _store_activated(
            right, u_right, weight, h_ptr, u_ptr, a_ptr, row, end, n0 + BN // 2, low, F, KIND, FAST, GATED, BM,
            BN // 2, PARTS // 2,
        )  # fmt: skip
    else:
        # the activation is that of the number which is saved
        h_low = h.to(low)
        if h_ptr is not None:
            _store(h_ptr, h_low, row, end, n0, F, BN)
        a = activate(h_low.to(tl.float32), KIND, FAST)
        if GATED:
            u_low = u.to(low)
            if u_ptr is not None:
                _store(u_ptr, u_low, row, end, n0, F, BN)
            a *= u_low.to(tl.float32)
        if a_ptr is not None:
            if weight is not None:
                a *= weight[:, None]
            _store(a_ptr, a, row, end, n0, F, BN)


@triton.jit
def _two_products(
    h, u, x_ptr, token, w, v, e, n0, K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BK)
    n = n0 + tl.arange(0, BN)
    x_ptrs = x_ptr + token[:, None] * K + k[None, :]
    if not TMA:
        offsets = e.to(tl.int64) * K * N + k[:, None].to(tl.int64) * N + n[None, :]
    for k0 in range(0, K, BK):
        if K % BK == 0:  # noqa: SIM108
            x = tl.load(x_ptrs + k0)
        else:
            x = tl.load(x_ptrs + k0, mask=(k0 + k)[None, :] < K, other=0.0)
        if TMA:
            w_tile = w.load([e, k0, n0]).reshape(BK, BN)
            v_tile = v.load([e, k0, n0]).reshape(BK, BN)
        else:
            inside = ((k0 + k)[:, None] < K) & (n[None, :] < N)
            w_tile = tl.load(w + offsets + k0 * N, mask=inside, other=0.0)
            v_tile = tl.load(v + offsets + k0 * N, mask=inside, other=0.0)
        h = tl.dot(x, w_tile, h, input_precision=PRECISION)
        u = tl.dot(x, v_tile, u, input_precision=PRECISION)
    return h, u


@triton.jit(do_not_specialize=["M", "R"])
def up_backward_kernel(
    g_ptr, g_desc, token_ptr, w2, b2_ptr, weight_ptr, h_ptr, u_ptr, dh_ptr, du_ptr, a_ptr, partial_ptr,
    tile_ptr, M, R,
    D: tl.constexpr, F: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    GATED: tl.constexpr, BIASED: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
    PARTS: tl.constexpr, EARLY: tl.constexpr, GATHERED: tl.constexpr,
):  # fmt: skip
    """From the layer's gradient g_TD through the down-projection and the activation, in one pass.

    With p = g[token] w2ᵀ (GATHERED: g_desc has g[token] already) and the activation a of h (and u): dh and du are
    weight * p times a's derivatives, a_RF (if there) becomes weight * a, and partial (F / BN, R) the parts of the
    weight's own gradient sum_f p_f a_f (+ g b2). dh and du may be h's and u's own memory: a tile reads all of its
    own h and u, and nobody else's, before it stores.
    """
    NT: tl.constexpr = (F + BN - 1) // BN
    tiles_m = tl.load(tile_ptr + 3 * M)
    total = tl.load(tile_ptr + 3 * M + 1)
    step, tiles = tl.num_programs(0), tiles_m * NT
    # A tile's indices are fetched one tile ahead, its place in the table two: nothing waits for them.
    e, row0, end, nt = _tile(tile_ptr, tl.program_id(0), tiles, tiles_m, M, R, NT, GROUP)
    next_e, next_row0, next_end, next_nt = _tile(
        tile_ptr, tl.program_id(0) + step, tiles, tiles_m, M, R, NT, GROUP
    )
    token = tl.load(
        token_ptr + row0 + tl.arange(0, BM), mask=row0 + tl.arange(0, BM) < tl.minimum(end, total), other=0
    )
    for tile in tl.range(tl.program_id(0), tiles, step, flatten=FLATTEN):
        row = row0 + tl.arange(0, BM)
        real = row < tl.minimum(end, total)
        next_row = next_row0 + tl.arange(0, BM)
        next_token = tl.load(token_ptr + next_row, mask=next_row < tl.minimum(next_end, total), other=0)
        after_e, after_row0, after_end, after_nt = _tile(
            tile_ptr, tile + 2 * step, tiles, tiles_m, M, R, NT, GROUP
        )
        token_64 = token.to(tl.int64)
        n0 = nt * BN
        if EARLY:
            # fetched while the product is computed
            h, u = _pre_activations(h_ptr, u_ptr, row, real, n0, F, GATED, BN)
        p = tl.zeros((BM, BN), tl.float32)
        if GATHERED:
            p = multiply_tile(p, g_desc, row, row0, w2, e, n0, D, F, True, PRECISION, True, TMA, BM, BN, BK)
        else:
            p = multiply_tile(
                p, g_ptr, token_64, row0, w2, e, n0, D, F, True, PRECISION, False, TMA, BM, BN, BK
            )
        weight = tl.load(weight_ptr + row, mask=real, other=0.0)
        if not EARLY:
            h, u = _pre_activations(h_ptr, u_ptr, row, real, n0, F, GATED, BN)
        part = _through_activation(
            p, h, u, weight, dh_ptr, du_ptr, a_ptr, row, end, n0, F, KIND, FAST, GATED, BM, BN, PARTS
        )
        if BIASED and nt == 0:
            for d0 in range(0, D, BK):
                d = d0 + tl.arange(0, BK)
                there = real[:, None] & (d < D)[None, :]
                g = tl.load(g_ptr + token_64[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
                part += tl.sum(g * _bias(b2_ptr, e, d, D), 1)
        tl.store(partial_ptr + nt.to(tl.int64) * R + row, part, mask=row < end)
        token = next_token
        e, row0, end, nt = next_e, next_row0, next_end, next_nt
        next_e, next_row0, next_end, next_nt = after_e, after_row0, after_end, after_nt


@triton.jit
def _pre_activations(h_ptr, u_ptr, row, real, n0, F: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr):
    """h and u of a tile; zeros behind the expert's rows, so that all that comes of them is zero too."""
    n = n0 + tl.arange(0, BN)
    place_RF = row.to(tl.int64)[:, None] * F + n[None, :]
    inside = real[:, None]
    if F % BN != 0:
        inside = inside & (n < F)[None, :]
    h = tl.load(h_ptr + place_RF, mask=inside, other=0.0)
    u = h
    if GATED:
        u = tl.load(u_ptr + place_RF, mask=inside, other=0.0)
    return h, u


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr):
    return x.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
def _store(ptr, x, row, end, n0, F: tl.constexpr, BN: tl.constexpr):
    """A tile's columns n0…, up to row `end` and column F."""
    n = n0 + tl.arange(0, BN)
    mask = (row < end)[:, None] & (n < F)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * F + n[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _through_activation(
    p, h, u, weight, dh_ptr, du_ptr, a_ptr, row, end, n0,
    F: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Stores what up_backward_kernel does of BN columns, PARTS at a time for want of registers; sum_f p_f a_f."""
    if PARTS > 1:
        p_left, p_right = _halves(p, BM, BN)
        h_left, h_right = _halves(h, BM, BN)
        u_left, u_right = h_left, h_right
        if GATED:
            u_left, u_right = _halves(u, BM, BN)
        part = _through_activation(
            p_left, h_left, u_left, weight, dh_ptr, du_ptr, a_ptr, row, end, n0, F, KIND, FAST, GATED, BM, BN // 2,
            PARTS // 2,
        )  # fmt: skip
        part += _through_activation(
            p_right, h_right, u_right, weight, dh_ptr, du_ptr, a_ptr, row, end, n0 + BN // 2, F, KIND, FAST, GATED,
            BM, BN // 2, PARTS // 2,
        )  # fmt: skip
        return part
    else:
        # Bound to p: else the compiler computes the activation twice, in the layouts of p and of the stores.
        a, slope = activate_and_slope(h.to(tl.float32) + 0.0 * p, KIND, FAST)
        if GATED:
            _store(du_ptr, p * a * weight[:, None], row, end, n0, F, BN)
            slope *= u.to(tl.float32)
            a *= u.to(tl.float32)
        _store(dh_ptr, p * slope * weight[:, None], row, end, n0, F, BN)
        if a_ptr is not None:
            _store(a_ptr, a * weight[:, None], row, end, n0, F, BN)
        return tl.sum(p * a, 1)


@triton.jit(do_not_specialize=["M", "R"])
def rows_kernel(
    a, a2, w, w2, b_ptr, weight_ptr, y_ptr, y_desc, tile_ptr, M, R,
    K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, TWO: tl.constexpr,
    BIASED: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, FLATTEN: tl.constexpr, TMA_STORE: tl.constexpr,
):  # fmt: skip
    """y_RN = a_RK w[e] (+ a2_RK w2[e]) + b[e], or with weight_ptr + weight * b[e]; TRANSPOSED: times wᵀ."""
    NT: tl.constexpr = (N + BN - 1) // BN
    tiles_m = tl.load(tile_ptr + 3 * M)
    for tile in tl.range(tl.program_id(0), tiles_m * NT, tl.num_programs(0), flatten=FLATTEN):
        m, nt = place(tile, tiles_m, NT, GROUP)
        e = tl.load(tile_ptr + m)
        row0 = tl.load(tile_ptr + M + m)
        end = tl.minimum(tl.load(tile_ptr + 2 * M + m), R)
        row = row0 + tl.arange(0, BM)
        # rows behind this expert's last: any numbers will do, they are not stored
        from_row = tl.minimum(row, R - 1).to(tl.int64)
        n0 = nt * BN
        y = tl.zeros((BM, BN), tl.float32)
        y = multiply_tile(y, a, from_row, row0, w, e, n0, K, N, TRANSPOSED, PRECISION, TMA, TMA, BM, BN, BK)
        if TWO:
            y = multiply_tile(
                y, a2, from_row, row0, w2, e, n0, K, N, TRANSPOSED, PRECISION, TMA, TMA, BM, BN, BK
            )
        n = n0 + tl.arange(0, BN)
        if BIASED:
            b = _bias(b_ptr, e, n, N)
            if weight_ptr is not None:
                b *= tl.load(weight_ptr + row, mask=row < R, other=0.0)[:, None]
            y += b
        # A descriptor stores in the background, but whole tiles: it does not know where an expert's rows end.
        if TMA_STORE and row0 + BM <= end:
            y_desc.store([row0, n0], y.to(y_desc.dtype))
        else:
            _store(y_ptr, y, row, end, n0, N, BN)
