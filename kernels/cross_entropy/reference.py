"""The definition of the losses, in plain torch: any dtype, any device.

    loss = Σ_c a_c · (lse - z_c) + z_loss · lse²,  a_c = weight_c · ((1 - ε) · q_c + ε / C)

z are the logits of a sample, lse = log Σ_c exp(z_c), ε the label smoothing, and q the target's
distribution: 1 at the target's class, or the given probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE, MEAN, SUM = 0, 1, 2
WANT_X, WANT_WEIGHT, WANT_BIAS = 1, 2, 4  # of linear_cross_entropy's gradients
WANT_LOGITS, WANT_TARGET = 1, 2  # of cross_entropy's

Numbers = tuple[int, float, float, int]  # ignore_index, label_smoothing, z_loss, reduction


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: half types are storage."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def empty_like_logits(x: Tensor) -> Tensor:
    """An uninitialised gradient of x [N, C] or [N, C, L], in the order that x lies in memory.

    The native code has the same rule (cpu_logits.h).
    """
    if x.dim() == 2:
        turned = x.stride(0) == 1 and x.stride(1) != 1
        return x.new_empty((x.shape[1], x.shape[0])).t() if turned else x.new_empty(x.shape)
    if x.stride(1) == 1:
        return x.new_empty((x.shape[0], x.shape[2], x.shape[1])).transpose(1, 2)
    return x.new_empty(x.shape)


# ----------------------------------------------------------------------------- terms of the loss


class Terms:
    """What the losses of logits ``z [samples, C]`` and their gradients are made of.

    Args:
        op: named in errors.
        z: logits in the dtype that is computed in.
        target: classes ``[samples]``, or probabilities ``[samples, C]``.
        class_weight: ``[C]`` or None; it has no gradient.
        numbers: ignore_index, label_smoothing, z_loss, reduction.
    """

    def __init__(
        self, op: str, z: Tensor, target: Tensor, class_weight: Tensor | None, numbers: Numbers
    ) -> None:
        ignore_index, smoothing, self.z_loss, self.reduction = numbers
        self.z, self.lse, self.log_p = z, z.logsumexp(1), z.log_softmax(1)
        classes = z.shape[1]
        weight = z.new_ones(classes) if class_weight is None else class_weight.detach().to(z.dtype)
        if target.is_floating_point():
            self.kept = torch.ones(z.shape[0], dtype=torch.bool, device=z.device)
            q = target.to(z.dtype)
            weights = self.kept.to(z.dtype)
        else:
            self.kept = target != ignore_index
            safe = torch.where(self.kept, target, 0)
            _check_classes(op, safe, classes, ignore_index)
            q = torch.zeros_like(z).scatter_(1, safe[:, None], 1.0)
            weights = weight[safe] * self.kept
        self.of_target = weight * (1 - smoothing)
        self.a = self.of_target * q + weight * (smoothing / classes)
        mean = self.reduction == MEAN
        self.weights = weights.sum() if mean else z.new_ones(())
        self.count = self.kept.sum() if mean else z.new_ones(())

    def loss(self) -> Tensor:
        """Of every sample, or reduced."""
        entropy = torch.where(self.a == 0, 0.0, -self.a * self.log_p).sum(1)
        each = entropy / self.weights + self.z_loss * self.lse.square() / self.count
        if self.z_loss == 0:  # 0/0 would not be 0 where nothing is kept
            each = entropy / self.weights
        each = torch.where(self.kept, each, 0.0)
        if self.reduction == NONE:
            return each
        nothing = (self.reduction == MEAN) & (self.count == 0)
        return torch.where(nothing, float("nan"), each.sum())

    def logits_gradient(self, grad: Tensor | float) -> Tensor:
        """Of z, for a gradient of the loss: a number, or one for each sample."""
        g = torch.as_tensor(grad, dtype=self.z.dtype, device=self.z.device).reshape(-1, 1)
        p = self.log_p.exp()
        dz = (self.a.sum(1, keepdim=True) * p - self.a) * (g / self.weights)
        if self.z_loss != 0:
            dz = dz + 2 * self.z_loss * self.lse[:, None] * p * (g / self.count)
        return torch.where(self.kept[:, None], dz, 0.0)

    def target_gradient(self, grad: Tensor) -> Tensor:
        """Of the target's probabilities."""
        scale = grad.to(self.z.dtype).reshape(-1, 1) / self.weights
        return -scale * self.of_target * self.log_p


