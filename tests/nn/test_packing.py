"""Packed weights: used in eval mode without gradients, never stale, never in anyone's way."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.utils.prune

import nnarch
import nnarch.nn as nn
from nnarch import functional as F

MODULES = {
    "conv": (lambda: nn.Conv2d(3, 8, 3), (1, 3, 6, 6)),
    "conv in channels_last": (
        lambda: nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),
        (1, 3, 6, 6),
    ),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (1, 8, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 20, 4, 2, 1), (1, 3, 6, 6)),
    "transposed in channels_last": (
        lambda: nn.ConvTranspose2d(3, 20, 4, 2, 1).to(memory_format=torch.channels_last),
        (1, 3, 6, 6),
    ),
    "transposed, few outputs": (lambda: nn.ConvTranspose2d(9, 3, 4, 2, 1), (1, 9, 6, 6)),
    "transposed, one pixel": (lambda: nn.ConvTranspose2d(9, 20, 4), (2, 9, 1, 1)),
    "signal": (lambda: nn.Conv1d(3, 8, 3), (1, 3, 9)),
    "transposed signal": (lambda: nn.ConvTranspose1d(9, 20, 4, 2), (1, 9, 7)),
    "linear": (lambda: nn.Linear(7, 5), (2, 7)),
}


@pytest.fixture(params=MODULES)
def module_and_input(request):
    build, shape = MODULES[request.param]
    return build().eval(), torch.randn(shape)


def expected(module, x):
    """The module's function, computed by torch.nn from the weights as they are now."""
    with torch.no_grad():
        name = type(module).__name__
        return getattr(torch.nn, name).forward(module, x)


@torch.no_grad()
def infer(module, x):
    return module(x)


def assert_current(module, x):
    torch.testing.assert_close(infer(module, x), expected(module, x))


def test_eval_packs_once(module_and_input, monkeypatch):
    module, x = module_and_input
    packs = []
    pack = type(module)._pack
    monkeypatch.setattr(type(module), "_pack", lambda *args: packs.append(1) or pack(*args))
    for _ in range(3):
        assert_current(module, x)
    with torch.inference_mode():
        module(x)
    assert len(packs) == 1
    assert None not in module._packed.packed.values()


def test_training_mode_and_gradients_do_without(module_and_input):
    module, x = module_and_input
    module(x)  # the weight wants a gradient
    assert module._packed is None
    module.requires_grad_(False)
    module(x.clone().requires_grad_())
    assert module._packed is None
    module(x)  # frozen, and nothing else wants one
    assert module._packed is not None
    module.train()
    assert module._packed is None
    infer(module, x)
    assert module._packed is None


def _scale(module):
    with torch.no_grad():
        module.weight.mul_(2)


def _optimizer_step(module):
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.SGD([module.weight], lr=0.1).step()


def _uncounted_data(module):
    module.weight.data.mul_(2)


def _uncounted_numpy(module):
    module.weight.detach().numpy()[...] += 1


def _new_data(module):
    module.weight.data = torch.randn_like(module.weight)


def _new_data_twice(module):
    module.weight.data = torch.randn_like(module.weight)
    module.weight.data = torch.randn_like(module.weight)  # might get the first one's address


def _new_parameter(module):
    module.weight = nn.Parameter(torch.randn_like(module.weight))


def _load(module):
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})


def _load_assign(module):
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}, assign=True)


def _prune(module):
    mask = module.weight.detach().abs() > module.weight.detach().abs().median()
    torch.nn.utils.prune.custom_from_mask(module, "weight", mask)


CHANGES = [
    _scale,
    _optimizer_step,
    _uncounted_data,
    _uncounted_numpy,
    _new_data,
    _new_data_twice,
    _new_parameter,
    _load,
    _load_assign,
    _prune,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_every_change_of_the_weight_is_noticed(module_and_input, change):
    module, x = module_and_input
    before = infer(module, x)
    change(module)
    assert not torch.allclose(infer(module, x), before)
    assert_current(module, x)


def test_transposed_data_at_the_same_address_is_noticed():
    module, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    infer(module, x)
    module.weight.data = module.weight.data.t()
    assert_current(module, x)


@pytest.fixture
def large():
    """A packed linear layer where most elements lie outside every probe, and an input."""
    module, x = nn.Linear(64, 64).eval(), torch.randn(2, 64)
    infer(module, x)
    return module, x


def test_a_counted_write_of_one_element_is_noticed(large):
    module, x = large
    with torch.no_grad():
        module.weight[3, 2] += 5
    assert_current(module, x)


def test_no_new_data_gets_the_address_of_packed_data():
    # So large (36 MB) that malloc maps every block by itself, at the first address that is free.
    module, x = nn.Linear(3072, 3072).eval(), torch.randn(2, 3072)
    infer(module, x)
    address = module.weight.data_ptr()
    replacement = module.weight.data.clone()
    module.weight.data = replacement
    blocks = [torch.empty_like(replacement) for _ in range(4)]
    assert all(block.data_ptr() != address for block in blocks)
    assert_current(module, x)


def test_drop_packed_weights_after_an_uncounted_write_of_one_element(large):
    module, x = large
    module.weight.data[3, 2] += 5
    nn.drop_packed_weights(nn.Sequential(module))
    assert module._packed is None
    assert_current(module, x)


def test_half_precision_and_double(module_and_input):
    module, x = module_and_input
    infer(module, x)
    module.double()
    assert module._packed is None
    assert_current(module, x.double())


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, rows, module_and_input):
    """A packed weight was made of float32, and autocast rounds what it multiplies."""
    module, x = module_and_input
    x = x[:1].expand(rows, *x.shape[1:])
    infer(module, x)
    with torch.autocast("cpu", dtype):
        for _ in range(2):
            found, wanted = infer(module, x), expected(module, x)
            assert found.dtype == wanted.dtype == dtype
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    assert_current(module, x)


