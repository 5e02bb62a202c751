"""Launch plans without Python (ADR 13), on meta tensors and a driver that only takes notes."""

from __future__ import annotations

import struct
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from replay_driver import STREAM, Driver

TensorDescriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor
plan = pytest.importorskip("nnarch.kernels.gpu.plan", reason="needs triton")
import nnarch  # noqa: E402
from nnarch import library, nodes  # noqa: E402
from nnarch.direct import DECLINED, WANTS_GRADIENT  # noqa: E402
from nnarch.kernels.gpu import replay  # noqa: E402

META = torch.device("meta")
FUNCTION = 1234

if library.native is None or library.OPS["linear"].direct is library._declined:
    pytest.skip("no direct functions here", allow_module_level=True)


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(replay, "is_available", lambda: True)
    replay.set_up(made.addresses(), META)
    yield made
    replay.forget()
    replay.set_up([0] * 5, META)


def kernel(signature, **metadata):
    """What Triton makes of a kernel, as far as a plan looks at it."""
    ordinary = {
        "num_warps": 4, "num_ctas": 1, "shared": 512, "launch_pdl": False,
        "launch_cooperative_grid": False, "global_scratch_size": 0, "profile_scratch_size": 0,
        "target": SimpleNamespace(warp_size=32),
    }  # fmt: skip
    return SimpleNamespace(
        function=FUNCTION,
        metadata=SimpleNamespace(**ordinary | metadata),
        src=SimpleNamespace(signature=signature),
    )


def place(slot, like, offset=0):
    return plan.Place(slot, offset, tuple(like.shape), like.stride(), like.dtype)


def allocation(like):
    return plan.Allocate(tuple(like.shape), like.stride(), like.dtype, like.device)


def described_launch(base, **layout):
    """A launch that reads `base`, seen as [5, 6] with rows 8 apart, by a descriptor."""
    source = torch.empty(0, dtype=base.dtype)  # of no meta tensor: 16 must divide its address
    view = TensorDescriptor(source, [5, 6], [8, 1], [4, 2], padding="nan")
    layout = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [4, 2],
              "fp4_padded": False} | layout  # fmt: skip
    compiled = kernel(
        {"n": "i32", "x": "tensordesc<fp16[4,2]>", "m": "i32"}, tensordesc_meta=[layout]
    )
    start, names = (lambda: None), ["n", "x", "m"]
    return plan.KernelLaunch(start, compiled, (1,), names, [7, None, 9], [], [(1, base, view)])


def launch(places, values=None, grid=(3, 2), **metadata):
    """A launch whose pointers are `places`, followed by the numbers of `values` by type."""
    values = values or {}
    names = [f"p{i}" for i in range(len(places))] + list(values)
    signature = {f"p{i}": "*fp32" for i in range(len(places))} | {k: k for k in values}
    arguments = [None] * len(places) + list(values.values())
    compiled = kernel(signature, **metadata)
    return plan.KernelLaunch(
        lambda: None, compiled, grid, names, arguments, list(enumerate(places)), []
    )


def linear_plan(x, weight, **metadata):
    """y = linear(x, weight) as one launch."""
    y = torch.empty(x.shape[0], weight.shape[0], device=META, dtype=x.dtype)
    places = [place(0, x), place(1, weight), place(2, y)]
    steps = [allocation(y), launch(places, {"i32": -5, "fp32": 0.5, "constexpr": 9}, **metadata)]
    return plan.Plan(steps, place(2, y))


def linear_arguments(rows=4, dtype=torch.float16, weight=None):
    x = torch.empty(rows, 8, device=META, dtype=dtype)
    weight = torch.empty(6, 8, device=META, dtype=dtype) if weight is None else weight
    return x, weight, *5 * [None], 0, 0.0


def give(arguments, what=None, function=None, limit=9):
    what = what or linear_plan(*arguments[:2])
    return replay.give(function or library.OPS["linear"].direct, arguments, what, limit)


def call(*arguments):
    with torch.no_grad():
        return library.OPS["linear"].direct(*arguments)


def test_a_launch_is_repeated(driver):
    arguments = linear_arguments()
    assert call(*arguments) is DECLINED
    assert give(arguments)
    driver.parameters = 7  # three pointers, two numbers, two of Triton's own
    y = call(*linear_arguments())
    assert (y.shape, y.stride(), y.dtype, y.device) == ((4, 6), (6, 1), torch.float16, META)
    (note,) = driver.launches
    assert (note.function, note.shared, note.stream) == (FUNCTION, 512, STREAM)
    assert note.blocks == [3, 2, 1, 128, 1, 1] and not note.cooperative
    number = struct.unpack("<i", struct.pack("<Q", note.values[3])[:4])[0]
    real = struct.unpack("<f", struct.pack("<Q", note.values[4])[:4])[0]
    assert (number, real, note.values[5:]) == (-5, 0.5, [0, 0])


