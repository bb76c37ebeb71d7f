"""What the preflight says of prompts that are too long, for families whose pipelines put words around a prompt."""

from inspect import signature

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from dreambooth import arguments, script
from reslora_diffusion.diffusion.models.families import FAMILIES
from reslora_diffusion.diffusion.options import DreamBoothOptions
from reslora_diffusion.diffusion.options.checks import check
from reslora_diffusion.export.embeddings_header import is_embeddings
from reslora_diffusion.utils.problems import BadInput
from test_diffusion_language_families import BUILDERS, load
from tiny import saved
from tiny_families import tiny_flux_2, tiny_flux_2_klein, tiny_lumina_2, tiny_z_image

PROMPT = " ".join(["a photo of a dog on a blue background"] * 20)
LONG, SHORT = 1000, 150


def read_by(pipeline: DiffusionPipeline, length: int) -> int:
    """The number of tokens of `PROMPT` whose states the pipeline gives its transformer."""
    seen = []
    hook = pipeline.text_encoder.register_forward_pre_hook(
        lambda _, args, given: seen.append(int(given["attention_mask"].sum())), with_kwargs=True
    )
    name = "complex_human_instruction"  # SANA's, which a call has by default and `encode_prompt` has not
    given = {p.name: p.default for p in signature(type(pipeline).__call__).parameters.values() if p.name == name}
    with torch.no_grad():
        encoded = pipeline.encode_prompt([PROMPT], device="cpu", max_sequence_length=length, **given)
    hook.remove()
    drops = hasattr(pipeline, "prompt_template_encode_start_idx")  # Qwen-Image cuts states
    return encoded[0].shape[1] if drops else seen[0]


def counted(pipeline: DiffusionPipeline, length: int) -> int:
    family = FAMILIES[type(pipeline).__name__]
    return family.tokens_cut_off([(pipeline.tokenizer, length)], PROMPT, DreamBoothOptions())


@pytest.mark.parametrize("build", [build for build in BUILDERS if build not in (tiny_flux_2, tiny_flux_2_klein)])
def test_tokens_that_a_pipeline_cuts_off_are_counted_with_its_own_words(build):
    pipeline = load(build)
    family = FAMILIES[type(pipeline).__name__]
    if not family.has_template:
        assert counted(pipeline, SHORT) == len(pipeline.tokenizer(PROMPT).input_ids) - SHORT > 0
    else:
        assert counted(pipeline, SHORT) == read_by(pipeline, LONG) - read_by(pipeline, SHORT) > 0
    assert counted(pipeline, LONG) == 0


@pytest.mark.parametrize("build", [tiny_flux_2, tiny_flux_2_klein])
def test_tokens_of_a_chat_are_counted(build):
    """Its layers are too many for a tiny text encoder's states; the mask is what it is given first."""
    pipeline = load(build)
    kept = [read_mask(pipeline, length) for length in (LONG, SHORT)]
    assert counted(pipeline, SHORT) == kept[0] - kept[1] > 0
    assert kept[0] > len(pipeline.tokenizer(PROMPT).input_ids)  # with words of the template


def test_a_tokenizer_without_a_template_has_the_prompt_alone_counted():
    pipeline = load(tiny_z_image)
    pipeline.tokenizer.chat_template = None
    assert counted(pipeline, SHORT) == len(pipeline.tokenizer(PROMPT).input_ids) - SHORT


def read_mask(pipeline: DiffusionPipeline, length: int) -> int:
    seen = []

    def note(_, args, given):
        seen.append(int(given["attention_mask"].sum()))
        raise InterruptedError

    hook = pipeline.text_encoder.register_forward_pre_hook(note, with_kwargs=True)
    with pytest.raises(InterruptedError):
        pipeline.encode_prompt([PROMPT], device="cpu", max_sequence_length=length)
    hook.remove()
    return seen[0]


def test_the_preflight_of_a_dry_run_counts_the_system_prompt(tmp_path, capsys):
    folder = saved(tiny_lumina_2)
    pipeline = load(tiny_lumina_2)
    options = {"pretrained_model_name_or_path": folder, "instance_prompt": PROMPT, "max_sequence_length": SHORT}
    script.main(arguments(tmp_path / "out", dry_run=True, **options))
    lost = read_by(pipeline, LONG) - SHORT
    assert lost > len(pipeline.tokenizer(PROMPT).input_ids) - SHORT
    assert f"{lost} tokens cut off the end of 'a photo of a dog" in capsys.readouterr().out


def test_prompts_longer_than_a_table_of_rotary_embeddings_are_refused(tmp_path):
    folder = saved(tiny_lumina_2)
    with pytest.raises(BadInput, match="--max_sequence_length: got 300, wanted at most 299"):
        check(arguments(tmp_path / "out", pretrained_model_name_or_path=folder, max_sequence_length=300))
    transformer = load(tiny_lumina_2).transformer
    width = transformer.config.cap_feat_dim

    def denoise(tokens: int) -> torch.Tensor:
        mask = torch.ones(1, tokens, dtype=torch.bool)
        latents, states = torch.zeros(1, transformer.config.in_channels, 4, 4), torch.zeros(1, tokens, width)
        with torch.no_grad():
            return transformer(latents, torch.zeros(1), states, mask, return_dict=False)[0]

    assert denoise(299).isfinite().all()
    with pytest.raises((RuntimeError, IndexError)):
        denoise(300)


def test_a_lone_tensor_that_is_too_narrow_is_no_embedding(tmp_path):
    path = tmp_path / "x.safetensors"
    for tensor, found in ((torch.tensor([5]), False), (torch.ones(5), False), (torch.ones(2, 768), True)):
        save_file({"step": tensor}, path)
        assert is_embeddings(path) == found
