"""The same bits for any number of threads, and for calls from many Python threads at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from op_samples import all_ops, gradients, outputs, run, samples
from torch import Tensor

import nnarch
from nnarch import functional as F

OPS = all_ops()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _everything(name: str) -> list[Tensor]:
    """Outputs and gradients of all samples of an operation."""
    results: list[Tensor] = []
    for args in samples(name):
        results += outputs(run(name, *args))
        with contextlib.suppress(NotImplementedError):  # test_library.py knows which and why
            results += [g for g in gradients(name, args) if g is not None]
    return results


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("name", OPS)
def test_one_and_two_threads(name, threads):
    threads(1)
    one = _everything(name)
    threads(2)
    assert _equal(_everything(name), one)


# The samples are small. These are cut into many tasks.
def _gradients(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    leaves = [t.requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.cos(y.detach() * 100))]


_X = (3, 24, 45, 47)
LARGE: dict[str, Callable[[], list[Tensor]]] = {
    "3x3": lambda: _gradients(
        lambda x, w: F.conv2d(x, w, padding=1, activation="silu"),
        torch.randn(_X), torch.randn(40, 24, 3, 3),
    ),
    "3x3 stride 2": lambda: _gradients(  # dw: ranges of threads that end within a split
        lambda x, w: F.conv2d(x, w, stride=2, padding=1),
        torch.randn(2, 130, 40, 38), torch.randn(200, 130, 3, 3),
    ),
    "1x1": lambda: _gradients(F.conv2d, torch.randn(_X), torch.randn(50, 24, 1, 1)),
    "stem": lambda: _gradients(
        lambda x, w: F.conv2d(x, w, stride=2, padding=3),
        torch.randn(2, 3, 95, 97), torch.randn(30, 3, 7, 7),
    ),
    "depthwise": lambda: _gradients(
        lambda x, w: F.conv2d(x, w, padding=1, groups=24),
        torch.randn(_X), torch.randn(24, 1, 3, 3),
    ),
    "linear": lambda: _gradients(F.linear, torch.randn(700, 130), torch.randn(300, 130)),
    # Rows 4 KB apart are copied for as many columns as a thread has.
    "packed": lambda: [
        F.linear(torch.randn(64, 1024), w, packed=F.pack_linear_weight(w))
        for w in (torch.randn(1000, 1024),)
    ],
    "1x1 7x7": lambda: _gradients(
        F.conv2d, torch.randn(1, 1024, 7, 7), torch.randn(600, 1024, 1, 1)
    ),
    "gemv": lambda: _gradients(F.linear, torch.randn(1, 3000), torch.randn(500, 3000)),
    "batch norm": lambda: _gradients(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True, activation="relu"),
        torch.randn(_X), torch.rand(24), torch.randn(24),
    ),
    "max pool": lambda: _gradients(lambda x: F.max_pool2d(x, 3, 2, 1), torch.randn(_X)),
    "average pool": lambda: _gradients(lambda x: F.avg_pool2d(x, 3, 2, 1), torch.randn(_X)),
    "global pool": lambda: _gradients(lambda x: F.adaptive_avg_pool2d(x, 1), torch.randn(_X)),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_large_ones(name, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        torch.manual_seed(0)
        results.append(LARGE[name]())
    assert _equal(results[0], results[1]) and _equal(results[0], results[2])


# ------------------------------------------------------------------------------- Python threads


def _concurrently(count: int, work: Callable[[int], None]) -> None:
    """Run work(0), …, work(count - 1) on threads that start together; raise what they raise."""
    barrier, errors = threading.Barrier(count), []

    def run_one(i: int) -> None:
        try:
            barrier.wait()
            work(i)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run_one, args=(i,)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


def test_eight_python_threads():
    """Every operation at once, each thread in an order of its own."""
    arguments = {name: samples(name) for name in OPS}

    def all_results(name: str) -> list[Tensor]:
        return [t for args in arguments[name] for t in outputs(run(name, *args))]

    serial = {name: all_results(name) for name in OPS}
    wrong: list[tuple[int, str]] = []

    def work(i: int) -> None:
        for repeat in range(3):
            for j in range(len(OPS)):
                name = OPS[(j * (repeat + 1) + i * 3) % len(OPS)]
                if not _equal(all_results(name), serial[name]):
                    wrong.append((i, name))

    _concurrently(8, work)
    assert wrong == []


def test_gradients_from_eight_python_threads():
    x, weight = torch.randn(2, 12, 20, 21), torch.randn(16, 12, 3, 3)
    serial = _gradients(lambda x, w: F.conv2d(x, w, activation="silu"), x, weight)
    results: list[list[Tensor]] = []

    def work(_: int) -> None:
        mine = [t.detach().clone() for t in (x, weight)]
        results.append(_gradients(lambda x, w: F.conv2d(x, w, activation="silu"), *mine))

    _concurrently(8, work)
    assert all(_equal(r, serial) for r in results)


def test_one_module_shared_by_eight_python_threads():
    """The first eval calls race to pack the weights."""
    model = torch.nn.Sequential(
        nnarch.nn.Conv2d(3, 16, 3), nnarch.nn.ReLU(), nnarch.nn.Conv2d(16, 16, 3, groups=16)
    ).eval()
    x = torch.randn(1, 3, 24, 24)
    results: list[Tensor] = []
    with torch.no_grad():
        expected = model(x)
    model.train().eval()  # drops what was packed

    def work(_: int) -> None:
        with torch.no_grad():
            results.append(model(x))

    _concurrently(8, work)
    assert all(torch.equal(y, expected) for y in results)
