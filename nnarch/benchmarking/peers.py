"""Who is measured: nnarch, and what a user would otherwise run.

A provider turns a problem into a contender: a call that is timed, and the tensors it computes. A
provider whose package is missing, or that cannot take the case, raises :class:`Unavailable` with
the reason, which the tables print.
"""

from __future__ import annotations

import functools
import importlib
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from nnarch.benchmarking.case import Case
from nnarch.benchmarking.correctness import Problem, gradients, in_format


class Unavailable(RuntimeError):
    """A provider cannot run here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """A provider made ready for one problem.

    Args:
        call: runs the work once; this is what is timed.
        outputs: the tensors of the last `call`, for the check against float64.
    """

    call: Callable[[], object]
    outputs: Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Provider:
    """Something that can run cases.

    Args:
        name: as given to `--providers` and stored in the CSV.
        title: for people.
        prepare: makes a contender out of a problem and a number of threads.
        takes: which cases it is meant for; others are not its business and go unmentioned.
        ours: whether this is nnarch rather than a peer.
        torch: whether it is torch itself, rather than another runtime.
        default: whether it runs when nobody asks for it by name.
    """

    name: str
    title: str
    prepare: Callable[[Problem, int], Contender]
    takes: Callable[[Case], bool] = lambda case: True
    ours: bool = False
    torch: bool = False
    default: bool = True


def _in_torch(
    problem: Problem, run: Callable[..., torch.Tensor], module: nn.Module, x: torch.Tensor
) -> Contender:
    """A contender that runs in torch: forward, or forward and backward."""
    result: list[torch.Tensor] = []
    if not problem.case.backward:

        def forward() -> None:
            result[:] = [run(x)]

        return Contender(forward, lambda: result)

    leaves = [x, *module.parameters()]
    gradient: torch.Tensor | None = None

    def forward_backward() -> None:
        nonlocal gradient
        for leaf in leaves:
            leaf.grad = None
        y = run(x)
        if gradient is None:
            gradient = problem.output_gradient(y.detach())
        y.backward(gradient)
        result[:] = [y.detach()]

    return Contender(forward_backward, lambda: [*result, *gradients(module, x)])


# ------------------------------------------------------------------------------------- nnarch


def _nnarch(problem: Problem, threads: int, *, memory_format: torch.memory_format) -> Contender:
    module, x = problem.fresh(memory_format)
    case = problem.case
    if case.ours is not None:
        run = case.ours(module)
        if isinstance(run, nn.Module):  # perhaps a new one, with copies of the weights
            return _in_torch(problem, run, run.to(x.device), x)
        return _in_torch(problem, run, module, x)
    import nnarch.nn

    with torch.device(x.device):
        twin = case.layer(nnarch.nn)
    twin.load_state_dict(module.state_dict())
    twin = twin.train(case.backward).to(x.device, x.dtype)
    if x.dim() == 4:
        twin = in_format(twin, memory_format)
    return _in_torch(problem, twin, twin, x)


def _nnarch_model(problem: Problem, threads: int) -> Contender:
    """Our own definition of the architecture, with the reference's weights."""
    import nnarch

    module, x = problem.fresh(torch.channels_last)
    assert problem.case.model is not None
    ours = nnarch.create_model(problem.case.model)
    ours.load_state_dict(module.state_dict())
    if problem.case.backward:
        ours = in_format(ours.train(), torch.channels_last)
    else:
        ours = nnarch.accelerate(ours.eval())
    return _in_torch(problem, ours, ours, x)


# -------------------------------------------------------------------------------------- torch


def _eager(problem: Problem, threads: int, *, memory_format: torch.memory_format) -> Contender:
    module, x = problem.fresh(memory_format)
    return _in_torch(problem, module, module, x)


def _compiled(problem: Problem, threads: int) -> Contender:
    """torch.compile, given channels_last, where inductor ran every single layer that was tried
    (3x3, 1x1, depthwise, max pool) faster than on NCHW. Whole models were not compared."""
    import torch._inductor.config as inductor

    module, x = problem.fresh(torch.channels_last)
    compiled = torch.compile(module)
    with inductor.patch(freezing=not problem.case.backward):
        compiled(x)  # compiles here, under the setting
    return _in_torch(problem, compiled, module, x)


# -------------------------------------------------------------------- peers of single cases


