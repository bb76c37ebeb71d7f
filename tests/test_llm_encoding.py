"""Token ids and labels: what is learned, how examples are padded and packed."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llm_tiny import DECODERS, adapted, build
from reslora_diffusion.llm.encoding import IGNORED, Collator, encode, encode_all, encode_prompt, pack, packing_problem
from reslora_diffusion.problems import BadInput

WORDS = "<pad> <s> </s> [UNK] user assistant system : a b c d e f g h".split()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% if m['role'] == 'assistant' %}"
    "{{ eos_token }} {% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
FORGETFUL = "{{ messages[-1]['role'] }} : {{ messages[-1]['content'] }}"
TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
LONG_TALK = [
    {"role": "system", "content": "h"},
    *TALK,
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def words(ids: list[int]) -> str:
    return " ".join("_" if i == IGNORED else WORDS[i] for i in ids)


def test_prompt_and_response_without_a_template(tokenizer):
    example = encode(TALK, tokenizer)
    assert words(example["input_ids"]) == "<s> a b c </s>"
    assert words(example["labels"]) == "_ _ _ c </s>"
    assert words(encode_prompt(TALK[:1], tokenizer)) == "<s> a b"


def test_prompt_template_goes_around_the_prompt_and_overrides_the_chat_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    example = encode(TALK, tokenizer, "user {prompt} : ")
    assert words(example["input_ids"]) == "<s> user a b : c </s>"
    assert words(example["labels"]) == "_ _ _ _ _ c </s>"
    assert words(encode_prompt(TALK[:1], tokenizer, "user {prompt} : ")) == "<s> user a b :"


def test_every_turn_of_the_assistant_is_learned_with_a_chat_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    example = encode(LONG_TALK, tokenizer)
    assert words(example["input_ids"]) == ("<s> system : h user : a b assistant : c </s> user : d assistant : e f </s>")
    assert words(example["labels"]) == "_ _ _ _ _ _ _ _ _ _ c </s> _ _ _ _ _ e f </s>"
    prompt = encode_prompt(LONG_TALK[:-1], tokenizer)
    assert words(prompt) == "<s> system : h user : a b assistant : c </s> user : d assistant :"
    assert example["input_ids"][: len(prompt)] == prompt


def test_the_end_is_learned_if_the_template_does_not_write_it(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }} ", "")
    assert words(encode(TALK, tokenizer)["labels"]).endswith("c </s>")


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert words(encode(TALK, tokenizer)["input_ids"]) == "<s> a b c </s>"
    assert words(encode_prompt(TALK[:1], tokenizer)) == "<s> a b"


def test_conversations_that_cannot_be_cut_are_named(tokenizer):
    with pytest.raises(BadInput, match="train row 2: 5 turns, but without a chat template"):
        encode_all([TALK, LONG_TALK], tokenizer, max_length=99, where="train")
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(BadInput, match="row 1: the chat template rewrites earlier turns"):
        encode_all([LONG_TALK], tokenizer, max_length=99)


def test_long_examples_stop_the_run_or_are_dropped(tokenizer):
    talks = [TALK, [TALK[0], {"role": "assistant", "content": "c " * 20}], TALK]
    with pytest.raises(BadInput, match=r"1 of 3 examples have more tokens than --max_length 8: row 2 \(24\)"):
        encode_all(talks, tokenizer, max_length=8)
    kept, dropped = encode_all(talks, tokenizer, max_length=8, drop_long=True)
    assert (len(kept), dropped) == (2, 1)
    with pytest.raises(BadInput, match="no example fits"):
        encode_all(talks, tokenizer, max_length=2, drop_long=True)


def example(seed: int, length: int) -> dict:
    ids = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [IGNORED] * (length // 3) + ids[length // 3 :]}


EXAMPLES = [example(seed, length) for seed, length in enumerate((5, 11, 3, 8, 6, 4))]


def test_padding_is_on_the_right_and_never_learned():
    batch = Collator(pad_token_id=0, multiple_of=4)(EXAMPLES[:2])
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].shape == (2, 12)
    assert batch["attention_mask"].sum(1).tolist() == [5, 11]
    assert (batch["labels"][0, 5:] == IGNORED).all()
    assert batch["input_ids"][0, :5].tolist() == EXAMPLES[0]["input_ids"]


def test_packs_hold_everything_once_and_are_full():
    packs = pack(EXAMPLES, 13)
    assert sorted(len(e["input_ids"]) for row in packs for e in row) == [3, 4, 5, 6, 8, 11]
    assert all(sum(len(e["input_ids"]) for e in row) <= 13 for row in packs)
    assert len(packs) == 3


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_pack_computes_what_its_examples_compute_alone(name, shortcut):
    model = adapted(name, shortcut=shortcut).double()
    collate = Collator(pad_token_id=0)
    total, count = 0.0, 0
    with torch.no_grad():
        for one in EXAMPLES:
            batch = collate([one])
            learned = int((batch["labels"] != IGNORED).sum()) - int(batch["labels"][0, 0] != IGNORED)
            total += model(**batch).loss.item() * learned
            count += learned
        packed = model(**collate(pack(EXAMPLES, 26))).loss.item()
        base = build(name).double()(**collate(pack(EXAMPLES, 26))).loss.item()
    assert packed == pytest.approx(total / count, rel=1e-6)
    assert abs(packed - base) > 1e-4
    assert packing_problem(model, collate, EXAMPLES) is None


def test_a_model_that_mixes_packed_examples_is_found_out():
    class Mixing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("llama")

        def forward(self, position_ids=None, **inputs):
            return self.inner(**inputs)

    problem = packing_problem(Mixing(), Collator(pad_token_id=0), EXAMPLES)
    assert "Mixing lets the examples of a pack see each other" in str(problem)
