"""Capsule routing on the GPU: votes are formed in registers, once an iteration, and never stored.

A program holds BLOCK_B samples × all output capsules and walks over a range of the input capsules:
a capsule's weight is read once for all of the program's samples, its votes live in registers for
the dot products, the softmax and the weighted sum. Ranges are added in a fixed order. What has no
input capsules (sums, outputs and their gradients, [B, O, D_out]) is left to torch between the
launches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.capsule_routing import reference, triton_squash
from nnarch.kernels.gpu import targets
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    flat_grid,
    launch,
    named_strides,
    needs_int64,
)
from nnarch.kernels.gpu.static import StaticCase
from nnarch.kernels.gpu.tiles import Tile, tile

squash, squash_grad = triton_squash.squash, triton_squash.squash_grad

_ELEMENTS = 2048  # votes of a program: 16 a thread, and twice as many for what meets them
_MOST = 8192  # O · D_out, rounded up to powers of two, that registers hold


@triton.jit
def _votes(
    x_ptr, w_ptr, b, i, o, d, samples, capsules, dim, IN: tl.constexpr,
    stride_xb, stride_xi, stride_xk, stride_wo, stride_wi, stride_wd, stride_wk,
):  # fmt: skip
    """What input capsule i votes: [b, o, d]; 0 outside.

    b: [BLOCK_B]; o: [BLOCK_O]; d: [BLOCK_D].
    """
    inside = (o < capsules)[:, None] & (d < dim)[None, :]
    w_row = w_ptr + i * stride_wi + o[:, None] * stride_wo + d[None, :] * stride_wd
    x_row = x_ptr + b * stride_xb + i * stride_xi
    votes = tl.zeros((b.shape[0], o.shape[0], d.shape[0]), tl.float32)
    for k in tl.range(0, IN):
        w = tl.load(w_row + k * stride_wk, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_row + k * stride_xk, mask=b < samples, other=0.0).to(tl.float32)
        votes += x[:, None, None] * w[None, :, :]
    return votes


@triton.jit
def _load_state(ptr, b, o, d, samples, capsules, dim):
    """[b, o, d] of a contiguous [samples, capsules, dim] in float32; 0 outside."""
    offset = (b[:, None, None] * capsules + o[None, :, None]) * dim + d[None, None, :]
    inside = (b < samples)[:, None, None] & (o < capsules)[None, :, None] & (d < dim)[None, None, :]
    return tl.load(ptr + offset, mask=inside, other=0.0)


@triton.jit
def _softmax(votes, agreed, o, capsules):
    """Over the output capsules, of ⟨votes, agreed⟩: [b, o]; 0 where there is no capsule."""
    logits = tl.sum(votes * agreed, axis=2)
    logits = tl.where((o < capsules)[None, :], logits, float("-inf"))
    e = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def _capsule_routing_fwd_kernel(
    x_ptr, w_ptr, agreed_ptr, partial_ptr, samples, inputs, capsules, dim, per_split,
    stride_xb, stride_xi, stride_xk, stride_wo, stride_wi, stride_wd, stride_wk,
    IN: tl.constexpr, FIRST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial[split, b, o, d] = Σ c·votes over the input capsules of a split."""
    groups = tl.cdiv(samples, BLOCK_B)
    pid = tl.program_id(0)
    split = pid // groups
    b = pid % groups * BLOCK_B + tl.arange(0, BLOCK_B)
    o, d = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_D)
    if INT64:
        b, o, split = b.to(tl.int64), o.to(tl.int64), split.to(tl.int64)
    agreed = tl.zeros((BLOCK_B, BLOCK_O, BLOCK_D), tl.float32)
    if not FIRST:
        agreed = _load_state(agreed_ptr, b, o, d, samples, capsules, dim)
    total = tl.zeros((BLOCK_B, BLOCK_O, BLOCK_D), tl.float32)
    for i in tl.range(split * per_split, tl.minimum(inputs, (split + 1) * per_split)):
        votes = _votes(
            x_ptr, w_ptr, b, i, o, d, samples, capsules, dim, IN,
            stride_xb, stride_xi, stride_xk, stride_wo, stride_wi, stride_wd, stride_wk,
        )  # fmt: skip
        if FIRST:
            total += votes
        else:
            total += _softmax(votes, agreed, o, capsules)[:, :, None] * votes
    if FIRST:
        total = total / capsules
    offset = ((split * samples + b[:, None, None]) * capsules + o[None, :, None]) * dim
    inside = (b < samples)[:, None, None] & (o < capsules)[None, :, None] & (d < dim)[None, None, :]
    tl.store(partial_ptr + offset + d[None, None, :], total, mask=inside)


