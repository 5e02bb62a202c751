"""The fused epilogue on a tile in registers, and the activations with their derivatives.

The codes are those of ``nnarch.kernels.activation.kinds``: 0 none, 1 relu, 2 relu6, 3 leaky_relu
(`alpha` is its slope), 4 hardswish, 5 hardsigmoid, 6 silu, 7 gelu, 8 gelu_tanh, 9 tanh, 10 sigmoid.
Everything computes in float32. `KIND` is a constexpr, so a kernel contains one activation only.

The derivatives are functions of what the forward pass saved: the output y for the kinds whose
derivative can be read from it (1, 2, 3, 5, 9, 10), the input z for the others (4, 6, 7, 8).
"""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_GELU_CUBIC = tl.constexpr(0.044715)
# A constexpr stays on the right of a product: on its left the interpreter loses the tensor.


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Within 2 ulp: a polynomial where (1 - e)/(1 + e) would cancel, no device library."""
    a = tl.abs(x)
    u = x * x
    small = x + x * u * (
        -0.33333332 + u * (0.13333231 + u * (-0.05393370 + u * (0.02147262 + u * -0.00694690)))
    )
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.5, small, tl.where(x < 0, -large, large))


@triton.jit
def _clamp(x, low, high):
    """Clamp that keeps NaN, as torch does; tl.minimum and tl.maximum may drop it."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _gelu_tanh_argument(x):
    return (x + x * x * x * _GELU_CUBIC) * _SQRT_2_OVER_PI


@triton.jit
def _sech2(x):
    """1 - tanh(x)^2 without its cancellation."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def apply_activation(x, KIND: tl.constexpr, alpha):
    """act(x) for a float32 tile."""
    if KIND == 1:
        x = tl.where(x < 0, 0.0, x)
    elif KIND == 2:
        x = _clamp(x, 0.0, 6.0)
    elif KIND == 3:
        x = tl.where(x < 0, x * alpha, x)
    elif KIND == 4:
        x = x * (_clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0))
    elif KIND == 5:
        x = _clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif KIND == 6:
        x = x * sigmoid(x)
    elif KIND == 7:
        x = x * (0.5 + 0.5 * tl.erf(x * _SQRT_HALF))
    elif KIND == 8:
        x = x * (0.5 + 0.5 * tanh(_gelu_tanh_argument(x)))
    elif KIND == 9:
        x = tanh(x)
    elif KIND == 10:
        x = sigmoid(x)
    return x


@triton.jit
def activation_derivative(saved, KIND: tl.constexpr, alpha):
    """act'(z) as a function of `saved`: y for kinds 1 2 3 5 9 10, z for kinds 4 6 7 8."""
    if KIND == 1:
        d = tl.where(saved <= 0, 0.0, 1.0)  # 1 for NaN, as torch
    elif KIND == 2:
        d = tl.where((saved <= 0) | (saved >= 6.0), 0.0, 1.0)
    elif KIND == 3:
        d = tl.where(saved > 0, 1.0, alpha)
    elif KIND == 4:
        d = tl.where(saved <= -3.0, 0.0, tl.where(saved < 3.0, saved * (1.0 / 3.0) + 0.5, 1.0))
    elif KIND == 5:
        d = tl.where((saved > 0) & (saved < 1.0), 1.0 / 6.0, 0.0)
    elif KIND == 6:
        s = sigmoid(saved)
        d = s * (1.0 + saved * (1.0 - s))
    elif KIND == 7:
        density = tl.exp(-0.5 * saved * saved) * _INV_SQRT_2PI
        d = 0.5 + 0.5 * tl.erf(saved * _SQRT_HALF) + saved * density
    elif KIND == 8:
        u = _gelu_tanh_argument(saved)
        du = (1.0 + saved * saved * (3.0 * _GELU_CUBIC)) * _SQRT_2_OVER_PI
        d = 0.5 + 0.5 * tanh(u) + 0.5 * saved * _sech2(u) * du
    elif KIND == 9:
        d = 1.0 - saved * saved
    elif KIND == 10:
        d = saved * (1.0 - saved)
    else:
        d = tl.full(saved.shape, 1.0, tl.float32)
    return d


