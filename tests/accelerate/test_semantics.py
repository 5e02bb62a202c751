"""What a forward pass may do besides computing: an accelerated model does the same, every time."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from accelerate_helpers import Model, ModelOfTwo, X, assert_same, convolution
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook

import nnarch

# ---------------------------------------------------------------------------------------- writes


def test_indices_in_a_program():
    def forward(self, x):
        return self.c(x).index_put((torch.tensor([0]),), torch.tensor(3.0))

    assert_same(Model(forward, c=convolution()), X)


def test_a_write_before_a_joined_convolution():
    def forward(self, x):
        h = self.stem(x)
        y = self.expand(h)
        h = self.relu(h)
        return self.project(self.depthwise(y)) + h

    layers = {
        "stem": nn.Conv2d(3, 4, 1),
        "expand": nn.Conv2d(4, 8, 1),
        "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "project": nn.Conv2d(8, 4, 1),
        "relu": nn.ReLU(inplace=True),
    }
    assert_same(Model(forward, **layers), X)


def test_a_write_before_a_converted_convolution():
    def forward(self, x):
        y = self.c(x).transpose(2, 3).contiguous()
        z = y.clone(memory_format=torch.channels_last)
        y.zero_()
        return self.d(z) + y

    assert_same(Model(forward, c=convolution(), d=convolution()), X)


def test_adds_in_place_in_a_program():
    """Of what others hold a view of, and of what nobody does; of the caller's own tensor, too."""

    def forward(self, x):
        y = self.c(x).flatten(2).softmax(-1)
        z = y[:, :1]
        y += self.c(x).flatten(2)
        w = y * 2
        w += y
        return y, z, w

    assert_same(Model(forward, c=convolution()), X)

    def writes_its_input(self, x):
        x += self.c(x)
        return x * 2

    model = nnarch.accelerate(Model(writes_its_input, c=convolution()))
    for _ in range(3):
        image = X.clone(memory_format=torch.channels_last)
        torch.testing.assert_close(model(image), image * 2)


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.flatten(1).mul_(2),
        lambda y: y.contiguous().mul_(2),
        lambda y: y.view(2, -1)[:, :5].zero_(),
        lambda y: y.transpose(2, 3)[:, 1].zero_(),
    ],
)
def test_writes_through_views(write):
    def forward(self, x):
        y = self.c(x)
        write(y)
        return y

    assert_same(Model(forward, c=convolution()), X)


def test_a_copy_in_another_format_stays_as_it_was():
    def forward(self, x):
        y = self.c(x)
        z = y.contiguous(memory_format=torch.channels_last)
        y.zero_()
        return z

    assert_same(Model(forward, c=convolution()), X)


def test_an_add_in_place_keeps_the_dtype():
    def forward(self, x, y):
        z = self.c(x)
        z += y
        return z

    assert_same(ModelOfTwo(forward, c=convolution()), X, X.double())
    with pytest.raises(RuntimeError):  # nor does it broadcast
        nnarch.accelerate(ModelOfTwo(forward, c=convolution()))(X, X.expand(2, 2, 3, 4, 4))


# ----------------------------------------------------------------------------------------- state


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.calls = convolution(), 0

    def forward(self, x):
        self.calls += 1
        return self.c(x) * self.calls


class CountingBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = convolution()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.c(x) * self.calls


class Averaging(CountingBuffer):
    def forward(self, x):
        self.calls.copy_(0.9 * self.calls + x.mean())
        return self.c(x) + self.calls.clone()


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.h = nn.GRUCell(4, 4), None

    def forward(self, x):
        if self.h is None:
            self.h = torch.zeros(6, 4)
        self.h = self.cell(x, self.h)
        return self.h


@pytest.mark.parametrize(
    ("model", "x", "warns"),
    [
        (Counting, X, "sets its attribute 'calls'"),
        (CountingBuffer, X, "changes a parameter or buffer"),
        (Averaging, X, "calls"),
        (Stateful, X[0, 0].repeat(2, 1)[:6], "sets its attribute 'h'"),
    ],
)
def test_state_is_kept(model, x, warns):
    assert_same(model(), x, warns=warns)