@triton.jit
def _capsule_routing_bwd_kernel(
    x_ptr, w_ptr, agreed_ptr, grad_ptr, partial_ptr, samples, inputs, capsules, dim, per_split,
    stride_xb, stride_xi, stride_xk, stride_wo, stride_wi, stride_wd, stride_wk,
    IN: tl.constexpr, INT64: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial[split, b, o, d] = Σ db·votes, the gradient of what the logits agree with."""
    groups = tl.cdiv(samples, BLOCK_B)
    pid = tl.program_id(0)
    split = pid // groups
    b = pid % groups * BLOCK_B + tl.arange(0, BLOCK_B)
    o, d = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_D)
    if INT64:
        b, o, split = b.to(tl.int64), o.to(tl.int64), split.to(tl.int64)
    agreed = _load_state(agreed_ptr, b, o, d, samples, capsules, dim)
    grad = _load_state(grad_ptr, b, o, d, samples, capsules, dim)
    total = tl.zeros((BLOCK_B, BLOCK_O, BLOCK_D), tl.float32)
    for i in tl.range(split * per_split, tl.minimum(inputs, (split + 1) * per_split)):
        votes = _votes(
            x_ptr, w_ptr, b, i, o, d, samples, capsules, dim, IN,
            stride_xb, stride_xi, stride_xk, stride_wo, stride_wi, stride_wd, stride_wk,
        )  # fmt: skip
        c = _softmax(votes, agreed, o, capsules)
        dc = tl.sum(votes * grad, axis=2)
        db = c * (dc - tl.sum(c * dc, axis=1)[:, None])
        total += db[:, :, None] * votes
    offset = ((split * samples + b[:, None, None]) * capsules + o[None, :, None]) * dim
    inside = (b < samples)[:, None, None] & (o < capsules)[None, :, None] & (d < dim)[None, None, :]
    tl.store(partial_ptr + offset + d[None, None, :], total, mask=inside)


@triton.jit
def _capsule_routing_bwd_inputs_kernel(
    x_ptr, w_ptr, agreed_ptr, grad_ptr, dx_ptr, dw_ptr, samples, capsules, dim,
    stride_xb, stride_xi, stride_xk, stride_wo, stride_wi, stride_wd, stride_wk,
    stride_db, stride_di, stride_dk, stride_go, stride_gi, stride_gd, stride_gk,
    IN: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, DETACHED: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx and dw of one input capsule, over all samples in order.

    agreed, grad: [TO, samples, capsules, dim]: what the logits of iterations FROM to TO agree with,
    and the gradients of their sums.
    """
    i = tl.program_id(0)
    o, d = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_D)
    if INT64:
        i, o = i.to(tl.int64), o.to(tl.int64)
    state = samples * capsules * dim
    inside = (o < capsules)[:, None] & (d < dim)[None, :]
    w_row = w_ptr + i * stride_wi + o[:, None] * stride_wo + d[None, :] * stride_wd
    dw_row = dw_ptr + i * stride_gi + o[:, None] * stride_go + d[None, :] * stride_gd
    for first in tl.range(0, samples, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        if INT64:
            b = b.to(tl.int64)
        votes = _votes(
            x_ptr, w_ptr, b, i, o, d, samples, capsules, dim, IN,
            stride_xb, stride_xi, stride_xk, stride_wo, stride_wi, stride_wd, stride_wk,
        )  # fmt: skip
        dvotes = tl.zeros((BLOCK_B, BLOCK_O, BLOCK_D), tl.float32)
        for n in tl.range(FROM, TO):
            grad = _load_state(grad_ptr + n * state, b, o, d, samples, capsules, dim)
            if n == 0:
                dvotes += grad / capsules
            else:
                agreed = _load_state(agreed_ptr + n * state, b, o, d, samples, capsules, dim)
                c = _softmax(votes, agreed, o, capsules)
                dvotes += c[:, :, None] * grad
                if not DETACHED:
                    dc = tl.sum(votes * grad, axis=2)
                    db = c * (dc - tl.sum(c * dc, axis=1)[:, None])
                    dvotes += db[:, :, None] * agreed
        for k in tl.range(0, IN):
            w = tl.load(w_row + k * stride_wk, mask=inside, other=0.0).to(tl.float32)
            x_at = x_ptr + b * stride_xb + i * stride_xi + k * stride_xk
            x = tl.load(x_at, mask=b < samples, other=0.0).to(tl.float32)
            dx = tl.sum(tl.sum(dvotes * w[None, :, :], axis=2), axis=1)
            dx_at = dx_ptr + b * stride_db + i * stride_di + k * stride_dk
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=b < samples)
            dw = tl.sum(dvotes * x[:, None, None], axis=0)
            if first > 0:
                dw += tl.load(dw_row + k * stride_gk, mask=inside, other=0.0)
            tl.store(dw_row + k * stride_gk, dw, mask=inside)


