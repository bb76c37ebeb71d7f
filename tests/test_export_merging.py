"""`reslora merge` changes the weights that a LoRA is for and nothing else: bits, precisions and files stay."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llm_tiny import GROUPED
from lora_factors import random_factors, wanted_deltas
from reslora_diffusion.core.functional import LoraFactors
from reslora_diffusion.export import combine, convert, export_peft, export_trained, fuse, resize, write_lora_file
from reslora_diffusion.export.limits import CheckFailed
from tiny import tiny_pipeline_folder

PARTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
SITE = ("to_q", "to_v")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of the UNet alone, and what it adds."""
    unet = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder()).unet
    components = {"unet": random_factors(unet, SITE, 0)}
    path = tmp_path_factory.mktemp("lora") / "x.safetensors"
    write_lora_file(path, components, "kohya", dtype=torch.float32)
    return path, {f"{name}.weight": delta for name, delta in wanted_deltas(components["unet"]).items()}


@pytest.fixture
def base(tmp_path):
    """A copy of a small pipeline whose parts have precisions of their own, one of them two."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_pipeline_folder(), folder)
    for part, name in PARTS.items():
        torch.manual_seed(len(part))
        weights = {k: v * (1 + 1e-4 * torch.randn_like(v)) for k, v in floats(load_file(folder / part / name)).items()}
        if part == "unet":
            weights = {k: v if "norm" in k else v.half() for k, v in weights.items()}
        if part == "text_encoder":
            weights = {k: v.bfloat16() for k, v in weights.items()}
        save_file(weights, folder / part / name, metadata={"format": "pt"})
    return folder


def floats(tensors):
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_merged(base, fused, deltas, scale=1.0, files=PARTS):
    """Bit for bit: what no LoRA touches is the base's, what it touches is W + scale * delta, once rounded."""
    touched = 0
    for part, name in PARTS.items():
        before, after = load_file(base / part / files.get(part, name)), load_file(fused / part / name)
        assert before.keys() == after.keys()
        for key, weight in before.items():
            if part == "unet" and key in deltas:
                touched += 1
                wanted = (weight.float() + scale * deltas[key].float()).to(weight.dtype)
                assert not same_bits(after[key], weight)
                torch.testing.assert_close(after[key], wanted, rtol=1e-3, atol=1e-6)
                assert after[key].dtype == weight.dtype
            else:
                assert same_bits(after[key], weight), (part, key)
    assert touched == len(deltas)


def test_every_tensor_keeps_its_precision_and_the_others_their_bits(lora, base, tmp_path):
    report = fuse(lora[0], str(base), tmp_path / "fused", scale=0.5)
    assert_merged(base, tmp_path / "fused", lora[1], 0.5)
    assert report.precisions == {"text_encoder": "BF16", "unet": "F16, F32", "vae": "F32"}
    total = sum(len(load_file(base / part / name)) for part, name in PARTS.items())
    assert report.untouched == total - len(lora[1])
    assert "bit for bit" in str(report)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "fused")
    assert pipe.tokenizer is not None
    assert {p.name for p in (tmp_path / "fused").iterdir()} == {p.name for p in base.iterdir()}


def test_what_is_loaded_is_what_is_merged(lora, base, tmp_path):
    """Hub snapshots hold weights twice. Without a variant, the variant's files are not even looked at."""
    variants = {part: name.replace(".safetensors", ".fp16.safetensors") for part, name in PARTS.items()}
    for part, name in PARTS.items():
        half = {k: v.half() + 1 for k, v in load_file(base / part / name).items()}
        save_file(half, base / part / variants[part], metadata={"format": "pt"})
    save_file({"x": torch.zeros(1)}, base / "v1-5-pruned.safetensors")  # a single-file checkpoint beside it
    fuse(lora[0], str(base), tmp_path / "plain")
    assert_merged(base, tmp_path / "plain", lora[1])
    fuse(lora[0], str(base), tmp_path / "half", variant="fp16")
    assert_merged(base, tmp_path / "half", lora[1], files=variants)
    for folder in ("plain", "half"):
        assert not list((tmp_path / folder).glob("**/*fp16*"))
        assert not list((tmp_path / folder).glob("*.safetensors"))
    for part, name in PARTS.items():
        (base / part / name).unlink()
    with pytest.raises(ValueError, match=r"give the variant, such as --variant fp16"):
        fuse(lora[0], str(base), tmp_path / "none")


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-0000{}-of-00002.safetensors"),
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
        ),
        (
            "diffusion_pytorch_model.fp16.safetensors.index.json",
            "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors",
        ),
    ],
)
def test_shards_of_all_ages(lora, base, tmp_path, index, shard):
    place = base / "unet"
    weights = load_file(place / PARTS["unet"])
    halves = {shard.format(n): dict(list(weights.items())[n - 1 :: 2]) for n in (1, 2)}
    for name, tensors in halves.items():
        save_file(tensors, place / name, metadata={"format": "pt"})
    stated = {"metadata": {}, "weight_map": {key: name for name, tensors in halves.items() for key in tensors}}
    (place / index).write_text(json.dumps(stated))
    (place / PARTS["unet"]).unlink()
    fuse(lora[0], str(base), tmp_path / "fused", variant="fp16" if "fp16" in index else None)
    got = {}
    for path in sorted((tmp_path / "fused/unet").glob("*.safetensors")):
        assert "fp16" not in path.name
        got |= load_file(path)
    assert got.keys() == weights.keys()
    assert all(same_bits(got[key], weights[key]) == (key not in lora[1]) for key in weights)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "fused").unet.state_dict()
    key = next(iter(lora[1]))
    torch.testing.assert_close(loaded[key], got[key].float())


