"""The Triton launchers of layer and RMS normalization, and the shapes compiled for in CI."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch.kernels.dropout.reference import survivor_scale, threshold
from nnarch.kernels.gpu import targets
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    flat_grid,
    launch,
    needs_int64,
    vector,
)
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.gpu.tiles import Tile, tile
from nnarch.kernels.layer_norm.triton_backward import (
    layer_norm_bwd_bwd_kernel,
    layer_norm_bwd_columns_kernel,
    layer_norm_bwd_kernel,
)
from nnarch.kernels.layer_norm.triton_forward import layer_norm_fwd_kernel, row_dropout_kernel
from nnarch.kernels.normalization.triton_reduce import merge_sums

_LONGEST = 8192  # columns of a row that stays in registers: 16 a thread
_ELEMENTS = 1024  # of a tile of short rows
_COLUMNS = tile(BLOCK_R=16, BLOCK_C=64, num_warps=4)


def _blocks(columns: int) -> tuple[Tile, bool]:
    """The rows and columns of a program, and whether those are whole rows."""
    whole = columns <= _LONGEST
    width = max(4, 1 << (columns - 1).bit_length()) if whole else _LONGEST // 2
    rows = max(1, _ELEMENTS // width)
    return tile(BLOCK_R=rows, BLOCK_C=width, num_warps=min(16, max(4, width // 256))), whole


def _rows(x: Tensor | None, columns: int) -> Tensor | None:
    """x as [rows, columns] with dense rows; a copy where its strides allow no such view."""
    if x is None:
        return None
    view = x.reshape(-1, columns)
    return view if view.stride(1) == 1 or columns == 1 else view.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _statistics(stats: Tensor) -> dict[str, Any]:
    rms = stats.shape[0] == 1
    return {"mean_ptr": None if rms else stats[0], "rstd_ptr": stats[-1], "RMS": rms}


def _wide(x: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=x.device)


def _dense(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# -------------------------------------------------------------------------------------- forward


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    columns: int,
    eps: float,
    rms: bool,
) -> Tensor:
    """``nnarch::layer_norm``."""
    check_dtype("layer_norm", x, weight, bias, residual)
    y = _dense(x)
    _forward(x, weight, bias, residual, None, columns, eps, 0.0, rms, y, None, None)
    return y


def layer_norm_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    columns: int,
    eps: float,
    dropout_p: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``nnarch::layer_norm_train``."""
    check_dtype("layer_norm_train", x, weight, bias, residual)
    adds = residual is not None or seed is not None
    y, total = _dense(x), _dense(x) if adds else x.new_empty(0)
    stats = _wide(x, 1 if rms else 2, x.numel() // columns if columns else 0)
    _forward(
        x, weight, bias, residual, seed, columns, eps, dropout_p, rms, y,
        total if adds else None, stats,
    )  # fmt: skip
    return y, total, stats


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    columns: int,
    eps: float,
    dropout_p: float,
    rms: bool,
    y: Tensor,
    total: Tensor | None,
    stats: Tensor | None,
) -> None:
    if x.numel() == 0:
        return
    x_rows, r_rows = _rows(x, columns), _rows(residual, columns)
    assert x_rows is not None
    block, whole = _blocks(columns)
    arguments = {
        **{"x_ptr": x_rows, "residual_ptr": r_rows, "seed_ptr": seed},
        **{"weight_ptr": vector(weight), "bias_ptr": vector(bias)},
        **{"sum_ptr": total, "y_ptr": y},
        "mean_ptr": None if stats is None or rms else stats[0],
        "rstd_ptr": None if stats is None else stats[-1],
        **{"rows": len(x_rows), "columns": columns, "eps": float(eps), "RMS": rms},
        **_dropout_arguments(dropout_p),
        **{"stride_xr": _stride(x_rows), "stride_rr": _stride(r_rows)},
        **{"WHOLE": whole, "INT64": needs_int64(x_rows, r_rows, y)},
    }
    with device_guard(x):
        programs = cdiv(len(x_rows), block["BLOCK_R"])
        launch(layer_norm_fwd_kernel, flat_grid(programs), arguments, block)


