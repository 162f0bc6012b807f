import math
from importlib.util import find_spec
from types import SimpleNamespace
import torch
import torch.nn.functional as F
from torch import Tensor
from contextlib import contextmanager
from torch.utils.flop_counter import register_flop_formula
from .scan import _scan_flops, _state_dtype
if find_spec('triton') is None: triton = tl = SimpleNamespace(jit=lambda f: f, constexpr=None)
else:
    import triton
    import triton.language as tl
    from groupmamba.kernels import WALKS, _on
from .fused import _conv, _conv_backward, _gated, _gated_grads, _gated_split, _new, _no_autocast, _no_second_derivative, _parameter, _scan_plan, _tl

@triton.jit
def _row_stats(x, C, real, eps, BM: tl.constexpr, BC: tl.constexpr, ST: tl.constexpr):
    "Mean and 1/deviation of BM rows of C numbers; x points at the rows' first numbers, (BM, 1)."
    s = tl.zeros((BM,), ST); q = tl.zeros((BM,), ST)
    for k in range(0, C, BC):
        c = k + tl.arange(0, BC)
        v = tl.load(x + c[None], mask=(c < C)[None], other=0).to(ST)
        s += tl.sum(v, 1); q += tl.sum(v*v, 1)
    mean = s/real
    return mean, 1/tl.sqrt(tl.maximum(q/real - mean*mean, 0) + eps)

@triton.jit
def _vec(ptr, c, in_c, UNIT: tl.constexpr, WIDE: tl.constexpr, ST: tl.constexpr):
    "Parameters of columns c; 0 for columns that only fill up a group."
    p, in_p = _parameter(c, in_c, UNIT, WIDE)
    return tl.load(ptr + p, mask=in_p, other=0).to(ST)

@triton.jit
def _normed(x, mean, rstd, gain, shift, c, in_c, UNIT: tl.constexpr, WIDE: tl.constexpr, ST: tl.constexpr):
    "Columns c of the LayerNorm of rows x; 0 where there is no column."
    v = (tl.load(x + c[None], mask=in_c[None], other=0).to(ST) - mean[:,None])*rstd[:,None]
    return v*_vec(gain, c, in_c, UNIT, WIDE, ST)[None] + _vec(shift, c, in_c, UNIT, WIDE, ST)[None]

@triton.jit
def _block(w, n, k, in_n, in_k, sn, sk, DT: tl.constexpr):
    "Weights (len(k), len(n)) of a linear layer, transposed: w[n, k]."
    return tl.load(w + n[None]*sn + k[:,None]*sk, mask=in_n[None] & in_k[:,None], other=0).to(DT)

@triton.jit
def _rows_norm(x, gain, shift, y, stats, M, C, eps, UNIT: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, CP: tl.constexpr, ST: tl.constexpr):
    "LayerNorm of rows, and their mean and 1/deviation."
    m, c = tl.program_id(0)*BM + tl.arange(0, BM), tl.arange(0, CP)
    ok, in_c, real = m < M, c < C, C//WIDE*UNIT
    row = tl.minimum(m, M - 1).to(tl.int64)
    at, mask = row[:,None]*C + c[None], ok[:,None] & in_c[None]
    v = tl.load(x + at, mask=mask, other=0).to(ST)
    mean = tl.sum(v, 1)/real
    rstd = 1/tl.sqrt(tl.maximum(tl.sum(v*v, 1)/real - mean*mean, 0) + eps)
    tl.store(stats + 2*row, mean, mask=ok); tl.store(stats + 2*row + 1, rstd, mask=ok)
    v = (v - mean[:,None])*rstd[:,None]*_vec(gain, c, in_c, UNIT, WIDE, ST)[None] + _vec(shift, c, in_c, UNIT, WIDE, ST)[None]
    tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)

@triton.jit
def _rows_gemm(a, w, bias, res, scale, y, M, N, K, L, sa, sn, sk, EVEN: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, HAS_BIAS: tl.constexpr, RES: tl.constexpr, SCALE: tl.constexpr, ST: tl.constexpr, DT: tl.constexpr):
    "y = res + scale·(a wᵀ + bias); a (M, K), w (N, K), y and res (M, N)."
    blocks = tl.cdiv(N, BN)
    m, n, kk = tl.program_id(0)//blocks*BM + tl.arange(0, BM), tl.program_id(0) % blocks*BN + tl.arange(0, BN), tl.arange(0, BK)
    ok, in_n = m < M, n < N
    row = tl.minimum(m, M - 1).to(tl.int64)
    x, wn = a + row[:,None]*sa, w + n[None]*sn
    acc = tl.zeros((BM, BN), ST)
    for k in range(0, K, BK):
        c = k + kk
        if EVEN: t = tl.load(x + c[None]).to(DT)
        else: t = tl.load(x + c[None], mask=(c < K)[None], other=0).to(DT)
        b = tl.load(wn + c[:,None]*sk, mask=in_n[None] if EVEN else in_n[None] & (c < K)[:,None], other=0).to(DT)
        acc += tl.dot(t, b, input_precision='ieee').to(ST)
    if HAS_BIAS: acc += _vec(bias, n, in_n, UNIT, WIDE, ST)[None]
    mask, at = ok[:,None] & in_n[None], row[:,None]*N + n[None]
    if SCALE: acc *= tl.load(scale + row//L).to(ST)[:,None]
    if RES: acc += tl.load(res + at, mask=mask, other=0).to(ST)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)

