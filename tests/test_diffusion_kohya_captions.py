"""Captions as kohya's scripts read them: separators, a growing number of tags, passes without captions, weights.

The references are written from kohya's `process_caption` and `_get_weighted_input_ids`, a step and a token at a time.
"""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from dreambooth import SUBJECTS, arguments, script
from reslora_diffusion.diffusion.data.concepts import concepts_of, options_of
from reslora_diffusion.diffusion.data.encode import Warmup
from reslora_diffusion.diffusion.data.wordings import growing, wordings
from reslora_diffusion.diffusion.models.families.weighted_prompts import weighted_words, without_weights
from reslora_diffusion.diffusion.options import DreamBoothOptions, parse
from reslora_diffusion.diffusion.options.checks import check
from reslora_diffusion.diffusion.train.merging import Evaluation
from reslora_diffusion.utils.problems import BadInput
from test_diffusion_sampling import make_example, make_sampler, read_as
from tiny import tiny_pipeline_flux, tiny_pipeline_folder, tiny_pipeline_xl

TAGS = [f"tag {n}" for n in range(7)]
WEIGHTED = "a (big:1.5) octopus, [blue] ((sticker)) of a \\(red\\) dog"


# ------------------------------------------------------------------------------------------------------- tags


def test_tags_have_another_separator_between_them():
    orders = read_as("sks; cat, black;sun", shuffle_caption=True, keep_tokens=1, caption_separator=";")
    assert sorted(orders) == ["sks, cat, black, sun", "sks, sun, cat, black"]
    together = read_as("sks;cat||hat;sun", shuffle_caption=True, caption_separator=";", secondary_separator="||")
    assert len(together) == 6
    assert all("cat;hat" in order for order in together)  # kohya's scripts put the separator there, without a space
    assert read_as("sks; cat", caption_separator=";", secondary_separator="||") == ["sks; cat"]


def tags_at(step: int, count: int, least: int, steps: int) -> int:
    """The number of tags that kohya's `process_caption` leaves at a step."""
    return min(count, math.floor(step * ((count - least) / steps)) + least) if step < steps else count


@pytest.mark.parametrize("least", [1, 3, 9])
def test_a_caption_begins_with_its_first_tags(least):
    options = DreamBoothOptions(token_warmup_step=14, token_warmup_min=least, keep_tokens=1)
    caption = ",".join(["sks", *TAGS])
    (whole,), shorter = wordings(caption, options), growing(caption, options)
    warmup = Warmup(14, [(text, None) for text in shorter])
    for step in range(20):
        text, _ = (warmup.at(step) if shorter else None) or (whole, None)
        assert text == ", ".join(["sks", *TAGS[: tags_at(step, len(TAGS), least, 14)]])


def test_tags_of_a_growing_caption_are_shuffled_among_themselves():
    options = DreamBoothOptions(token_warmup_step=10, shuffle_caption=True)
    shorter = growing(", ".join(TAGS), options)
    assert [sorted(text.split(", ")) for text in shorter] == [TAGS[:count] for count in range(1, 7)]
    assert shorter[4:] != [", ".join(TAGS[:count]) for count in (5, 6)]
    assert shorter == growing(", ".join(TAGS), options)


def test_draws_of_a_step_have_the_tags_of_the_step():
    texts = [(f"{count} tags", make_example(count).texts[0][1]) for count in range(3)]
    example = replace(make_example(4), warmup=Warmup(6, texts))
    sampler = replace(make_sampler(count=1), instances=[example], draws_per_step=4)
    seen = [draw.prompt for n in range(32) for draw in [sampler.draw(example, 1, n)]]
    assert seen[:24] == [f"{step // 2} tags" for step in range(6) for _ in range(4)]
    assert seen[24:] == ["prompt 1"] * 8
    assert sampler.to_measure([example], 0).draw(example, 1, 0, timestep=5).prompt == "prompt 1"
    half = replace(sampler, warmup_scale=0.5)  # of a trial with half the steps
    assert [half.draw(example, 1, 4 * step).prompt for step in range(4)] == [
        *(f"{n} tags" for n in range(3)),
        "prompt 1",
    ]


def test_what_is_merged_and_measured_on_has_all_tags():
    short = make_example(1).texts[0][1]._replace(hidden=torch.full((5, 6), -1.0))
    example = replace(make_example(4), warmup=Warmup(1000, [("short", short)]))
    sampler = replace(make_sampler(), instances=[example] * 4, draws_per_step=2)
    options = DreamBoothOptions(train_batch_size=2, calibration_batches=6)
    found = Evaluation.of(sampler, options)
    for batch in (*found.calibration, *found.validation):
        assert (batch.texts.hidden >= 0).all()
    assert (sampler.batches(0, 2)[0].texts.hidden == -1).all()