def test_pointers_are_those_of_the_call(driver):
    storage = torch.empty(64, 8, device=META, dtype=torch.float16)
    arguments = linear_arguments()
    x = arguments[0]
    y = torch.empty(4, 6, device=META, dtype=torch.float16)
    moved = place(0, x, offset=16)
    steps = [allocation(y), launch([moved, place(2, y, offset=2)])]
    assert give(arguments, plan.Plan(steps, place(2, y)))
    driver.parameters = 2
    call(storage[2:6], *arguments[1:])
    base = storage[2:6].data_ptr()  # a meta tensor's is 0
    assert driver.launches[0].values == [base + 16, 2]


def test_a_descriptor_is_made_for_every_call(driver):
    arguments = linear_arguments()
    y = torch.empty(4, 6, device=META, dtype=torch.float16)
    read = described_launch(place(0, arguments[0], offset=32))
    assert give(arguments, plan.Plan([allocation(y), read], place(2, y)))
    driver.parameters = 7  # a number, the descriptor with its sizes and strides, a number
    for calls in (1, 2):
        assert call(*arguments).shape == (4, 6)
        numbers = [value & 0xFFFFFFFF for value in driver.launches[-1].values]
        assert numbers == [7, 1000 + calls, 5, 6, 8, 1, 9]
    for note in driver.descriptions:
        assert (note.kind, note.start) == (6, arguments[0].data_ptr() + 32)
        assert (note.sizes, note.strides, note.box) == ([6, 5], [16], [2, 4])
        not_interleaved, swizzle, promotion, fill = note.options
        assert (not_interleaved, swizzle, promotion, fill) == (0, 3, 2, 1)
    driver.fails = True
    assert call(*arguments) is DECLINED


def test_a_cooperative_launch(driver):
    arguments = linear_arguments()
    assert give(arguments, linear_plan(*arguments[:2], launch_cooperative_grid=True))
    call(*arguments)
    assert driver.launches[0].cooperative


@pytest.mark.parametrize(
    "other",
    [
        lambda: linear_arguments(rows=5),
        lambda: linear_arguments(dtype=torch.bfloat16),
        lambda: (torch.empty(8, 4, device=META, dtype=torch.float16).t(), *linear_arguments()[1:]),
        lambda: (*linear_arguments()[:2], torch.empty(6, device=META, dtype=torch.float16),
                 *linear_arguments()[3:]),
        lambda: (torch.empty(4, 8, dtype=torch.float16), *linear_arguments()[1:]),
        lambda: (torch.empty(4, 8, device=META, dtype=torch.complex64).conj(),
                 *linear_arguments()[1:]),
    ],
    ids=["shape", "dtype", "stride", "bias", "device", "not plain"],
)  # fmt: skip
def test_other_arguments_decline(driver, other):
    assert give(linear_arguments())
    assert call(*other()) is DECLINED
    assert not driver.launches


def test_one_tensor_for_two_arguments_is_another_call(driver):
    same = torch.empty(8, 8, device=META, dtype=torch.float16)
    two = (same, torch.empty_like(same), *linear_arguments()[2:])
    one = (same, same, *linear_arguments()[2:])
    assert give(two, linear_plan(*two[:2]))
    assert call(*one) is DECLINED
    assert give(one, linear_plan(*one[:2]))
    assert call(*one).shape == call(*two).shape == (8, 8)


def test_settings_of_float32_are_part_of_the_call(driver):
    arguments = linear_arguments(dtype=torch.float32)
    assert give(arguments) and call(*arguments) is not DECLINED
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert call(*arguments) is DECLINED
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    try:
        nnarch.set_precision("highest")
        assert call(*arguments) is DECLINED
    finally:
        nnarch.set_precision("high")
    assert call(*arguments) is not DECLINED


def test_a_launch_that_fails_declines(driver):
    arguments = linear_arguments()
    assert give(arguments)
    driver.fails = True
    assert call(*arguments) is DECLINED
    driver.fails = False
    driver.device = 1  # another one is current
    assert call(*arguments) is DECLINED


def test_whoever_watches_is_asked(driver):
    arguments = linear_arguments()
    assert give(arguments)
    with nnarch.trace():
        assert call(*arguments) is DECLINED
    assert not driver.launches


def test_new_tensors_copies_and_views(driver):
    arguments = linear_arguments()
    x = arguments[0]
    turned = torch.empty(8, 4, device=META, dtype=torch.float16).t()
    wide = torch.empty(4, 8, device=META)
    copies = [
        plan.TorchCall(torch.ops.aten.clone.default, (None,), {}, [(0, place(0, x))],
                       [allocation(turned)]),
        plan.TorchCall(torch.ops.aten._to_copy.default, (None,), {}, [(0, place(2, turned))],
                       [allocation(wide)]),
        plan.TorchCall(torch.ops.aten.new_zeros.default, (None, [4, 8]), {}, [(0, place(0, x))],
                       [allocation(wide)]),
    ]  # fmt: skip
    row = plan.Place(4, 2 * 8 * 4, (8,), (1,), torch.float32)
    assert give(arguments, plan.Plan(copies, row))
    y = call(*arguments)
    assert (y.shape, y.stride(), y.dtype, y.storage_offset()) == ((8,), (1,), torch.float32, 16)