# ----------------------------------------------------------------------------------- launchers


def capsule_routing(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    iterations: int,
    detach_routing: bool,
    packed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``nnarch::capsule_routing``."""
    block = _prepare("capsule_routing", x, weight, bias)
    b, o, d = x.shape[0], weight.shape[0], weight.shape[2]
    agreed, sums = x.new_zeros((b, o, d), dtype=torch.float32), []
    v = agreed
    for n in range(iterations):
        s = _over_inputs(
            _capsule_routing_fwd_kernel, x, weight, {"agreed_ptr": agreed}, block, FIRST=n == 0
        )
        s = s if bias is None else s + bias.float()
        v = squash(s, -1)
        agreed = agreed + v
        sums.append(s)
    return v.to(x.dtype), torch.stack(sums, 1)


def capsule_routing_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    detach_routing: bool,
    packed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``nnarch::capsule_routing_grad``."""
    block = _prepare("capsule_routing_grad", x, weight, grad)
    iterations = sums.shape[1]
    states = sums.transpose(0, 1).contiguous()
    outputs = squash(states, -1)
    agreed = outputs.cumsum(0) - outputs
    d_outputs = torch.zeros_like(states)
    d_outputs[-1] = grad.float()
    d_sums = torch.zeros_like(states)
    first = iterations - 1 if detach_routing else 0
    for n in range(iterations - 1, first - 1, -1):
        d_sums[n] = squash_grad(d_outputs[n], states[n], -1)
        if n > 0 and not detach_routing:
            tensors = {"agreed_ptr": agreed[n], "grad_ptr": d_sums[n]}
            d_outputs[:n] += _over_inputs(_capsule_routing_bwd_kernel, x, weight, tensors, block)
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    format = library.output_format(weight)
    dw = torch.zeros_like(weight, dtype=torch.float32, memory_format=format)
    if x.numel() and weight.numel():
        arguments = {
            **{"x_ptr": x, "w_ptr": weight, "agreed_ptr": agreed, "grad_ptr": d_sums},
            **{"dx_ptr": dx, "dw_ptr": dw, "samples": x.shape[0]},
            **{"capsules": weight.shape[0], "dim": weight.shape[2]},
            **named_strides("x", "bik", x),
            **named_strides("w", "oidk", weight),
            **named_strides("d", "bik", dx),
            **named_strides("g", "oidk", dw),
            **{"IN": x.shape[2], "FROM": first, "TO": iterations, "DETACHED": detach_routing},
            "INT64": needs_int64(x, weight, dx, dw, states),
        }
        with device_guard(x):
            # Twice the warps: dvotes beside the rest take 128 registers of four, and Triton 3.6
            # spills; of eight they take 80, and 24 warps rather than 16 share a processor.
            wide = dataclasses.replace(block, num_warps=min(8, 2 * block.num_warps))
            launch(_capsule_routing_bwd_inputs_kernel, flat_grid(x.shape[1]), arguments, wide)
    return dx, dw.to(weight.dtype), d_sums.sum((0, 1)).to(x.dtype)


def capsule_routing_pack(weight: torch.Tensor) -> torch.Tensor:
    """``nnarch::capsule_routing_pack``: the kernels read the weight as it lies."""
    return weight.clone()


def _over_inputs(
    kernel: object,
    x: torch.Tensor,
    weight: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    block: Tile,
    **switches: bool,
) -> torch.Tensor:
    """A kernel's sums over all input capsules, [B, O, D_out] in float32."""
    (b, inputs, k), o, d = x.shape, weight.shape[0], weight.shape[2]
    groups = cdiv(b, dict(block.block)["BLOCK_B"])
    # Enough programs for two waves; none with fewer than 8 input capsules.
    wanted = cdiv(2 * targets.current_target().processors, max(1, groups))
    per_split = max(8, cdiv(inputs, wanted))
    splits = cdiv(inputs, per_split)
    partial = torch.empty((splits, b, o, d), dtype=torch.float32, device=x.device)
    if splits == 0 or partial.numel() == 0 or k == 0:
        return torch.zeros((b, o, d), dtype=torch.float32, device=x.device)
    arguments = {
        **{"x_ptr": x, "w_ptr": weight, **tensors, "partial_ptr": partial},
        **{"samples": b, "inputs": inputs, "capsules": o, "dim": d, "per_split": per_split},
        **named_strides("x", "bik", x),
        **named_strides("w", "oidk", weight),
        **{"IN": k, **switches, "INT64": needs_int64(x, weight, partial)},
    }
    with device_guard(x):
        launch(kernel, flat_grid(groups * splits), arguments, block)
    return partial.sum(0)


def _prepare(op: str, *tensors: torch.Tensor | None) -> Tile:
    """The tile for x and weight, the first two tensors, after the checks that all need."""
    check_dtype(op, *tensors)
    x, weight = tensors[0], tensors[1]
    assert x is not None and weight is not None
    block_o = triton.next_power_of_2(max(1, weight.shape[0]))
    block_d = triton.next_power_of_2(max(1, weight.shape[2]))
    if block_o * block_d > _MOST:
        raise NotImplementedError(
            f"backend 'triton' lacks nnarch::{op} for {weight.shape[0]} output capsules of "
            f"{weight.shape[2]} values"
        )
    most = max(1, _ELEMENTS // (block_o * block_d))
    block_b = min(most, triton.next_power_of_2(max(1, x.shape[0])))
    warps = max(1, min(8, block_b * block_o * block_d // 512))
    return tile(BLOCK_B=block_b, BLOCK_O=block_o, BLOCK_D=block_d, num_warps=warps)


def capsule_windows(x: torch.Tensor, *geometry: Sequence[int]) -> torch.Tensor:
    """nnarch::capsule_windows: a copy, which torch's strided kernels make at the memory's speed."""
    check_dtype("capsule_windows", x)
    return reference.capsule_windows(x, *geometry)


def capsule_windows_grad(
    grad: torch.Tensor, input_size: Sequence[int], *geometry: Sequence[int]
) -> torch.Tensor:
    """nnarch::capsule_windows_grad, by additions of torch's, one a tap."""
    check_dtype("capsule_windows_grad", grad)
    return reference.capsule_windows_grad(grad, input_size, *geometry)


# ------------------------------------------------------------------------------ static checks

_B, _I, _K, _O, _D = 512, 1152, 8, 10, 16  # MNIST's CapsNet
_VOTES = float(_B * _I * _O * _D)
_TENSORS = float(_B * _I * _K + _O * _I * _D * _K)


def _tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.empty((_B, _I, _K), dtype=dtype, device="meta")
    return x, torch.empty((_O, _I, _D, _K), dtype=dtype, device="meta")


def _iteration_case(dtype: torch.dtype, first: bool) -> None:
    x, weight = _tensors(dtype)
    agreed = torch.empty((_B, _O, _D), dtype=torch.float32, device="meta")
    block = _prepare("capsule_routing", x, weight)
    _over_inputs(_capsule_routing_fwd_kernel, x, weight, {"agreed_ptr": agreed}, block, FIRST=first)


def _iteration_grad_case(dtype: torch.dtype) -> None:
    x, weight = _tensors(dtype)
    state = torch.empty((_B, _O, _D), dtype=torch.float32, device="meta")
    block = _prepare("capsule_routing_grad", x, weight)
    tensors = {"agreed_ptr": state, "grad_ptr": state}
    _over_inputs(_capsule_routing_bwd_kernel, x, weight, tensors, block)


def _inputs_grad_case(dtype: torch.dtype) -> None:
    x, weight = _tensors(dtype)
    sums = torch.empty((_B, 3, _O, _D), dtype=torch.float32, device="meta")
    grad = torch.empty((_B, _O, _D), dtype=dtype, device="meta")
    capsule_routing_grad(grad, x, weight, sums, False, None)


# An iteration is a launch, and a case of its own: each reads x and the weight once.
STATIC_CASES = [
    *triton_squash.STATIC_CASES,
    *(
        StaticCase(
            f"capsule_routing B512 1152×8→10×16, {name}",
            lambda dtype, first=first: _iteration_case(dtype, first),
            flops=_VOTES * (2 * _K + terms),
            elements=_TENSORS,
        )
        for name, first, terms in (("first iteration", True, 1), ("an iteration", False, 4))
    ),
    StaticCase(
        "capsule_routing_grad B512 1152×8→10×16, an iteration",
        _iteration_grad_case,
        flops=_VOTES * (2 * _K + 6),
        elements=_TENSORS,
    ),
    StaticCase(
        "capsule_routing_grad B512 1152×8→10×16, dx and dw",
        _inputs_grad_case,
        flops=_VOTES * (6 * _K + 20),
        elements=2 * _TENSORS,
        main=6,
    ),
]
