"""Files that cannot be used, one by one: a single message that names every problem, and nothing written."""

import json
import pickle
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file

from lora_factors import ATTENTION, CLIP, random_factors
from reslora_diffusion import ResLoraConfig
from reslora_diffusion.core.functional import LoraFactors
from reslora_diffusion.export import (
    export_lora,
    export_peft,
    fuse,
    inspect_lora,
    read_lora,
    resize,
    verify_lora,
    write_lora_file,
)
from reslora_diffusion.export.embeddings import read_embeddings
from reslora_diffusion.export.limits import LARGEST_EXPORT
from reslora_diffusion.export.tools import combine
from tiny import tiny_pipeline_folder, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae

PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{PATH.replace('.', '_')}"


def pair(rank=2, width=8, out=8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(rank, width), torch.ones(out, rank)


def diffusers_pair(path=PATH, **sizes) -> dict[str, torch.Tensor]:
    A, B = pair(**sizes)
    return {f"unet.{path}.lora_A.weight": A, f"unet.{path}.lora_B.weight": B}


def refusal(path) -> str:
    """The message, the same from every reader."""
    messages = set()
    for read in (read_lora, inspect_lora):
        with pytest.raises(ValueError, match=r".+") as caught:
            read(path)
        messages.add(str(caught.value))
    assert len(messages) == 1
    return messages.pop()


def saved(tmp_path, tensors, metadata=None, name="x.safetensors"):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / name, metadata=metadata)
    return tmp_path / name


