"""Statistics of logits, and their gradient, in Triton: positions × blocks of classes.

A program holds BLOCK_P positions and walks over their classes with an online log-sum-exp. What is
one number a position (the loss, the factors of the gradient) is put together between the kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides, needs_int64
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
def cross_entropy_fwd_kernel(
    x_ptr,  # [N, C, L]
    target_ptr,  # [N·L] int64, or None where q is given
    weight_ptr,  # [C] or None
    q_ptr,  # [N, C, L] target probabilities, or None
    top_ptr,  # [N·L] each, float32: lse = top + log
    log_ptr,
    nll_ptr,  # lse - x at the target; NaN where the target is no class
    entropy_ptr,  # Σ a·(lse - x)
    total_ptr,  # Σ a
    positions,
    classes,
    length,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_qn,
    stride_qc,
    stride_ql,
    of_target,
    rest,
    FACTORS: tl.constexpr,  # whether entropy and total are wanted
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
    total = tl.zeros((BLOCK_P,), tl.float32)
    at_target = tl.zeros((BLOCK_P,), tl.float32)
    target = tl.zeros((BLOCK_P,), tl.int64)
    if target_ptr is not None:
        target = tl.load(target_ptr + p, mask=valid, other=0)
    for start in range(0, classes, BLOCK_C):
        c = (start + lane)[None, :]
        inside = valid[:, None] & (c < classes)
        x = tl.load(x_ptr + x_row + c * stride_xc, mask=inside, other=low).to(tl.float32)
        now = tl.maximum(top, tl.max(x, axis=1))
        reference = tl.where(now == low, 0.0, now)
        total = total * tl.exp(top - reference) + tl.sum(tl.exp(x - reference[:, None]), axis=1)
        top = now
        hit = inside & (c == target[:, None])
        at_target += tl.sum(tl.where(hit, x, 0.0), axis=1)
    log_sum = tl.log(total)
    tl.store(top_ptr + p, top, mask=valid)
    tl.store(log_ptr + p, log_sum, mask=valid)
    if target_ptr is not None:
        is_class = (target >= 0) & (target < classes)
        nll = tl.where(is_class, (top - at_target) + log_sum, float("nan"))
        tl.store(nll_ptr + p, nll, mask=valid)
    if FACTORS:
        q_row = (n * stride_qn + i * stride_ql)[:, None]
        entropy = tl.zeros((BLOCK_P,), tl.float32)
        sums = tl.zeros((BLOCK_P,), tl.float32)
        for start in range(0, classes, BLOCK_C):
            c = (start + lane)[None, :]
            inside = valid[:, None] & (c < classes)
            x = tl.load(x_ptr + x_row + c * stride_xc, mask=inside, other=0.0).to(tl.float32)
            a = _factors(
                weight_ptr, q_ptr, q_row + c * stride_qc, c, inside, of_target, rest, BLOCK_P,
                BLOCK_C,
            )  # fmt: skip
            below = (top[:, None] - x) + log_sum[:, None]
            entropy += tl.sum(tl.where(inside, a * below, 0.0), axis=1)
            sums += tl.sum(a, axis=1)
        tl.store(entropy_ptr + p, entropy, mask=valid)
        tl.store(total_ptr + p, sums, mask=valid)


@triton.jit
def cross_entropy_bwd_kernel(
    x_ptr,  # [N, C, L]
    dx_ptr,  # [N, C, L], may be x; or None
    dq_ptr,  # [N, C, L] or None
    target_ptr,  # [N·L] int64 or None
    weight_ptr,  # [C] or None
    q_ptr,  # [N, C, L] or None
    lse_ptr,  # [N·L] each, float32
    alpha_ptr,
    beta_ptr,
    scale_ptr,
    positions,
    classes,
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
    FACTORS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = alpha·exp(x - lse) - beta·[c is the target] - scale·a; dq = scale·weight·(lse - x)"""
    pid = tl.program_id(0)
    blocks = tl.cdiv(classes, BLOCK_C)
    p = pid // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    lane = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    if INT64:
        p, lane = p.to(tl.int64), lane.to(tl.int64)
    valid = p < positions
    c = lane[None, :]
    inside = valid[:, None] & (c < classes)
    n, i = p // length, p % length
    x_offset = (n * stride_xn + i * stride_xl)[:, None] + c * stride_xc
    q_offset = (n * stride_qn + i * stride_ql)[:, None] + c * stride_qc
    x = tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + p, mask=valid, other=0.0)[:, None]
    scale = tl.load(scale_ptr + p, mask=valid, other=0.0)[:, None]
    if dx_ptr is not None:
        alpha = tl.load(alpha_ptr + p, mask=valid, other=0.0)[:, None]
        dx = alpha * tl.exp(x - lse)
        if target_ptr is not None:
            beta = tl.load(beta_ptr + p, mask=valid, other=0.0)[:, None]
            target = tl.load(target_ptr + p, mask=valid, other=-1)[:, None]
            dx -= tl.where(c == target, beta, 0.0)
        if FACTORS:
            dx -= scale * _factors(
                weight_ptr, q_ptr, q_offset, c, inside, of_target, rest, BLOCK_P, BLOCK_C
            )
        d_offset = (n * stride_dn + i * stride_dl)[:, None] + c * stride_dc
        tl.store(dx_ptr + d_offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dq_ptr is not None:
        factor = of_target
        if weight_ptr is not None:
            factor = of_target * tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
        dq = scale * factor * (lse - x)
        e_offset = (n * stride_en + i * stride_el)[:, None] + c * stride_ec
        tl.store(dq_ptr + e_offset, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_kernel(x_ptr, y_ptr, grad_ptr, count, INT64: tl.constexpr, BLOCK: tl.constexpr):
    """y = x · grad"""
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    y = x * tl.load(grad_ptr).to(tl.float32)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < count)


# ----------------------------------------------------------------------------------- launchers


def as_ncl(x: torch.Tensor | None) -> torch.Tensor | None:
    """[N, C] as [N, C, 1]."""
    return x if x is None or x.dim() == 3 else x.unsqueeze(2)


def block_of(x: torch.Tensor) -> Tile:
    """Neighbours in memory side by side: classes, or positions."""
    classes = x.shape[1]
    if x.stride(1) == 1:
        block_c = min(2048, triton.next_power_of_2(classes))
        return tile(BLOCK_P=max(1, 2048 // block_c), BLOCK_C=block_c, num_warps=4)
    return tile(BLOCK_P=128, BLOCK_C=min(16, triton.next_power_of_2(classes)), num_warps=4)


class Numbers:
    """What the kernels know of the options of a loss.

    Args:
        target: classes [positions], or probabilities.
        class_weight: [C] float32 or None.
        smoothing: of the labels.
        classes: C.
    """

    def __init__(
        self,
        target: torch.Tensor,
        class_weight: torch.Tensor | None,
        smoothing: float,
        classes: int,
    ) -> None:
        soft = target.is_floating_point()
        self.target = None if soft else target.contiguous()
        self.q = as_ncl(target) if soft else None
        self.class_weight = None if class_weight is None else class_weight.contiguous()
        self.of_target = 1.0 - smoothing
        self.rest = smoothing / classes
        self.factors = soft or smoothing != 0.0

    def arguments(self, x: torch.Tensor, *others: torch.Tensor | None) -> dict[str, object]:
        """Of both kernels, for logits x [N, C, L]."""
        return {
            **{"x_ptr": x, "target_ptr": self.target, "q_ptr": self.q},
            **{"weight_ptr": self.class_weight, "FACTORS": self.factors},
            **{"positions": x.shape[0] * x.shape[2], "classes": x.shape[1], "length": x.shape[2]},
            **{"of_target": self.of_target, "rest": self.rest},
            **named_strides("x", "ncl", x),
            **named_strides("q", "ncl", self.q),
            "INT64": needs_int64(x, self.q, *others),
        }


def statistics(x: torch.Tensor, numbers: Numbers) -> dict[str, torch.Tensor]:
    """lse (float64), nll, entropy and total of every position of x [N, C, L].

    What does not apply to the loss is 0.
    """
    count = x.shape[0] * x.shape[2]
    names = ("top", "log", "nll", "entropy", "total")
    results = {name: x.new_zeros(count, dtype=torch.float32) for name in names}
    block = block_of(x)
    arguments = {f"{name}_ptr": t for name, t in results.items()}
    programs = cdiv(count, block["BLOCK_P"])
    arguments |= numbers.arguments(x)
    launch(cross_entropy_fwd_kernel, flat_grid(programs), arguments, block)
    results["lse"] = results["top"].double() + results["log"]
    return results


def gradients(
    x: torch.Tensor,
    numbers: Numbers,
    lse: torch.Tensor,
    slopes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dx: torch.Tensor | None,
    dq: torch.Tensor | None = None,
) -> None:
    """Write the gradients of x [N, C, L] to dx, and of the target's probabilities to dq.

    Args:
        x: logits.
        numbers: of the loss.
        lse: [positions], float64.
        slopes: alpha, beta and scale of every position.
        dx, dq: like x; None where one is not wanted. dx may be x.
    """
    block = block_of(x)
    alpha, beta, scale = slopes
    rounded = lse.float()
    # What the rounding of lse takes away: exp(x - lse) would be off by 4e-6 for logits near 100.
    alpha = torch.where(alpha == 0, 0.0, alpha * (rounded.double() - lse).exp())
    alpha, beta, scale = (s.float().contiguous() for s in (alpha, beta, scale))
    arguments = numbers.arguments(x, dx, dq) | {
        **{"dx_ptr": dx, "dq_ptr": dq, "lse_ptr": rounded.contiguous()},
        **{"alpha_ptr": alpha, "beta_ptr": beta, "scale_ptr": scale},
        **named_strides("d", "ncl", dx),
        **named_strides("e", "ncl", dq),
    }
    count = x.shape[0] * x.shape[2]
    programs = cdiv(count, block["BLOCK_P"]) * cdiv(x.shape[1], block["BLOCK_C"])
    launch(cross_entropy_bwd_kernel, flat_grid(programs), arguments, block)


def scale_by(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """x times the scalar grad; x is contiguous."""
    y, block = torch.empty_like(x), 4096
    arguments = {"x_ptr": x, "y_ptr": y, "grad_ptr": grad, "count": x.numel()}
    grid = flat_grid(cdiv(x.numel(), block))
    launch(scale_kernel, grid, arguments | {"INT64": needs_int64(x)}, tile(BLOCK=block))
    return y


@triton.jit
def _scale_in_place_kernel(
    x_ptr,  # [count]
    factor_ptr,  # one number
    count,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:  # the usual gradient of a loss leaves the memory alone
        at = tl.program_id(0).to(tl.int64) if INT64 else tl.program_id(0)
        at = at * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < count).to(tl.float32)
        tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < count)


def scale_in_place(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x, contiguous, times the scalar `factor`, whose value the host does not wait for."""
    block = 4096
    arguments = {"x_ptr": x, "factor_ptr": factor, "count": x.numel(), "INT64": needs_int64(x)}
    launch(_scale_in_place_kernel, flat_grid(cdiv(x.numel(), block)), arguments, tile(BLOCK=block))
