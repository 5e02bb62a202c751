"""Products that are cut by the machine's caches, as on machines with others."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, machine_with, name_of
from tolerances import assert_as_accurate
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch.kernels.conv2d.op import conv2d_tile, weight_grad

MACHINES = {"small": (512, False), "medium": (1024, False), "large, far": (2048, True)}


@pytest.fixture(params=MACHINES.values(), ids=MACHINES)
def machine(request):
    with machine_with(*request.param):
        yield request.param


# rows, depth, columns: several parts of a sum; rows 4 KB apart; blocks that end early
SIZES = [(600, 1031, 70), (530, 1536, 290), (130, 2048, 300), (70, 3072, 129), (57, 4160, 140)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("packs", [False, True], ids=["unpacked", "packed"])
def test_linear(size, packs, dtype, machine):
    m, k, n = size
    x, w = torch.randn(m, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    b, r = torch.randn(n).to(dtype), torch.randn(m, n).to(dtype)
    packed = F.pack_linear_weight(w) if packs else None
    y = F.linear(x, w, b, residual=r, activation="relu", packed=packed)
    same = torch.relu(TF.linear(x, w, b) + r)
    truth = torch.relu(TF.linear(x.double(), w.double(), b.double()) + r.double())
    assert_as_accurate(y, same, truth, ulps=16.0 if dtype == torch.float32 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize(
    "size", [(5, 5, 5), (257, 33, 70), (513, 140, 400), (1100, 70, 385), (40, 900, 20)], ids=str
)
def test_the_product_of_two_transposed_matrices(size, dtype, machine):
    positions, n, m = size
    g, x = torch.randn(positions, m, dtype=dtype), torch.randn(positions, n + 3, dtype=dtype)[:, :n]
    with nnarch.trace() as trace:
        y = F.linear(g.t(), x.t())
    assert [call.algorithm for call in trace] == ["weight_grad"]
    truth = g.double().t() @ x.double()
    assert_as_accurate(y, g.t() @ x, truth, ulps=16.0 if dtype == torch.float32 else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "size",
    [(5, 300, 9), (14, 129, 64), (15, 128, 33), (32, 2048, 515), (96, 257, 1100), (190, 700, 600)],
    ids=str,
)
def test_a_weight_with_dense_columns(size, dtype, machine):
    """dx of a few rows: parts of the sum, rows 4 KB apart, columns that are no whole panels."""
    m, k, n = size
    x, w = torch.randn(m, k).to(dtype), (torch.randn(k, n + 5) / k**0.5).to(dtype)[:, :n]
    with nnarch.trace() as trace:
        y = F.linear(x, w.t())
    if dtype.itemsize >= 4:
        assert [call.algorithm for call in trace] == ["unpacked"]
    truth = x.double() @ w.double()
    assert_as_accurate(y, x @ w, truth, ulps=16.0 if dtype == torch.float32 else None)


@pytest.mark.parametrize("channels, k", [(1024, 144), (64, 420), (2048, 130)])
def test_pointwise_convolution_and_its_weight_gradient(channels, k, machine):
    x = torch.randn(3, channels, 14, 13).contiguous(memory_format=torch.channels_last)
    w = torch.randn(k, channels, 1, 1) / channels**0.5
    y = F.conv2d(x, w, activation="relu")
    truth = torch.relu(TF.conv2d(x.double(), w.double()))
    assert_as_accurate(y, torch.relu(TF.conv2d(x, w)), truth, ulps=16.0)
    g = torch.randn_like(y)
    rest = (tuple(w.shape), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    rows = [t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (g, x)]
    truth = (rows[0].double().t() @ rows[1].double()).view_as(w)
    same = (rows[0].t() @ rows[1]).view_as(w)
    assert_as_accurate(weight_grad(g, x, *rest), same, truth, ulps=16.0)


# Rows 4 KB apart in strips of their own are copied side by side first; rows of an image of more
# than 4 MB pass all columns at once, here to an output that is written past the caches.
@pytest.mark.parametrize("adds", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize(
    "n, channels, k, h, w, stride",
    [
        (2, 512, 130, 30, 19, 2),
        (1, 1536, 144, 9, 17, (1, 2)),
        (3, 1024, 128, 13, 8, (2, 1)),
        (1, 192, 416, 80, 77, 1),
    ],
)
def test_pointwise_convolution_in_strips(n, channels, k, h, w, stride, adds, dtype, machine):
    x = torch.randn(n, channels, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(k, channels, 1, 1, dtype=dtype) * 4 / channels**0.5
    plain = TF.conv2d(x, weight, stride=stride)
    truth = TF.conv2d(x.double(), weight.double(), stride=stride)
    r = torch.randn_like(plain) if adds else torch.zeros_like(plain)
    y = F.conv2d(x, weight, stride=stride, residual=r if adds else None, activation="relu6")
    same, truth = TF.relu6(plain + r), TF.relu6(truth + r.double())
    assert 0 < (y == 6).sum() < y.numel() / 4
    # In float64 torch's own rounding is the truth.
    assert_as_accurate(y, same, truth, ulps=16.0 if dtype == torch.float32 else 64.0)


@pytest.mark.parametrize(
    "size", [(4, 96, 96, 40, 37), (1, 160, 200, 14, 14), (9, 256, 70, 14, 13)], ids=str
)
def test_winograd_in_the_order_that_reads_less(size, machine):
    n, c, k, h, w = size
    x = torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last)
    layer = nnarch.nn.Conv2d(c, k, 3, padding=1).eval()
    with torch.no_grad(), nnarch.trace() as trace:
        y = layer(x)
        again = F.conv2d(x, layer.weight, layer.bias, padding=1)  # packs on the way
    packed, unpacked = [call.algorithm for call in trace if call.op == "conv2d"]
    assert packed.startswith("winograd")
    if packed == unpacked:
        assert torch.equal(y, again)
    truth = TF.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    assert (y - truth).abs().max() <= 5e-6 * truth.abs().max()


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2}], ids=str)
@pytest.mark.usefixtures("highest_precision")
def test_weights_packed_right_before_their_product(options, weight_format, machine):
    groups, stride = options.get("groups", 1), options.get("stride", 1)
    x = torch.randn(2, 240, 6, 5).contiguous(memory_format=torch.channels_last)
    w = (torch.randn(310, 240 // groups, 3, 3) / 40).contiguous(memory_format=weight_format)
    bias, grad = torch.randn(310), torch.randn(2, 310, 4, 3)
    y = F.conv2d(x, w, bias, stride, 1, groups=groups, activation="relu")
    truth = TF.conv2d(x.double(), w.double(), bias.double(), stride, 1, groups=groups).relu()
    same = TF.conv2d(x, w, bias, stride, 1, groups=groups).relu()
    assert_as_accurate(y, same, truth, ulps=16.0)
    y = F.conv_transpose2d(grad, w, None, stride, groups=groups)
    truth = TF.conv_transpose2d(grad.double(), w.double(), None, stride, groups=groups)
    same = TF.conv_transpose2d(grad, w, None, stride, groups=groups)
    assert_as_accurate(y, same, truth, ulps=16.0)


def test_a_recurrent_layer_whose_weights_leave_the_cache(machine):
    lstm = nnarch.nn.LSTM(320, 320)
    plain = torch.nn.LSTM(320, 320)
    plain.load_state_dict(lstm.state_dict())
    for batch in (3, 16, 50):
        x = torch.randn(4, batch, 320)
        same, truth = plain(x)[0], torch.nn.LSTM(320, 320).double()
        truth.load_state_dict(lstm.state_dict())
        assert_as_accurate(lstm(x)[0], same, truth(x.double())[0], ulps=16.0)


def test_winograds_tile_is_smaller_where_weights_come_from_afar():
    w, size = torch.empty(128, 128, 3, 3), (1, 128, 7, 7)  # 2.4 MB: in any last-level cache
    with machine_with(1024, far_l3=False):
        near = conv2d_tile(w, size, padding=1)
    with machine_with(2048, far_l3=True):
        assert conv2d_tile(w, size, padding=1) < near
