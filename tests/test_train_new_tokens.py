"""`--train_text_encoder_ti`: embeddings of new tokens are trained beside the adapter (pivotal tuning).

The bases here say eos_token_id 2, as those of Stable Diffusion and FLUX.1 on the hub do.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel
from typer.testing import CliRunner

from dreambooth import arguments, generate, train
from lora_factors import ATTENTION, random_factors
from reslora_diffusion.cli import app
from reslora_diffusion.diffusion.models.families import FAMILIES
from reslora_diffusion.diffusion.models.new_tokens import NewTokens, add_new_tokens, new_tokens_in, put_new_tokens
from reslora_diffusion.diffusion.objective.randomness import Stream, generator
from reslora_diffusion.diffusion.options import parse
from reslora_diffusion.diffusion.options.checks import check, quick_check
from reslora_diffusion.diffusion.options.preflight import preflight
from reslora_diffusion.export import export_lora, read_lora
from reslora_diffusion.export.embeddings import (
    Embeddings,
    load_embeddings,
    pool_at_the_end,
    read_embeddings,
    write_embeddings,
)
from reslora_diffusion.utils.problems import BadInput
from reslora_diffusion.utils.wording import worded
from tiny import (
    saved,
    tiny_pipeline,
    tiny_pipeline_3,
    tiny_pipeline_3_without_t5,
    tiny_pipeline_flux,
    tiny_pipeline_xl,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
)

PROMPT = "a sticker of TOK animal"
OPTIONS = {
    "train_text_encoder_ti": True,
    "instance_prompt": PROMPT,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "save_precision": "fp32",
    "shortcut": "block",
}
T5 = {"enable_t5_ti": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny pipeline whose CLIPs have an old configuration."""

    def of(build):
        folder = tmp_path_factory.getbasetemp() / f"old-{build.__name__}"
        if not folder.exists():
            shutil.copytree(saved(build), folder)
            for path in folder.glob("text_encoder*/config.json"):
                config = json.loads(path.read_text())
                if "CLIP" in config["architectures"][0]:
                    path.write_text(json.dumps(config | {"eos_token_id": 2}))
        return folder

    return of


def state(folder, step):
    return load_file(folder / f"checkpoint-{step}" / "state" / "state.safetensors")


def rows_in(found):
    rows = {name: value for name, value in found.items() if name.endswith(("_embedding.new", "tokens.new"))}
    assert rows
    return rows


def pixels(image):
    return np.asarray(image.convert("RGB"), dtype=np.float64)


# ------------------------------------------------------------------------------------------- one text encoder


