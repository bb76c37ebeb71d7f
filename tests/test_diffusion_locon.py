"""Adapters on convolutions (LoCon), and the layers that kohya's scripts train by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreambooth import arguments, train
from reslora_diffusion.diffusion.models.adapters import add_adapters
from reslora_diffusion.diffusion.models.architecture import CONVOLUTION, Architecture
from reslora_diffusion.diffusion.models.families import FAMILIES
from reslora_diffusion.diffusion.models.meta_pipeline import layers_in, load_meta_pipeline
from reslora_diffusion.diffusion.objective.randomness import Stream, generator
from reslora_diffusion.diffusion.options import parse
from reslora_diffusion.diffusion.options.checks import check, quick_check
from reslora_diffusion.diffusion.options.model_checks import model_problems
from reslora_diffusion.export import combine, convert, extract, fuse, inspect_lora, read_lora, resize, verify_lora
from reslora_diffusion.export.flux import layer_of
from reslora_diffusion.utils.problems import BadInput
from tiny import saved, tiny_pipeline, tiny_pipeline_3, tiny_pipeline_flux, tiny_pipeline_xl
from tiny_families import tiny_lumina_2

WEIGHTS = "pytorch_lora_weights.safetensors"
# The tables of networks/lora.py: classes, and the linear layers and convolutions in each of them.
OF_KOHYA = ("Transformer2DModel",)
WITH_CONVOLUTIONS = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
OF_CLIP = ("CLIPAttention", "CLIPMLP")
SD15 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def inside(model: nn.Module, classes: tuple[str, ...], spatial: bool) -> set[str]:
    """Names of the layers that kohya's loop over classes finds; without `spatial` of one pixel alone."""
    return {
        f"{name}.{child}"
        for name, module in model.named_modules()
        if type(module).__name__ in classes
        for child, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and (spatial or layer.kernel_size == (1, 1)))
    }


def architecture_of(kind: str, **models: nn.Module) -> Architecture:
    layers = {name: layers_in(model) for name, model in models.items()}
    return Architecture(FAMILIES[kind], {}, layers, {}, None, "epsilon", 77)


@pytest.mark.parametrize(
    ("kind", "unet", "encoders", "counts"),
    [
        ("StableDiffusionPipeline", SD15, [CLIP_L], (192, 278, 72)),
        ("StableDiffusionXLPipeline", SDXL, [CLIP_L, CLIP_G], (722, 788, 264)),
    ],
)
def test_the_layers_of_kohya_are_those_of_its_tables(kind, unet, encoders, counts):
    """On the configurations of the released models: as many layers as kohya's scripts say, and the same ones."""
    classes = [CLIPTextModel, CLIPTextModelWithProjection]
    with torch.device("meta"):
        models = {"unet": UNet2DConditionModel(**unet)}
        for config, name, build in zip(encoders, ("text_encoder", "text_encoder_2"), classes, strict=False):
            models[name] = build(CLIPTextConfig(**config))
    architecture = architecture_of(kind, **models)
    words = ["--target_modules", "kohya", "--text_encoder_target_modules", "kohya", "--train_text_encoder"]
    without, spatial = parse(words), parse([*words, "--conv_rank", "2"])
    found = {}
    for options in (without, spatial):
        names = {}
        for part, name, _ in architecture.adapted(options):
            names.setdefault(part, set()).add(name)
        assert names["unet"] == inside(
            models["unet"], WITH_CONVOLUTIONS if options.conv_rank else OF_KOHYA, bool(options.conv_rank)
        )
        for part in names.keys() - {"unet"}:
            assert names[part] == inside(models[part], OF_CLIP, False)
        found[options.conv_rank] = names
    of_clip = sum(len(names) for part, names in found[2].items() if part != "unet")
    assert (len(found[None]["unet"]), len(found[2]["unet"]), of_clip) == counts


def test_the_layers_of_kohya_in_flux_are_those_of_its_blocks():
    """19 x 10 + 38 x 3 layers in Black Forest Labs' names, as networks/lora_flux.py counts them."""
    with torch.device("meta"):
        model = FluxTransformer2DModel()
    options = parse(["--target_modules", "kohya"])
    names = [name for _, name, _ in architecture_of("FluxPipeline", transformer=model).adapted(options)]
    assert len({layer_of(name) for name in names}) == 304
    assert None not in {layer_of(name) for name in names}


