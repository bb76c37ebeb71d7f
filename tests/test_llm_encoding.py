"""Token ids and labels: what is learned, how examples are padded and packed."""

import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llm_tiny import DECODERS, adapted, build
from reslora_diffusion.llm.data import template_for_training
from reslora_diffusion.llm.encoder import Encoder
from reslora_diffusion.llm.encoding import (
    IGNORED,
    Collator,
    encode,
    encode_all,
    encode_prompt,
    pack_examples,
    packing_problem,
    segments,
)
from reslora_diffusion.llm.forms import Conversation
from reslora_diffusion.llm.showing import first_example, statistics
from reslora_diffusion.utils.problems import BadInput

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


REWRITING = (  # as Qwen3, Phi-3 and GPT-OSS do: the last answer is written in another way than earlier ones
    "{% for m in messages %}{{ m['role'] }} : {% if loop.last and m['role'] == 'assistant' %}h {% endif %}"
    "{{ m['content'] }} {% if m['role'] == 'assistant' %}{{ eos_token }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def test_answers_that_a_template_rewrites_later_are_learned_one_by_one(tokenizer):
    tokenizer.chat_template = REWRITING
    examples, dropped = encode_all([LONG_TALK], tokenizer, max_length=99)
    assert [words(one["input_ids"]) for one in examples] == [
        "system : h user : a b assistant : h c </s>",
        "system : h user : a b assistant : c </s> user : d assistant : h e f </s>",
    ]
    assert [words(one["labels"]) for one in examples] == ["_ " * 9 + "h c </s>", "_ " * 16 + "h e f </s>"]
    assert dropped == 0
    assert encode(LONG_TALK, tokenizer) == examples[1]
    assert [text for text, _ in segments(LONG_TALK, tokenizer, None)][1] == "h e f </s> "
    prompt = encode_prompt(LONG_TALK[:-1], tokenizer)
    assert examples[1]["input_ids"][: len(prompt)] == prompt


def test_what_a_template_refuses_is_said_by_row(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}" + TEMPLATE
    )
    with pytest.raises(BadInput) as caught:
        encode_all([TALK, LONG_TALK, TALK, LONG_TALK], tokenizer, max_length=99, where="train")
    message = "train row 2, 4: the chat template does not take the conversation: no system turn, please"
    assert caught.value.problems == [message]
    tokenizer.chat_template = "{{ messages[0].content + 3 }}"
    with pytest.raises(BadInput, match="row 1: the chat template does not take the conversation: can only concatenate"):
        encode_all([TALK], tokenizer, max_length=99)


def test_an_answer_that_a_template_leaves_out_is_not_learned_as_nothing(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'][:1] }}")
    with pytest.raises(BadInput, match="row 1: the chat template leaves out or changes part of the answer 'e f'"):
        encode_all([LONG_TALK], tokenizer, max_length=99)


def test_text_is_given_in_parts_to_templates_that_want_parts(tokenizer):
    content = "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    plain = encode(LONG_TALK, with_template(tokenizer, TEMPLATE))
    assert encode(LONG_TALK, with_template(tokenizer, TEMPLATE.replace("{{ m['content'] }}", content))) == plain


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


# ------------------------------------------------------------------------------------------------- the end


def learned(example) -> list[int]:
    return [i for i in example["labels"] if i != IGNORED]


def test_a_special_token_at_the_end_of_a_response_is_not_its_end(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["g"]})
    talk = [TALK[0], {"role": "assistant", "content": "c g"}]
    for template in (None, TEMPLATE.replace("{{ eos_token }} ", "")):
        tokenizer.chat_template = template
        example = encode(talk, tokenizer)
        assert words(learned(example)) == "c g </s>"
        assert example["end"] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("closing", "text", "end"),
    [
        ("h ", "c h", "h"),  # as <|eot_id|>, where the tokenizer's end token is another
        ("g h ", "c g h", "h"),  # as Command R's <|END_RESPONSE|><|END_OF_TURN_TOKEN|>
        ("h {{ eos_token }} ", "c h </s>", "</s>"),  # as Phi-3: generation stops at what it knows
        ("f ", "c f </s>", "</s>"),  # ordinary text, which no generation stops at
    ],
)
def test_the_end_that_is_taught_is_the_one_that_is_known(tokenizer, closing, text, end):
    tokenizer.add_tokens(["g", "h"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }} ", closing)
    example = encode(TALK, tokenizer)
    assert words(learned(example)) == text
    assert example["end"] == tokenizer.convert_tokens_to_ids(end)