def test_sums_start_anew():
    def forward(self, x):
        total = torch.zeros(1, 2)
        for layer in self.layers:
            total += layer(x)
        return total

    layers = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))
    assert_same(Model(forward, layers=layers), X[0, 0, :1], warns="all calls have in common")


def test_a_mask_is_a_constant():
    """It is made without inputs and nobody writes into it: no reason to give up."""

    def forward(self, x):
        mask = torch.zeros(4, 4)
        mask[:, 2:] = -1.0
        return self.c(x) + mask

    assert_same(Model(forward, c=convolution()), X)


def test_noise_is_new_in_every_call():
    noisy = nnarch.accelerate(Model(lambda self, x: self.c(x) + torch.randn(1), c=convolution()))
    assert not torch.equal(noisy(X), noisy(X))


def test_autocast_inside():
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.c(x)

    model = Model(forward, c=convolution()).eval()
    with pytest.warns(UserWarning, match="autocast of its own"):
        assert nnarch.accelerate(model)(X).dtype == torch.bfloat16


# ------------------------------------------------------------------------- what a caller may want


def _warm(model):
    accelerated = nnarch.accelerate(model.eval())
    for _ in range(2):
        accelerated(X)
    return accelerated


def test_a_warm_model_is_still_watched():
    model = _warm(nn.Sequential(convolution(), nn.Flatten(), nn.Linear(48, 3)))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        model(forward_ad.make_dual(X, X))
    seen = []
    hook = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(X)
    finally:
        hook.remove()
    assert {"Conv2d", "Flatten", "Linear"} <= set(seen)
    setattr(model.body, "2", nn.Linear(48, 7))
    assert model(X).shape == (2, 7)


def test_the_gradient_of_a_residual_alone():
    def forward(self, x, r):
        return self.p(self.d(self.e(x))) + r

    layers = {
        "e": nn.Conv2d(3, 8, 1),
        "d": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "p": nn.Conv2d(8, 3, 1),
    }
    residual = X.clone().requires_grad_()
    nnarch.accelerate(ModelOfTwo(forward, **layers).eval())(X, residual).sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(X))


# -------------------------------------------------------------------------------------- arguments


def test_a_name_that_ends_like_a_fixed_argument():
    class Masked(nn.Module):
        def forward(self, x, mask_token, mask=None):
            return x + mask_token

    assert_same(Masked(), X, X)


def test_sizes_by_keyword_before_a_norm():
    def forward(self, x):
        return self.norm(self.linear(x.reshape(shape=(2, -1))))

    assert_same(Model(forward, linear=nn.Linear(48, 5), norm=nn.BatchNorm1d(5)), X)


def test_a_layer_alone_takes_its_other_arguments():
    x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    lstm = nn.LSTM(3, 4)
    torch.testing.assert_close(nnarch.accelerate(lstm)(x, (h, h)), lstm(x, (h, h)))


def test_a_call_of_its_own():
    class Doubling(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Doubling(4, 4)

        def __call__(self, x):
            return super().__call__(x) + 1

        def forward(self, x):
            return self.layer(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerated = nnarch.accelerate(Outer().eval())
    model = Outer().eval()
    model.load_state_dict({k.removeprefix("body."): v for k, v in accelerated.state_dict().items()})
    torch.testing.assert_close(accelerated(X), model(X))


# ---------------------------------------------------------------------------------------- threads


def test_other_threads_are_left_alone():
    """Models that run, and others that are accelerated, while one is traced."""
    net = nn.Sequential(*(nn.Sequential(convolution(), nn.ReLU()) for _ in range(10))).eval()
    expected, errors, done = net(X), [], threading.Event()

    def serve():
        while not done.is_set():
            try:
                torch.testing.assert_close(net(X), expected)
            except Exception as error:
                errors.append(error)
                return

    def accelerate():
        try:
            for _ in range(3):
                torch.testing.assert_close(nnarch.accelerate(net)(X), expected)
        except Exception as error:
            errors.append(error)

    server = threading.Thread(target=serve)
    others = [threading.Thread(target=accelerate) for _ in range(2)]
    server.start()
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    done.set()
    server.join()
    assert errors == []