@triton.jit
def _rows_wide(a, stats, gain, shift, w, bias, y, M, N, K, eps, sn, sk, UNIT: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr, ST: tl.constexpr, DT: tl.constexpr):
    "The same for few columns in and many out: a tile of rows is read once, K <= BK, for all of its columns."
    m, c = tl.program_id(0)*BM + tl.arange(0, BM), tl.arange(0, BK)
    ok, in_c = m < M, c < K
    row = tl.minimum(m, M - 1).to(tl.int64)
    x = tl.load(a + row[:,None]*K + c[None], mask=in_c[None], other=0)
    if NORM:
        t, real = x.to(ST), K//WIDE*UNIT
        mean = tl.sum(t, 1)/real
        rstd = 1/tl.sqrt(tl.maximum(tl.sum(t*t, 1)/real - mean*mean, 0) + eps)
        tl.store(stats + 2*row, mean, mask=ok); tl.store(stats + 2*row + 1, rstd, mask=ok)
        t = (t - mean[:,None])*rstd[:,None]*_vec(gain, c, in_c, UNIT, WIDE, ST)[None] + _vec(shift, c, in_c, UNIT, WIDE, ST)[None]
        x = t.to(DT)
    else: x = x.to(DT)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        in_n = n < N
        acc = tl.dot(x, tl.load(w + n[None]*sn + c[:,None]*sk, mask=in_n[None] & in_c[:,None], other=0).to(DT), input_precision='ieee').to(ST)
        if HAS_BIAS: acc += tl.load(bias + n, mask=in_n, other=0).to(ST)[None]
        tl.store(y + row[:,None]*N + n[None], acc.to(y.dtype.element_ty), mask=ok[:,None] & in_n[None])

