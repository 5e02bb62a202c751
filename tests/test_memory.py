"""Pooled memory: blocks return when their tensors die, never while anything still needs them."""

from __future__ import annotations

import copy
import gc
import io
import threading

import numpy as np
import pytest
import torch
from alone import alone
from torch import Tensor

import nnarch
from nnarch import functional as F
from nnarch.library import pooled_memory

pytestmark = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 11),
    reason="torch before 2.11 adopts no memory from the stable ABI",
)

X = torch.randn(400, 500)  # its copies take 800 kB
SMALL = torch.randn(40, 50)


def large(x: Tensor = X) -> Tensor:
    return F.activation(x, "relu")


@pytest.fixture(autouse=True)
def _empty_pool():
    gc.collect()
    nnarch.empty_cache()
    yield
    gc.collect()
    nnarch.empty_cache()


def test_a_dead_tensor_gives_its_block_to_the_next():
    with pooled_memory():
        first = large()
        address = first.data_ptr()
        del first
        assert large().data_ptr() == address
    assert nnarch.empty_cache() >= X.nbytes
    assert nnarch.empty_cache() == 0


def test_live_tensors_keep_their_blocks():
    with pooled_memory():
        kept = [large(X + i) for i in range(5)]
        assert nnarch.empty_cache() == 0
        for _ in range(5):
            large(-X)
    nnarch.empty_cache()
    assert len({y.data_ptr() for y in kept}) == 5
    assert all(torch.equal(y, torch.relu(X + i)) for i, y in enumerate(kept))


@pytest.mark.parametrize(
    "derive",
    [
        lambda y: y[3:5],
        lambda y: y.t().view(-1)[:9] if y.t().is_contiguous() else y.t()[:1],
        lambda y: y.detach(),
        lambda y: y.numpy(),
        lambda y: torch.utils.dlpack.to_dlpack(y),
        lambda y: np.from_dlpack(y),
    ],
    ids=["slice", "transpose", "detach", "numpy", "capsule", "dlpack"],
)
def test_what_shares_memory_keeps_the_block(derive):
    with pooled_memory():
        y = large()
        address = y.data_ptr()
        shared = derive(y)
        del y
        assert large(-X).data_ptr() != address
        del shared
        assert nnarch.empty_cache() >= 2 * X.nbytes


def test_small_tensors_and_other_scopes_are_not_pooled():
    with pooled_memory():
        F.activation(SMALL, "relu")
    large()
    assert nnarch.empty_cache() == 0


def test_blocks_that_share_pages_are_freed_together():
    with pooled_memory():
        kept, other = large(), large(-X)
    address = other.data_ptr()
    del other
    assert nnarch.empty_cache() == 0
    with pooled_memory():
        assert large().data_ptr() == address
    assert torch.equal(kept, torch.relu(X))
    del kept
    assert nnarch.empty_cache() >= 2 * X.nbytes


def test_packed_weights_are_packed_anew_where_they_lay():
    """Without a pooled scope; another weight keeps their common pages. Of several free blocks of
    one size the last that was given back serves first: it is the likeliest to be in a cache. In a
    process of its own, whose free blocks are these alone.
    """
    alone(_pack_anew)


def _pack_anew() -> None:
    weight = torch.randn(64, 64, 3, 3)
    earlier, packed, other = (F.pack_conv2d_weight(w) for w in (weight, weight, -weight))
    address, values = packed.data_ptr(), packed.clone()
    del earlier
    del packed
    again = F.pack_conv2d_weight(weight)
    assert again.data_ptr() == address
    assert torch.equal(again, values) and torch.equal(other, -values)


def test_scopes_nest_and_end_with_errors():
    with pytest.raises(KeyError), pooled_memory():
        with pooled_memory():
            pass
        large()
        raise KeyError
    assert nnarch.empty_cache() >= X.nbytes
    large()
    assert nnarch.empty_cache() == 0


def test_scopes_belong_to_a_thread():
    with pooled_memory():
        thread = threading.Thread(target=large)
        thread.start()
        thread.join()
        assert nnarch.empty_cache() == 0


def test_a_tensor_may_die_on_another_thread():
    with pooled_memory():
        box = [large()]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert nnarch.empty_cache() >= X.nbytes


def test_a_larger_block_serves_when_it_is_not_much_larger():
    with pooled_memory():
        address = large().data_ptr()
        assert large(X[:300]).data_ptr() == address
        assert large(X[:150]).data_ptr() != address


def test_eight_threads():
    """Everyone's results stay their own while blocks change hands."""
    wrong: list[int] = []

    def work(i: int) -> None:
        inputs = [X + i, X[: 200 + 20 * i] * i, X - i]
        with pooled_memory():
            for _ in range(20):
                results = [large(x) for x in inputs]
                if not all(torch.equal(y, x.relu()) for x, y in zip(inputs, results, strict=True)):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert nnarch.empty_cache() > 0


def test_pooled_tensors_are_tensors():
    """Saved, copied, shared and changed in place like any other."""
    with pooled_memory():
        y = large()
    expected = torch.relu(X)
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(y), torch.load(buffer, weights_only=True), y.clone()):
        assert torch.equal(twin, expected)
    y += 1
    assert torch.equal(y.share_memory_(), expected + 1)


def test_outputs_of_an_accelerated_model_survive_later_calls():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU()
    )
    fast = nnarch.accelerate(model.eval())
    images = [torch.randn(2, 3, 64, 64) for _ in range(3)]
    with torch.no_grad():
        kept = [fast(x) for x in images]
        for x, y in zip(images, kept, strict=True):
            torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    del kept, y
    assert nnarch.empty_cache() > 0
