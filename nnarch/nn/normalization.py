"""Batch normalization modules."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from nnarch import functional as F
from nnarch.kernels.activation.kinds import Activation


class _KernelBatchNorm(_BatchNorm):
    """The forward pass shared by every rank: torch.nn's bookkeeping around our kernel."""

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        activation: Activation = None,
    ) -> Tensor:
        """Normalise ``input [N, C, ...]`` per channel, add `residual` of its shape, activate.

        `activation` is what :func:`nnarch.functional.batch_norm` takes.
        """
        self._check_input_dim(input)
        # Past nn.Module.__getattr__, as in Conv2d.
        parameters, buffers = self._parameters, self._buffers
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        mean, var = buffers["running_mean"], buffers["running_var"]
        use_batch = self.training or (mean is None and var is None)
        update = self.training and self.track_running_stats
        return F.batch_norm(
            input,
            mean if update or not use_batch else None,
            var if update or not use_batch else None,
            weight,
            bias,
            use_batch,
            self._step(update),
            self.eps,
            residual=residual,
            activation=activation,
        )

    def _step(self, update: bool) -> float:
        """Count this batch and return the weight of its statistics in the running ones."""
        batches = self._buffers["num_batches_tracked"] if update else None
        if batches is not None:
            batches.add_(1)
            if self.momentum is None:  # a cumulative average over all batches so far
                return 1.0 / float(batches)
        return 0.0 if self.momentum is None else self.momentum


class BatchNorm1d(_KernelBatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of ``[N, C]`` or ``[N, C, L]``, as torch.nn.BatchNorm1d.

    Source: Ioffe and Szegedy, 2015, Batch Normalization.
    """


class BatchNorm2d(_KernelBatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of ``[N, C, H, W]``, as torch.nn.BatchNorm2d.

    Args:
        num_features: C.
        eps: added to the variance before the square root.
        momentum: weight of a new batch in the running statistics; None averages all batches.
        affine: whether to learn a scale and a shift per channel.
        track_running_stats: whether eval mode uses running statistics instead of the batch's.
        device, dtype: of the parameters and statistics.

    Source: Ioffe and Szegedy, 2015, Batch Normalization.
    """


class BatchNorm3d(_KernelBatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of ``[N, C, D, H, W]``, as torch.nn.BatchNorm3d.

    Source: Ioffe and Szegedy, 2015, Batch Normalization.
    """


class LazyBatchNorm1d(torch.nn.LazyBatchNorm1d):
    """A :class:`BatchNorm1d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(torch.nn.LazyBatchNorm2d):
    """A :class:`BatchNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(torch.nn.LazyBatchNorm3d):
    """A :class:`BatchNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm3d