@pytest.mark.parametrize("several", [False, True])
def test_each_third_pass_has_no_captions(several):
    shapes = [(4, 8, 8), (4, 6, 10)] if several else [(4, 8, 8)]
    examples = [make_example(n, shape=shapes[n % len(shapes)]) for n in range(4)]
    empty = make_example(1).texts[0][1]._replace(hidden=torch.full((5, 6), -1.0))
    sampler = replace(make_sampler(classes=2), instances=examples, empty=empty, dropped_pass=3)
    for turn in range(12):  # two turns of two make a pass
        hidden = torch.cat([batch.texts.hidden[batch.prompt_index] for batch in sampler.batches(2 * turn, 2)])
        assert len(hidden) == 4  # the class images as well
        assert (hidden == -1).all() if turn // 2 in (2, 5) else (hidden >= 0).all(), turn


# ---------------------------------------------------------------------------------------------------- weights


def test_weights_of_words_are_kohyas():
    assert weighted_words("normal text") == [("normal text", 1.0)]
    assert weighted_words("(unbalanced") == [("unbalanced", 1.1)]
    assert weighted_words("\\(literal\\]") == [("(literal]", 1.0)]
    assert weighted_words("(unnecessary)(parens)") == [("unnecessaryparens", 1.1)]
    assert weighted_words("(hm:...) (cat:1.2.3)") == [("hm:...", 1.1), (" ", 1.0), ("cat:1.2.3", 1.1)]
    assert without_weights("a ((big)) [blue] \\(red\\) (dog:1.3)") == "a big blue (red) dog"
    found = weighted_words("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).")
    assert [text for text, _ in found] == ["a ", "house", " ", "on", " a ", "hill", ", sun, ", "sky", "."]
    assert [w for _, w in found] == pytest.approx([1, 1.573, 1.1, 1, 1.1, 0.55, 1.1, 1.4641, 1.1])


def states_of(encoder: torch.nn.Module, tokenizer: CLIPTokenizer, second_to_last: bool, pieces: int) -> torch.Tensor:
    """States of `WEIGHTED`, each token's times its weight: the parts are spelled out by hand."""
    parts = [("a ", 1.0), ("big", 1.5), (" octopus, ", 1.0), ("blue", 1 / 1.1), (" ", 1.0), ("sticker", 1.21)]
    parts += [(" of a (red) dog", 1.0)]
    size = tokenizer.model_max_length - 2
    ids, weights = [], []
    for text, weight in parts:
        own = tokenizer(text).input_ids[1:-1]
        ids, weights = ids + own, weights + [weight] * len(own)
    ids, weights = ids[: pieces * size], weights[: pieces * size]
    assert len(ids) < pieces * size
    rows, factors = [], []
    for n in range(pieces):
        own, factor = ids[n * size : (n + 1) * size], weights[n * size : (n + 1) * size]
        ended = own if len(own) == size else [*own, tokenizer.eos_token_id]
        padding = [tokenizer.pad_token_id] * (size + 1 - len(ended))
        last = [tokenizer.eos_token_id] if len(own) == size else []
        rows.append([tokenizer.bos_token_id, *ended, *(last or padding)][: size + 2])
        factors.append([*factor, *[1.0] * (size - len(factor))])
    output = encoder(torch.tensor(rows), output_hidden_states=True)
    states = output.hidden_states[-2] if second_to_last else output.last_hidden_state
    inner = torch.cat([s[1:-1] * torch.tensor(f)[:, None] for s, f in zip(states, factors, strict=True)])
    return torch.cat([states[0, :1], inner, states[-1, -1:]])


def prepared(folder, **options):
    """A run with one caption for all images, ready to train."""
    args = arguments(folder / "out", instance_prompt=WEIGHTED, weighted_captions=True, **options)
    run, _ = script.prepare(args, check(args))
    return run


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
def test_states_of_words_are_multiplied_by_their_weights(tmp_path, trained, pieces):
    own = {"encoding_cache_dir": tmp_path / "cache"} if not trained else {"train_text_encoder": True}
    run = prepared(tmp_path, max_token_length=75 * pieces, **own)
    (batch,) = run.batches(0, 0)
    with torch.no_grad():
        hidden = run.denoiser.condition(batch)["encoder_hidden_states"][0]
    run.close()
    fresh = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
    with torch.no_grad():
        expected = states_of(fresh.text_encoder, fresh.tokenizer, False, pieces)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


def test_both_encoders_of_xl_are_weighted_and_the_pooled_state_is_not(tmp_path):
    pipeline = tiny_pipeline_xl(tmp_path / "model")
    run = prepared(tmp_path, pretrained_model_name_or_path=tmp_path / "model")
    (batch,) = run.batches(0, 0)
    given = run.denoiser.condition(batch)
    run.close()
    with torch.no_grad():
        both = [
            states_of(encoder, tokenizer, True, 1)
            for encoder, tokenizer in (
                (pipeline.text_encoder, pipeline.tokenizer),
                (pipeline.text_encoder_2, pipeline.tokenizer_2),
            )
        ]
    torch.testing.assert_close(given["encoder_hidden_states"][0], torch.cat(both, -1), rtol=1e-4, atol=1e-5)


