"""attn_implementation="nnarch" in models of the transformers package, against their "eager"."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnarch

transformers = pytest.importorskip("transformers", reason="needs the transformers package")

nnarch.register_transformers_attention()

_SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}


def _bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**_SMALL, intermediate_size=64))


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=61, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    shape = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


def _mistral() -> nn.Module:
    shape = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 64, "sliding_window": 5}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**shape))


def _gpt_oss() -> nn.Module:
    shape = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 12}
    shape |= {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**shape))


def _t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, vocab_size=61,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


MODELS = {f.__name__[1:]: f for f in (_bert, _gpt2, _llama, _mistral, _gpt_oss, _t5)}
GENERATORS = [name for name in MODELS if name != "bert"]


def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The same model with its own attention and with ours."""
    torch.manual_seed(0)
    theirs = MODELS[name]()
    theirs.set_attn_implementation("eager")
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("nnarch")
    assert ours.config._attn_implementation == "nnarch"
    return theirs.eval(), ours.eval()


def _inputs(name: str, padding: str) -> dict[str, Tensor]:
    tokens = torch.randint(1, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if padding == "right":
        mask[1, 7:] = 0
    elif padding == "left":
        mask[1, :4] = 0
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if name == "t5":
        inputs["decoder_input_ids"] = tokens[:, :6]
    return inputs


def _output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    return out.last_hidden_state if "logits" not in out else out.logits


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str, padding: str) -> None:
    theirs, ours = _pair(name)
    inputs = _inputs(name, padding)
    with nnarch.trace() as trace:
        mine = _output(ours, inputs)
    assert "attention" in {event.op for event in trace}
    expected = _output(theirs, inputs)
    # A query that sees no key is zero here and an average there: what it gives counts nowhere.
    seen = inputs["attention_mask"].bool() if name != "t5" else torch.ones(3, 6, dtype=torch.bool)
    torch.testing.assert_close(mine[seen], expected[seen], rtol=1e-4, atol=2e-5)
    weight = torch.randn_like(expected) * seen[..., None]
    (mine * weight).sum().backward()
    (expected * weight).sum().backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is not None:
            scale = q.grad.abs().max().item() + 1e-3
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATORS)
def test_generation_gives_the_same_tokens(name: str, cache: str) -> None:
    theirs, ours = _pair(name)
    inputs = _inputs(name, "right" if name == "t5" else "left")
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))


def test_dropout_is_applied_in_training() -> None:
    _, ours = _pair("gpt2")
    inputs = _inputs("gpt2", "none")
    ours.train()
    first, second = (_output(ours, inputs) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    third = _output(ours, inputs)
    torch.manual_seed(4)
    assert torch.equal(third, _output(ours, inputs))


def test_capped_scores_are_refused() -> None:
    q = torch.randn(1, 2, 3, 8)
    from nnarch.accelerate.transformers_attention import attend

    with pytest.raises(ValueError, match="does not cap scores"):
        attend(nn.Module(), q, q, q, None, softcap=30.0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_accelerate_takes_our_attention(name: str) -> None:
    theirs, _ = _pair(name)
    inputs = _inputs(name, "none")
    with pytest.warns(UserWarning, match="keeps its own forward pass"):
        fast = nnarch.accelerate(theirs)
    with torch.no_grad(), nnarch.trace() as trace:
        mine = _output(fast, inputs)
    assert {"attention", "linear"} <= {event.op for event in trace}
    torch.testing.assert_close(mine, _output(theirs, inputs), rtol=1e-4, atol=2e-5)
    assert theirs.config._attn_implementation == "eager"  # the model itself stays as it was
