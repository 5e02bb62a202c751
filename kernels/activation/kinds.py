"""The activation functions, their codes, and what their gradients are computed from."""

from __future__ import annotations

import torch

from nnarch.calls import wants_gradient

NONE, RELU, RELU6, LEAKY_RELU, HARDSWISH, HARDSIGMOID = range(6)
SILU, GELU, GELU_TANH, TANH, SIGMOID = range(6, 11)

CODES = {
    None: NONE,
    "relu": RELU,
    "relu6": RELU6,
    "leaky_relu": LEAKY_RELU,
    "hardswish": HARDSWISH,
    "hardsigmoid": HARDSIGMOID,
    "silu": SILU,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "tanh": TANH,
    "sigmoid": SIGMOID,
}
NAMES = {code: name for name, code in CODES.items()}

# The slope of leaky_relu for negative inputs where none is given.
DEFAULT_ALPHA = 0.01

# Kinds whose gradient follows from their output: a fused kernel need not keep its input.
INVERTIBLE = frozenset((NONE, RELU, RELU6, LEAKY_RELU, HARDSIGMOID, TANH, SIGMOID))

# Those that keep their output where they stand alone. leaky_relu keeps its input, as in torch: then
# a residual may be added to its output in place. (A negative slope hides the sign, too.)
KEEPS_OUTPUT = INVERTIBLE - {LEAKY_RELU}

Activation = str | tuple[str, float] | None

_ENCODED = {
    name: (code, DEFAULT_ALPHA if code == LEAKY_RELU else 0.0) for name, code in CODES.items()
}


def encode(activation: Activation, op: str = "activation") -> tuple[int, float]:
    """The (code, alpha) that operations take.

    Args:
        activation: None, a name, or (name, alpha). Only leaky_relu has an alpha, its slope for
            negative inputs, which must not be negative here: its gradient would no longer follow
            from its output.
        op: the function to name in errors.

    Raises:
        ValueError: unknown name, or an alpha that the kind does not take.
        TypeError: neither a name nor a pair.
    """
    try:
        return _ENCODED[activation]  # type: ignore[index]
    except (KeyError, TypeError):
        return _encode_pair(activation, op)


def _encode_pair(activation: object, op: str) -> tuple[int, float]:
    if isinstance(activation, str):
        raise ValueError(f"{op}: activation must be one of {_known()}, got {activation!r}")
    if not isinstance(activation, (tuple, list)) or len(activation) != 2:
        raise TypeError(
            f"{op}: activation must be None, a name or a pair (name, alpha), got {activation!r}"
        )
    name, alpha = activation
    if not isinstance(name, str) or name not in CODES:
        raise ValueError(f"{op}: activation must be one of {_known()}, got {name!r}")
    if name != "leaky_relu":
        raise ValueError(f"{op}: activation {name!r} takes no alpha, got {alpha!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"{op}: alpha of leaky_relu must be a number, got {alpha!r}")
    if not alpha >= 0:
        raise ValueError(f"{op}: alpha of leaky_relu must not be negative, got {alpha!r}")
    return LEAKY_RELU, float(alpha)


def _known() -> str:
    return ", ".join(repr(name) for name in CODES if name is not None)


def needs_split(code: int, *tensors: torch.Tensor | None) -> bool:
    """Whether a fused call must run its activation apart, because a gradient needs its input."""
    return code not in INVERTIBLE and wants_gradient(*tensors)