def naive_clip(model, table, ids, end):
    """CLIP's text model written out: hidden states after all layers, and the projected state at the end of the text."""
    weights = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    x = table[ids] + weights["embeddings.position_embedding.weight"][: ids.shape[1]]
    config, length = model.config, ids.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)

    def normed(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).rsqrt()
        return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for number in range(config.num_hidden_layers):
        layer = f"encoder.layers.{number}"
        y = normed(x, f"{layer}.layer_norm1")
        q, k, v = (
            linear(y, f"{layer}.self_attn.{part}_proj").unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
            for part in "qkv"
        )
        weight = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
        x = x + linear((weight @ v).transpose(1, 2).flatten(2), f"{layer}.self_attn.out_proj")
        y = linear(normed(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{layer}.mlp.fc2")
    x = normed(x, "final_layer_norm")
    first = (ids == end).int().argmax(1)
    return x, x[torch.arange(len(ids)), first] @ weights["text_projection.weight"].T


def test_states_pooled_vector_and_gradients_are_those_of_a_naive_clip_with_the_longer_table(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = tiny_text_encoder(tokenizer).config
    config.eos_token_id, config.pad_token_id, config.projection_dim = 2, 0, 12
    model = CLIPTextModelWithProjection(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    first, end = len(tokenizer), tokenizer.eos_token_id
    tokenizer.add_tokens(["<s0>", "<s1>"])
    prompts = ["a photo of <s0><s1> dog on a blue background", "a <s1> dog", "a dog"]
    ids = torch.stack(
        [nn.functional.pad(row, (0, 32 - len(row))) for row in map(torch.tensor, tokenizer(prompts).input_ids)]
    )  # padded by id 0, as CLIP-G is
    assert ids.max() == first + 1 > end
    table, new = model.get_input_embeddings().weight.clone(), torch.randn(2, config.hidden_size).double()
    rows = new.clone().requires_grad_()
    hidden, pooled = naive_clip(model, torch.cat([table, rows]), ids, end)
    (hidden.square().mean() + pooled.square().mean()).backward()

    tokens = put_new_tokens(model, new.clone(), first)
    at_largest = model(ids)
    assert not torch.allclose(at_largest.text_embeds[:2], pooled[:2])  # what transformers would pool
    torch.testing.assert_close(at_largest.text_embeds[2], pooled[2])
    pool_at_the_end(model, tokenizer)
    found = model(ids)
    torch.testing.assert_close(found.last_hidden_state, hidden)
    torch.testing.assert_close(found.text_embeds, pooled)
    (found.last_hidden_state.square().mean() + found.text_embeds.square().mean()).backward()
    torch.testing.assert_close(tokens.new.grad, rows.grad)
    assert rows.grad.abs().min() > 0
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "text_model.embeddings.token_embedding.new"
    ]


def test_a_step_brings_new_rows_a_tenth_of_the_way_to_the_size_of_the_table():
    torch.manual_seed(0)
    table = nn.Embedding(50, 8).double()
    tokens = NewTokens(table, torch.randn(3, 8).double() * 7, 50)
    before = tokens.new.detach().clone()
    tokens.rescale(torch.tensor(True))
    wanted = before * (table.weight.detach().std() / before.std()) ** 0.1
    torch.testing.assert_close(tokens.new.detach(), wanted, rtol=1e-6, atol=0)
    tokens.rescale(torch.tensor(False))  # a step that was left out, as its gradients were not finite
    torch.testing.assert_close(tokens.new.detach(), wanted, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------- whole runs


RUNS = {
    "sd": (tiny_pipeline, {}, {"clip_l": 32}),
    "xl": (
        tiny_pipeline_xl,
        {"token_abstraction": "TOK,TOK2", "instance_prompt": "TOK2, a TOK"},
        {"clip_l": 32, "clip_g": 32},
    ),
    "sd3": (tiny_pipeline_3, T5, {"clip_l": 32, "clip_g": 8, "t5": 40}),
    "flux": (tiny_pipeline_flux, T5 | {"initializer_concept": "a dog"}, {"clip_l": 32, "t5": 40}),
    "flux without T5": (tiny_pipeline_flux, {"mixed_precision": "bf16"}, {"clip_l": 32}),
}
FAST = ("xl", "flux")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_what_the_card_of_a_run_loads_in_plain_diffusers_generates_the_image_of_the_trained_model(
    name, base, tmp_path, monkeypatch
):
    build, own, widths = RUNS[name]
    options = OPTIONS | {"pretrained_model_name_or_path": base(build), "validation_prompt": "a dog and TOK"} | own
    options |= {"train_text_encoder_ti_frac": 1, "num_validation_images": 1, "text_encoder_lr": 0.05}
    folder = train(tmp_path / "run", **options)
    file = folder / "run_emb.safetensors"
    words = options.get("token_abstraction", "TOK").split(",")
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["reslora.tokens"]).keys() == set(words)
    found = read_embeddings(file)
    assert {key: rows.shape[1] for key, rows in found.rows.items()} == widths
    assert all(torch.equal(load_file(file)["t5xxl"], rows) for key, rows in found.rows.items() if key == "t5")
    last, earlier = state(folder, 4), state(folder, 2)
    assert len(rows_in(last)) == len(widths)
    for key, value in rows_in(last).items():
        assert any(torch.equal(value, rows) for rows in found.rows.values()), key
        assert not torch.equal(value, earlier[key])

    card = (folder / "README.md").read_text()
    program = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].splitlines()
    assert sum("eos_token_id" in line for line in program) == len(widths.keys() - {"t5"})
    space = {}
    monkeypatch.chdir(folder)
    exec("\n".join(program[:-2]), space)
    pipe, prompt = space["pipe"], worded("a dog and TOK", found.tokens)
    assert f'prompt="{worded(str(options["instance_prompt"]), found.tokens)}"' in program[-2]
    if "mixed_precision" in own:
        pipe.to(torch.bfloat16)
    family = FAMILIES[json.loads((base(build) / "model_index.json").read_text())["_class_name"]]

    def image(prompt, pipe=pipe):
        given = {"max_sequence_length": 77} if name == "sd3" else {}
        size = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": family.guidance_scale}
        return pixels(pipe(prompt, generator=generator(0, Stream.VALIDATION, 0), **size, **given).images[0])

    trained = pixels(Image.open(folder / "samples" / "step-000004" / "0-0.png"))
    tolerance = 8 if "mixed_precision" in own else 1
    assert np.abs(image(prompt) - trained).max() <= tolerance
    assert np.abs(image("a dog and TOK") - trained).max() > 0 or name == "flux without T5"
    untrained = pixels(Image.open(folder / "samples" / "step-000000" / "0-0.png"))
    assert np.abs(untrained - trained).max() > 3 * tolerance
    report = json.loads((folder / "export_report.json").read_text())
    assert report["files"]["embeddings"]["path"] == file.name


@pytest.mark.parametrize(
    "more",
    [
        {"use_ema": True, "initializer_concept": "a dog", "validation_prompt": "TOK", "num_validation_images": 1},
        pytest.param({"pretrained_model_name_or_path": tiny_pipeline_flux, **T5}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True, "optimizer": "rite"}, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_trained_up_to_the_pivot_and_a_resumed_run_is_the_same(more, base, tmp_path, capsys):
    build = more.get("pretrained_model_name_or_path", tiny_pipeline)
    options = OPTIONS | more | {"pretrained_model_name_or_path": base(build), "checkpointing_steps": 1}
    folder = train(tmp_path / "whole", **options)
    assert capsys.readouterr().out.count("new tokens are not trained after step 2") == 1
    steps = [state(folder, step) for step in (1, 2, 3, 4)]
    for key in rows_in(steps[0]):
        if key.startswith("ema."):
            continue
        assert not torch.equal(steps[0][key], steps[1][key]), key
        assert torch.equal(steps[1][key], steps[3][key]), key
    denoiser = next(key for key in steps[0] if "lora_B" in key and not key.startswith(("optimizer", "ema")))
    assert not torch.equal(steps[2][denoiser], steps[3][denoiser])
    for step in (1,) if "use_ema" in more else (1, 3):  # the other one in the slow cases alone
        again = tmp_path / f"again-{step}"
        shutil.copytree(folder / f"checkpoint-{step}", again / f"checkpoint-{step}")
        train(again, **options, resume_from_checkpoint="latest")
        resumed = state(again, 4)
        assert resumed.keys() == steps[3].keys()
        assert all(torch.equal(resumed[name], value) for name, value in steps[3].items()), step
        one, other = (
            read_embeddings(path)
            for path in (folder / "whole_emb.safetensors", again / f"again-{step}_emb.safetensors")
        )
        assert all(torch.equal(one.rows[key], other.rows[key]) for key in one.rows)


def test_the_best_step_is_exported_with_its_tokens(base, tmp_path):
    options = OPTIONS | {"pretrained_model_name_or_path": base(tiny_pipeline), "checkpointing_steps": 1}
    options |= {"keep_best": True, "validation_split": 0.4, "validation_steps": 1, "train_text_encoder_ti_frac": 1}
    options |= {"max_train_steps": 2}
    folder = train(tmp_path / "run", **options, learning_rate=0.3, text_encoder_lr=1.0)
    step = json.loads((folder / "merge_report.json").read_text())["step"]
    assert step == 1
    exported = read_embeddings(folder / "run_emb.safetensors").rows["clip_l"]
    (trained,) = rows_in(state(folder, step)).values()
    assert torch.equal(exported, trained)
    again = tmp_path / "again"
    shutil.copytree(folder / "checkpoint-1", again / "checkpoint-1")
    train(again, **options, learning_rate=0.3, text_encoder_lr=1.0, resume_from_checkpoint="latest")
    assert torch.equal(read_embeddings(again / "again_emb.safetensors").rows["clip_l"], exported)


@pytest.mark.parametrize("build", [tiny_pipeline, tiny_pipeline_xl])
def test_tokens_in_a_later_piece_of_a_long_prompt_are_read_there(build, base, tmp_path):
    prompt = "a photo of a dog on a blue background and TOK " + "dog " * 20 + "TOK dog"
    options = arguments(tmp_path, **OPTIONS, max_token_length=150)
    options.new_tokens = {"TOK": ["<s0>", "<s1>"]}
    ours, wanted = (DiffusionPipeline.from_pretrained(base(build)) for _ in range(2))
    family = FAMILIES[type(ours).__name__]
    encoders = add_new_tokens(ours, family, options)
    rows = {family.embedding_keys[name]: new_tokens_in(one).new.detach() for name, one in encoders.items()}
    load_embeddings(wanted, Embeddings(rows, options.new_tokens))
    tokens = family.read(ours, [prompt], options)
    first = new_tokens_in(ours.text_encoder).first
    pieces = tokens.ids[0, 0].unflatten(0, (2, 32))
    assert [(piece >= first).sum().item() for piece in pieces] == [2, 2]
    assert torch.equal(tokens.ids, family.read(wanted, [prompt], options).ids)
    found = family.encode(family.text_encoders_of(ours), tokens)
    reference = family.encode(family.text_encoders_of(wanted), tokens)
    torch.testing.assert_close(found.hidden, reference.hidden)
    if found.pooled is not None:
        torch.testing.assert_close(found.pooled, reference.pooled)
    found.hidden[:, 32:].square().sum().backward()  # of the second piece
    assert all(new_tokens_in(one).new.grad.abs().min() > 0 for one in encoders.values())


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_text_encoder": True}, "--train_text_encoder and --train_text_encoder_ti both train the text encoders"),
        (
            {"pre_compute_text_embeddings": True},
            "--pre_compute_text_embeddings cannot be used with --train_text_encoder_ti",
        ),
        ({"train_text_encoder_ti_frac": 0}, "--train_text_encoder_ti_frac: got 0"),
        ({"train_text_encoder_ti_frac": 1.5}, "got 1.5, wanted a number above 0 and at most 1"),
        ({"train_text_encoder_ti": None}, "--token_abstraction is used only with --train_text_encoder_ti"),
        (
            {"token_abstraction": "ZZZ"},
            "--token_abstraction: ZZZ stands in no prompt of the images, such as 'a sticker",
        ),
        ({"token_abstraction": "TOK,,TOK"}, "wanted words with commas between, each once"),
        ({"num_new_tokens_per_abstraction": 0}, "--num_new_tokens_per_abstraction: got 0, wanted 1 or more"),
        ({"cuda_graph": True}, "a recorded step has the prompts it was recorded with"),
        ({"schedule": "prune:ratio=0.5"}, "--schedule prune leaves a smaller model without files beside it"),
        ({"enable_t5_ti": True}, "--enable_t5_ti does not apply to Stable Diffusion 1.x or 2.x"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(options, said, tmp_path):
    with pytest.raises(BadInput) as error:
        quick_check(arguments(tmp_path, **OPTIONS | {"token_abstraction": "TOK"} | options))
    assert said in str(error.value)


def test_a_longer_concept_and_a_token_that_exists_are_refused_without_weights(base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base(tiny_pipeline), folder)
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
    given = OPTIONS | {"pretrained_model_name_or_path": folder}
    options = arguments(tmp_path / "out", **given, num_new_tokens_per_abstraction=1, initializer_concept="a dog")
    with pytest.raises(BadInput, match="'a dog' is 2 tokens of the base, and --num_new_tokens_per_abstraction is 1"):
        check(options)
    tokenizer = tiny_tokenizer(tmp_path / "own")
    tokenizer.add_tokens(["<s1>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(BadInput, match="the base has tokens <s1> already"):
        check(arguments(tmp_path / "out", **given))


def test_tokens_of_a_t5_that_is_not_there_are_refused(base, tmp_path):
    folder = base(tiny_pipeline_3_without_t5)
    options = OPTIONS | T5 | {"pretrained_model_name_or_path": folder}
    with pytest.raises(BadInput, match="--enable_t5_ti trains tokens of T5, which this base lacks"):
        check(arguments(tmp_path, **options))


def test_new_tokens_of_a_language_model_are_refused_with_the_reason(tmp_path):
    from tiny_families import tiny_qwen_image

    options = OPTIONS | {"pretrained_model_name_or_path": saved(tiny_qwen_image)}
    with pytest.raises(
        BadInput, match="--train_text_encoder_ti does not apply to Qwen-Image: it trains new tokens of CLIP"
    ):
        quick_check(arguments(tmp_path, **options))


def test_a_job_of_ai_toolkit_names_its_tokens_and_what_is_not_used(tmp_path):
    own = {"trigger": "TOK", "tokens": 4, "init_words": "a man", "save_format": "pt"}
    process = {"type": "sd_trainer", "network": {"type": "lora", "linear": 16}, "datasets": [], "embedding": own}
    process |= {"device": "cuda:0", "slider": {"targets": []}}
    (tmp_path / "job.json").write_text(json.dumps({"job": "extension", "config": {"name": "a", "process": [process]}}))
    options = parse(["--config", str(tmp_path / "job.json")])
    assert options.train_text_encoder_ti
    assert (options.token_abstraction, options.initializer_concept) == ("TOK", "a man")
    assert (options.num_new_tokens_per_abstraction, options.train_text_encoder_ti_frac) == (4, 1)
    said = "\n".join(options.notes)
    assert "NOT USED: slider: there is no such section here" in said
    assert "device" not in said
    assert options.problems == []


def test_the_preflight_says_what_is_trained_and_counts_the_new_tokens(base, tmp_path):
    given = OPTIONS | {"pretrained_model_name_or_path": base(tiny_pipeline_xl), "dry_run": True}
    given |= {"instance_prompt": "a photo of TOK2 and TOK " + "dog " * 26, "token_abstraction": "TOK,TOK2"}
    options = arguments(tmp_path / "out", **given, initializer_concept="a dog", train_text_encoder_ti_frac=0.25)
    plan = check(options)
    lines = "\n".join(preflight(plan, options))
    assert options.worded("TOK2TOK") == "<s2><s3><s0><s1>"
    assert (
        "new tokens: TOK is read as <s0><s1>, TOK2 is read as <s2><s3>; their embeddings in text_encoder, "
        "text_encoder_2 begin as those of 'a dog' and are trained in the first 25% of steps"
    ) in lines
    words = len(plan.base.windows[0][0]("a photo of <s0><s1> and <s2><s3> " + "dog " * 26).input_ids)
    assert 32 < words < len(tiny_tokenizer(tmp_path)("a photo of <s0><s1> and <s2><s3> " + "dog " * 26).input_ids)
    assert f"{words - 32} tokens cut off the end of" in lines


def test_the_preflight_says_what_it_does_not_count_of_t5(base, tmp_path):
    given = OPTIONS | {"pretrained_model_name_or_path": base(tiny_pipeline_flux), "dry_run": True}
    for more, said in ((T5, "MB; T5, its new tokens and activations come on top"), ({}, "MB; activations come on top")):
        options = arguments(tmp_path / "out", **given | more)
        assert said in "\n".join(preflight(check(options), options))


# ------------------------------------------------------------------------------------------------- files


def test_files_of_other_programs_are_read(tmp_path):
    torch.manual_seed(0)
    clip_l, clip_g, one = torch.randn(3, 8), torch.randn(3, 12), torch.randn(8)
    save_file({"clip_l": clip_l, "clip_g": clip_g}, tmp_path / "theirs_emb.safetensors")
    found = read_embeddings(tmp_path / "theirs_emb.safetensors")
    assert found.tokens == {"TOK": ["<s0>", "<s1>", "<s2>"]}
    assert torch.equal(found.rows["clip_g"], clip_g)
    save_file({"emb_params": clip_l.half()}, tmp_path / "cat.safetensors")
    found = read_embeddings(tmp_path / "cat.safetensors")
    assert found.tokens == {"cat": ["cat", "cat_1", "cat_2"]}
    assert torch.equal(found.rows["clip_l"], clip_l.half().float())
    for word in ("<cat-toy>", "<v1.5>", "sks"):
        save_file({word: one}, tmp_path / "learned_embeds.safetensors")
        found = read_embeddings(tmp_path / "learned_embeds.safetensors")
        assert (found.tokens, found.rows["clip_l"].shape) == ({word: [word]}, (1, 8))


def test_embeddings_in_the_place_of_a_lora_are_called_by_their_name(tmp_path):
    save_file(
        {"clip_l": torch.ones(2, 4), "t5": torch.ones(2, 8), "t5xxl": torch.ones(2, 8)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match=r"they are those of an embedding of new tokens"):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("tensors", "header", "said"),
    [
        (
            {"unet.a.lora_A.weight": torch.ones(2, 4), "unet.a.lora_B.weight": torch.ones(4, 2)},
            {},
            "holds no embeddings",
        ),
        ({"clip_l": torch.ones(2, 4), "clip_g": torch.ones(3, 4)}, {}, "holds no embeddings"),
        ({"clip_l": torch.ones(2, 4), "unet.x": torch.ones(2, 4)}, {}, "holds no embeddings"),
        ({"a": torch.ones(2, 4, 3)}, {}, "holds no embeddings"),
        ({"prompt_embeds": torch.ones(77, 4)}, {}, "holds no embeddings"),
        *(
            ({f"lora_unet_mid_block_attentions_0_proj_in.{part}": torch.ones(1, 8)}, {}, "holds no embeddings")
            for part in ("lora_down.weight", "lokr_w1", "diff", "dora_scale", "scalar", "on_input")
        ),
        ({"clip_l": torch.tensor([[1.0, torch.nan]])}, {}, "clip_l are not finite"),
        ({"clip_l": torch.ones(2, 4)}, {"reslora.tokens": '{"TOK": ["<s0>"]}'}, "names other tokens than its 2 rows"),
        ({"clip_l": torch.ones(2, 4)}, {"reslora.tokens": '{"TOK": "<s0>"}'}, "names other tokens than its 2 rows"),
        ({"clip_l": torch.ones(2, 4)}, {"reslora.tokens": "[1"}, "is not JSON"),
    ],
)
def test_a_file_that_is_none_is_refused(tensors, header, said, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors", metadata=header)
    with pytest.raises(ValueError, match=said):
        read_embeddings(tmp_path / "x.safetensors")


def test_rows_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="clip_l are not finite"):
        write_embeddings(tmp_path / "x.safetensors", {"clip_l": torch.tensor([[torch.inf]])}, {"TOK": ["<s0>"]}, {})
    assert not list(tmp_path.iterdir())


def test_a_pipeline_reads_them_as_by_its_own_loader(base, tmp_path):
    """SD3's pipeline has no `load_textual_inversion`, that of SDXL has."""
    torch.manual_seed(0)
    rows = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 32)}
    write_embeddings(tmp_path / "x_emb.safetensors", rows, {"TOK": ["<s0>", "<s1>"]}, {})
    one, other = (DiffusionPipeline.from_pretrained(base(tiny_pipeline_xl)) for _ in range(2))
    load_embeddings(one, read_embeddings(tmp_path / "x_emb.safetensors"))
    for end, key in (("", "clip_l"), ("_2", "clip_g")):
        encoder, tokenizer = (getattr(other, f"{part}{end}") for part in ("text_encoder", "tokenizer"))
        other.load_textual_inversion(rows[key], token=["<s0>", "<s1>"], text_encoder=encoder, tokenizer=tokenizer)
        getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id
    found, wanted = (pipe.encode_prompt("a <s0><s1> dog", device="cpu") for pipe in (one, other))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(ValueError, match="the base has <s0>, <s1> already"):
        load_embeddings(one, read_embeddings(tmp_path / "x_emb.safetensors"))
    three = DiffusionPipeline.from_pretrained(base(tiny_pipeline_3))
    with pytest.raises(ValueError, match="its clip_g is 32 wide, and the base has 8"):
        load_embeddings(three, read_embeddings(tmp_path / "x_emb.safetensors"))
    write_embeddings(tmp_path / "y_emb.safetensors", {"t5": torch.ones(2, 40)}, {"TOK": ["<s0>", "<s1>"]}, {})
    load_embeddings(three, read_embeddings(tmp_path / "y_emb.safetensors"))
    assert isinstance(three.text_encoder_3, T5EncoderModel)
    ids = three.tokenizer_3("a <s0><s1>", return_tensors="pt").input_ids
    assert torch.equal(three.text_encoder_3.encoder.embed_tokens(ids)[0, -3:-1], torch.ones(2, 40))


def test_the_command_inspects_them_and_a_lora_names_those_beside_it(tmp_path):
    def inspect(*words):
        result = CliRunner().invoke(app, ["inspect", *map(str, words)])
        return result.exit_code, result.output

    torch.manual_seed(0)
    rows = {"clip_l": torch.randn(4, 768), "clip_g": torch.randn(4, 1280)}
    tokens = {"TOK": ["<s0>", "<s1>"], "TOK2": ["<s2>", "<s3>"]}
    write_embeddings(tmp_path / "dog_emb.safetensors", rows, tokens, {"steps": "500"})
    code, said = inspect(tmp_path / "dog_emb.safetensors")
    assert code == 0
    assert "dog_emb.safetensors: embeddings of 4 new tokens for SDXL or Stable Diffusion 3" in said
    assert "in prompts TOK is <s0><s1>, TOK2 is <s2><s3>" in said
    assert re.search(rf"clip_g +4 +1280 +{rows['clip_g'].norm(dim=1).min():.3g} to", said)
    assert re.search(r"steps +500", said)
    found = json.loads(inspect("--json", tmp_path / "dog_emb.safetensors")[1])
    assert found["encoders"] == {"clip_l": [4, 768], "clip_g": [4, 1280]}
    export_lora(tmp_path, {"unet": random_factors(tiny_unet(), ATTENTION, 0)}, name="dog")
    for source in (tmp_path, tmp_path / "kohya" / "dog.safetensors"):
        assert "dog_emb.safetensors beside it has the new tokens that it was trained with: TOK" in inspect(source)[1]
    save_file({"clip_l": torch.zeros(1, 768)}, tmp_path / "zero.safetensors")
    code, said = inspect(tmp_path / "zero.safetensors")
    assert (code, "PROBLEM: clip_l are zero" in said) == (1, True)


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    """A LoRA of the tiny SDXL, and its new tokens beside it."""
    folder = tmp_path_factory.mktemp("exported")
    pipe = DiffusionPipeline.from_pretrained(base(tiny_pipeline_xl))
    export_lora(folder, {"unet": random_factors(pipe.unet, ATTENTION, 0)}, name="dog", dtype=torch.float32)
    torch.manual_seed(0)
    rows = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 32)}
    write_embeddings(folder / "dog_emb.safetensors", rows, {"TOK": ["<s0>", "<s1>"]}, {})
    return folder


@pytest.mark.parametrize("build", [tiny_pipeline_xl, tiny_pipeline_3])
def test_the_script_that_generates_reads_the_tokens_of_each_lora_in_its_own_column(build, base, tmp_path):
    widths = {tiny_pipeline_xl: {"clip_l": 32, "clip_g": 32}, tiny_pipeline_3: {"clip_l": 32, "clip_g": 8, "t5": 40}}
    for seed, name in enumerate(("dog", "cat")):
        pipe = DiffusionPipeline.from_pretrained(base(build))
        part = "unet" if build is tiny_pipeline_xl else "transformer"
        factors = {part: random_factors(getattr(pipe, part), ATTENTION, seed)}
        export_lora(tmp_path / name, factors, name=name, dtype=torch.float32)
        torch.manual_seed(seed)
        rows = {key: torch.randn(2, width) for key, width in widths[build].items()}
        write_embeddings(tmp_path / name / f"{name}_emb.safetensors", rows, {"TOK": ["<s0>", "<s1>"]}, {})
    words = ["--pretrained_model_name_or_path", str(base(build)), "--output_dir", str(tmp_path / "images")]
    words += ["--lora", f"dog={tmp_path / 'dog'}", f"cat={tmp_path / 'cat' / 'pytorch_lora_weights.safetensors'}"]
    words += ["--prompt", "a TOK in snow", "<s1> alone", "a hat", "--num_inference_steps", "2", "--resolution", "64"]
    generate.main(generate.parse_args(words))
    for label in ("base", "dog", "cat"):
        pipe = DiffusionPipeline.from_pretrained(base(build))
        pipe.set_progress_bar_config(disable=True)
        tokens = {}
        if label != "base":
            pipe.load_lora_weights(tmp_path / label)
            learned = read_embeddings(tmp_path / label / f"{label}_emb.safetensors")
            load_embeddings(pipe, learned)
            tokens = learned.tokens
        for number, prompt in enumerate(("a TOK in snow", "<s1> alone", "a hat")):
            size = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 7.5}
            image = pipe(worded(prompt, tokens), generator=torch.Generator().manual_seed(0), **size).images[0]
            written = Image.open(tmp_path / "images" / label / f"{number}-0.png")
            np.testing.assert_array_equal(pixels(image), pixels(written))


@pytest.mark.parametrize("source", [".", "kohya/dog.safetensors"])
def test_a_base_that_the_lora_is_merged_into_learns_its_tokens(source, exported, base, tmp_path):
    folder = base(tiny_pipeline_xl)
    result = CliRunner().invoke(app, ["merge", str(exported / source), "--base", str(folder), str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    assert "new tokens of dog_emb.safetensors are in its tokenizers and in text_encoder, text_enc" in result.output
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    wanted = DiffusionPipeline.from_pretrained(folder)
    wanted.load_lora_weights(exported, weight_name="pytorch_lora_weights.safetensors")
    load_embeddings(wanted, read_embeddings(exported / "dog_emb.safetensors"))

    def image(pipe, prompt="a <s0><s1> dog"):
        given = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
        return pipe(prompt, generator=torch.Generator().manual_seed(0), **given).images[0]

    np.testing.assert_allclose(image(merged), image(wanted), atol=1e-4)
    assert np.abs(image(merged) - image(merged, "a dog")).max() > 1e-2


def test_a_copy_of_the_lora_has_its_tokens_beside_it(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = read_embeddings(exported / "dog_emb.safetensors").rows["clip_g"]
    for words, there in (
        (["convert", exported, "--to", "kohya", "--output", "a.safetensors"], "a_emb.safetensors"),
        (["convert", exported / "kohya/dog.safetensors", "--to", "diffusers", "--output", "b"], "b/b_emb.safetensors"),
        (["resize", exported, "--rank", "1", "--output", "c", "--allow_lossy"], "c/c_emb.safetensors"),
        (["export", exported, "d", "--name", "puppy"], "d/puppy_emb.safetensors"),
        (["combine", exported, "b", "--output", "e"], "e/dog_emb.safetensors"),
    ):
        result = CliRunner().invoke(app, [*map(str, words)])
        assert result.exit_code == 0, result.output
        assert f"wrote {there}, the new tokens" in result.output
        assert torch.equal(read_embeddings(tmp_path / there).rows["clip_g"], rows)


def test_tokens_of_another_lora_in_the_folder_are_not_taken(exported, tmp_path):
    from reslora_diffusion.export.embeddings_inspection import embeddings_beside

    shutil.copy(exported / "kohya" / "dog.safetensors", tmp_path / "cat-000200.safetensors")
    shutil.copy(exported / "dog_emb.safetensors", tmp_path / "dog_emb.safetensors")
    assert embeddings_beside(tmp_path / "cat-000200.safetensors") is None
    shutil.copy(exported / "dog_emb.safetensors", tmp_path / "cat_emb.safetensors")
    assert embeddings_beside(tmp_path / "cat-000200.safetensors").name == "cat_emb.safetensors"