def test_without_an_end_token_nothing_is_trained_unless_the_template_closes_its_turns(tokenizer):
    tokenizer.eos_token = None
    tokenizer.chat_template = None
    with pytest.raises(BadInput, match="train row 1, 2: the tokenizer has no end token"):
        encode_all([TALK, TALK], tokenizer, max_length=99, where="train")
    tokenizer.add_tokens(["h"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }} ", "h ")
    assert words(learned(encode(TALK, tokenizer))) == "c h"


def test_tokens_without_rows_are_named_with_their_rows(tokenizer):
    talks = [TALK, [TALK[0], {"role": "assistant", "content": "g h"}]]
    with pytest.raises(BadInput, match=r"row 2: the model's embedding has 14 rows and none for 'g' \(14\), 'h' \(15\)"):
        encode_all(talks, tokenizer, max_length=99, rows=14)
    assert len(encode_all(talks, tokenizer, max_length=99, rows=16)[0]) == 2


# ------------------------------------------------------------------------------------ templates of real models

SINGLE = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
MULTI = [*SINGLE, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]
THOUGHT = [SINGLE[0], {"role": "assistant", "content": "<think>\nadd them\n</think>\n\n4"}]
RESPONSES = {  # what is learned behind the prompt that generation starts from: of SINGLE, of THOUGHT, of both of MULTI
    "llama3": ("4<|eot_id|>", None, ["4<|eot_id|>", "Yes<|eot_id|>"]),
    "phi3": ("4<|end|>\n</s>", None, ["4<|end|>\n</s>", "Yes<|end|>\n</s>"]),
    "qwen3": (
        "<think>\n\n</think>\n\n4<|im_end|>\n",
        "<think>\nadd them\n</think>\n\n4<|im_end|>\n",
        ["<think>\n\n</think>\n\n4<|im_end|>\n", "<think>\n\n</think>\n\nYes<|im_end|>\n"],
    ),
    "gptoss": (
        "<|channel|>final<|message|>4<|return|>",
        None,
        ["<|channel|>final<|message|>4<|return|>", "<|channel|>final<|message|>Yes<|return|>"],
    ),
    "deepseek_r1_distill": (
        "\n</think>\n\n4<｜end▁of▁sentence｜>",
        "add them\n</think>\n\n4<｜end▁of▁sentence｜>",
        ["\n</think>\n\n4<｜end▁of▁sentence｜>", "\n</think>\n\nYes<｜end▁of▁sentence｜>"],
    ),
    "nemotron_3_nano": (
        "</think>4<|im_end|>\n",
        "add them\n</think>\n\n4<|im_end|>\n",
        ["</think>4<|im_end|>\n", "</think>Yes<|im_end|>\n"],
    ),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_templates_of_models_as_trl_ships_them(tokenizer, name):
    folder = Path(pytest.importorskip("trl").__file__).with_name("chat_templates")
    tokenizer.chat_template = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    single, thought, multi = RESPONSES[name]
    for talk, wanted in ((SINGLE, single), (THOUGHT, thought)):
        if wanted is not None:
            context, response = segments(talk, tokenizer, None)
            given = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
            assert (context, response) == ((given, False), (wanted, True))
    found = [piece for pieces in Encoder(tokenizer).sequences(MULTI) for piece in pieces if piece.learned]
    assert [piece.text for piece in found] == multi


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
    packs = pack_examples(EXAMPLES, 13)
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
        packed = model(**collate(pack_examples(EXAMPLES, 26))).loss.item()
        base = build(name).double()(**collate(pack_examples(EXAMPLES, 26))).loss.item()
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


# --------------------------------------------------------------------------------------- tools, texts, long rows

CALLING = (  # as Qwen's: tools first, a call as JSON, what the tool said as a turn
    "{% if tools %}{% for t in tools %}{{ t['function']['name'] }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] or '' }} {% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] }} {% endfor %}{% if m['role'] == 'assistant' %}{{ eos_token }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
CALL = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "g"}}]},
    {"role": "tool", "content": "d"},
    {"role": "assistant", "content": "e"},
]