def test_a_weight_packed_before_autocast():
    weight, x = torch.randn(40, 30), torch.randn(5, 30)
    packed = F.pack_linear_weight(weight)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, weight, packed=packed)
    torch.testing.assert_close(y.float(), x @ weight.t(), rtol=0.02, atol=0.1)


def test_a_weight_in_shared_memory_is_never_packed(large):
    module, x = large
    module.share_memory()
    assert_current(module, x)
    # Another process writes without counting; an alias from NumPy does the same.
    module.weight.detach().numpy()[3, 2] += 5
    assert_current(module, x)


def test_copies_and_files_do_not_carry_the_cache(module_and_input):
    module, x = module_and_input
    unpacked = pickle.dumps(module)
    infer(module, x)
    assert module._packed is not None
    assert set(module.state_dict()) == {"weight", "bias"}
    assert len(pickle.dumps(module)) == len(unpacked)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    clones = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    )
    for clone in clones:
        assert clone._packed is None
        assert_current(clone, x)
        _uncounted_data(clone)
        assert_current(clone, x)
        assert_current(module, x)


def test_functional_call_uses_the_given_weight(module_and_input):
    module, x = module_and_input
    infer(module, x)
    other = {k: v.detach() + 1 for k, v in module.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(module, other, (x,))
        for name, value in other.items():
            getattr(module, name).copy_(value)
    torch.testing.assert_close(got, expected(module, x))


def test_a_forced_backend_leaves_no_packing_of_its_own(module_and_input):
    module, x = module_and_input
    with nnarch.use_backend("reference"):
        assert_current(module, x)
    assert_current(module, x)
    with nnarch.trace() as record:
        infer(module, x)
    assert [entry.backend for entry in record] == ["cpu"]
    assert all(packed.numel() > 0 for packed in module._packed.packed.values())


def test_vmap_over_an_ensemble_of_weights():
    nets = [nn.Linear(7, 5).eval() for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(nets)
    x = torch.randn(2, 7)

    def call(weights):
        return torch.func.functional_call(nets[0], weights, (x,))

    with torch.no_grad():
        got = torch.func.vmap(call)({k: v.detach() for k, v in stacked.items()})
    torch.testing.assert_close(got, torch.stack([expected(net, x) for net in nets]))


def test_a_meta_weight_is_not_packed():
    with torch.device("meta"):
        module = nn.Linear(3, 4).eval()
    with torch.no_grad():
        assert module(torch.empty(2, 3, device="meta")).shape == (2, 4)
    assert module._packed is None


def test_weights_made_in_inference_mode_are_followed():
    with torch.inference_mode():
        module, x = nn.Linear(7, 5).eval(), torch.randn(2, 7)
        for _ in range(2):
            torch.testing.assert_close(
                module(x), torch.nn.functional.linear(x, module.weight, module.bias)
            )
            module.weight.mul_(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_probes_work_in_every_dtype(dtype):
    module, x = nn.Linear(8, 8, dtype=dtype).eval(), torch.randn(2, 8, dtype=dtype)
    infer(module, x)
    module.weight.data.mul_(2)
    torch.testing.assert_close(infer(module, x), expected(module, x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "args", "attribute", "value"),
    [
        ("Conv2d", (8, 16, 3), "stride", (2, 2)),
        ("ConvTranspose2d", (8, 16, 4, 2, 1), "stride", (1, 1)),
        ("ConvTranspose2d", (8, 16, 4, 2, 1), "dilation", (2, 2)),
        ("ConvTranspose1d", (8, 16, 4, 2, 1), "stride", (3,)),
    ],
)
def test_what_packing_reads_beside_the_weight(name, args, attribute, value):
    module = getattr(nn, name)(*args).eval()
    x = torch.randn(1, 8, *([12] * (module.weight.dim() - 2)))
    assert_current(module, x)
    setattr(module, attribute, value)
    assert_current(module, x)


def test_other_groups():
    module, x = nn.Conv2d(8, 16, 3, groups=2).eval(), torch.randn(1, 8, 12, 12)
    infer(module, x)
    module.groups = 1
    assert_current(module, x[:, :4])


def test_empty_weights():
    module = nn.Linear(0, 4).eval()
    for _ in range(2):
        torch.testing.assert_close(infer(module, torch.randn(3, 0)), module.bias.expand(3, 4))


def test_exchanging_the_class_of_a_twin_is_enough():
    module = torch.nn.Linear(7, 5).eval()
    module.__class__ = nn.Linear
    x = torch.randn(2, 7)
    assert_current(module, x)
    assert module._packed is not None