def test_the_layers_of_kohya_in_lumina_2_are_those_of_its_tables():
    """JointTransformerBlock and FinalLayer of networks/lora_lumina.py, by the names of their classes in diffusers."""
    model = DiffusionPipeline.from_pretrained(saved(tiny_lumina_2)).transformer
    options = parse(["--target_modules", "kohya"])
    names = {name for _, name, _ in architecture_of("Lumina2Pipeline", transformer=model).adapted(options)}
    assert names == inside(model, ("Lumina2TransformerBlock", "LuminaLayerNormContinuous"), False)
    assert {name.partition(".")[0] for name in names} == {"layers", "noise_refiner", "context_refiner", "norm_out"}


LOCON = {
    "target_modules": ["kohya"],
    "conv_rank": 2,
    "conv_alpha": 1,
    "train_text_encoder": True,
    "text_encoder_target_modules": ["kohya"],
    "shortcut": "block",
    "save_precision": "fp32",
    "scale_weight_norms": 0.3,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("locon") / "run", **LOCON, max_train_steps=2, checkpointing_steps=1)


def test_convolutions_are_adapted_at_their_own_rank_and_joined_to_nothing():
    options = arguments("out", **LOCON, rank_pattern=["conv1=3"])
    base = load_meta_pipeline(options)
    assert [*model_problems(base, options)] == []
    pipeline = StableDiffusionPipeline.from_pretrained(saved(tiny_pipeline))
    adapters = add_adapters(pipeline, base, options)
    adapter = adapters.handles()[0].adapter
    ranks = {name: (u.layer.r["default"], u.layer.lora_alpha["default"]) for name, u in adapter.unjoined.items()}
    spatial = {name for part, name, layer in base.adapted(options) if layer.is_spatial}
    points = {name for part, name, layer in base.adapted(options) if layer.kind == CONVOLUTION} - spatial
    assert {ranks[name] for name in points} == {(4, 4)}
    assert {ranks[name] for name in spatial if name.endswith("conv1")} == {(3, 1)}
    assert {ranks[name] for name in spatial if not name.endswith("conv1")} == {(2, 1)}
    assert ranks.keys() == spatial | points
    assert {u.kind for u in adapter.unjoined.values()} == {"Conv2d"}
    assert base.adapter_size(options) == sum(p.numel() for p in adapters.tensors().values())


def test_a_locon_is_trained_and_every_loader_reads_it(trained):
    """The two files hold the same; both are loaded by diffusers, and the kohya file has kohya's names and shapes."""
    report = json.loads((trained / "export_report.json").read_text())
    assert {check["loader"].split()[0] for check in report["loaders"]} >= {"diffusers", "kohya's"}
    kohya = load_file(next((trained / "kohya").iterdir()))
    down = {name: tensor.shape for name, tensor in kohya.items() if name.endswith("lora_down.weight")}
    up = {name: tensor.shape for name, tensor in kohya.items() if name.endswith("lora_up.weight")}
    assert down["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"][2:] == (3, 3)
    assert up["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"][2:] == (1, 1)
    assert down["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"][2:] == (1, 1)
    with safe_open(next((trained / "kohya").iterdir()), "pt") as file:
        assert "2" in file.metadata()["reslora.conv_rank"]
    pipe = StableDiffusionPipeline.from_pretrained(saved(tiny_pipeline), safety_checker=None)
    image = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    states = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(1))
    outputs = []
    with torch.no_grad():
        outputs.append(pipe.unet(image, 5, states).sample)
        for source in (trained, trained / "kohya"):
            name = WEIGHTS if source == trained else next(source.iterdir()).name
            pipe.load_lora_weights(str(source), weight_name=name)
            outputs.append(pipe.unet(image, 5, states).sample)
            pipe.unload_lora_weights()
    base, first, second = outputs
    assert (first - base).norm() > 1e-3 * base.norm()
    assert torch.allclose(first, second, atol=1e-5)