def _check_classes(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    wrong = target[(target < 0) | (target >= classes)]
    if wrong.numel():
        raise ValueError(
            f"{op}: target must be a class from 0 to {classes - 1} or ignore_index {ignore_index}, "
            f"got {int(wrong[0])}"
        )


# ------------------------------------------------------------------------------ the operations


def cross_entropy(
    x: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of logits x [N, C] or [N, C, L]; log-sum-exps; the gradient where wanted."""
    numbers = (ignore_index, label_smoothing, z_loss, reduction)
    terms = Terms("cross_entropy", _samples(x), _samples_of(target), class_weight, numbers)
    dx = x.new_empty(0)
    if wanted:
        dx = _like_logits(terms.logits_gradient(1.0), x).detach()
    return terms.loss().to(x.dtype), terms.lse.detach().double(), dx


def cross_entropy_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
    wanted: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of target probabilities, as far as they are wanted."""
    numbers = (ignore_index, label_smoothing, z_loss, reduction)
    terms = Terms("cross_entropy_backward", _samples(x), _samples_of(target), class_weight, numbers)
    dx = dq = x.new_empty(0)
    if wanted & WANT_LOGITS:
        dx = _like_logits(terms.logits_gradient(grad), x)
    if wanted & WANT_TARGET:
        dq = _like_logits(terms.target_gradient(grad), x)
    return dx, dq if wanted & WANT_TARGET else x.new_empty(0)


def cross_entropy_scale(grad: Tensor, ready: Tensor, like: Tensor | None) -> Tensor:
    """A gradient that is ready for a gradient 1 of the loss, times that of the loss."""
    return (ready * grad).to(ready.dtype).contiguous()


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of the logits x·weightᵀ + bias; log-sum-exps; the gradients that are wanted."""
    numbers = (ignore_index, label_smoothing, z_loss, reduction)
    z = _logits(x, weight, bias)
    terms = Terms("linear_cross_entropy", z, target, class_weight, numbers)
    gradients = _linear_gradients(terms, 1.0, x, weight, wanted)
    return terms.loss(), terms.lse.detach().double(), *gradients


def linear_cross_entropy_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, as far as they are wanted."""
    numbers = (ignore_index, label_smoothing, z_loss, reduction)
    z = _logits(x, weight, bias)
    terms = Terms("linear_cross_entropy_backward", z, target, class_weight, numbers)
    return _linear_gradients(terms, grad, x, weight, wanted)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype(x.dtype)
    z = x.to(dtype) @ weight.to(dtype).t()
    return z if bias is None else z + bias.to(dtype)


def _linear_gradients(
    terms: Terms, grad: Tensor | float, x: Tensor, weight: Tensor, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = (x.new_empty(0) for _ in range(3))
    if wanted:
        g = terms.logits_gradient(grad).detach()
        if wanted & WANT_X:
            dx = (g @ weight.detach().to(g.dtype)).to(x.dtype)
        if wanted & WANT_WEIGHT:
            dw = (g.t() @ x.detach().to(g.dtype)).to(x.dtype)
        if wanted & WANT_BIAS:
            db = g.sum(0).to(x.dtype)
    return dx, dw, db


def _samples(x: Tensor) -> Tensor:
    """[N, C] or [N, C, L] as [N·L, C], in the dtype that is computed in."""
    return x.movedim(1, -1).reshape(-1, x.shape[1]).to(compute_dtype(x.dtype))


def _samples_of(target: Tensor) -> Tensor:
    return _samples(target) if target.is_floating_point() else target


def _like_logits(samples: Tensor, x: Tensor) -> Tensor:
    rows = samples.reshape(x.movedim(1, -1).shape).movedim(-1, 1)
    return empty_like_logits(x.detach()).copy_(rows.detach())