@triton.jit
def activation_second_derivative(saved, KIND: tl.constexpr):
    """The derivative of :func:`activation_derivative` by `saved`; 0 for the piecewise linear."""
    if KIND == 4:
        d = tl.where((saved > -3.0) & (saved < 3.0), 1.0 / 3.0, 0.0)
    elif KIND == 6:
        s = sigmoid(saved)
        d = s * (1.0 - s) * (2.0 + saved * (1.0 - 2.0 * s))
    elif KIND == 7:
        d = tl.exp(-0.5 * saved * saved) * _INV_SQRT_2PI * (2.0 - saved * saved)
    elif KIND == 8:
        u = _gelu_tanh_argument(saved)
        du = (1.0 + saved * saved * (3.0 * _GELU_CUBIC)) * _SQRT_2_OVER_PI
        ddu = saved * (6.0 * _GELU_CUBIC * _SQRT_2_OVER_PI)
        d = _sech2(u) * (du + 0.5 * saved * (ddu - 2.0 * tanh(u) * du * du))
    elif KIND == 9:
        d = -2.0 * saved
    elif KIND == 10:
        d = 1.0 - 2.0 * saved
    else:
        d = tl.zeros(saved.shape, tl.float32)
    return d


@triton.jit
def scale_and_shift(x, bias_ptr, scale_ptr, shift_ptr, channel, in_range):
    """scale[c] * (x + bias[c]) + shift[c]; `channel` and `in_range` broadcast against `x`.

    A pointer that is None leaves its term out at compile time.
    """
    if bias_ptr is not None:
        x += tl.load(bias_ptr + channel, mask=in_range, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + channel, mask=in_range, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x += tl.load(shift_ptr + channel, mask=in_range, other=0.0).to(tl.float32)
    return x


@triton.jit
def write_tile(
    acc,  # [rows, WIDTH] float32
    y_ptr,
    row_y,  # [rows] offset of each row in y
    stride_yk,
    residual_ptr,  # None, or read at row_r + k·stride_rk
    row_r,
    stride_rk,
    row_inside,
    first_k,  # channel of column 0
    end_k,  # channels from here on do not exist
    bias_ptr,
    scale_ptr,
    shift_ptr,
    alpha,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    INT64: tl.constexpr,
):
    """Store act(scale·(acc + bias) + shift + residual), at most 32 channels at a time.

    The addresses and the residual of a wide tile, all at once, would spill registers.
    """
    if WIDTH > 32:
        halves = tl.permute(tl.reshape(acc, (acc.shape[0], 2, WIDTH // 2)), (0, 2, 1))
        low, high = tl.split(halves)
        # fmt: off
        write_tile(
            low, y_ptr, row_y, stride_yk, residual_ptr, row_r, stride_rk, row_inside,
            first_k, end_k, bias_ptr, scale_ptr, shift_ptr, alpha,
            ACTIVATION, WIDTH // 2, INT64,
        )
        write_tile(
            high, y_ptr, row_y, stride_yk, residual_ptr, row_r, stride_rk, row_inside,
            first_k + WIDTH // 2, end_k, bias_ptr, scale_ptr, shift_ptr, alpha,
            ACTIVATION, WIDTH // 2, INT64,
        )
        # fmt: on
    else:
        k = first_k + tl.arange(0, WIDTH)
        k_inside = k < end_k
        if INT64:
            k = k.to(tl.int64)
        inside = row_inside[:, None] & k_inside[None, :]
        acc = scale_and_shift(acc, bias_ptr, scale_ptr, shift_ptr, k[None, :], k_inside[None, :])
        if residual_ptr is not None:
            r_ptr = residual_ptr + row_r[:, None] + (k * stride_rk)[None, :]
            acc += tl.load(r_ptr, mask=inside, other=0.0).to(tl.float32)
        y = apply_activation(acc, ACTIVATION, alpha).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row_y[:, None] + (k * stride_yk)[None, :], y, mask=inside)