def _rival(problem: Problem, threads: int, *, name: str, package: str) -> Contender:
    """What the case itself says that this provider runs."""
    _require(package)
    module, x = problem.fresh(None)
    return _in_torch(problem, problem.case.rivals[name](module), module, x)


def _rival_provider(name: str, title: str, package: str) -> Provider:
    return Provider(
        name,
        title,
        functools.partial(_rival, name=name, package=package),
        takes=lambda case: name in case.rivals,
        torch=package == "torch",
    )


# --------------------------------------------------------------------------- other runtimes


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed (pip install 'nnarch[bench]')") from error


def _onnx_bytes(module: nn.Module, x: torch.Tensor) -> bytes:
    """The model in ONNX, by the exporter that folds BatchNorm and needs no further package."""
    _require("onnx")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), cast(Any, buffer), dynamo=False)
    return buffer.getvalue()


def _onnxruntime(problem: Problem, threads: int) -> Contender:
    runtime: Any = _require("onnxruntime")
    module, x = problem.fresh(None)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        _onnx_bytes(module, x), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x.numpy()}
    result: list[Any] = []

    def call() -> None:
        result[:] = session.run(None, feed)

    return Contender(call, lambda: [torch.from_numpy(y) for y in result])


def _openvino(problem: Problem, threads: int) -> Contender:
    openvino: Any = _require("openvino")
    module, x = problem.fresh(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(module, example_input=x)
    converted.reshape({0: list(x.shape)})
    compiled = openvino.compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    feed = {0: x.numpy()}
    result: list[Any] = []

    def call() -> None:
        result[:] = [request.infer(feed, share_inputs=True, share_outputs=True)[0]]

    return Contender(call, lambda: [torch.from_numpy(y) for y in result])


# ----------------------------------------------------------------------------------- registry


def _is_layer(case: Case) -> bool:
    return not case.rivals


def _is_image(case: Case) -> bool:
    return len(case.shape) == 4 and not case.rivals


def _is_frozen_model(case: Case) -> bool:
    return case.model is not None and not case.backward


def _is_own_model(case: Case) -> bool:
    from nnarch.models import list_models

    return case.model in list_models()


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(
            "nnarch",
            "nnarch",
            functools.partial(_nnarch, memory_format=torch.channels_last),
            takes=lambda case: case.model is None or case.ours is not None,
            ours=True,
        ),
        Provider(
            "nnarch_model",
            "nnarch, own model",
            _nnarch_model,
            takes=_is_own_model,
            ours=True,
        ),
        Provider(
            "nnarch_nchw",
            "nnarch, NCHW",
            functools.partial(_nnarch, memory_format=torch.contiguous_format),
            takes=lambda case: case.model is None and _is_image(case),
            ours=True,
            default=False,
        ),
        Provider(
            "eager",
            "torch eager",
            functools.partial(_eager, memory_format=torch.contiguous_format),
            takes=_is_layer,
            torch=True,
        ),
        Provider(
            "channels_last",
            "torch channels_last",
            functools.partial(_eager, memory_format=torch.channels_last),
            takes=_is_image,
            torch=True,
        ),
        Provider("compile", "torch.compile", _compiled, takes=_is_layer, torch=True),
        Provider("onnxruntime", "ONNX Runtime", _onnxruntime, takes=_is_frozen_model),
        Provider("openvino", "OpenVINO", _openvino, takes=_is_frozen_model),
        _rival_provider("scipy_csr", "scipy CSR", "scipy"),
        _rival_provider("torch_csr", "torch CSR", "torch"),
    )
}


def select(names: Sequence[str] | None = None) -> list[Provider]:
    """The providers with these names, or the default ones.

    Raises:
        ValueError: a name is unknown.
    """
    if names is None:
        return [provider for provider in PROVIDERS.values() if provider.default]
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown:
        raise ValueError(f"providers: expected some of {', '.join(PROVIDERS)}; got {unknown[0]!r}")
    return [PROVIDERS[name] for name in names]


_kept_alive: list[torch.library.Library] = []  # a Library that dies takes its operations along


def torchvision() -> ModuleType:
    """Import torchvision, also beside a build of torch that its C++ library was not made for.

    Where that library does not load, the import stops at two operations that it should have
    declared; declaring them is enough for the models.

    Raises:
        Unavailable: torchvision is not installed, or fails for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        raise Unavailable(f"torchvision does not import: {error}") from error
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept_alive.append(library)
    return importlib.import_module("torchvision")