def test_a_locon_with_dora_is_trained_and_its_file_generates_the_image_of_the_trained_model(tmp_path):
    options = {"use_dora": True, "shortcut": "block", "conv_rank": 3, "conv_alpha": 2.0, "learning_rate": 0.02}
    options |= {"validation_prompt": "a dog", "num_validation_images": 1, "save_precision": "fp32"}
    folder = train(tmp_path / "run", **options)
    stretched = [name for name in load_file(folder / WEIGHTS) if name.endswith("magnitude_vector")]
    assert sum("conv" in name for name in stretched) > 10
    assert verify_lora(folder, str(saved(tiny_pipeline))).passed
    pipe = StableDiffusionPipeline.from_pretrained(saved(tiny_pipeline))

    def image():
        given = {"num_inference_steps": 2, "height": 64, "width": 64}
        found = pipe("a dog", generator=generator(0, Stream.VALIDATION, 0), **given).images[0]
        return np.asarray(found, dtype=np.float64)

    wanted = np.asarray(Image.open(folder / "samples" / "step-000003" / "0-0.png"), dtype=np.float64)
    assert np.abs(image() - wanted).max() > 10
    pipe.load_lora_weights(folder, weight_name=WEIGHTS)
    assert np.abs(image() - wanted).max() <= 1


def test_norms_of_convolutions_are_limited(trained):
    found = {path: f for path, f in read_lora(trained).components["unet"].items() if f.lora_A.ndim == 4}
    norms = [(f.scaling * f.lora_B.flatten(1) @ f.lora_A.flatten(1)).norm().item() for f in found.values()]
    assert max(norms) == pytest.approx(0.3, rel=1e-4)  # reached by one of them at least


