"""Sparse reservoirs: schemas, checks, autograd, and the public functions."""

from __future__ import annotations

import warnings
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from nnarch import arrays, library
from nnarch.kernels.activation import kinds

from . import reference

_GPU = "nnarch.kernels.reservoir.numba_scan"
ACTIVATIONS = {name: kinds.CODES[name] for name in ("tanh", "sigmoid", "relu", None)}

# --------------------------------------------------------------------------------------- checks


def _check_shape(op: str, name: str, tensor: Any, shape: tuple[int, ...], like: Tensor) -> None:
    library.check_tensor(op, name, tensor)
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{op}: {name} must be {shape}, got {tuple(tensor.shape)}")
    library.check_same(op, name, tensor, like)


def _check_matrix(op: str, values: Tensor, columns: Tensor, rows: Tensor) -> int:
    """A square matrix in compressed rows; its size."""
    library.check_tensor(op, "values", values)
    for name, t in (("columns", columns), ("rows", rows)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if t.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be torch.int32, got {t.dtype}")
        library.check_device(op, name, t, values, of="values")
    for name, t in (("values", values), ("columns", columns), ("rows", rows)):
        if t.dim() != 1:
            raise ValueError(f"{op}: {name} must be 1-D, got {tuple(t.shape)}")
    if rows.numel() < 1:
        raise ValueError(f"{op}: rows must have one entry more than the matrix has rows, got none")
    if columns.numel() != values.numel():
        raise ValueError(
            f"{op}: columns must have {values.numel()} entries as values, got {columns.numel()}"
        )
    return rows.numel() - 1


def _check_entries(op: str, values: Tensor, columns: Tensor, rows: Tensor) -> None:
    """What takes a look at the numbers, where there are any."""
    if rows.device.type == "meta" or is_fake(rows):
        return
    n = rows.numel() - 1
    steps = rows.long().diff()
    if int(rows[0]) != 0 or int(rows[-1]) != values.numel() or bool((steps < 0).any()):
        raise ValueError(f"{op}: rows must rise from 0 to the number of values, {values.numel()}")
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < n:
        raise ValueError(f"{op}: columns must be at least 0 and below {n}")


def _check_common(
    op: str, x: Tensor, state0: Tensor, n: int, activation: int, matrix: tuple[Tensor, ...]
) -> None:
    library.check_tensor(op, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be [steps, batch, inputs], got {tuple(x.shape)}")
    _check_shape(op, "state", state0, (x.shape[1], n), x)
    library.check_same(op, "values", matrix[0], x)
    if activation not in ACTIVATIONS.values():
        raise ValueError(f"{op}: activation must be one of {list(ACTIVATIONS)}, got {activation}")


def _check_packed(op: str, packed: Tensor | None, x: Tensor) -> None:
    if packed is None:
        return
    if not isinstance(packed, Tensor) or packed.dtype != _compute_dtype(x):
        what = packed.dtype if isinstance(packed, Tensor) else type(packed).__name__
        raise TypeError(
            f"{op}: packed must be a {_compute_dtype(x)} tensor of pack_reservoir, got {what}"
        )
    library.check_device(op, "packed", packed, x)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_pack(values: Tensor, columns: Tensor, rows: Tensor) -> None:
    _check_matrix("reservoir_pack", values, columns, rows)
    _check_entries("reservoir_pack", values, columns, rows)


def _check_scan(
    x: Tensor, w_in: Tensor | None, bias: Tensor | None, values: Tensor, columns: Tensor,
    rows: Tensor, packed: Tensor | None, state0: Tensor, leak: float, activation: int, skip: int,
) -> None:  # fmt: skip
    op = "reservoir_scan"
    n = _check_matrix(op, values, columns, rows)
    _check_common(op, x, state0, n, activation, (values, columns, rows))
    if w_in is not None:
        _check_shape(op, "w_in", w_in, (n, x.shape[2]), x)
    elif x.shape[2] != n:
        raise ValueError(
            f"{op}: without w_in, x must be [steps, batch, {n}], one input a neuron; "
            f"got {tuple(x.shape)}"
        )
    if bias is not None:
        _check_shape(op, "bias", bias, (n,), x)
    if skip < 0:
        raise ValueError(f"{op}: skip must be at least 0, got {skip}")
    _check_packed(op, packed, x)
    if packed is None:
        _check_entries(op, values, columns, rows)


def _check_generate(
    x: Tensor, y0: Tensor, w_in: Tensor, bias: Tensor | None, values: Tensor, columns: Tensor,
    rows: Tensor, packed: Tensor | None, state0: Tensor, w_out: Tensor, b_out: Tensor | None,
    leak: float, activation: int,
) -> None:  # fmt: skip
    op = "reservoir_generate"
    n = _check_matrix(op, values, columns, rows)
    _check_common(op, x, state0, n, activation, (values, columns, rows))
    library.check_tensor(op, "y0", y0)
    if y0.dim() != 2:
        raise ValueError(f"{op}: y0 must be [batch, outputs], got {tuple(y0.shape)}")
    fed, inputs = y0.shape[1], x.shape[2] + y0.shape[1]
    _check_shape(op, "y0", y0, (x.shape[1], fed), x)
    _check_shape(op, "w_in", w_in, (n, inputs), x)
    library.check_tensor(op, "w_out", w_out)
    if tuple(w_out.shape) not in ((fed, n), (fed, n + inputs)):
        raise ValueError(
            f"{op}: w_out must be {(fed, n)}, or {(fed, n + inputs)} where it reads the input too; "
            f"got {tuple(w_out.shape)}"
        )
    library.check_same(op, "w_out", w_out, x)
    if bias is not None:
        _check_shape(op, "bias", bias, (n,), x)
    if b_out is not None:
        _check_shape(op, "b_out", b_out, (fed,), x)
    _check_packed(op, packed, x)
    if packed is None:
        _check_entries(op, values, columns, rows)


# ----------------------------------------------------------------------------------- operations


def _fake_pack(values: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()  # rows are padded by what they hold
    return values.new_empty(size, dtype=_compute_dtype(values))


def _fake_scan(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    state0, skip = args[6], args[9]
    kept: Any = torch.sym_max(0, x.shape[0] - skip)
    return x.new_empty((kept, *state0.shape)), x.new_empty(tuple(state0.shape))


def _fake_generate(x: Tensor, y0: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], *y0.shape)), x.new_empty(tuple(args[6].shape))


reservoir_pack_op = library.declare(
    "reservoir_pack(Tensor values, Tensor columns, Tensor rows) -> Tensor",
    reference=reference.reservoir_pack,
    fake=_fake_pack,
    check=_check_pack,
    gpu=f"{_GPU}:reservoir_pack",
    gpu_backend="numba",
)

reservoir_scan_op = library.declare(
    "reservoir_scan(Tensor x, Tensor? w_in, Tensor? bias, Tensor values, Tensor columns, "
    "Tensor rows, Tensor? packed, Tensor state0, float leak, int activation, int skip) "
    "-> (Tensor, Tensor)",
    reference=reference.reservoir_scan,
    fake=_fake_scan,
    check=_check_scan,
    gpu=f"{_GPU}:reservoir_scan",
    gpu_backend="numba",
)

reservoir_generate_op = library.declare(
    "reservoir_generate(Tensor x, Tensor y0, Tensor w_in, Tensor? bias, Tensor values, "
    "Tensor columns, Tensor rows, Tensor? packed, Tensor state0, Tensor w_out, Tensor? b_out, "
    "float leak, int activation) -> (Tensor, Tensor)",
    reference=reference.reservoir_generate,
    fake=_fake_generate,
    check=_check_generate,
    gpu=f"{_GPU}:reservoir_generate",
    gpu_backend="numba",
)

# ----------------------------------------------------------------------------- public functions


def _activation(op: str, name: str | None) -> int:
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {list(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def _compressed(op: str, matrix: Any) -> tuple[Tensor, Tensor, Tensor]:
    """values, columns, rows of a matrix as torch, scipy or a tuple has it."""
    if isinstance(matrix, tuple) and len(matrix) == 3:
        # as_tensor would move a tensor to the default device, where one is set.
        values, columns, rows = (
            part if isinstance(part, Tensor) else torch.as_tensor(part) for part in matrix
        )
        return values, columns, rows
    if isinstance(matrix, np.ndarray):
        matrix = torch.as_tensor(matrix)
    if isinstance(matrix, Tensor) and matrix.layout == torch.strided and matrix.dim() == 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the format a beta
            matrix = matrix.to_sparse_csr()
    if isinstance(matrix, Tensor) and matrix.layout == torch.sparse_csr:
        parts = matrix.values(), matrix.col_indices(), matrix.crow_indices()
    elif all(hasattr(matrix, part) for part in ("tocsr", "shape")):
        matrix = cast(Any, matrix).tocsr()
        parts = tuple(map(torch.as_tensor, (matrix.data, matrix.indices, matrix.indptr)))
    else:
        raise TypeError(
            f"{op}: matrix must be a sparse CSR tensor, a scipy sparse matrix, a dense matrix or "
            f"the tuple (values, columns, rows), got {type(matrix).__name__}"
        )
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{op}: matrix must be square, got {tuple(matrix.shape)}")
    values, columns, rows = parts
    return values, columns.to(torch.int32), rows.to(torch.int32)


def pack_reservoir(matrix: Any) -> Tensor:
    """A recurrent matrix in the order that the kernels of its device read, to be given as `packed`.

    Args:
        matrix: as for :func:`reservoir_scan`.

    Returns:
        An opaque tensor. It holds the values too: pack again when those change.
    """
    return reservoir_pack_op(*_compressed("pack_reservoir", matrix))


@arrays.public
def reservoir_scan(
    x: Tensor,
    matrix: Any,
    w_in: Tensor | None = None,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    leak: float = 1.0,
    activation: str | None = "tanh",
    skip: int = 0,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The states of a sparse reservoir over a whole sequence.

    ``s[t] = (1 - leak)·s[t-1] + leak·f(W·s[t-1] + w_in·x[t] + bias)``. Jaeger, 2001, The "echo
    state" approach to analysing and training recurrent neural networks; leaky neurons: Jaeger and
    others, 2007, Optimization and applications of echo state networks with leaky integrators.

    Args:
        x: ``[T, B, I]`` inputs; ``[T, B, N]`` without `w_in`, added to the neurons as they are.
        matrix: W, ``[N, N]`` and sparse: a CSR tensor, a scipy sparse matrix, or the tuple
            (values, columns, rows) of its compressed rows with int32 indices.
        w_in: ``[N, I]``.
        bias: ``[N]``.
        state: ``[B, N]`` before the first step; zeros by default.
        leak: 1 is a neuron without memory of its own.
        activation: "tanh", "sigmoid", "relu", or None for linear neurons.
        skip: steps whose states are not kept (the washout). With ``skip=T`` memory does not grow
            with the sequence.
        packed: what :func:`pack_reservoir` made of `matrix`, to save packing it in every call.

    Returns:
        ``[max(0, T - skip), B, N]``, the states kept, and ``[B, N]``, the last state.

    Raises:
        ValueError: shapes that do not fit, a matrix that is not square, an unknown activation.
        TypeError: arguments of the wrong type; dtypes that differ.
    """
    op = "reservoir_scan"
    library.check_tensor(op, "x", x)
    values, columns, rows = _compressed(op, matrix)
    if isinstance(skip, bool) or not isinstance(skip, int):
        raise TypeError(f"{op}: skip must be an int, got {skip!r}")
    if state is None:
        state = _zero_state(op, x, rows)
    return reservoir_scan_op(
        x, w_in, bias, values, columns, rows, packed, state, float(leak),
        _activation(op, activation), skip,
    )  # fmt: skip


@arrays.public
def reservoir_generate(
    x: Tensor,
    y0: Tensor,
    matrix: Any,
    w_in: Tensor,
    w_out: Tensor,
    b_out: Tensor | None = None,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    leak: float = 1.0,
    activation: str | None = "tanh",
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A reservoir that runs freely: every step's output is part of the next step's input.

    Args:
        x: ``[T, B, I]``, the inputs from outside; I may be 0.
        y0: ``[B, O]``, the output before the first step.
        matrix, bias, state, leak, activation, packed: as for :func:`reservoir_scan`.
        w_in: ``[N, I + O]``, weights of the inputs, then of the outputs fed back.
        w_out: ``[O, N]``, the readout; ``[O, N + I + O]`` reads the step's input beside the state.
        b_out: ``[O]``.

    Returns:
        ``[T, B, O]``, the outputs, and ``[B, N]``, the state after the last step.

    Raises:
        ValueError: shapes that do not fit, a matrix that is not square, an unknown activation.
        TypeError: arguments of the wrong type; dtypes that differ.
    """
    op = "reservoir_generate"
    library.check_tensor(op, "x", x)
    values, columns, rows = _compressed(op, matrix)
    if state is None:
        state = _zero_state(op, x, rows)
    return reservoir_generate_op(
        x, y0, w_in, bias, values, columns, rows, packed, state, w_out, b_out, float(leak),
        _activation(op, activation),
    )  # fmt: skip


def _zero_state(op: str, x: Tensor, rows: Tensor) -> Tensor:
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be [steps, batch, inputs], got {tuple(x.shape)}")
    return x.new_zeros(x.shape[1], max(0, rows.numel() - 1))