def _dropout_arguments(p: float) -> dict[str, Any]:
    # A float would be specialised on when it is 1.
    return {"threshold": threshold(p), "scale": float(survivor_scale(p))}


def row_dropout(x: Tensor, seed: Tensor, columns: int, dropout_p: float) -> Tensor:
    """``nnarch::row_dropout``."""
    check_dtype("row_dropout", x)
    y = _dense(x)
    if x.numel() == 0:
        return y
    rows = _rows(x, columns)
    assert rows is not None
    block, _ = _blocks(columns)
    arguments = {
        **{"x_ptr": rows, "seed_ptr": seed, "y_ptr": y},
        **{"rows": len(rows), "columns": columns, "stride_xr": _stride(rows)},
        **_dropout_arguments(dropout_p),
        "INT64": needs_int64(rows, y),
    }
    with device_guard(x):
        launch(row_dropout_kernel, flat_grid(cdiv(len(rows), block["BLOCK_R"])), arguments, block)
    return y


# ----------------------------------------------------------------------------------- gradients


def layer_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    columns: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``nnarch::layer_norm_backward``."""
    check_dtype("layer_norm_backward", grad, grad_sum, s, weight)
    want_s, parameters = bool(wanted & 1), bool(wanted & 6)
    ds = _dense(s) if want_s else s.new_empty(0)
    dweight, dbias = (_wide(s, columns if parameters else 0) for _ in range(2))
    if s.numel() == 0:
        return ds, dweight.zero_(), dbias.zero_()
    g, added, rows = (_rows(t, columns) for t in (grad, grad_sum, s))
    assert g is not None and rows is not None
    block, whole = _blocks(columns)
    tiles = cdiv(len(rows), block["BLOCK_R"])
    # Few programs leave few partial sums: two for each processor.
    per_program = cdiv(tiles, 2 * targets.current_target().processors) if whole else 1
    programs = cdiv(tiles, per_program)
    partial = _wide(s, programs, 2, columns) if whole and parameters else None
    arguments = {
        **{"grad_ptr": g, "grad_sum_ptr": added, "s_ptr": rows, "weight_ptr": vector(weight)},
        **_statistics(stats),
        **{"ds_ptr": ds if want_s else None, "partial_ptr": partial},
        **{"rows": len(rows), "columns": columns, "row_tiles": per_program},
        **{"stride_gr": _stride(g), "stride_ar": _stride(added), "stride_sr": _stride(rows)},
        **{"WHOLE": whole, "INT64": needs_int64(g, added, rows, ds)},
    }
    with device_guard(s):
        if want_s or partial is not None:
            launch(layer_norm_bwd_kernel, flat_grid(programs), arguments, block)
        if parameters:
            if partial is None:
                partial = _column_sums(g, rows, None, None, stats, columns)
            merge_sums(partial[:, 0], dweight)
            merge_sums(partial[:, 1], dbias)
    return ds, dweight, dbias


def _column_sums(
    grad: Tensor,
    s: Tensor,
    a: Tensor | None,
    means: Tensor | None,
    stats: Tensor,
    columns: int,
) -> Tensor:
    """Partial sums [splits, 2, columns] over the rows."""
    tiles = cdiv(len(s), _COLUMNS["BLOCK_R"])
    column_blocks = cdiv(columns, _COLUMNS["BLOCK_C"])
    splits = max(1, min(tiles, 4 * targets.current_target().processors // column_blocks))
    per_program = cdiv(tiles, splits)
    splits = cdiv(tiles, per_program)
    partial = _wide(s, splits, 2, columns)
    statistics = _statistics(stats)
    del statistics["RMS"]
    arguments = {
        **{"grad_ptr": grad, "s_ptr": s, "a_ptr": a, **statistics, "means_ptr": means},
        **{"partial_ptr": partial, "rows": len(s), "columns": columns, "row_tiles": per_program},
        **{"stride_gr": _stride(grad), "stride_sr": _stride(s), "stride_ar": _stride(a)},
        "INT64": needs_int64(grad, s, a),
    }
    launch(layer_norm_bwd_columns_kernel, (column_blocks, splits), arguments, _COLUMNS)
    return partial


def layer_norm_backward_backward(
    gg_ds: Tensor,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    grad: Tensor,
    s: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``nnarch::layer_norm_backward_backward``."""
    op = "layer_norm_backward_backward"
    check_dtype(op, gg_ds, gg_weight, gg_bias, grad, s, weight)
    d_grad, d_s, d_weight = _dense(s), _dense(s), _wide(s, columns)
    if s.numel() == 0:
        return d_grad, d_s, d_weight.zero_()
    a, g, rows = (_rows(t, columns) for t in (gg_ds, grad, s))
    assert a is not None and g is not None and rows is not None
    block, _ = _blocks(min(columns, 1024))  # eight values a thread for each of seven sums
    means = _wide(s, 2, len(rows))
    arguments = {
        **{"a_ptr": a, "gg_weight_ptr": vector(gg_weight), "gg_bias_ptr": vector(gg_bias)},
        **{"grad_ptr": g, "s_ptr": rows, "weight_ptr": vector(weight), **_statistics(stats)},
        **{"d_grad_ptr": d_grad, "d_s_ptr": d_s, "means_ptr": means},
        **{"rows": len(rows), "columns": columns},
        **{"stride_ar": _stride(a), "stride_gr": _stride(g), "stride_sr": _stride(rows)},
        "INT64": needs_int64(a, g, rows, d_s),
    }
    with device_guard(s):
        programs = cdiv(len(rows), block["BLOCK_R"])
        launch(layer_norm_bwd_bwd_kernel, flat_grid(programs), arguments, block)
        merge_sums(_column_sums(g, rows, a, means, stats, columns)[:, 0], d_weight)
    return d_grad, d_s, d_weight