def test_calls_of_tools_are_learned_and_what_tools_say_is_not(tokenizer):
    talk = Conversation(CALL, [{"type": "function", "function": {"name": "g"}}])
    example = encode(talk, with_template(tokenizer, CALLING))
    assert words(example["input_ids"]) == "g user : a assistant : g </s> [UNK] : d assistant : e </s>"
    assert words(example["labels"]) == "_ _ _ _ _ _ g </s> _ _ _ _ _ e </s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE, "leaves out the call of the tool 'g'"),
        (CALLING.replace("{{ t['function']['name'] }}", ""), "leaves out the tool 'h': it does not know tools"),
        (
            CALLING.replace("{{ m['role'] }} : {{", "{{ m['role'] }} : {{ m['role'] != 'tool' and "),
            "the tool's turn 'd'",
        ),
    ],
)
def test_a_template_that_knows_no_tools_is_refused(tokenizer, template, message):
    talk = Conversation(CALL, [{"type": "function", "function": {"name": "h"}}])
    with pytest.raises(BadInput, match=message):
        encode_all([talk], with_template(tokenizer, template), max_length=99)


def test_a_system_turn_that_a_template_drops_is_refused(tokenizer):
    silent = TEMPLATE.replace("{{ m['content'] }}", "{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}")
    with pytest.raises(BadInput, match="leaves out the system's turn 'h'"):
        encode_all([LONG_TALK], with_template(tokenizer, silent), max_length=99)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
@pytest.mark.parametrize("template", [TEMPLATE, REWRITING])
def test_a_turn_that_is_marked_is_not_learned(tokenizer, mark, template):
    talk = [LONG_TALK[0], LONG_TALK[1], LONG_TALK[2] | mark, *LONG_TALK[3:]]
    (example,), _ = encode_all([talk], with_template(tokenizer, template), max_length=99)
    assert words([i for i in example["labels"] if i != IGNORED]) in ("e f </s>", "h e f </s>")


def test_a_text_is_learned_in_windows(tokenizer):
    tokenizer.chat_template = TEMPLATE
    texts = [[{"role": "text", "content": text}] for text in ("a b c d e f", "g")]
    examples, dropped = encode_all(texts, tokenizer, max_length=4)
    assert [words(one["input_ids"]) for one in examples] == ["<s> a b c", "d e f </s>", "<s> g </s>"]
    assert all(one["labels"] == one["input_ids"] for one in examples)
    assert dropped == 0


def test_long_rows_are_cut_if_asked_but_not_to_nothing(tokenizer):
    talks = [[{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d e f"}], TALK]
    examples, cut = encode_all(talks, tokenizer, max_length=5, cut_long=True)
    assert [words(one["labels"]) for one in examples] == ["_ _ _ c d", "_ _ _ c </s>"]
    assert cut == 1
    with pytest.raises(BadInput, match=r"nothing is left of an answer in row 1 \(8 tokens\), row 2 \(5 tokens\)"):
        encode_all(talks, tokenizer, max_length=3, cut_long=True)


def test_packing_takes_as_long_for_each_row_however_many_there_are():
    rows = [{"input_ids": [0] * (1 + i * 7919 % 50), "labels": [], "end": 0} for i in range(60_000)]
    started = time.process_time()
    bins = pack_examples(rows, 64)
    assert time.process_time() - started < 3  # a search among all bins took minutes
    lengths = [sum(len(row["input_ids"]) for row in one) for one in bins]
    assert max(lengths) <= 64
    assert sum(map(len, bins)) == len(rows)
    assert len(bins) <= 1.02 * sum(lengths) / 64 + 1


def test_the_first_example_shows_what_is_learned(tokenizer):
    example = encode(LONG_TALK, with_template(tokenizer, TEMPLATE))
    shown = list(first_example(example, tokenizer))
    assert shown[1] == "| <s> system : h user : a b assistant :[[c </s>]]user : d assistant :[[e f </s>]]"
    long = example | {"input_ids": example["input_ids"] * 30, "labels": example["labels"] * 30}
    assert list(first_example(long, tokenizer))[-1] == "| ... and 200 more tokens"
    assert next(statistics([example, long], 999)).startswith("tokens in an example: 20 least, 600 median")


def test_trls_training_template_learns_a_thinking_conversation_in_one_sequence(tokenizer):
    trl = pytest.importorskip("trl")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    alone, _ = encode_all([LONG_TALK], tokenizer, max_length=99)
    assert len(alone) == 2
    template = template_for_training(tokenizer)
    (pieces,) = Encoder(tokenizer, training_template=template).sequences(LONG_TALK)
    learned = [piece.text for piece in pieces if piece.learned]
    assert [text.split()[-1] for text in learned] == ["c<|im_end|>", "f<|im_end|>"]
    assert "".join(piece.text for piece in pieces).count("<|im_start|>") == 5
    with pytest.raises(BadInput, match=r"marks no \{% generation %\}"):
        template_for_training(with_template(tokenizer, TEMPLATE))
    with pytest.raises(BadInput, match="has no chat template"):
        template_for_training(with_template(tokenizer, None))