def test_a_shard_that_is_not_there(lora, base, tmp_path):
    index = base / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors", "b": "gone.safetensors"}}))
    (base / "unet" / PARTS["unet"]).unlink()
    with pytest.raises(ValueError, match="names shards that are not there: ../x.safetensors, gone.safetensors"):
        fuse(lora[0], str(base), tmp_path / "fused")


def test_a_precision_that_is_asked_for(lora, base, tmp_path):
    report = fuse(lora[0], str(base), tmp_path / "fused", dtype=torch.bfloat16)
    for part, name in PARTS.items():
        before, after = load_file(base / part / name), load_file(tmp_path / "fused" / part / name)
        for key, weight in before.items():
            assert after[key].dtype == torch.bfloat16
            if key not in lora[1]:
                assert same_bits(after[key], weight.bfloat16())
    assert "in that precision" in str(report)
    config = json.loads((tmp_path / "fused/text_encoder/config.json").read_text())
    assert {config[name] for name in ("dtype", "torch_dtype") if name in config} <= {"bfloat16"}


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_and_places_that_cannot_be(lora, base, tmp_path, scale):
    with pytest.raises(ValueError, match="wanted a finite number"):
        fuse(lora[0], str(base), tmp_path / "fused", scale=scale)
    for place in (base, base.parent):
        with pytest.raises(ValueError, match="is or holds the base"):
            fuse(lora[0], str(base), place, overwrite=True)
    assert (base / "model_index.json").is_file()


def test_a_quantised_base_is_refused(lora, base, tmp_path):
    config = base / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ValueError, match="is quantised"):
        fuse(lora[0], str(base), tmp_path / "fused")
    config.write_text(config.read_text().replace("quantization_config", "x"))
    weights = load_file(base / "unet" / PARTS["unet"])
    eight = {k: v.to(torch.float8_e4m3fn) if k in lora[1] else v for k, v in weights.items()}
    save_file(eight, base / "unet" / PARTS["unet"], metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no precision to add in"):
        fuse(lora[0], str(base), tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_a_write_that_goes_wrong_is_found(lora, base, tmp_path, monkeypatch):
    from reslora_diffusion.export import rewriting

    def careless(tensors, path, metadata):
        save_file({k: v.half().float() if v.dtype == torch.float32 else v for k, v in tensors.items()}, path, metadata)

    monkeypatch.setattr(rewriting, "save_file", careless)
    with pytest.raises(CheckFailed, match="were not written as computed"):
        fuse(lora[0], str(base), tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("headless", [False, True])
def test_names_with_and_without_the_prefix_of_the_head(tmp_path, headless):
    """GPT-2's own checkpoint is saved without `transformer.`; its layers are Conv1D."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    model.save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    if headless:
        weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    path = "transformer.h.1.attn.c_attn"
    factors = {path: LoraFactors(torch.randn(2, 32), torch.randn(96, 2), 0.5)}
    export_peft(tmp_path / "lora", factors, model=model, dtype=torch.float32)
    fuse(tmp_path / "lora", str(tmp_path / "base"), tmp_path / "fused")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").state_dict()
    for name, weight in model.state_dict().items():
        delta = 0.5 * (factors[path].lora_B @ factors[path].lora_A).T if name == f"{path}.weight" else 0
        torch.testing.assert_close(got[name], weight + delta, rtol=1e-5, atol=1e-5)


def test_output_layers_that_are_the_embedding(tmp_path):
    """The other way round too: an adapted embedding's layer would take the output with it."""
    model = LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base")
    export_peft(tmp_path / "lora", {"lm_head": LoraFactors(torch.ones(1, 32), torch.ones(64, 1), 1.0)})
    with pytest.raises(ValueError, match="lm_head share their weight with other layers.*untie the base first"):
        fuse(tmp_path / "lora", str(tmp_path / "base"), tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("file", ["", "adapter_model.safetensors"])
def test_the_end_that_a_lora_was_taught_goes_into_the_merged_model(tmp_path, file):
    """`--save_merged_model` writes it too; else generation would run on past every answer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**GROUPED))
    model.save_pretrained(tmp_path / "base")
    export_peft(tmp_path / "lora", random_factors(model, ("q_proj",), 0), model=model)
    taught = tmp_path / "lora/generation_config.json"
    taught.write_text(json.dumps({"eos_token_id": [2, 7], "max_length": 99}))
    report = fuse(tmp_path / "lora" / file, str(tmp_path / "base"), tmp_path / "fused")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert merged.generation_config.eos_token_id == [2, 7]
    assert "generation stops where the LoRA was taught to: 7" in str(report)
    for name, write in {
        "converted": lambda out: convert(tmp_path / "lora" / file, out, "peft"),
        "resized": lambda out: resize(tmp_path / "lora" / file, out, "full"),
        "exported": lambda out: export_trained(tmp_path / "lora" / file, out),
        "combined": lambda out: combine([tmp_path / "lora" / file] * 2, out, [0.5, 0.5]),
    }.items():
        write(tmp_path / name)
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"] == [2, 7], name
    taught.unlink()
    assert "generation stops" not in str(fuse(tmp_path / "lora", str(tmp_path / "base"), tmp_path / "plain"))
