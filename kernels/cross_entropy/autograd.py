"""The backward of losses whose gradients the forward has made: a product with one number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnarch import library

from . import reference

_GPU = "nnarch.kernels.cross_entropy.triton_kernel"


def _check(grad: Tensor, ready: Tensor, like: Tensor | None) -> None:
    op = "cross_entropy_scale"
    library.check_tensor(op, "grad", grad)
    library.check_tensor(op, "ready", ready)
    if grad.dim() != 0:
        raise ValueError(f"{op}: grad must be a scalar, got shape {tuple(grad.shape)}")


# Under functorch `like` makes the result depend on what it is the gradient of, so that a second
# derivative raises; it is None elsewhere.
cross_entropy_scale = library.declare(
    "cross_entropy_scale(Tensor grad, Tensor ready, Tensor? like) -> Tensor",
    reference=reference.cross_entropy_scale,
    fake=lambda grad, ready, like: ready.new_empty(ready.shape),
    check=_check,
    gpu=f"{_GPU}:cross_entropy_scale",
)

_scale_in_place = library.define_native("cross_entropy_scale_(Tensor(a!) x, float factor) -> ()")
# In place and the same tensor, or another one where a second backward may come. Only nodes call it.
library.define_native("cross_entropy_ready(Tensor grad, Tensor ready, bool keep) -> Tensor")


def scaled(
    op: str,
    grad: Tensor,
    ready: Sequence[Tensor | None],
    likes: Sequence[Tensor | None],
    anchors: Sequence[Tensor | None] = (),
) -> tuple[Tensor | None, ...]:
    """Gradients that are ready for a gradient 1 of the loss, times `grad`.

    Args:
        op: named where a second derivative is wanted.
        grad: of the loss, a scalar.
        ready: the gradients; None where there is none.
        likes: what they belong to, under functorch; else None.
        anchors: where they lead to (:func:`anchor`), by which a second derivative finds its error.
            A node in C++ knows by itself.
    """
    if torch._C._are_functorch_transforms_active():
        return _each(lambda r, like: _scaled(grad, r, like), ready, likes)
    if type(grad) is not Tensor:  # traced by torch.compile, which fuses it with what follows
        return _each(lambda r, _: (r * grad).to(r.dtype), ready, likes)
    if torch.is_grad_enabled():
        gradients = _each(lambda r, _: _scaled(grad, r, None), ready, likes)
        return _not_twice(op, gradients, [a for a in anchors if a is not None])
    alone = not _is_batched(grad) and not _graph_is_kept()
    if grad.is_cpu and library.native is not None and alone:
        factor = grad.item()
        if factor != 1.0:
            for gradient in ready:
                if gradient is not None:
                    # In place: the forward made it for this moment. Nothing else holds it, and it
                    # is as large as the weight; a copy took 30 ms more for 154 MB.
                    _scale_in_place(gradient, factor)
        return tuple(ready)
    if grad.is_cuda and alone:
        return _each(lambda r, _: _times_on_gpu(grad, r), ready, likes)
    return _each(lambda r, _: _scaled(grad, r, None), ready, likes)


def anchor(t: Tensor | None) -> Tensor | None:
    """Nothing that is made of `t`: a way to it in autograd's graph that keeps no memory."""
    if t is None or not t.requires_grad or torch._C._are_functorch_transforms_active():
        return None
    with torch.enable_grad():
        return t.flatten()[:0].clone()


def if_functorch(t: Tensor | None) -> Tensor | None:
    """Only there is an input needed beside its gradient; elsewhere it may go."""
    return t if torch._C._are_functorch_transforms_active() else None


def _each(function: Any, ready: Sequence[Any], likes: Sequence[Any]) -> tuple[Any, ...]:
    pairs = zip(ready, likes, strict=True)
    return tuple(None if r is None else function(r, like) for r, like in pairs)


def _scaled(grad: Tensor, ready: Tensor, like: Tensor | None) -> Tensor:
    """Dense in memory as `ready` is."""
    order = _memory_order(ready)
    back = sorted(range(ready.dim()), key=lambda i: order[i])
    like = None if like is None else like.permute(order)
    return cross_entropy_scale(grad, ready.permute(order), like).permute(back)


def _memory_order(ready: Tensor) -> list[int]:
    return sorted(range(ready.dim()), key=lambda d: -ready.stride(d))


def _times_on_gpu(grad: Tensor, ready: Tensor) -> Tensor:
    """In place, as on the CPU; nobody waits for the value of `grad`."""
    try:
        from nnarch.kernels.cross_entropy.triton_kernel import scale_on_gpu

        scale_on_gpu(grad, ready.permute(_memory_order(ready)))
    except (ImportError, NotImplementedError):  # what the forward's reference made
        return _scaled(grad, ready, None)
    return ready


def _is_batched(grad: Tensor) -> bool:
    """Whether it is several gradients at once: autograd.grad's is_grads_batched."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)  # type: ignore[attr-defined]


def _graph_is_kept() -> bool:
    """Whether a second backward may come, which wants the same gradients again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]


def _not_twice(
    op: str, gradients: tuple[Tensor | None, ...], anchors: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """What torch.autograd.function.once_differentiable does, with a message that names `op`, and
    also where only what lies behind the operation is differentiated: autograd passes over an error
    that leads to nothing."""
    message = f"nnarch::{op} has no second derivative (once_differentiable)"

    def marked(g: Tensor) -> Tensor:
        inputs = g.detach().requires_grad_(), *anchors
        delayed = torch._C._functions.DelayedError(message, len(inputs))  # type: ignore[attr-defined]
        marked = delayed(*inputs)
        return marked[0] if isinstance(marked, tuple) else marked

    return tuple(None if g is None else marked(g) for g in gradients)
