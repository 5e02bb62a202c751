"""Launch plans: the third call of a kind repeats the second, with the tensors of the third."""

from __future__ import annotations

import pytest
import torch
from op_samples import samples

from nnarch import library
from nnarch.kernels.gpu import plans

OPS = sorted(n for n, op in library.OPS.items() if op.gpu is not None)

UNPLANNED = {}


def fresh(arguments):
    """The same arguments with other values of the floating-point tensors."""
    return tuple(
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device).copy_(a.flip(0))
        if isinstance(a, torch.Tensor) and a.is_floating_point() and a.dim()
        else a
        for a in arguments
    )


def tensors_of(result):
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


@pytest.mark.parametrize("name", OPS)
def test_plans_repeat_the_launcher(name, monkeypatch):
    op = library.OPS[name]
    replays = []
    run = plans.Plan.run
    monkeypatch.setattr(plans.Plan, "run", lambda self, *a: replays.append(1) or run(self, *a))
    planned = op.implementation(op.gpu_backend)
    count = 0
    for arguments in samples(name):
        for turn in range(4):
            if turn:
                arguments = fresh(arguments)
            try: expected = tensors_of(op.launcher()(*arguments))
            except NotImplementedError as e: print(name, "NOTIMPL", e); break
            algorithm = library.ran.algorithm
            got = tensors_of(planned(*arguments))
            assert library.ran.algorithm == algorithm
            for mine, direct in zip(got, expected, strict=True):
                assert mine.stride() == direct.stride() and mine.dtype == direct.dtype
                assert torch.equal(mine.nan_to_num(7.0), direct.nan_to_num(7.0))
    print(name, "REPLAYS", len(replays), "of", 2*len(samples(name)))
