"""Packed batches of several rows, by every implementation of attention: no example sees another.

Flash kernels run on GPUs only. Exact torch code of the same contract stands in for them here; transformers' own code
hands it its arguments.
"""

import pytest
import torch
import transformers.integrations.flex_attention as flex_attention
import transformers.modeling_flash_attention_utils as flash_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from llm_tiny import adapted, build
from reslora_diffusion.llm.encoder import IGNORED
from reslora_diffusion.llm.encoding import Collator, packing_problem, uses_flash_attention
from reslora_diffusion.llm.packed_attention import attend_in_parts

LENGTHS = (5, 11, 3, 8)
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "exact_flash", "eager_of_parts", "sdpa_of_parts")


def example(seed: int, length: int) -> dict:
    ids = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [IGNORED] + ids[1:], "end": 2}


EXAMPLES = [example(seed, length) for seed, length in enumerate(LENGTHS)]


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Attention of [B, T, heads, width]; fewer heads of keys and values are shared."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def flash(q, k, v, causal=True, softmax_scale=None, **_):
    return attend(q, k, v, causal, softmax_scale)


def flash_of_parts(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, causal=True, softmax_scale=None, **_):
    """q, k, v [tokens, heads, width], cut into parts at cu_seqlens."""
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q)
    cuts = list(zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], strict=True))
    parts = [attend(q[None, a:b], k[None, a:b], v[None, a:b], causal, softmax_scale)[0] for a, b in cuts]
    return torch.cat(parts)


def arguments(is_causal=True, softmax_scale=None, **_):
    return {"causal": is_causal, "softmax_scale": softmax_scale}


def uncompiled(q, k, v, training=False, **settings):
    return torch.nn.attention.flex_attention.flex_attention(q, k, v, **settings)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    found = (flash, flash_of_parts, None, flash_attention._pad_input, flash_attention._unpad_input)
    monkeypatch.setattr(
        flash_attention, "lazy_import_flash_attention", lambda *_, **__: (found, (arguments, arguments))
    )
    AttentionInterface.register("exact_flash", flash_attention_forward)
    AttentionMaskInterface.register("exact_flash", flash_attention_mask)
    eager = torch.nn.attention.flex_attention.flex_attention
    monkeypatch.setattr(
        flex_attention, "compile_friendly_flex_attention", lambda *given, training, **kw: eager(*given, **kw)
    )


def packed(rows: list[list[int]], collate: Collator) -> dict:
    return collate([[EXAMPLES[i] for i in row] for row in rows])


def test_lengths_are_those_of_the_examples_and_the_padding():
    batch = packed([[0, 1], [2, 3]], Collator(0))
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 5, 16, 19, 27, 32]
    assert batch["max_length_q"] == batch["max_length_k"] == 11
    assert batch["position_ids"].tolist()[1] == [*range(3), *range(8), *range(5)]
    assert packed([[0, 1]], Collator(0))["cu_seq_lens_q"].tolist() == [0, 5, 16]  # nothing is padded
    assert "cu_seq_lens_q" not in packed([[0, 1]], Collator(0, lengths=False))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[1], [3, 0, 2]]], ids=str)
def test_examples_of_a_pack_do_not_see_each_other(implementation, rows):
    if implementation == "flex_attention" and rows != [[0, 1], [2, 3]]:
        pytest.skip("it takes ten seconds to get ready for each shape")
    model = adapted("llama", shortcut="middle", num_previous=None)
    alone = [model(input_ids=torch.tensor([one["input_ids"]])).logits[0] for one in EXAMPLES]
    model.get_base_model().config._attn_implementation = implementation
    collate = Collator(0, lengths=uses_flash_attention(model), parts="parts" in implementation)
    assert collate.lengths == (implementation == "exact_flash")
    batch = packed(rows, collate)
    del batch["labels"]
    with torch.no_grad():
        found = model(**batch).logits
    for row, chosen in enumerate(rows):
        at = 0
        for i in chosen:
            length = LENGTHS[i]
            torch.testing.assert_close(found[row, at : at + length], alone[i], rtol=1e-4, atol=1e-5)
            at += length


def test_the_probe_finds_what_only_batches_of_several_rows_do():
    model = build("llama")
    model.config._attn_implementation = "exact_flash"
    assert packing_problem(model, Collator(0), EXAMPLES) is None
    assert packing_problem(model, Collator(0), EXAMPLES[:1]) is None
    problem = packing_problem(model, Collator(0, lengths=False), EXAMPLES)
    assert problem == "--packing: LlamaForCausalLM lets the examples of a pack see each other; wanted --packing false"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_parts_have_the_gradients_of_a_mask_and_score_no_other_pairs(name, implementation, monkeypatch):
    """A pack of T tokens made attention compute T^2 scores for each row, however short its examples were."""
    scores: list[int] = []

    def counting(q, k, *rest, **settings):
        scores.append(q.shape[-2] * k.shape[-2] * q.shape[0])
        return scaled_dot_product_attention(q, k, *rest, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    gradients = {}
    for parts in (False, True):
        model = adapted(name, shortcut="block", num_previous=1)
        model.get_base_model().set_attn_implementation(implementation)
        assert not parts or attend_in_parts(model, 32)
        batch = packed([[0, 1], [2, 3]], Collator(0, lengths=False, parts=parts))
        scores.clear()
        model(**batch).loss.backward()
        gradients[parts] = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        if implementation == "sdpa":
            layers = model.get_base_model().config.num_hidden_layers
            assert sum(scores) == layers * (sum(n * n for n in LENGTHS) if parts else 2 * 16 * 16)
    assert any(value.abs().max() > 1e-3 for value in gradients[True].values())
    for key, value in gradients[True].items():
        torch.testing.assert_close(value, gradients[False][key], rtol=1e-4, atol=1e-6)


def test_a_batch_without_lengths_is_attended_to_as_before():
    """Such as those of generation, and padded ones."""
    for implementation in ("eager", "sdpa"):
        model = build("llama")
        model.set_attn_implementation(implementation)
        ids = torch.tensor([EXAMPLES[1]["input_ids"], EXAMPLES[3]["input_ids"] + [0] * 3])
        mask = (ids != 0).long()
        wanted = [model(ids[:1]).logits, model(ids, attention_mask=mask).logits[1, :8], model.generate(ids[:1])]
        assert attend_in_parts(model, 32)
        found = [model(ids[:1]).logits, model(ids, attention_mask=mask).logits[1, :8], model.generate(ids[:1])]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_where_parts_would_not_do_the_mask_stays():
    assert not attend_in_parts(build("mistral"), 9)  # its window is 8
    assert attend_in_parts(build("mistral"), 8)
    model = build("llama")
    model.config._attn_implementation = "exact_flash"
    assert not attend_in_parts(model, 8)