def test_weights_are_of_models_that_read_clip_alone(tmp_path):
    tiny_pipeline_flux(tmp_path / "model")
    args = arguments(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "model", weighted_captions=True)
    with pytest.raises(BadInput, match="--weighted_captions does not apply to .*: it weights words of models"):
        check(args)


# ------------------------------------------------------------------------------------------------ whole runs


def test_a_run_whose_captions_grow_and_are_left_out(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(SUBJECTS / "octopus", data)
    for number in range(5):
        (data / f"{number}.txt").write_text("sks; blue, big; sticker; dog")
    args = arguments(
        tmp_path / "out",
        instance_data_dir=data,
        train_batch_size=5,
        max_train_steps=12,
        caption_separator=";",
        token_warmup_step=0.5,
        token_warmup_min=2,
        caption_dropout_every_n_epochs=4,
    )
    run, _ = script.prepare(args, check(args))
    tags, fresh = (
        ["sks", "blue, big", "sticker", "dog"],
        StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder()),
    )
    encoder, tokenizer = fresh.text_encoder, fresh.tokenizer
    for step in range(12):
        caption = "" if step % 4 == 3 else ", ".join(tags[: tags_at(step, 4, 2, 6)])
        (batch,) = run.batches(step, 0)
        ids = tokenizer([caption], padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            torch.testing.assert_close(batch.texts.hidden[batch.prompt_index][0], encoder(ids)[0][0])
        assert len(batch.texts.hidden) == 1
    run.close()


# --------------------------------------------------------------------------------------------------- options


def test_options_of_captions_come_from_kohyas_files(tmp_path):
    config, dataset = tmp_path / "k.toml", tmp_path / "d.toml"
    own = 'caption_separator = ";"\ntoken_warmup_min = 2\ntoken_warmup_step = 0.25\n'
    config.write_text(f'network_module = "networks.lora"\nweighted_captions = true\n{own}keep_tokens = 1\n')
    options = parse(["--config", str(config)])
    assert (options.caption_separator, options.token_warmup_min, options.token_warmup_step) == (";", 2, 0.25)
    assert (options.weighted_captions, options.keep_tokens) == (True, 1)
    dataset.write_text(
        f'[general]\ncaption_dropout_every_n_epochs = 3\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "x"\n{own}'
        'keep_tokens = 1\n[[datasets.subsets]]\nimage_dir = "y"\ntoken_warmup_step = 100\n'
    )
    options = parse(["--concepts", str(dataset)])
    assert (options.caption_dropout_every_n_epochs, options.notes) == (3, [])
    first, second = (concept.own for concept in concepts_of(options))
    assert (first["caption_separator"], first["token_warmup_min"], first["token_warmup_step"]) == (";", 2, 0.25)
    assert (first["keep_tokens"], second["token_warmup_step"]) == (1, 100)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"caption_separator": ";"}, "--caption_separator is used only with one of --shuffle_caption, "),
        ({"token_warmup_min": 3}, "--token_warmup_min is used only with --token_warmup_step"),
        ({"token_warmup_step": 3, "enable_wildcard": True}, "--token_warmup_step begins with the first tags"),
        ({"shuffle_caption": True, "caption_separator": ""}, "--caption_separator: got no text"),
        ({"keep_tokens": 1}, "--keep_tokens is used only with one of --shuffle_caption, --caption_tag_dropout_rate"),
    ],
)
def test_options_of_captions_that_contradict_each_other(tmp_path, options, said):
    with pytest.raises(BadInput) as error:
        check(arguments(tmp_path / "out", **options))
    assert [problem.startswith(said) for problem in error.value.problems] == [True]


def test_options_of_tags_may_be_of_a_concept(tmp_path):
    """The run's --keep_tokens and --token_warmup_min are for a concept that shuffles or begins with few tags."""
    concept = f'[[concepts]]\ninstance_data_dir = "{SUBJECTS / "cactus"}"\ninstance_prompt = "a, b"\n'
    file = tmp_path / "concepts.toml"
    own = {"instance_data_dir": None, "instance_prompt": None, "concepts": file}
    options = arguments(tmp_path / "out", keep_tokens=1, token_warmup_min=2, **own)
    file.write_text(concept)
    with pytest.raises(BadInput) as error:
        check(options)
    assert [problem.split(" is used only")[0] for problem in error.value.problems] == [
        "--keep_tokens",
        "--token_warmup_min",
    ]
    file.write_text(concept + "shuffle_caption = true\ntoken_warmup_step = 3\n")
    (found,) = check(options).concepts
    drawn = options_of(found.own, options)
    assert (drawn.shuffle_caption, drawn.token_warmup_step) == (True, 3)
    assert (drawn.keep_tokens, drawn.token_warmup_min) == (1, 2)