# ------------------------------------------------------------------------------ static checks


def _case(operation: str, rows: int, columns: int) -> StaticCase:
    """An operation on activations of a Transformer."""
    # Forward: two addends, their sum, the result. Backward: two gradients and the sum, the result.
    tensors = {"layer_norm": 3, "layer_norm_train": 4, "rms_norm": 2, "row_dropout": 2}
    tensors |= {"layer_norm_backward": 4, "layer_norm_backward_backward": 5}

    def run(dtype: torch.dtype) -> Any:
        x, v = meta(rows, columns, dtype=dtype), meta(columns, dtype=torch.float32)
        stats = meta(2, rows, dtype=torch.float32)
        seed = meta(1, dtype=torch.int64)
        return {
            "layer_norm": lambda: layer_norm(x, v, v, x, columns, 1e-5, False),
            "rms_norm": lambda: layer_norm(x, v, None, None, columns, 1e-5, True),
            "layer_norm_train": lambda: layer_norm_train(
                x, v, v, x, seed, columns, 1e-5, 0.1, False
            ),
            "row_dropout": lambda: row_dropout(x, seed, columns, 0.1),
            "layer_norm_backward": lambda: layer_norm_backward(x, x, x, v, stats, columns, 7),
            "layer_norm_backward_backward": lambda: layer_norm_backward_backward(
                x, v, v, x, x, v, stats, columns
            ),
        }[operation]()

    elements = float(rows * columns)
    dropout = 25 if operation in ("layer_norm_train", "row_dropout") else 0
    return StaticCase(
        f"{operation} {rows}×{columns}",
        run,
        (10 + dropout) * elements,
        tensors[operation] * elements,
    )


STATIC_CASES = [
    _case(operation, rows, columns)
    for operation in (
        "layer_norm", "rms_norm", "layer_norm_train", "row_dropout", "layer_norm_backward",
        "layer_norm_backward_backward",
    )
    for rows, columns in ((4096, 768), (2048, 8192), (1024, 16384))
]  # fmt: skip