@triton.jit
def _rows_in(x, gain, shift, w, zx, sums, stats, L, C, eps, tiles, UNIT: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, UP: tl.constexpr, GP: tl.constexpr, ST: tl.constexpr, DT: tl.constexpr):
    "x and z of the groups of a tile of rows, from their LayerNorm, whose column sums are kept too."
    r = tl.program_id(0) % tiles*BM + tl.arange(0, BM)
    ok, row = r < L, ((tl.program_id(0)//tiles).to(tl.int64)*L + tl.minimum(r, L - 1))
    x += row[:,None]*C
    mean, rstd = _row_stats(x, C, C//WIDE*UNIT, eps, BM, BC, ST)
    if tl.program_id(1) == 0:
        tl.store(stats + 2*row, mean, mask=ok); tl.store(stats + 2*row + 1, rstd, mask=ok)
    u = tl.arange(0, UP)
    in_u = u < WIDE
    for i in range(GP):
        g = tl.program_id(1)*GP + i
        t = tl.where(ok[:,None], _normed(x, mean, rstd, gain, shift, g*WIDE + u, in_u, UNIT, WIDE, ST), 0.)
        tl.store(sums + tl.program_id(0).to(tl.int64)*C + g*WIDE + u, tl.sum(t, 0), mask=in_u)
        out, mask = zx + row[:,None]*(2*C) + (g*WIDE + u)[None], ok[:,None] & in_u[None]
        wg, t = w + g*(2*WIDE*WIDE), t.to(DT)
        tl.store(out, tl.dot(t, _block(wg, u, u, in_u, in_u, WIDE, 1, DT), input_precision='ieee').to(zx.dtype.element_ty), mask=mask)
        tl.store(out + C, tl.dot(t, _block(wg + WIDE*WIDE, u, u, in_u, in_u, WIDE, 1, DT), input_precision='ieee').to(zx.dtype.element_ty), mask=mask)

@triton.jit
def _gate(sums, w1, b1, w2, b2, mean, gate, L, C, R, tiles, UNIT: tl.constexpr, WIDE: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, ST: tl.constexpr):
    "Eq. 7-8 for one image, from its column sums."
    b, c, j = tl.program_id(0).to(tl.int64), tl.arange(0, CP), tl.arange(0, RP)
    in_c, in_j = c < C, j < R
    m = tl.zeros((CP,), ST)
    for i in range(tiles): m += tl.load(sums + (b*tiles + i)*C + c, mask=in_c, other=0)
    m = m/L
    tl.store(mean + b*C + c, m, mask=in_c)
    p, in_p = _parameter(c, in_c, UNIT, WIDE)
    both, real = in_j[:,None] & in_p[None], C//WIDE*UNIT
    h = tl.sum(tl.load(w1 + j[:,None]*real + p[None], mask=both, other=0).to(ST)*m[None], 1) + tl.load(b1 + j, mask=in_j, other=0).to(ST)
    s = tl.sum(tl.load(w2 + p[None]*R + j[:,None], mask=both, other=0).to(ST)*tl.maximum(h, 0)[:,None], 0) + tl.load(b2 + p, mask=in_p, other=0).to(ST)
    tl.store(gate + b*C + c, tl.sigmoid(s), mask=in_c)

@triton.jit
def _gate_back(q, mean, gate, w1, b1, w2, skip, dmean, h_out, dh_out, d_out, mean_out, dskip, L, C, R, tiles, UNIT: tl.constexpr, WIDE: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr,
    ST: tl.constexpr):
    "Back through the gate of one image, from the sums of dt·o·norm(x): gradients of its mean, hidden units and sigmoid's argument; the image's share of that of skip."
    b, c, j = tl.program_id(0).to(tl.int64), tl.arange(0, CP), tl.arange(0, RP)
    in_c, in_j, real = c < C, j < R, C//WIDE*UNIT
    p, in_p = _parameter(c, in_c, UNIT, WIDE)
    both = in_j[:,None] & in_p[None]
    s = tl.zeros((CP,), ST)
    for i in range(tiles): s += tl.load(q + (b*tiles + i)*C + c, mask=in_c, other=0)
    g, m = tl.load(gate + b*C + c, mask=in_c, other=0), tl.load(mean + b*C + c, mask=in_c, other=0)
    tl.store(dskip + b, tl.sum(s*g, 0))
    d = tl.where(in_p, s*tl.load(skip).to(ST)*g*(1 - g), 0.)
    w = tl.load(w1 + j[:,None]*real + p[None], mask=both, other=0).to(ST)
    h = tl.maximum(tl.sum(w*m[None], 1) + tl.load(b1 + j, mask=in_j, other=0).to(ST), 0)
    dh = tl.where(h > 0, tl.sum(tl.load(w2 + p[None]*R + j[:,None], mask=both, other=0).to(ST)*d[None], 1), 0.)
    tl.store(dmean + b*C + c, tl.sum(w*dh[:,None], 0), mask=in_c)
    tl.store(h_out + b*R + j, h, mask=in_j); tl.store(dh_out + b*R + j, dh, mask=in_j)
    tl.store(d_out + b*real + p, d, mask=in_p); tl.store(mean_out + b*real + p, m, mask=in_p)

@triton.jit
def _tile_of(x, stats, gain, shift, gate, C, L, tiles, UNIT: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, UP: tl.constexpr, ST: tl.constexpr):
    "For a tile of an image's rows and one group: row numbers, columns, which of both exist, the LayerNorm of x and the gate."
    r, b = tl.program_id(0) % tiles*BM + tl.arange(0, BM), (tl.program_id(0)//tiles).to(tl.int64)
    u = tl.arange(0, UP)
    in_u, c, row = u < WIDE, tl.program_id(1)*WIDE + u, b*L + tl.minimum(r, L - 1)
    t = _normed(x + row[:,None]*C, tl.load(stats + 2*row).to(ST), tl.load(stats + 2*row + 1).to(ST), gain, shift, c, in_u, UNIT, WIDE, ST)
    return row, c, in_u, (r < L)[:,None] & in_u[None], t, tl.load(gate + b*C + c, mask=in_u, other=0).to(ST)[None]

@triton.jit
def _rows_mix(v, x, stats, gain, shift, w, skip, gate, t, L, C, tiles, UNIT: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, UP: tl.constexpr, ST: tl.constexpr, DT: tl.constexpr):
    "t = (v wᵀ)·skip·norm(x)·gate, a group at a time."
    row, c, in_u, mask, xn, g = _tile_of(x, stats, gain, shift, gate, C, L, tiles, UNIT, WIDE, BM, UP, ST)
    u, at = tl.arange(0, UP), row[:,None]*C + c[None]
    wg = _block(w + tl.program_id(1)*(WIDE*WIDE), u, u, in_u, in_u, WIDE, 1, DT)
    o = tl.dot(tl.load(v + at, mask=mask, other=0).to(DT), wg, input_precision='ieee').to(ST)
    tl.store(t + at, (o*tl.load(skip).to(ST)*xn*g).to(t.dtype.element_ty), mask=mask)

@triton.jit
def _rows_mix_back(dt, v, x, stats, gain, shift, w, skip, gate, do, dv, dxn, q, L, C, tiles, UNIT: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, UP: tl.constexpr, ST: tl.constexpr, DT: tl.constexpr):
    "Gradients of o = v wᵀ, of v and of norm(x), and for every image, tile and channel the sum of dt·o·norm(x)."
    row, c, in_u, mask, xn, g = _tile_of(x, stats, gain, shift, gate, C, L, tiles, UNIT, WIDE, BM, UP, ST)
    u, at = tl.arange(0, UP), row[:,None]*C + c[None]
    wg = w + tl.program_id(1)*(WIDE*WIDE)
    o = tl.dot(tl.load(v + at, mask=mask, other=0).to(DT), _block(wg, u, u, in_u, in_u, WIDE, 1, DT), input_precision='ieee').to(ST)
    d, s = tl.load(dt + at, mask=mask, other=0).to(ST), tl.load(skip).to(ST)
    tl.store(q + tl.program_id(0).to(tl.int64)*C + c, tl.sum(d*o*xn, 0), mask=in_u)
    tl.store(dxn + at, (d*o*s*g).to(dxn.dtype.element_ty), mask=mask)
    d = (d*s*xn*g).to(DT)
    tl.store(do + at, d.to(do.dtype.element_ty), mask=mask)
    tl.store(dv + at, tl.dot(d, _block(wg, u, u, in_u, in_u, 1, WIDE, DT), input_precision='ieee').to(dv.dtype.element_ty), mask=mask)

@triton.jit
def _rows_in_back(dzx, w, dmean, dxn, L, C, tiles, WIDE: tl.constexpr, BM: tl.constexpr, UP: tl.constexpr, ST: tl.constexpr, DT: tl.constexpr):
    "Adds to dxn what comes through the in-projection and through the mean of each image."
    r, b = tl.program_id(0) % tiles*BM + tl.arange(0, BM), (tl.program_id(0)//tiles).to(tl.int64)
    u = tl.arange(0, UP)
    in_u, c, row = u < WIDE, tl.program_id(1)*WIDE + u, b*L + tl.minimum(r, L - 1)
    mask, at = (r < L)[:,None] & in_u[None], row[:,None]*C + c[None]
    wg, dz = w + tl.program_id(1)*(2*WIDE*WIDE), dzx + row[:,None]*(2*C) + c[None]
    s = tl.dot(tl.load(dz, mask=mask, other=0).to(DT), _block(wg, u, u, in_u, in_u, 1, WIDE, DT), input_precision='ieee').to(ST)
    s += tl.dot(tl.load(dz + C, mask=mask, other=0).to(DT), _block(wg + WIDE*WIDE, u, u, in_u, in_u, 1, WIDE, DT), input_precision='ieee').to(ST)
    s += tl.load(dmean + b*C + c, mask=in_u, other=0).to(ST)[None]/L + tl.load(dxn + at, mask=mask, other=0).to(ST)
    tl.store(dxn + at, s.to(dxn.dtype.element_ty), mask=mask)

@triton.jit
def _rows_norm_back(g, x, stats, gain, res, dx, part, M, C, rows, UNIT: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, CP: tl.constexpr, RES: tl.constexpr, ST: tl.constexpr):
    "dx = res + gradient of a LayerNorm's input, given that of its output; a share of the gradients of gain and shift, (programs, 2, C)."
    c = tl.arange(0, CP)
    in_c, m0 = c < C, tl.program_id(0)*rows
    gn, real = _vec(gain, c, in_c, UNIT, WIDE, ST)[None], C//WIDE*UNIT
    in_p = _parameter(c, in_c, UNIT, WIDE)[1]
    dgain = tl.zeros((CP,), ST); dshift = tl.zeros((CP,), ST)
    for i in range(0, rows, BM):
        m = m0 + i + tl.arange(0, BM)
        mask, at = (m < M)[:,None] & in_c[None], tl.minimum(m, M - 1).to(tl.int64)[:,None]*C + c[None]
        mean, rstd = (tl.load(stats + 2*tl.minimum(m, M - 1).to(tl.int64)).to(ST)[:,None], tl.load(stats + 2*tl.minimum(m, M - 1).to(tl.int64) + 1).to(ST)[:,None])
        d = tl.load(g + at, mask=mask, other=0).to(ST)
        h = tl.where(mask & in_p[None], (tl.load(x + at, mask=mask, other=0).to(ST) - mean)*rstd, 0.)
        dgain += tl.sum(d*h, 0); dshift += tl.sum(d, 0)
        d *= gn
        d = tl.where(in_p[None], rstd*(d - (tl.sum(d, 1)/real)[:,None] - h*(tl.sum(d*h, 1)/real)[:,None]), 0.)
        if RES: d += tl.load(res + at, mask=mask, other=0).to(ST)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=mask)
    part += tl.program_id(0)*2*C + c
    tl.store(part, dgain, mask=in_c); tl.store(part + C, dshift, mask=in_c)

@triton.jit
def _rows_wgrad(dy, a, shares, M, rows, sdy, sa, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HALVES: tl.constexpr, BIAS: tl.constexpr, ST: tl.constexpr, DT: tl.constexpr):
    "Shares of dyᵀ a, blocks·N·K numbers, and behind them of the sum of dy, N numbers. Block z is half z % HALVES of group z // HALVES."
    nk = tl.cdiv(K, BK)
    z, split = tl.program_id(1), tl.program_id(2)
    n, k = tl.program_id(0)//nk*BN + tl.arange(0, BN), tl.program_id(0) % nk*BK + tl.arange(0, BK)
    in_n, in_k, g = n < N, k < K, z//HALVES
    dy += z % HALVES*C + g*N + n[None]
    a += g*K + k[None]
    acc = tl.zeros((BN, BK), ST); sums = tl.zeros((BN,), ST)
    for i in range(0, rows, BT):
        m = split*rows + i + tl.arange(0, BT)
        ok, row = m < M, tl.minimum(m, M - 1).to(tl.int64)
        d = tl.load(dy + row[:,None]*sdy, mask=ok[:,None] & in_n[None], other=0)
        t = tl.load(a + row[:,None]*sa, mask=ok[:,None] & in_k[None], other=0)
        acc += tl.dot(tl.trans(d.to(DT)), t.to(DT), input_precision='ieee').to(ST)
        if BIAS: sums += tl.sum(d.to(ST), 0)
    shares += split.to(tl.int64)*SIZE
    tl.store(shares + (z*N + n[:,None])*K + k[None], acc, mask=in_n[:,None] & in_k[None])
    if BIAS and tl.program_id(0) % nk == 0: tl.store(shares + tl.num_programs(1)*N*K + n, sums, mask=in_n)

@triton.jit
def _wider(p, out, size, K, KP, UNIT_N: tl.constexpr, WIDE_N: tl.constexpr, UNIT_K: tl.constexpr, WIDE_K: tl.constexpr, BLOCK: tl.constexpr):
    "A matrix (N, K) with its groups of rows and of columns filled up with zeros, in another dtype."
    i = tl.program_id(0)*BLOCK + tl.arange(0, BLOCK)
    n, k = i//KP, i % KP
    row, in_n = _parameter(n, i < size, UNIT_N, WIDE_N)
    col, in_k = _parameter(k, in_n, UNIT_K, WIDE_K)
    tl.store(out + i, tl.load(p + row*K + col, mask=in_k, other=0).to(out.dtype.element_ty), mask=i < size)

# ---- plans and launches
def _p2(n, least=16): return max(least, triton.next_power_of_2(n))
def _types(x): return dict(ST=_tl(_state_dtype(x)), DT=_tl(x.dtype if x.is_cuda else _state_dtype(x)))   # Triton's interpreter knows no bfloat16 products

PLANS = dict(                        # blocks, warps and stages, as an H100 likes them
    gemm=lambda m, n, k: (128, 64, 64, 4, 3) if n <= 64 else (64, 128, 64, 4, 3) if n <= 128 or m < 8192 else (128, 128, 64, 4, 3),
    wide=lambda n, k: (128, 128, 8, 3) if k <= 64 else (64, 64, 4, 3),
    rows=lambda unit, l: (64, 4) if l >= 64 else (32, 4),
    mix_back=lambda unit, l: (32, 4) if unit > 64 or l < 64 else (64, 4),
    wgrad=lambda n, k: (128, min(64, _p2(n)), min(64, _p2(k)), 4, 3) if min(n, k) <= 64 else (64, min(128, _p2(n)), min(128, _p2(k)), 4, 3),
    norm=lambda c: (32, 4) if c <= 128 else (4, 2))

def _units(units, c): return dict(UNIT=units[0], WIDE=units[1]) if units else dict(UNIT=c, WIDE=c)

def norm_rows(x, gain, shift, eps, units=None):
    "LayerNorm of rows (M, C), and their statistics."
    (m, c), (bm, warps) = x.shape, PLANS['norm'](x.shape[1])
    y, stats = torch.empty_like(x), x.new_empty(m, 2, dtype=_state_dtype(x))
    with _on(x): _rows_norm[(triton.cdiv(m, bm),)](x, gain, shift, y, stats, m, c, eps, **_units(units, c), BM=bm, CP=_p2(c), ST=_tl(_state_dtype(x)), num_warps=warps)
    return y, stats

def gemm(a, w, bias=None, res=None, scale=None, rows_per_image=1, units=None):
    "res + scale·(a wᵀ + bias); a (M, K); w (N, K), any strides; bias and scale one a column and an image."
    (m, k), n = a.shape, w.shape[0]
    y = a.new_empty(m, n)
    if k <= 128 and n >= 4*k and res is None and scale is None and units is None: return _wide(a, a, None, w, bias, y)
    bm, bn, bk, warps, stages = PLANS['gemm'](m, n, k)
    with _on(a): _rows_gemm[(triton.cdiv(m, bm)*triton.cdiv(n, bn),)](a, w, a if bias is None else bias, a if res is None else res, a if scale is None else scale, y, m, n, k, rows_per_image,
        a.stride(0), *w.stride(), EVEN=k % bk == 0, BM=bm, BN=bn, BK=bk, HAS_BIAS=bias is not None, RES=res is not None, SCALE=scale is not None, **_units(units, n), **_types(a),
        num_warps=warps, num_stages=stages)
    return y

def _wide(a, stats, norm, w, bias, y, units=None):
    "y = norm(a) wᵀ + bias for rows of at most 128 columns."
    (m, k), n, (gain, shift, eps) = a.shape, w.shape[0], norm or (a, a, 0.)
    bm, bn, warps, stages = PLANS['wide'](n, k)
    with _on(a): _rows_wide[(triton.cdiv(m, bm),)](a, stats, gain, shift, w, a if bias is None else bias, y, m, n, k, eps, *w.stride(), BM=bm, BN=bn, BK=_p2(k), NORM=norm is not None,
        HAS_BIAS=bias is not None, **_units(units, k), **_types(a), num_warps=warps, num_stages=stages)
    return y

def norm_gemm(x, norm, w, bias, units):
    "norm(x) wᵀ + bias, and the norm's statistics: in one kernel where rows are short."
    if x.shape[1] <= 128:
        y, stats = x.new_empty(len(x), len(w)), x.new_empty(len(x), 2, dtype=_state_dtype(x))
        return _wide(x, stats, norm, w, bias, y, units), stats
    xn, stats = norm_rows(x, *norm, units)
    return gemm(xn, w, bias), stats

def wgrad(dy, a, bias=False, groups=1, halves=1):
    "dyᵀ a in float32, (N, K), and behind it, in the same flat tensor, the column sums of dy. Grouped: dy (M, halves·groups·N), a (M, groups·K) give (groups·halves·N, K)."
    m, n, k = len(dy), dy.shape[1]//(groups*halves), a.shape[1]//groups
    bt, bn, bk, warps, stages = PLANS['wgrad'](n, k)
    tiles, blocks = triton.cdiv(n, bn)*triton.cdiv(k, bk), groups*halves
    rows = triton.cdiv(triton.cdiv(m, max(1, min(264//(tiles*blocks), m//256))), bt)*bt
    shares = a.new_empty(triton.cdiv(m, rows), blocks*n*k + n*bias, dtype=_state_dtype(a))
    with _on(a): _rows_wgrad[(tiles, blocks, len(shares))](dy, a, shares, m, rows, dy.stride(0), a.stride(0), N=n, K=k, C=groups*n, SIZE=shares.shape[1], BT=bt, BN=bn, BK=bk, HALVES=halves, BIAS=bias,
        **_types(a), num_warps=warps, num_stages=stages)
    return shares.sum(0)

def norm_back(g, x, stats, gain, part, res=None, units=None):
    "res + the gradient of a LayerNorm's input from that of its output; shares of those of gain and shift go to `part`. Rows (M, C)."
    (m, c), (bm, warps) = x.shape, PLANS['norm'](x.shape[1])
    rows = triton.cdiv(triton.cdiv(m, len(part)), bm)*bm
    dx = torch.empty_like(x)
    with _on(x): _rows_norm_back[(len(part),)](g, x, stats, gain, x if res is None else res, dx, part, m, c, rows, **_units(units, c), BM=bm, CP=_p2(c), RES=res is not None,
        ST=_tl(_state_dtype(x)), num_warps=warps)
    return dx

def _parts(x, n=1): return x.new_empty(n, min(528, x.shape[0]), 2, x.shape[1], dtype=_state_dtype(x))

def widen(p, unit, wide, dims=(0,)):
    "A parameter with every group of `unit` numbers along `dims` filled up with zeros to `wide`."
    if unit == wide: return p
    for d in dims:
        p = F.pad(p.unflatten(d, (-1, unit)), (0, 0)*(p.dim() - 1 - d) + (0, wide - unit)).flatten(d, d + 1)
    return p

def narrow(p, unit, wide, dims=(0,)):
    "The inverse of `widen`."
    if unit == wide: return p
    for d in dims: p = p.unflatten(d, (-1, wide)).narrow(d + 1, 0, unit).flatten(d, d + 1)
    return p

def _cast(params, dtype, unit, wide, dims):
    "Matrices in the dtype of the products, groups filled up along `dims` of each."
    if wide == unit:
        if all(p.dtype == dtype for p in params): return [p.contiguous() for p in params]
        out = [torch.empty_like(p, dtype=dtype, memory_format=torch.contiguous_format) for p in params]
        torch._foreach_copy_(out, list(params))
        return out
    out = []
    for p, d in zip(params, dims):
        n, k = (p.shape[i]//unit*wide if i in d else p.shape[i] for i in (0, 1))
        out.append(p.new_empty(n, k, dtype=dtype))
        rows, cols = ((unit, wide) if i in d else (p.shape[i], p.shape[i]) for i in (0, 1))
        with _on(p): _wider[(triton.cdiv(n*k, 1024),)](p.contiguous(), out[-1], n*k, p.shape[1], k, UNIT_N=rows[0], WIDE_N=rows[1], UNIT_K=cols[0], WIDE_K=cols[1], BLOCK=1024)
    return out

def _tiles(x, unit, plan='rows'):
    "(B, L, C), rows and warps a program, tiles an image."
    b, l, c = len(x), x.shape[1]*x.shape[2], x.shape[3]
    bm, warps = PLANS[plan](unit, l)
    return b, l, c, bm, warps, triton.cdiv(l, bm)

MIXER_DIMS, FFN_DIMS = ((0, 1), (0, 1), (0, 1)), ((1,), (0,))
def _rows(x): return x.flatten(0, 2)
def _scaled(dy, scale): return _rows(dy if scale is None else (dy*scale.view(-1, 1, 1, 1)).to(dy.dtype))

def mixer_forward(x, scale, gain, shift, w1, b1, w2, b2, w_in, k, kb, x_proj, dt_w, A_log, D, dt_b, ng, nb, w_out, skip, w, bias, eps, geps, walks):
    "y, and for the backward pass zx, u, borders, v, t, the statistics of x and of t, the mean of every image and its gate."
    G, wide, st, types = len(walks), x.shape[3]//len(walks), _state_dtype(x), _types(x)
    unit = len(gain)//G
    groups, units = dict(UNIT=unit, WIDE=wide), (unit, wide)
    w_in, w_out, w = _cast((w_in, w_out, w), x.dtype, *units, MIXER_DIMS)
    b, l, c, bm, warps, tiles = _tiles(x, wide)
    zx, stats, sums = x.new_empty(*x.shape[:3], 2*c), x.new_empty(b*l, 2, dtype=st), x.new_empty(b*tiles, c, dtype=st)
    gp = G if wide <= 32 else 1
    with _on(x):
        _rows_in[(b*tiles, G//gp)](x, gain, shift, w_in, zx, sums, stats, l, c, eps, tiles, BM=bm, BC=min(128, _p2(c)), UP=_p2(wide), GP=gp, **groups, **types, num_warps=warps)
        mean, gate, t = x.new_empty(b, c, dtype=st), x.new_empty(b, c, dtype=st), _new(x)
        _gate[(b,)](sums, w1, b1, w2, b2, mean, gate, l, c, len(b1), tiles, CP=_p2(c), RP=_p2(len(b1)), **groups, ST=types['ST'], num_warps=8)
    u = _conv(zx[...,:c], k, kb, 'silu', unit=unit if wide > unit else None)
    v, borders = _gated(u, zx, x_proj, dt_w, -torch.exp(A_log), D, dt_b, ng, nb, geps, walks)
    with _on(x): _rows_mix[(b*tiles, G)](v, x, stats, gain, shift, w_out, skip, gate, t, l, c, tiles, BM=bm, UP=_p2(wide), **groups, **types, num_warps=warps)
    tn, tstats = norm_rows(_rows(t), gain, shift, eps, units)
    y = gemm(tn, w, bias, _rows(x), scale, l, units)
    return y.view_as(x), zx, u, borders, v, t, stats, tstats, mean, gate

def mixer_backward(dy, x, zx, u, borders, v, t, stats, tstats, mean, gate, scale, gain, shift, w1, b1, w2, b2, w_in, k, kb, x_proj, dt_w, A_log, D, dt_b, ng, nb, w_out, skip, w, bias, eps, geps, walks):
    "Gradients of x and, several parameters in one tensor, of the rest: `_mixer_grads` takes them apart."
    G, wide, types = len(walks), x.shape[3]//len(walks), _types(x)
    unit = len(gain)//G
    units, groups = (unit, wide), dict(UNIT=unit, WIDE=wide)
    cw_in, cw_out, cw = _cast((w_in, w_out, w), x.dtype, *units, MIXER_DIMS)
    b, l, c, bm, warps, tiles = _tiles(x, wide, 'mix_back')
    ds, part = _scaled(dy, scale), _parts(_rows(x), 2)
    dtn = gemm(ds, cw.t())
    dw = wgrad(ds, norm_rows(_rows(t), gain, shift, eps, units)[0], bias=True)
    dt = norm_back(dtn, _rows(t), tstats, gain, part[0], units=units)
    def new(*s): return x.new_empty(*s, dtype=_state_dtype(x))
    do, dv, dxn, q = _new(x), _new(x), dtn, new(b, tiles, c)
    with _on(x): _rows_mix_back[(b*tiles, G)](dt, v, x, stats, gain, shift, cw_out, skip, gate, do, dv, dxn, q, l, c, tiles, BM=bm, UP=_p2(wide), **groups, **types, num_warps=warps)
    dw_out = wgrad(_rows(do), _rows(v), groups=G)
    r = len(b1)
    dmean, h, dh, d, m, dskip = new(b, c), new(b, r), new(b, r), new(b, G*unit), new(b, G*unit), new(b)
    with _on(x): _gate_back[(b,)](q, mean, gate, w1, b1, w2, skip, dmean, h, dh, d, m, dskip, l, c, r, tiles, CP=_p2(c), RP=_p2(r), **groups, ST=types['ST'], num_warps=8)
    with _no_autocast(x): dgate = dh.t() @ m, dh.sum(0), d.t() @ h, d.sum(0)
    A, dzx = -torch.exp(A_log), _new(zx)
    du, dscan, dnorm = _gated_grads(dv, u, zx, borders, x_proj, dt_w, A, D, dt_b, ng, nb, geps, walks, dzx)
    taps = _conv_backward(du, zx[...,:c], k, kb, 'silu', out=dzx[...,:c], unit=unit if wide > unit else None)[1]
    b, l, c, bm, warps, tiles = _tiles(x, wide)
    with _on(x): _rows_in_back[(b*tiles, G)](dzx, cw_in, dmean, dxn, l, c, tiles, WIDE=wide, BM=bm, UP=_p2(wide), **types, num_warps=warps)
    dw_in = wgrad(_rows(dzx), norm_rows(_rows(x), gain, shift, eps, units)[0], groups=G, halves=2)
    dx = norm_back(dxn, _rows(x), stats, gain, part[1], _rows(dy), units)
    return dx.view_as(x), part.sum((0, 1)), *dgate, dw_in, taps, dscan, dnorm, dw_out, dskip.sum().view(1), dw

def _mixer_grads(grads, params, wide):
    "The gradient of every parameter, from what `mixer_backward` returns."
    norm, g1, gb1, g2, gb2, dw_in, taps, dscan, dnorm, dw_out, dskip, dw = grads
    gain, shift, w1, b1, w2, b2, w_in, k, kb, x_proj, dt_w, A_log, D, dt_b, ng, nb, w_out, skip, w, bias = params
    unit, c = len(gain)//4, 4*wide
    dgain, dshift = narrow(norm, unit, wide, (1,))
    dx_proj, ddt_w, dA, dD, ddt_b, dng, dnb = _gated_split(dscan, dnorm, x_proj, dt_w, A_log)
    taps = narrow(taps, unit, wide, (1,))
    both = (0, 1)
    out = (dgain, dshift, g1, gb1, g2, gb2, narrow(dw_in.view(2*c, wide), unit, wide, both), taps[:9].t(), taps[9], dx_proj, ddt_w, -dA*torch.exp(A_log), dD, ddt_b, dng, dnb,
           narrow(dw_out.view(c, wide), unit, wide, both), dskip, narrow(dw[:c*c].view(c, c), unit, wide, both), narrow(dw[c*c:], unit, wide))
    return [g.reshape(p.shape).to(p.dtype) for g, p in zip(out, params)]

def ffn_forward(x, scale, gain, shift, w1, b1, k, kb, w2, b2, eps):
    "y, and for the backward pass h and the statistics of x."
    units, l = (len(gain)//4, x.shape[3]//4), x.shape[1]*x.shape[2]
    w1, w2 = _cast((w1, w2), x.dtype, *units, FFN_DIMS)
    h, stats = norm_gemm(_rows(x), (gain, shift, eps), w1, b1, units)
    h = h.view(*x.shape[:3], -1)
    return gemm(_rows(_conv(h, k, kb, 'gelu')), w2, b2, _rows(x), scale, l, units).view_as(x), h, stats

def ffn_backward(dy, x, h, stats, scale, gain, shift, w1, b1, k, kb, w2, b2, eps):
    "Gradients of x and, several parameters in one tensor, of the rest: `_ffn_grads` takes them apart."
    units = len(gain)//4, x.shape[3]//4
    cw1, cw2 = _cast((w1, w2), x.dtype, *units, FFN_DIMS)
    ds, part = _scaled(dy, scale), _parts(_rows(x))
    da = gemm(ds, cw2.t()).view_as(h)
    dh, taps, a = _conv_backward(da, h, k, kb, 'gelu', save_y=True)
    del da
    dw2 = wgrad(ds, _rows(a), bias=True)
    del a
    dxn = gemm(_rows(dh), cw1.t())
    dw1 = wgrad(_rows(dh), norm_rows(_rows(x), gain, shift, eps, units)[0], bias=True)
    dx = norm_back(dxn, _rows(x), stats, gain, part[0], _rows(dy), units)
    return dx.view_as(x), part.sum((0, 1)), dw1, taps, dw2

def _ffn_grads(grads, params, wide):
    "The gradient of every parameter, from what `ffn_backward` returns."
    norm, dw1, taps, dw2 = grads
    gain, shift, w1, b1, k, kb, w2, b2 = params
    unit, c, m = len(gain)//4, 4*wide, len(b1)
    dgain, dshift = narrow(norm, unit, wide, (1,))
    out = (dgain, dshift, narrow(dw1[:m*c].view(m, c), unit, wide, (1,)), dw1[m*c:], taps[:9].t(), taps[9], narrow(dw2[:c*m].view(c, m), unit, wide), narrow(dw2[c*m:], unit, wide))
    return [g.reshape(p.shape).to(p.dtype) for g, p in zip(out, params)]

# ---- operators
_MIXER = 'gain shift fc1 fc1_bias fc2 fc2_bias in_proj conv conv_bias x_proj dt_weight A_log D dt_bias scan_gain scan_shift out_proj skip proj proj_bias'.split()
_FFN = 'gain shift fc1 fc1_bias conv conv_bias fc2 fc2_bias'.split()
def _list(names): return ', '.join(f'Tensor {n}' for n in names)

_mixer_op = torch.library.custom_op('groupmamba::mixer_block', mixer_forward, mutates_args=(),
    schema=f'(Tensor x, Tensor? scale, {_list(_MIXER)}, float eps, float scan_eps, int[] walks) -> ({", ".join(["Tensor"]*10)})')
_mixer_backward_op = torch.library.custom_op('groupmamba::mixer_block_backward', mixer_backward, mutates_args=(),
    schema=f'(Tensor dy, Tensor x, Tensor zx, Tensor u, Tensor borders, Tensor v, Tensor t, Tensor stats, Tensor tstats, Tensor mean, Tensor gate, Tensor? scale, {_list(_MIXER)}, float eps, float scan_eps, int[] walks) -> ({", ".join(["Tensor"]*13)})')
_ffn_op = torch.library.custom_op('groupmamba::ffn_block', ffn_forward, mutates_args=(), schema=f'(Tensor x, Tensor? scale, {_list(_FFN)}, float eps) -> (Tensor, Tensor, Tensor)')
_ffn_backward_op = torch.library.custom_op('groupmamba::ffn_block_backward', ffn_backward, mutates_args=(),
    schema=f'(Tensor dy, Tensor x, Tensor h, Tensor stats, Tensor? scale, {_list(_FFN)}, float eps) -> ({", ".join(["Tensor"]*5)})')

def _norm_forward(x, gain, shift, eps): return tuple(t.view(s) for t, s in zip(norm_rows(x.flatten(0, -2), gain, shift, eps), (x.shape, (*x.shape[:-1], 2))))

def _norm_backward(dy, x, stats, gain):
    part = _parts(x.flatten(0, -2))
    return norm_back(dy.flatten(0, -2), x.flatten(0, -2), stats, gain, part[0]).view_as(x), part.sum((0, 1))

_norm_op = torch.library.custom_op('groupmamba::rows_norm', _norm_forward, mutates_args=(), schema='(Tensor x, Tensor gain, Tensor shift, float eps) -> (Tensor, Tensor)')
_norm_backward_op = torch.library.custom_op('groupmamba::rows_norm_backward', _norm_backward, mutates_args=(), schema='(Tensor dy, Tensor x, Tensor stats, Tensor gain) -> (Tensor, Tensor)')

@_norm_op.register_fake
def _(x, gain, shift, eps): return _new(x), x.new_empty(*x.shape[:-1], 2, dtype=_state_dtype(x))

@_norm_backward_op.register_fake
def _(dy, x, stats, gain): return _new(x), x.new_empty(2, x.shape[-1], dtype=_state_dtype(x))

def _save_norm(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1], *inputs[1:3])

def _norm_vjp(ctx, dy, dstats):
    x, stats, gain, shift = ctx.saved_tensors
    dx, d = torch.ops.groupmamba.rows_norm_backward(torch.zeros_like(x) if dy is None else dy.contiguous(), x, stats, gain)
    return dx, d[0].to(gain.dtype), d[1].to(shift.dtype), None

@_mixer_op.register_fake
def _(x, scale, *args):
    (b, h, w, c), walks, st = x.shape, args[-1], _state_dtype(x)
    def new(*s, dtype=st): return x.new_empty(*s, dtype=dtype)
    borders = new(b, -(-(h*w)//_scan_plan(c//len(walks))[0]), args[11].shape[1], c)
    return _new(x), new(b, h, w, 2*c, dtype=x.dtype), _new(x), borders, _new(x), _new(x), new(b*h*w, 2), new(b*h*w, 2), new(b, c), new(b, c)

@_mixer_backward_op.register_fake
def _(dy, x, zx, u, borders, v, t, stats, tstats, mean, gate, scale, *args):
    def new(*s): return x.new_empty(*s, dtype=_state_dtype(x))
    c, r, wide, real = x.shape[3], args[2].shape[0], x.shape[3]//len(args[-1]), args[0].shape[0]
    rank, n = args[10].shape[1], args[11].shape[1]
    return (_new(x), new(2, c), new(r, real), new(r), new(real, r), new(real), new(2*c*wide), new(10, c), new(real*(2*rank + 3*n + 2)), new(2, real), new(c*wide), new(1), new(c*c + c))

@_ffn_op.register_fake
def _(x, scale, *args): return _new(x), x.new_empty(*x.shape[:3], args[2].shape[0]), x.new_empty(math.prod(x.shape[:3]), 2, dtype=_state_dtype(x))

@_ffn_backward_op.register_fake
def _(dy, x, h, stats, scale, *args):
    def new(*s): return x.new_empty(*s, dtype=_state_dtype(x))
    c, m = x.shape[3], h.shape[3]
    return _new(x), new(2, c), new(m*c + m), new(10, m), new(m*c + c)

def _save(n):
    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.options, ctx.scaled = inputs[2 + n:], inputs[1] is not None
        ctx.save_for_backward(inputs[0], *output[1:], *inputs[1:2 + n])
    return save

def _mixer_vjp(ctx, dy, *rest):
    x, *saved = ctx.saved_tensors
    dx, *grads = torch.ops.groupmamba.mixer_block_backward(torch.zeros_like(x) if dy is None else dy.contiguous(), x, *saved, *ctx.options)
    return dx, None, *_mixer_grads(grads, saved[-20:], x.shape[3]//4), None, None, None

def _ffn_vjp(ctx, dy, *rest):
    x, *saved = ctx.saved_tensors
    dx, *grads = torch.ops.groupmamba.ffn_block_backward(torch.zeros_like(x) if dy is None else dy.contiguous(), x, *saved, *ctx.options)
    return dx, None, *_ffn_grads(grads, saved[-8:], x.shape[3]//4), None

_mixer_op.register_autograd(_mixer_vjp, setup_context=_save(20))
_ffn_op.register_autograd(_ffn_vjp, setup_context=_save(8))
_norm_op.register_autograd(_norm_vjp, setup_context=_save_norm)
for _op in (_mixer_backward_op, _ffn_backward_op, _norm_backward_op): _op.register_autograd(_no_second_derivative)

@register_flop_formula(torch.ops.groupmamba.mixer_block)
def _mixer_flops(x, scale, gain, shift, fc1, fc1_bias, fc2, fc2_bias, in_proj, conv, conv_bias, x_proj, dt_weight, A_log, *args, out_shape=None, **kwargs):
    "Projections, convolution, selection, scan and gate; filled-up channels do not count."
    rows, c, r = math.prod(x[:3]), gain[0], fc1[0]
    products = 3*c*in_proj[1] + c*x_proj[0]//(c//x_proj[1]) + c*dt_weight[1] + c*c
    u = (x[0], x[1]*x[2], c)
    return 2*rows*(products + 9*c) + 2*2*x[0]*r*c + _scan_flops(u, u, A_log)

@register_flop_formula(torch.ops.groupmamba.ffn_block)
def _ffn_flops(x, scale, gain, shift, fc1, *args, out_shape=None, **kwargs):
    return 2*math.prod(x[:3])*(2*math.prod(fc1) + 9*fc1[0])

_PLAIN = False
@contextmanager
def plain_form():
    "Inside, models take the reference form of their blocks, on every device."
    global _PLAIN
    before, _PLAIN = _PLAIN, True
    try: yield
    finally: _PLAIN = before

def fused_dtype(
    x:Tensor, # image map
)->torch.dtype|None: # 16-bit dtype in which fused blocks would run; None: the reference form
    "The one place that chooses between the two forms of a block: fused on CUDA in 16 bits, where Triton is; the reference form otherwise."
    if _PLAIN or not x.is_cuda or find_spec('triton') is None or torch.compiler.is_exporting(): return None
    dtype = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else x.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None

def widened(unit): return -(-unit//8)*8   # 16 bytes

def mixer_block(x, scale, params, eps, scan_eps, directions):
    return torch.ops.groupmamba.mixer_block(x.contiguous(), scale, *params, eps, scan_eps, [WALKS[d] for d in directions])[0]

def ffn_block(x, scale, params, eps):
    return torch.ops.groupmamba.ffn_block(x.contiguous(), scale, *params, eps)[0]

def layer_norm(
    x:Tensor, # map (..., C)
    norm, # `nn.LayerNorm(C)`
)->Tensor: # same shape; in 16 bits where blocks are fused
    "`norm(x)`, by one kernel in 16 bits where fused blocks run."
    dtype = fused_dtype(x) if isinstance(norm, torch.nn.LayerNorm) else None
    return norm(x) if dtype is None else torch.ops.groupmamba.rows_norm(x.to(dtype).contiguous(), norm.weight, norm.bias, norm.eps)[0]