def _refused():
    x, weight = linear_arguments()[:2]
    y = torch.empty(4, 6, device=META, dtype=torch.float16)
    call_ = plan.TorchCall(torch.ops.aten.add.Tensor, (None, 1), {}, [(0, place(0, x))],
                           [allocation(x)])  # fmt: skip
    yield "an operation", plan.Plan([call_, allocation(y)], place(3, y))
    yield "clusters", linear_plan(x, weight, num_ctas=2)
    yield "scratch", linear_plan(x, weight, global_scratch_size=4)
    yield "dependent launch", linear_plan(x, weight, launch_pdl=True)
    yield "two results", plan.Plan([allocation(y)], (place(2, y), None))
    other = plan.Place(2, 0, (4, 3), (3, 1), torch.float32)
    yield "another dtype", plan.Plan([allocation(y)], other)
    interpreted = plan.KernelLaunch(lambda: None, None, (1,), [], [], [], [])
    yield "interpreted", plan.Plan([allocation(y), interpreted], place(2, y))
    images = described_launch(place(0, x), is_im2col=True)
    yield "a descriptor of images", plan.Plan([allocation(y), images], place(2, y))


@pytest.mark.parametrize("what", [pytest.param(p, id=name) for name, p in _refused()])
def test_what_only_python_can_do_is_not_taken(driver, what):
    arguments = linear_arguments()
    assert not give(arguments, what)
    assert call(*arguments) is DECLINED


def test_nothing_keeps_tensors(driver):
    arguments = linear_arguments()
    assert give(arguments)
    x, weight = arguments[:2]
    y = call(*arguments)
    assert [t._use_count() for t in (x, weight, y)] == [1, 1, 1]
    driver.fails = True
    assert call(*arguments) is DECLINED
    assert [t._use_count() for t in (x, weight)] == [1, 1]


def test_a_plan_is_kept_until_it_is_dropped(driver):
    arguments = linear_arguments()
    what = linear_plan(*arguments[:2])
    alive = weakref.ref(what)
    assert give(arguments, what)
    del what
    assert alive() is not None
    assert give(arguments)  # another one in its place
    assert alive() is None
    replay.forget()
    assert call(*arguments) is DECLINED


def test_plans_are_bounded(driver):
    for rows in range(1, 4):
        assert give(linear_arguments(rows), limit=2)
    assert [call(*linear_arguments(rows)) is DECLINED for rows in (1, 2, 3)] == [True, True, False]


def test_calls_from_threads(driver):
    arguments = linear_arguments()
    assert give(arguments)
    shapes = []
    threads = [
        threading.Thread(
            target=lambda: shapes.extend(call(*linear_arguments()).shape for _ in range(50))
        )
        for _ in range(4)
    ]
    for t in threads:
        t.start()
    for _ in range(50):
        give(arguments)
    for t in threads:
        t.join()
    assert shapes == 200 * [(4, 6)] and len(driver.launches) == 200


def backward_plan(grad, x, weight, bits):
    """Both gradients of linear by one launch, or the one that `bits` ask for."""
    of = ((x, 1), (weight, 2))
    steps = [*(allocation(t) for t, bit in of if bits & bit), launch([place(0, grad)])]
    made = iter(range(3, 6))
    results = tuple(place(next(made), t) if bits & bit else None for t, bit in of)
    return plan.Plan(steps, (*results, None))


def has_nodes():
    return nodes.available(library.native._name)


@pytest.mark.skipif(not has_nodes(), reason="no nodes for this torch")
@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_a_node_repeats_the_plan_of_a_backward(driver, wanted):
    arguments = linear_arguments()
    x, weight = arguments[:2]
    x.requires_grad_(bool(wanted & 1))
    weight.requires_grad_(bool(wanted & 2))
    direct = library.OPS["linear"].direct
    assert direct(*arguments) is WANTS_GRADIENT
    assert give(arguments)
    y = direct(*arguments)
    assert y.grad_fn.name() == "nnarch_linear" and len(driver.launches) == 1

    grad = torch.empty_like(y)
    node = (grad, x.detach(), weight.detach(), wanted)
    number = library.native_op_names().index("linear_backward")
    schema = torch.ops.nnarch.linear_backward.default._schema
    function = nnarch.direct.function(library.native, number, schema)
    assert give(node, backward_plan(*node), function)
    y.backward(grad)
    assert len(driver.launches) == 2
    for t, bit in ((x, 1), (weight, 2)):
        assert (t.grad is not None) == bool(wanted & bit)
        assert t.grad is None or (t.grad.shape, t.grad.dtype) == (t.shape, t.dtype)
