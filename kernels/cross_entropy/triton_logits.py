"""The loss of logits, and their gradient, in Triton: positions × blocks of classes.

A program of the first kernel holds BLOCK_P positions and walks over their classes with an online
log-sum-exp; the second writes the gradient block by block. Both put together what is one number a
position themselves: a launch for each step of it would cost more than the arithmetic.

Rows of logits may be wider in memory than there are classes, so that they are read and written 16
bytes at a time: the columns beyond count for nothing and have the gradient 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch.kernels.cross_entropy.triton_loss import Loss
from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides
from nnarch.kernels.gpu.tiles import Tile, tile


@triton.jit
def _factors(
    weight_ptr, q_ptr, q_offset, c, inside, of_target, rest, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """a = weight[c]·(of_target·q + rest)"""
    a = tl.zeros((BLOCK_P, BLOCK_C), tl.float32) + rest
    if q_ptr is not None:
        a += of_target * tl.load(q_ptr + q_offset, mask=inside, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        a *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, a, 0.0)


@triton.jit
def _targets(target_ptr, weight_ptr, ignore_index, p, valid, classes, BLOCK_P: tl.constexpr):
    """The target of each position, whether it counts, and the target's weight."""
    target = tl.zeros((BLOCK_P,), tl.int64)
    weight = tl.full((BLOCK_P,), 1.0, tl.float32)
    kept = valid
    if target_ptr is not None:
        target = tl.load(target_ptr + p, mask=valid, other=0)
        kept = valid & (target != ignore_index)
        if weight_ptr is not None:
            known = kept & (target >= 0) & (target < classes)
            weight = tl.load(weight_ptr + target, mask=known, other=1.0)
    return target, kept, weight


@triton.jit
def cross_entropy_fwd_kernel(
    x_ptr,  # [N, width, L]
    target_ptr,  # [N·L] int64, or None where q is given
    weight_ptr,  # [C] or None
    q_ptr,  # [N, C, L] target probabilities, or None
    weights_ptr,  # what a mean divides by: the targets' weights, and how many there are; or None
    count_ptr,
    value_ptr,  # [N·L] float32: the loss, NaN where the target is no class
    lse_ptr,  # [N·L] float64
    total_ptr,  # [N·L] float32: Σ a; or None
    ignore_index,
    positions,
    classes,
    width,
    length,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_qn,
    stride_qc,
    stride_ql,
    of_target,
    rest,
    z_loss,  # None for 0
    FACTORS: tl.constexpr,  # whether every class has a part in the loss
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    p = pid * BLOCK_P + tl.arange(0, BLOCK_P)
    lane = tl.arange(0, BLOCK_C)
    if INT64:
        p, lane = p.to(tl.int64), lane.to(tl.int64)
    valid = p < positions
    n, i = p // length, p % length
    x_row = (n * stride_xn + i * stride_xl)[:, None]
    low = -float("inf")
    top = tl.full((BLOCK_P,), low, tl.float32)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)  # each lane's own: reduced once, at the end
    target, kept, weight = _targets(
        target_ptr, weight_ptr, ignore_index, p, valid, classes, BLOCK_P
    )
    if target_ptr is not None:
        is_class = valid & (target >= 0) & (target < classes)
        x_target = x_ptr + n * stride_xn + i * stride_xl + target * stride_xc
        at_target = tl.load(x_target, mask=is_class, other=0.0).to(tl.float32)
    for start in range(0, classes, BLOCK_C):
        c = (start + lane)[None, :]
        x = tl.load(x_ptr + x_row + c * stride_xc, mask=valid[:, None] & (c < width), other=low)
        x = tl.where(c < classes, x.to(tl.float32), low)
        now = tl.maximum(top, tl.max(x, axis=1))
        reference = tl.where(now == low, 0.0, now)
        sums = sums * tl.exp(top - reference)[:, None] + tl.exp(x - reference[:, None])
        top = now
    log_sum = tl.log(tl.sum(sums, axis=1))
    lse = top.to(tl.float64) + log_sum.to(tl.float64)
    tl.store(lse_ptr + p, lse, mask=valid)

    value = tl.zeros((BLOCK_P,), tl.float32)
    if target_ptr is not None:
        nll = tl.where(is_class, (top - at_target) + log_sum, float("nan"))
        value = tl.where(weight == 0, 0.0, of_target * weight * nll)
    if FACTORS:
        q_row = (n * stride_qn + i * stride_ql)[:, None]
        total = tl.zeros((BLOCK_P,), tl.float32)
        for start in range(0, classes, BLOCK_C):
            c = (start + lane)[None, :]
            inside = valid[:, None] & (c < classes)
            x = tl.load(x_ptr + x_row + c * stride_xc, mask=valid[:, None] & (c < width), other=0.0)
            a = _factors(
                weight_ptr, q_ptr, q_row + c * stride_qc, c, inside, of_target, rest, BLOCK_P,
                BLOCK_C,
            )  # fmt: skip
            below = (top[:, None] - x.to(tl.float32)) + log_sum[:, None]
            value += tl.sum(tl.where(inside, a * below, 0.0), axis=1)
            total += tl.sum(a, axis=1)
        if total_ptr is not None:
            tl.store(total_ptr + p, total, mask=valid)
    value = tl.where(kept, value, 0.0)
    if weights_ptr is not None:
        value /= tl.load(weights_ptr).to(tl.float32)  # 0/0: where nothing counts a mean is NaN
    if z_loss is not None:
        z = z_loss * (lse * lse).to(tl.float32)
        if count_ptr is not None:
            z /= tl.load(count_ptr).to(tl.float32)
        value += tl.where(kept, z, 0.0)
    tl.store(value_ptr + p, value, mask=valid)


