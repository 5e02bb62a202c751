"""The cells on tiles in registers, forward and backward, and the rows of a step.

Codes of `kinds.py`: 0 RNN tanh, 1 RNN relu, 2 LSTM, 3 GRU. Everything computes in float32. A tile
runs over units and sequences in either order: nothing here depends on it.
"""

import triton
import triton.language as tl

from nnarch.kernels.gpu.epilogue import sigmoid, tanh


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
    i = sigmoid(i + peep_i * c)
    f = sigmoid(f + peep_f * c)
    g = tanh(g)
    c = f * c + i * g
    o = sigmoid(o + peep_o * c)
    return i, f, g, o, c, o * tanh(c)


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
    r = sigmoid(xr + hr)
    z = sigmoid(xz + hz)
    n = tanh(xn + r * hn)
    return r, z, n, (1.0 - z) * n + z * h


@triton.jit
def gru_cell_backward(dh, r, z, n, hn, h):
    """Gradients of r and z before their activation, of both products of n, and of h directly."""
    d_n = dh * (1.0 - z) * (1.0 - n * n)
    d_r = d_n * hn * r * (1.0 - r)
    d_z = dh * (h - n) * z * (1.0 - z)
    return d_r, d_z, d_n, d_n * r, dh * z
