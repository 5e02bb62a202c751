"""The gated linear layer on the GPU: act(x·gateᵀ + gate_bias) ⊙ (x·upᵀ + up_bias).

One kernel keeps the accumulators of both products, so that x is read once and neither product is
ever in memory. A few rows are bound by reading the weights: two products and the elementwise gate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from nnarch.kernels.activation.triton_gated import gate
from nnarch.kernels.gpu.epilogue import apply_activation, write_tile
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    dot_precision,
    flat_grid,
    launch,
    named_strides,
    needs_int64,
    vector,
)
from nnarch.kernels.gpu.matmul import grouped_order, matmul_cost, matmul_tiles, precision_of
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.gpu.targets import Target
from nnarch.kernels.gpu.tiles import Problem, Tile, TileTable, pick
from nnarch.kernels.linear.triton_product import SMALL_M, product, reads_vectors
from nnarch.kernels.linear.triton_row import one_row


def _fits(problem: Problem, tile: Tile, target: Target) -> bool:
    """As matmul_fits, for one operand by rows, two by columns, and two accumulators."""
    m, n, k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    stages = max(1, tile.num_stages - 1) if target.backend == "hip" else tile.num_stages
    shared = stages * (m + 2 * n) * k * problem.itemsize
    threads = tile.num_warps * target.warp_size
    loads = (m + 2 * n) * k // threads
    if problem.vectors:
        loads = loads * problem.itemsize // 16
    other = {"registers": 96, "shared": 48}[target.operands]
    registers = 2 * m * n // threads + 3 * loads + other
    return shared <= target.shared_bytes and registers <= target.max_registers and threads <= 1024


GATED = TileTable(
    "gated_linear",
    {
        "half": matmul_tiles(
            (128, 64, 64, 8, 3),
            (128, 64, 32, 8, 3),
            (128, 32, 64, 4, 3),
            (64, 64, 32, 4, 3),
            (64, 32, 32, 4, 2),
        ),
        "tf32": matmul_tiles(
            (128, 64, 32, 8, 3), (128, 32, 32, 8, 3), (64, 32, 32, 4, 2), (64, 32, 16, 4, 2)
        ),
        "tf32x3": matmul_tiles((128, 32, 32, 8, 3), (64, 32, 32, 4, 2), (64, 32, 32, 8, 2)),
        "ieee": matmul_tiles((64, 32, 16, 8, 2), (32, 32, 16, 8, 2), (32, 16, 16, 4, 2)),
    },
    matmul_cost,
    _fits,
)


@triton.jit
def _gated_linear_fwd_kernel(
    x_ptr,  # [M, C], any strides
    g_ptr,  # [K, C] each, any strides
    u_ptr,
    y_ptr,  # [M, K], dense
    g_bias_ptr,  # [K] each, or None
    u_bias_ptr,
    alpha,
    M,
    K,
    C,
    stride_xm,
    stride_xc,
    stride_gk,
    stride_gc,
    stride_uk,
    stride_uc,
    stride_ym,
    ACTIVATION: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N)
    tile_m, tile_n = grouped_order(tl.program_id(0), tiles_m, tiles_n, 8)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_inside, k_inside = m < M, k < K
    lane = tl.arange(0, BLOCK_K)
    if INT64:
        m, k, lane = m.to(tl.int64), k.to(tl.int64), lane.to(tl.int64)

    x_row, g_row, u_row = m * stride_xm, k * stride_gk, k * stride_uk
    gates = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(C, BLOCK_K)):
        c = step * BLOCK_K + lane
        c_inside = c < C
        x_at = x_row[:, None] + (c * stride_xc)[None, :]
        x = tl.load(x_ptr + x_at, mask=m_inside[:, None] & c_inside[None, :], other=0.0)
        inside = c_inside[:, None] & k_inside[None, :]
        g_at = (c * stride_gc)[:, None] + g_row[None, :]
        g = tl.load(g_ptr + g_at, mask=inside, other=0.0)
        gates = tl.dot(x, g, gates, input_precision=PRECISION)
        u_at = (c * stride_uc)[:, None] + u_row[None, :]
        u = tl.load(u_ptr + u_at, mask=inside, other=0.0)
        ups = tl.dot(x, u, ups, input_precision=PRECISION)

    if g_bias_ptr is not None:
        gates += tl.load(g_bias_ptr + k, mask=k_inside, other=0.0).to(tl.float32)[None, :]
    if u_bias_ptr is not None:
        ups += tl.load(u_bias_ptr + k, mask=k_inside, other=0.0).to(tl.float32)[None, :]
    # fmt: off
    write_tile(
        apply_activation(gates, ACTIVATION, alpha) * ups, y_ptr, m * stride_ym, 1, None, m, 0,
        m_inside, tile_n * BLOCK_N, K, None, None, None, 0.0, 0, BLOCK_N, INT64,
    )
    # fmt: on


def gated_linear(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    packed: torch.Tensor | None,
    activation: int,
    alpha: float,
) -> torch.Tensor:
    """nnarch::gated_linear on a GPU; `packed` is a CPU matter and not read."""
    check_dtype("gated_linear", x, gate_weight, up_weight)
    y = x.new_empty((*x.shape[:-1], gate_weight.shape[0]))
    if y.numel() == 0:
        return y
    m = math.prod(x.shape[:-1])
    rows, out = x.reshape(m, x.shape[-1]), y.view(m, y.shape[-1])
    with device_guard(x):
        if m > SMALL_M:
            _both(rows, gate_weight, up_weight, out, gate_bias, up_bias, activation, alpha)
            return y
        products = []
        for weight, bias in ((gate_weight, gate_bias), (up_weight, up_bias)):
            products.append(torch.empty_like(out))
            multiply = one_row if m == 1 else product
            multiply(rows, weight, products[-1], _only(bias))
    return gate(products[0], products[1], activation, alpha).view(y.shape)


def _only(bias: torch.Tensor | None) -> dict[str, Any]:
    """The epilogue of a product that has a bias and nothing else."""
    absent = {"scale_ptr": None, "shift_ptr": None, "residual_ptr": None}
    return {"bias_ptr": vector(bias), **absent, "alpha": 0.0, "ACTIVATION": 0}


def _both(x, gate_weight, up_weight, y, gate_bias, up_bias, activation: int, alpha: float) -> None:
    """Both products of more than a few rows, [M, C] to [M, K]."""
    (m, c), k = x.shape, gate_weight.shape[0]
    precision = dot_precision("matmul")
    vectors = all(reads_vectors(t) for t in (x, gate_weight, up_weight))
    problem = Problem(m, k, c, precision_of(x.dtype, precision), vectors=vectors)
    arguments = {
        **{"x_ptr": x, "g_ptr": gate_weight, "u_ptr": up_weight, "y_ptr": y},
        **{"g_bias_ptr": vector(gate_bias), "u_bias_ptr": vector(up_bias)},
        **{"M": m, "K": k, "C": c, "alpha": float(alpha), "ACTIVATION": activation},
        **named_strides("x", "mc", x),
        **named_strides("g", "kc", gate_weight),
        **named_strides("u", "kc", up_weight),
        "stride_ym": y.stride(0),
        "INT64": needs_int64(x, gate_weight, up_weight, y),
        "PRECISION": precision,
    }

    def run(tile: Tile) -> None:
        programs = cdiv(m, tile["BLOCK_M"]) * cdiv(k, tile["BLOCK_N"])
        launch(_gated_linear_fwd_kernel, flat_grid(programs), arguments, tile)

    run(pick(GATED, problem, run))


def gated_linear_pack(gate_weight: torch.Tensor, up_weight: torch.Tensor) -> torch.Tensor:
    """An empty tensor: the GPU kernels read the weights as they are."""
    return gate_weight.new_empty(0)


def _case(name: str, m: int, c: int, k: int, activation: int) -> StaticCase:
    def run(dtype: torch.dtype) -> torch.Tensor:
        weights = [meta(k, c, dtype=dtype) for _ in range(2)]
        b = meta(k, dtype=dtype)
        return gated_linear(meta(m, c, dtype=dtype), *weights, b, b, None, activation, 0.0)

    return StaticCase(
        f"gated linear {name} {m}×{c}×{k}",
        run,
        flops=4.0 * m * c * k,
        elements=m * c + 2 * k * c + m * k,
        matrix=True,
    )


STATIC_CASES = [_case("silu", 8192, 4096, 4096, 6), _case("gelu", 8192, 4096, 4096, 7)]
"""What bench/static_gpu.py compiles, listed by triton_kernel.py."""