@triton.jit
def cross_entropy_bwd_kernel(
    x_ptr,  # [N, width, L]
    dx_ptr,  # [N, width, L], may be x; or None
    dq_ptr,  # [N, C, L] or None
    target_ptr,  # [N·L] int64 or None
    weight_ptr,  # [C] or None
    q_ptr,  # [N, C, L] or None
    weights_ptr,  # what a mean divides by, or None
    count_ptr,
    lse_ptr,  # [N·L] float64
    grad_ptr,  # of the loss: [N·L], or one number with stride_g 0; None for 1
    total_ptr,  # Σ a: [N·L], or one number with stride_t 0; None for 0
    stride_g,
    stride_t,
    ignore_index,
    positions,
    classes,
    width,
    length,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_dn,
    stride_dc,
    stride_dl,
    stride_qn,
    stride_qc,
    stride_ql,
    stride_en,
    stride_ec,
    stride_el,
    of_target,
    rest,
    z_loss,
    FACTORS: tl.constexpr,
    TIMES_WEIGHTS: tl.constexpr,  # the gradient times what a mean divides it by
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = alpha·exp(x - lse) - beta·[c is the target] - scale·a; dq = scale·weight·(lse - x)"""
    pid = tl.program_id(0)
    blocks = tl.cdiv(width, BLOCK_C)
    p = pid // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    lane = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    if INT64:
        p, lane = p.to(tl.int64), lane.to(tl.int64)
    valid = p < positions
    c = lane[None, :]
    in_memory = valid[:, None] & (c < width)
    inside = valid[:, None] & (c < classes)
    n, i = p // length, p % length
    x_offset = (n * stride_xn + i * stride_xl)[:, None] + c * stride_xc
    q_offset = (n * stride_qn + i * stride_ql)[:, None] + c * stride_qc
    x = tl.load(x_ptr + x_offset, mask=in_memory, other=0.0).to(tl.float32)

    target, kept, weight = _targets(
        target_ptr, weight_ptr, ignore_index, p, valid, classes, BLOCK_P
    )
    scale = tl.full((BLOCK_P,), 1.0, tl.float32)
    if grad_ptr is not None:
        scale = tl.load(grad_ptr + p * stride_g, mask=valid, other=0.0).to(tl.float32)
    of_z = scale
    if weights_ptr is not None:
        weights = tl.load(weights_ptr).to(tl.float32)
        if TIMES_WEIGHTS:
            scale *= weights
            of_z *= weights
        scale /= weights
        of_z /= tl.load(count_ptr).to(tl.float32)
    scale = tl.where(kept, scale, 0.0)
    lse = tl.load(lse_ptr + p, mask=valid, other=0.0)
    rounded = lse.to(tl.float32)
    if dx_ptr is not None:
        alpha = tl.zeros((BLOCK_P,), tl.float32)
        if total_ptr is not None:
            alpha = scale * tl.load(total_ptr + p * stride_t, mask=valid, other=0.0)
        beta = scale * of_target * weight
        if target_ptr is not None:
            alpha += beta
        if z_loss is not None:
            alpha += tl.where(kept, of_z * 2.0 * z_loss * rounded, 0.0)
        # The rounding of lse too: exp(x - rounded) is off by 4e-6 for logits near 100.
        below = tl.exp((rounded.to(tl.float64) - lse).to(tl.float32))
        alpha = tl.where(alpha == 0, 0.0, alpha * below)
        dx = alpha[:, None] * tl.exp(x - rounded[:, None])
        if target_ptr is not None:
            dx -= tl.where(c == target[:, None], beta[:, None], 0.0)
        if FACTORS:
            dx -= scale[:, None] * _factors(
                weight_ptr, q_ptr, q_offset, c, inside, of_target, rest, BLOCK_P, BLOCK_C
            )
        dx = tl.where(kept[:, None] & (c < classes), dx, 0.0)
        d_offset = (n * stride_dn + i * stride_dl)[:, None] + c * stride_dc
        tl.store(dx_ptr + d_offset, dx.to(dx_ptr.dtype.element_ty), mask=in_memory)
    if dq_ptr is not None:
        factor = of_target
        if weight_ptr is not None:
            factor = of_target * tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
        dq = scale[:, None] * factor * (rounded[:, None] - x)
        e_offset = (n * stride_en + i * stride_el)[:, None] + c * stride_ec
        tl.store(dq_ptr + e_offset, dq.to(dq_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------- launchers


def block_of(x: torch.Tensor) -> Tile:
    """Neighbours in memory side by side: classes, or positions."""
    classes = x.shape[1]
    if x.stride(1) == 1:
        block_c = min(2048, triton.next_power_of_2(classes))
        return tile(BLOCK_P=max(1, 2048 // block_c), BLOCK_C=block_c, num_warps=4)
    return tile(BLOCK_P=128, BLOCK_C=min(16, triton.next_power_of_2(classes)), num_warps=4)


def losses(
    x: torch.Tensor,
    loss: Loss,
    values: torch.Tensor,
    lse: torch.Tensor,
    totals: torch.Tensor | None = None,
) -> None:
    """Write the losses of all positions of x [N, width, L], divided as the reduction divides.

    Args:
        x, loss: logits and what is lost by them.
        values, lse: [positions] float32 and float64; written.
        totals: [positions] float32, or None: Σ a of every position, where the loss uses it.
    """
    block = block_of(x)
    arguments = loss.arguments(x) | {"value_ptr": values, "lse_ptr": lse, "total_ptr": totals}
    programs = cdiv(x.shape[0] * x.shape[2], block["BLOCK_P"])
    launch(cross_entropy_fwd_kernel, flat_grid(programs), arguments, block)


def gradients(
    x: torch.Tensor,
    loss: Loss,
    lse: torch.Tensor,
    grad: torch.Tensor | None,
    totals: torch.Tensor | None,
    dx: torch.Tensor | None,
    dq: torch.Tensor | None = None,
    times_weights: bool = False,
) -> None:
    """Write the gradients of x [N, width, L] to dx, and of the target's probabilities to dq.

    Args:
        x, loss: as in :func:`losses`.
        lse: [positions], float64.
        grad: of the loss: a number or [positions]; None for 1.
        totals: Σ a (:meth:`Loss.totals`).
        dx, dq: like x; None where one is not wanted. dx may be x.
        times_weights: leave out a mean's division by the weights.
    """
    block = block_of(x)
    arguments = loss.arguments(x, dx, dq) | {
        **{"dx_ptr": dx, "dq_ptr": dq, "lse_ptr": lse, "grad_ptr": grad, "total_ptr": totals},
        **{"stride_g": _step(grad), "stride_t": _step(totals), "TIMES_WEIGHTS": times_weights},
        **named_strides("d", "ncl", dx),
        **named_strides("e", "ncl", dq),
    }
    count = x.shape[0] * x.shape[2]
    programs = cdiv(count, block["BLOCK_P"]) * cdiv(x.shape[1], block["BLOCK_C"])
    launch(cross_entropy_bwd_kernel, flat_grid(programs), arguments, block)


def _step(numbers: torch.Tensor | None) -> int:
    """From one position's number to the next one's: 0 where all have the same."""
    return 0 if numbers is None or numbers.dim() == 0 else numbers.stride(0)