def test_a_resumed_locon_is_the_uninterrupted_one(trained, tmp_path):
    shutil.copytree(trained / "checkpoint-1", tmp_path / "checkpoint-1")
    train(tmp_path, **LOCON, max_train_steps=2, checkpointing_steps=1, resume_from_checkpoint="latest")
    one, other = load_file(trained / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    state = load_file(tmp_path / "checkpoint-2" / "state" / "state.safetensors")
    wanted = load_file(trained / "checkpoint-2" / "state" / "state.safetensors")
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_the_tools_take_a_trained_locon(trained, tmp_path):
    """Merged, cut, combined, converted and extracted again, each with the delta that a convolution should have."""
    base = str(saved(tiny_pipeline))
    lora = read_lora(trained)
    path = "mid_block.resnets.0.conv1"
    A, B, scaling = lora.components["unet"][path]
    delta = scaling * torch.einsum("orxy,rikl->oikl", B.double(), A.double())
    fuse(trained, base, tmp_path / "merged")
    before = UNet2DConditionModel.from_pretrained(base, subfolder="unet").state_dict()[f"{path}.weight"]
    after = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet").state_dict()[f"{path}.weight"]
    assert torch.allclose(after.double() - before.double(), delta, atol=1e-6)

    def delta_of(source):
        A, B, scaling = read_lora(source).components["unet"][path]
        return scaling * torch.einsum("orxy,rikl->oikl", B.double(), A.double())

    resize(trained, tmp_path / "cut", rank=1, allow_lossy=True, dtype=torch.float32)
    U, S, V = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    assert torch.allclose(delta_of(tmp_path / "cut").flatten(1), S[0] * U[:, :1] @ V[:1], atol=1e-5)
    combine([trained, trained], tmp_path / "sum", weights=[1, 0.5], dtype=torch.float32)
    assert torch.allclose(delta_of(tmp_path / "sum"), 1.5 * delta, atol=1e-5)
    convert(trained, tmp_path / "one.safetensors", "kohya", dtype=torch.float32)
    assert torch.allclose(delta_of(tmp_path / "one.safetensors"), delta, atol=1e-6)
    extract(tmp_path / "merged", base, tmp_path / "back", rank=16, modules="all", dtype=torch.float32)
    assert torch.allclose(delta_of(tmp_path / "back"), delta, atol=1e-4)
    assert verify_lora(trained, base).passed
    facts = {m.path: m for m in inspect_lora(trained).modules if m.component == "unet"}
    assert abs(facts[path].norm - delta.norm().item()) < 1e-4


def test_a_locon_is_trained_on_from_its_file(trained, tmp_path):
    """--network_weights of a LoCon, whose convolutions have another rank than its linear layers."""
    options = LOCON | {"method": "lora", "shortcut": None, "rank": 8, "conv_rank": 8, "scale_weight_norms": None}
    again = train(tmp_path, **options, network_weights=trained / WEIGHTS, max_train_steps=1, learning_rate=1e-12)
    was, now = read_lora(trained).components["unet"], read_lora(again).components["unet"]
    for path, (A, B, scaling) in was.items():
        new = now[path]
        wanted = scaling * B.flatten(1) @ A.flatten(1)
        assert torch.allclose(new.scaling * new.lora_B.flatten(1) @ new.lora_A.flatten(1), wanted, atol=1e-5), path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"conv_rank": 0}, "--conv_rank: got 0, wanted 1 or more"),
        ({"conv_alpha": 1}, "--conv_alpha is used only with --conv_rank"),
        ({"conv_rank": 500}, "--rank is larger than layers of the unet: down_blocks.0"),
        ({"conv_rank": 2, "schedule": "restart"}, "restart: convolutions and embeddings are adapted"),
        ({"conv_rank": 2, "pretrained_model_name_or_path": tiny_pipeline_3}, "--conv_rank does not apply to Stable D"),
        ({"conv_rank": 2, "pretrained_model_name_or_path": tiny_pipeline_flux}, "is for the convolutions of a UNet"),
        ({"target_modules": ["conv_norm_out"]}, "neither linear layers nor convolutions: conv_norm_out (a norm)"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(options, said, tmp_path):
    if callable(build := options.get("pretrained_model_name_or_path")):
        options = options | {"pretrained_model_name_or_path": saved(build)}
    with pytest.raises(BadInput) as error:
        check(arguments(tmp_path, **options))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ('network_module = "networks.lora"\nnetwork_args = ["conv_dim=8", "conv_alpha=2"]', (["kohya"], 8, 2)),
        ('network_module = "networks.lora"\nnetwork_args = ["conv_dim=8"]', (["kohya"], 8, 1)),
        ('network_module = "networks.lora"', (["kohya"], None, None)),
        ('network_module = "lycoris.kohya"\nnetwork_dim = 16\nnetwork_args = ["algo=locon"]', (["kohya"], 16, 1)),
        ('network_module = "lycoris.kohya"\nnetwork_args = ["preset=attn-mlp"]', (["kohya"], None, None)),
        ('network_module = "lycoris.kohya"\nnetwork_args = ["preset=attn-only"]', (None, None, None)),
    ],
)
def test_a_toml_of_kohyas_says_which_layers(lines, wanted, tmp_path):
    (tmp_path / "k.toml").write_text(f'train_data_dir = "x"\n{lines}\n')
    options = parse(["--config", str(tmp_path / "k.toml")])
    assert (options.target_modules, options.conv_rank, options.conv_alpha) == wanted
    assert options.text_encoder_target_modules == ["kohya"]
    assert options.problems == []
    given = parse(["--config", str(tmp_path / "k.toml"), "--target_modules", "to_q"])
    assert given.target_modules == ["to_q"]


def test_a_toml_with_bad_convolutions_is_one_message(tmp_path):
    (tmp_path / "k.toml").write_text('network_module = "networks.lora"\nnetwork_args = ["conv_dim=many"]\n')
    options = parse(["--config", str(tmp_path / "k.toml"), "--output_dir", str(tmp_path)])
    with pytest.raises(BadInput, match="network_args: could not convert string to float: 'many'"):
        quick_check(options)


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_pipeline_xl, tiny_pipeline_3, tiny_pipeline_flux, tiny_lumina_2])
def test_kohyas_layers_of_every_family_are_trained_and_exported(build, tmp_path):
    spatial = {"conv_rank": 2} if build is tiny_pipeline_xl else {}
    options = {"target_modules": ["kohya"], "shortcut": "block", "max_train_steps": 2} | spatial
    folder = train(tmp_path, pretrained_model_name_or_path=saved(build), **options)
    assert json.loads((folder / "export_report.json").read_text())["loaders"]
