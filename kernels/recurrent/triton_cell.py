"""The cells on tiles in registers, forward and backward, and the rows of a step.

Codes of `kinds.py`: 0 RNN tanh, 1 RNN relu, 2 LSTM, 3 GRU. Everything computes in float32. A tile
runs over units and sequences in either order: nothing here depends on it.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_MOST_EXPONENT = tl.constexpr(50.0)
"""Of e^-x in a sigmoid: two such factors and a tanh's have a finite product; σ is 1e-15 there."""
_MOST_TANH = tl.constexpr(8.15449047)
"""The last argument of the quotient that is not rounded beyond 1."""


@triton.jit
def _sigmoid_below(x):
    """σ(x) is 1 over this; a NaN stays."""
    bound = tl.minimum(x * -_LOG2_E, _MOST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)
    return 1.0 + tl.exp2(bound)


@triton.jit
def _tanh_parts(x):
    """Numerator and denominator of tanh(x): the CPU's quotient (cell_math_isa.h), within 2.1 ulp.

    The denominator is 1 to 2⁹. Unlike exp it is right near 0 and waits for no special function.
    """
    x = tl.maximum(x, -_MOST_TANH, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, _MOST_TANH, propagate_nan=tl.PropagateNan.ALL)
    u = x * x
    above = 2.06358503e-05 + u * 1.33843204e-08
    above = 1.0 + u * (0.133826891 + u * (0.00349745968 + u * above))
    below = 0.000328852041 + u * 7.79026318e-07
    below = 1.0 + u * (0.467160103 + u * (0.0258843689 + u * below))
    return x * above, below


@triton.jit
def tanh(x):
    above, below = _tanh_parts(x)
    return above / below


@triton.jit
def step_rows(t, steps, batch, starts_ptr):
    """First row and number of rows of step t; no rows outside the sequence."""
    inside = (t >= 0) & (t < steps)
    if starts_ptr is None:
        first = tl.cast(t, tl.int64) * batch
        count = tl.where(inside, batch, 0).to(tl.int64)
    else:
        first = tl.load(starts_ptr + t, mask=inside, other=0)
        count = tl.load(starts_ptr + t + 1, mask=inside, other=0) - first
    return first, count


@triton.jit
def rnn_act(z, CELL: tl.constexpr):
    """tanh, or a relu that keeps NaN."""
    return tanh(z) if CELL == 0 else tl.where(z < 0, 0.0, z)


@triton.jit
def rnn_derivative(y, CELL: tl.constexpr):
    """The derivative as a function of the output; relu passes NaN's gradient on, as torch does."""
    return 1.0 - y * y if CELL == 0 else tl.where(y <= 0, 0.0, 1.0)


@triton.jit
def lstm_cell(i, f, g, o, c, peep_i, peep_f, peep_o):
    """Activated gates, the next c and h, from gates before their activation.

    The peephole weights broadcast; 0.0 where there are none.
    """
    i = _sigmoid_below(i + peep_i * c)
    f = _sigmoid_below(f + peep_f * c)
    above, g = _tanh_parts(g)
    both = i * f
    share = 1.0 / (both * g)  # a division costs more than the products that share it
    i, f, g = share * g * f, share * g * i, share * both * above
    c = f * c + i * g
    o = _sigmoid_below(o + peep_o * c)
    above, below = _tanh_parts(c)
    share = 1.0 / (o * below)
    return i, f, g, share * below, c, share * above


@triton.jit
def lstm_cell_backward(dh, dc, i, f, g, o, c, c_before, peep_i, peep_f, peep_o):
    """Gradients of the four gates before their activation, and of c before the step."""
    seen = tanh(c)
    d_o = dh * seen * o * (1.0 - o)
    dc = dc + dh * o * (1.0 - seen * seen) + d_o * peep_o
    d_i = dc * g * i * (1.0 - i)
    d_f = dc * c_before * f * (1.0 - f)
    d_g = dc * i * (1.0 - g * g)
    return d_i, d_f, d_g, d_o, dc * f + d_i * peep_i + d_f * peep_f


@triton.jit
def gru_cell(xr, xz, xn, hr, hz, hn, h):
    """r, z, n and the next h, from the input's and the state's products."""
    r, z = _sigmoid_below(xr + hr), _sigmoid_below(xz + hz)
    share = 1.0 / (r * z)
    r, z = share * z, share * r
    n = tanh(xn + r * hn)
    return r, z, n, (1.0 - z) * n + z * h


@triton.jit
def gru_cell_backward(dh, r, z, n, hn, h):
    """Gradients of r and z before their activation, of both products of n, and of h directly."""
    d_n = dh * (1.0 - z) * (1.0 - n * n)
    d_r = d_n * hn * r * (1.0 - r)
    d_z = dh * (h - n) * z * (1.0 - z)
    return d_r, d_z, d_n, d_n * r, dh * z