# ------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("name", ["x.bin", "x.safetensors", "x.pt", "x.ckpt"])
def test_a_pickle_is_never_opened(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    path = tmp_path / name
    path.write_bytes(pickle.dumps({"lora": Bomb()}))
    assert "is a pickle" in refusal(path)
    torch.save({"x": torch.zeros(1)}, path)
    assert "is a pickle" in refusal(path)
    assert not (tmp_path / "boom").exists()


def test_the_message_on_a_pickle_has_a_program_that_converts_it(tmp_path, monkeypatch):
    """Embeddings as A1111 and as diffusers' example write them, and a LoRA of kohya's scripts before safetensors."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    rows = torch.randn(2, 768)
    of_a1111 = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.nn.Parameter(rows)}}
    torch.save(of_a1111 | {"name": "dog", "step": 500, "sd_checkpoint": None}, "dog toy.pt")
    torch.save({"<cat>": rows[0]}, "learned_embeds.bin")
    A, B = pair()
    torch.save({f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}, "old.pt")
    for name in ("dog toy.pt", "learned_embeds.bin", "old.pt"):
        python, *words = shlex.split(refusal(name).split("writes one: ")[1])
        assert python == "python"
        subprocess.run([sys.executable, *words], check=True)
    assert torch.equal(read_embeddings(tmp_path / "dog toy.pt.safetensors").rows["clip_l"], rows)
    assert read_embeddings(tmp_path / "dog toy.pt.safetensors").names == ["dog toy", "dog toy_1"]
    assert read_embeddings(tmp_path / "learned_embeds.bin.safetensors").names == ["<cat>"]
    assert torch.equal(read_lora("old.pt.safetensors").components["unet"][PATH].lora_B, B)


def test_loras_that_cancel_each_other_are_not_combined(tmp_path):
    unet = random_factors(tiny_unet(), ATTENTION, 0)
    for name in ("a", "b"):
        write_lora_file(tmp_path / f"{name}.safetensors", {"unet": unet}, "kohya", dtype=torch.float32)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "a.safetensors"]
    with pytest.raises(
        ValueError, match=r"cancel each other: 0.1 x .*a.safetensors \+ 0.2 x .*b.safetensors"
    ) as raised:
        combine(files, tmp_path / "out", [0.1, 0.2, -0.3])
    assert "is zero; wanted other weights, or other files" in str(raised.value)
    assert not (tmp_path / "out").exists()
    combine(files, tmp_path / "out", [0.1, 0.2, -0.2])


def test_a_truncated_file(tmp_path):
    path = saved(tmp_path, diffusers_pair())
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 9, 4, 0):
        path.write_bytes(whole[:cut])
        message = refusal(path)
        assert "truncated" in message or "cut off" in message
        assert f"({cut} bytes)" in message


def test_a_header_that_claims_more_than_there_is(tmp_path):
    """The size is compared with the file before anything is reserved."""
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{" + b" " * 64)
    assert "is not a safetensors file, or its header is cut off" in refusal(path)
    header = json.dumps({"a.lora_A.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    assert "damaged or truncated" in refusal(path)


@pytest.mark.parametrize("content", [b"hello, this is a text file", b"\x89PNG\r\n\x1a\n" + bytes(64), bytes(100)])
def test_what_is_no_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert "is not a safetensors file" in refusal(path)


def test_a_missing_file_and_a_folder_without_one(tmp_path):
    assert refusal(tmp_path / "no.safetensors").endswith("does not exist")
    assert "holds 0 .safetensors files" in refusal(tmp_path)
    for name in ("a", "b"):
        saved(tmp_path, diffusers_pair(), name=f"{name}.safetensors")
    assert "holds 2 .safetensors files; wanted pytorch_lora_weights.safetensors" in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------------- the keys


def test_foreign_tensors_are_named_with_what_they_are_for(tmp_path):
    checkpoint = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 2)}
    message = refusal(saved(tmp_path, checkpoint))
    assert "is a UNet; wanted a LoRA" in message
    checkpoint |= {"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.zeros(2)}
    assert "is a whole checkpoint; wanted a LoRA" in refusal(saved(tmp_path, checkpoint))
    flux = {"double_blocks.0.processor.proj_lora1.down.weight": torch.zeros(2, 2)}
    message = refusal(saved(tmp_path, flux, {"modelspec.architecture": "flux-1-dev/lora"}))
    assert "they are those of FLUX" in message
    assert "its header says it is for flux-1-dev/lora" in message
    t5 = {f"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_{side}.weight": pair()[0] for side in ("up", "down")}
    assert "they are those of T5" in refusal(saved(tmp_path, t5))
    assert "keys are no LoRA" in refusal(saved(tmp_path, {"weight": torch.zeros(2)}))


def test_parts_of_a_pipeline_are_called_what_they_are(tmp_path):
    torch.manual_seed(0)
    unet = tiny_unet()
    parts = {
        "a ControlNet": ControlNetModel.from_unet(unet),
        "a UNet in diffusers' layout": unet,
        "an autoencoder": tiny_vae(),
        "a text encoder": tiny_text_encoder(tiny_tokenizer(tmp_path / "tokenizer")),
    }
    for what, model in parts.items():
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
        message = refusal(saved(tmp_path, tensors))
        assert f"is {what}; wanted a LoRA" in message
        assert "keys are no LoRA" not in message


def test_a_joined_layer_of_flux_has_equally_many_outputs_for_each_part(tmp_path):
    A, B = pair(out=10)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    message = refusal(saved(tmp_path, {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}))
    assert "not equally many in 1 modules: double_blocks.0.img_attn.qkv: lora_B [10, 2]" in message


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"{KOHYA}.lora_mid.weight", "LoCon with a middle tensor"),
        (f"{KOHYA}.diff", "full weight differences"),
        ("base_model.model.lm_head.modules_to_save.weight", "trained biases or whole modules"),
    ],
)
def test_other_kinds_of_adapter_are_refused_by_name(tmp_path, key, kind):
    assert f"holds {kind}" in refusal(saved(tmp_path, diffusers_pair() | {key: torch.zeros(2, 2)}))


@pytest.mark.parametrize(("key", "kind"), [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr")])
def test_loha_and_lokr_are_refused_by_name_where_a_plain_lora_is_wanted(tmp_path, key, kind):
    """What can use them has other words for a part that is left over."""
    path = saved(tmp_path, diffusers_pair() | {f"{KOHYA}.{key}": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=f"holds {kind}, not plain LoRA"):
        read_lora(path)
    with pytest.raises(ValueError, match="it is a plain LoRA too"):
        inspect_lora(path)


def test_every_problem_is_in_one_message(tmp_path):
    A, B = pair()
    tensors = diffusers_pair() | {
        f"{KOHYA}.lora_down.weight": A,  # another style, without its partner
        "unet.conv_in.lora_A.weight": torch.ones(3, 4),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2),  # ranks 3 and 2
        "unet.conv_out.lora_A.weight": A,  # no lora_B
        "text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight": B,  # no lora_A
        "something.else": A,
    }
    message = refusal(saved(tmp_path, tensors))
    for part in (
        "mixes key styles (diffusers: ",
        "kohya: lora_unet_mid_block",
        "ranks disagree in 1 modules: unet.conv_in: lora_A [3, 4], lora_B [8, 2]",
        "lora_B is missing for 1 modules: unet.conv_out",
        "lora_A is missing for 1 modules: text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "1 of 8 keys are no LoRA of Stable Diffusion: something.else",
    ):
        assert part in message
    assert message.count("\n  - ") == 5


def test_alphas_and_types(tmp_path):
    A, B = pair()
    kohya = {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}
    assert "alpha is not a single number" in refusal(saved(tmp_path, kohya | {f"{KOHYA}.alpha": torch.ones(3)}))
    lonely = {"lora_unet_conv_in.alpha": torch.tensor(1.0)}
    assert "alpha without lora_A and lora_B: unet.conv_in" in refusal(saved(tmp_path, kohya | lonely))
    whole = {name: tensor.int() for name, tensor in diffusers_pair().items()}
    assert "are I32, not floating-point" in refusal(saved(tmp_path, whole))
    empty = {name: tensor[:0] if "lora_A" in name else tensor[:, :0] for name, tensor in diffusers_pair().items()}
    assert "ranks disagree" in refusal(saved(tmp_path, empty))


def test_two_clip_layouts_that_contradict_each_other(tmp_path):
    A, B = pair()
    tensors = {}
    for number, layer in enumerate(("encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1")):
        tensors |= {f"text_encoder.{layer}.lora_A.weight": A + number, f"text_encoder.{layer}.lora_B.weight": B + 0}
    with pytest.raises(ValueError, match="1 modules are given twice, with different values"):
        read_lora(saved(tmp_path, tensors))


@pytest.mark.parametrize("value", ["{", "[1, 2]", '{"unet.lora_alpha": "much"}'])
def test_broken_metadata(tmp_path, value):
    path = saved(tmp_path, diffusers_pair(), {"lora_adapter_metadata": value})
    assert "cannot be used" in refusal(path) or "states no alpha" in refusal(path)


def test_an_unmerged_reslora_is_not_taken_for_a_lora(tmp_path):
    """`unet.save_lora_adapter` writes such a file: the shortcut stands in the configuration alone."""
    unet = tiny_unet()
    unet.add_adapter(ResLoraConfig(r=2, target_modules=["to_q"], shortcut="input"))
    unet.save_lora_adapter(tmp_path, adapter_name="default")
    assert "is an unmerged ResLoRA" in refusal(tmp_path)


def test_peft_folders(tmp_path):
    A, B = pair()
    path = "base_model.model.layers.0.q_proj"
    tensors = {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    saved(tmp_path, tensors, name="adapter_model.safetensors")
    assert "there is none beside it" in refusal(tmp_path)
    config = tmp_path / "adapter_config.json"
    for content, message in {
        "nonsense": "adapter_config.json is not JSON",
        '{"peft_type": "IA3"}': "is IA3 by its adapter_config.json; wanted plain LORA",
        '{"peft_type": "LORA", "use_dora": true}': "is DoRA",
        '{"peft_type": "RESLORA", "shortcut": "block"}': "is an unmerged ResLoRA",
        " " * 2_000_000: "more than any configuration",
    }.items():
        config.write_text(content)
        assert message in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------- what is written


def test_nothing_is_written_for_numbers_that_are_no_use(tmp_path):
    unet = random_factors(tiny_unet(), ATTENTION, 0)
    first, *_ = unet
    A, B, scaling = unet[first]
    broken = {
        "hold NaN or infinity": {"unet": unet | {first: LoraFactors(A * float("nan"), B, scaling)}},
        "hold NaN or infinity: unet.": {"unet": unet | {first: LoraFactors(A, B, float("inf"))}},
        "are zero: the adapter changes nothing": {
            "unet": {p: f._replace(lora_B=f.lora_B * 0) for p, f in unet.items()}
        },
        "of text_encoder are zero: it was never trained": {
            "unet": unet,
            "text_encoder": {"encoder.layers.0.mlp.fc1": LoraFactors(torch.ones(2, 8), torch.zeros(8, 2), 1.0)},
        },
        "there are no modules": {"unet": {}},
        "wanted some of unet, text_encoder, text_encoder_2": {"vae": unet},
        "disagree in unet.": {"unet": {first: LoraFactors(A, B[:, :-1], scaling)}},
    }
    for message, components in broken.items():
        with pytest.raises(ValueError, match=r"this LoRA cannot be exported:") as caught:
            export_lora(tmp_path / "out", components)
        assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_good_export_survives_a_bad_one(tmp_path):
    unet = random_factors(tiny_unet(), ATTENTION, 0)
    export_lora(tmp_path, {"unet": unet}, name="x")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    worse = {path: f._replace(lora_A=f.lora_A * float("nan")) for path, f in unet.items()}
    with pytest.raises(ValueError, match="NaN"):
        export_lora(tmp_path, {"unet": worse}, name="x")
    with pytest.raises(ValueError, match="float16; write float32 or bfloat16"):
        export_lora(tmp_path, {"unet": {path: f._replace(scaling=1e12) for path, f in unet.items()}}, name="x")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_failed_proof_replaces_nothing(tmp_path, monkeypatch):
    from reslora_diffusion.export import CheckFailed, lora

    unet = {"unet": random_factors(tiny_unet(), ATTENTION, 0)}
    export_lora(tmp_path, unet, name="x")
    before = (tmp_path / "kohya" / "x.safetensors").read_bytes()

    def half_written(components, naming):
        tensors = right(components, naming)
        return {name: tensor for name, tensor in tensors.items() if "attn2" not in name}

    right = lora.kohya_tensors
    monkeypatch.setattr(lora, "kohya_tensors", half_written)
    with pytest.raises(CheckFailed, match=r"nothing was replaced:\n  - diffusers .* reads 28 of 56 modules"):
        export_lora(tmp_path, unet, name="x")
    assert (tmp_path / "kohya" / "x.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "export_report.json",
        "kohya",
        "pytorch_lora_weights.safetensors",
    ]


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "/etc/x", "a\nb"])
def test_names_are_no_paths(tmp_path, name):
    with pytest.raises(ValueError, match="is not a file name"):
        export_lora(tmp_path / "out", {"unet": random_factors(tiny_unet(), ("to_q",), 0)}, name=name)


def test_names_in_headers_never_become_paths(tmp_path):
    header = {"ss_output_name": "../../evil", "modelspec.title": "/etc/passwd", "reslora.base_model": "../x"}
    source = saved(tmp_path, diffusers_pair(), header)
    resize(source, tmp_path / "inside" / "out", 2)
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and p != source)
    assert found == [
        "inside/out/export_report.json",
        "inside/out/kohya/out.safetensors",
        "inside/out/pytorch_lora_weights.safetensors",
    ]


def test_terminals_are_safe_from_headers(tmp_path):
    text = str(inspect_lora(saved(tmp_path, diffusers_pair(), {"modelspec.title": "\x1b[2Jgone\r\n" + "x" * 10_000})))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 400


def test_a_small_file_cannot_ask_for_huge_ones(tmp_path):
    """One module of a huge rank would pad all others to it."""
    tensors = diffusers_pair("conv_out", rank=1000, width=1000, out=1000)
    for number in range(3000):
        tensors |= diffusers_pair(f"down_blocks.0.resnets.{number}.conv1", rank=1, width=1024, out=1024)
    source = saved(tmp_path, {name: tensor.half() for name, tensor in tensors.items()})
    assert source.stat().st_size < LARGEST_EXPORT / 400
    with pytest.raises(ValueError, match=r"every module at rank 1000 makes .* GiB, more than 8"):
        resize(source, tmp_path / "out", "full")
    assert not (tmp_path / "out").exists()


def test_inputs_are_never_outputs(tmp_path):
    source = tmp_path / "x.safetensors"
    write_lora_file(source, {"unet": random_factors(tiny_unet(), ATTENTION, 0)}, "kohya")
    with pytest.raises(ValueError, match="would replace .*which is being read"):
        resize(source, source, 2, allow_lossy=True)
    export_lora(tmp_path / "out", read_lora(source).components, name="out")
    with pytest.raises(ValueError, match="would replace .*which is being read"):
        combine([tmp_path / "out", source], tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; wanted a folder"):
        resize(source, tmp_path / "file", 2)


# ------------------------------------------------------------------------------------------------------- the base


def test_a_lora_for_another_base_says_what_it_is_for(tmp_path):
    """Full-width SD 1.x factors against the tiny base, in every tool that takes a base."""
    wide = LoraFactors(torch.ones(1, 768), torch.ones(320, 1), 1.0)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    source = tmp_path / "sd1.safetensors"
    write_lora_file(source, {"unet": {path: wide}}, "kohya")
    base = str(tiny_pipeline_folder())
    result = verify_lora(source, base)
    assert not result.passed
    for text in ("\n".join(result.problems), str(pytest.raises(ValueError, fuse, source, base, tmp_path / "f").value)):
        assert f"the LoRA is for Stable Diffusion 1.x, and {base} is not" in text
        assert "have other shapes in the base" in text
    assert not (tmp_path / "f").exists()


def test_a_base_without_the_text_encoder_a_lora_has(tmp_path):
    encoder = tiny_text_encoder(tiny_tokenizer(tmp_path / "tokenizer"))
    factors = {"text_encoder_2": random_factors(encoder, CLIP, 0), "unet": random_factors(tiny_unet(), ATTENTION, 1)}
    export_lora(tmp_path / "xl", factors)
    result = verify_lora(tmp_path / "xl", str(tiny_pipeline_folder()))
    assert any("the LoRA is for text_encoder_2, which the base lacks" in problem for problem in result.problems)


@pytest.mark.parametrize("base", ["/no/such/place", "./no", "a/b/c", "with space"])
def test_a_base_that_cannot_be(tmp_path, base):
    source = tmp_path / "x.safetensors"
    write_lora_file(source, {"unet": random_factors(tiny_unet(), ("to_q",), 0)}, "kohya")
    with pytest.raises(ValueError, match="does not exist"):
        verify_lora(source, base)
    with pytest.raises(ValueError, match="is a LoRA, which is trained on a base"):
        verify_lora(source, str(source))
    with pytest.raises(ValueError, match="holds neither model_index.json nor config.json"):
        verify_lora(source, str(tmp_path))


@pytest.mark.parametrize("size", [1e-12, 1e-20, 1e-40])
def test_an_adapter_that_was_hardly_trained(tmp_path, size):
    """After one step of a warm-up. Half precision has no numbers so small; float32 has some."""
    torch.manual_seed(0)
    factors = {PATH: LoraFactors(torch.randn(4, 8), size * torch.randn(8, 4), 1.0)}
    for write in (
        lambda dtype: export_lora(tmp_path / "out", {"unet": factors}, dtype=dtype),
        lambda dtype: export_peft(tmp_path / "out", factors, dtype=dtype),
    ):
        with pytest.raises(ValueError, match="vanish in torch.float16.*hardly trained.*write float32 or bfloat16"):
            write(torch.float16)
        assert not (tmp_path / "out").exists()
        if size > 1e-30:
            assert write(torch.float32).largest_error < 1e-5
            shutil.rmtree(tmp_path / "out")
