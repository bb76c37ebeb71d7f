"""FLUX.1's two files: layers that are one in kohya's names, joined and split as diffusers' own converter does it."""

import pytest
import torch
from diffusers import ChromaTransformer2DModel, DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from lora_factors import largest_error, random_factors
from reslora_diffusion.core.functional import LoraFactors
from reslora_diffusion.diffusion.models.families import FAMILIES
from reslora_diffusion.export import convert, export_lora, extract, fuse, inspect_lora, read_lora, verify_lora
from reslora_diffusion.export.base import check_stored
from reslora_diffusion.export.flux import LAYERS, from_kohya_name, join, layer_of, parts_of, split
from reslora_diffusion.export.geometry import BaseKind
from reslora_diffusion.export.header import read_headers
from reslora_diffusion.export.hollow import hollow
from tiny import saved, tiny_pipeline_3, tiny_pipeline_flux

BLOCKS = tuple(
    [f"transformer_blocks.1.{leaf}" for leaf in ("attn.to_q", "attn.to_v", "attn.add_k_proj", "ff.net.2")]
    + [f"single_transformer_blocks.0.attn.to_{leaf}" for leaf in "qkv"]
    + [f"single_transformer_blocks.1.{leaf}" for leaf in ("attn.to_k", "proj_mlp", "proj_out")]
)


@pytest.fixture(scope="module")
def base() -> dict[str, torch.nn.Module]:
    """A transformer of FLUX.1's width with few of its blocks, without memory."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=2, num_single_layers=2)
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=1, intermediate_size=64))
    return {"transformer": hollow(transformer), "text_encoder": hollow(clip)}


@pytest.fixture(scope="module")
def components(base):
    return {
        "transformer": random_factors(base["transformer"], BLOCKS, seed=0, ranks=(2, 3), scalings=(1.0, 0.5)),
        "text_encoder": random_factors(base["text_encoder"], ("q_proj", "out_proj"), seed=1),
    }


def deltas(components) -> dict[str, torch.Tensor]:
    """What each module makes of a few random vectors, in float64: matrices of these widths are slow to form."""

    def probed(f: LoraFactors) -> torch.Tensor:
        vectors = torch.randn(f.lora_A.shape[1], 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return f.scaling * (f.lora_B.double() @ (f.lora_A.double() @ vectors))

    return {
        f"{c}.{path.removeprefix('text_model.')}": probed(f)
        for c, modules in components.items()
        for path, f in modules.items()
    }


def test_both_files_load_and_mean_the_same(tmp_path, components, base):
    report = export_lora(tmp_path, components, models=base, name="x", dtype=torch.float32, facts={"shortcut": "none"})
    assert report.files.keys() == {"diffusers", "kohya"}
    assert report.family == BaseKind.FLUX
    assert len(report.checks) == 3  # diffusers reads both, kohya's rules one
    count = sum(map(len, components.values()))
    assert all(check.matched == check.expected == count for check in report.checks)
    assert verify_lora(tmp_path).passed
    for file in report.files.values():
        assert largest_error(deltas(read_lora(file).components), deltas(components)) < 1e-6
    kohya = load_file(tmp_path / "kohya" / "x.safetensors")
    linear1 = "lora_unet_single_blocks_0_linear1"
    assert kohya[f"{linear1}.lora_up.weight"].shape == (7 * 3072, 4 * report.rank)
    assert kohya[f"{linear1}.alpha"] == 4 * report.rank
    looked = inspect_lora(tmp_path / "kohya" / "x.safetensors")
    assert looked.family is BaseKind.FLUX
    assert looked.metadata["ss_base_model_version"] == "flux1"
    assert not [note for note in looked.notes if "alphas" in note]
    back = convert(tmp_path / "kohya" / "x.safetensors", tmp_path / "back", to="diffusers")
    assert largest_error(deltas(read_lora(back[0].folder).components), deltas(components)) < 1e-6


def test_a_lora_of_chroma_is_loaded_and_says_what_it_is_for(tmp_path):
    """Its blocks have the names and widths of FLUX.1's; only the header tells them apart, through a conversion too."""
    with torch.device("meta"):
        small = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
        base = {"transformer": hollow(ChromaTransformer2DModel(num_layers=2, num_single_layers=2, **small))}
    components = {"transformer": random_factors(base["transformer"], BLOCKS, seed=0)}
    facts = {"modelspec.architecture": FAMILIES["ChromaPipeline"].architecture}
    report = export_lora(tmp_path, components, models=base, name="x", dtype=torch.float32, facts=facts)
    assert report.family == BaseKind.CHROMA
    assert len(report.checks) == 3
    assert all(check.matched == check.expected == len(components["transformer"]) for check in report.checks)
    (again,) = convert(report.files["diffusers"], tmp_path / "again", to="kohya")
    for file in (*report.files.values(), *again.files.values()):
        looked = inspect_lora(file)
        assert looked.family is BaseKind.CHROMA
        assert not [note for note in looked.notes if "header says" in note or "alphas" in note]
        assert largest_error(deltas(read_lora(file).components), deltas(components)) < 1e-6
    assert looked.metadata["ss_base_model_version"] == "chroma"
    assert looked.metadata["modelspec.implementation"].endswith("lodestones/Chroma")


def test_a_file_that_was_trained_as_a_whole_is_read_as_diffusers_reads_it(tmp_path):
    """kohya's own trainer: q, k and v share lora_A, and alpha is not the rank."""
    generator, name = torch.Generator().manual_seed(0), "lora_unet_double_blocks_3_txt_attn_qkv"
    A, B = torch.randn(4, 3072, generator=generator), torch.randn(3 * 3072, 4, generator=generator)
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = deltas(read_lora(tmp_path / "x.safetensors").components)
    paths = [f"transformer_blocks.3.attn.add_{part}_proj" for part in "qkv"]
    parts = {path: LoraFactors(A, rows, 0.5) for path, rows in zip(paths, B.split(3072), strict=True)}
    assert largest_error(found, deltas({"transformer": parts})) < 1e-12
    assert verify_lora(tmp_path / "x.safetensors").passed


def test_a_kohya_file_is_fitted_to_a_base_and_merged_into_it(tmp_path):
    folder = saved(tiny_pipeline_flux)
    before = DiffusionPipeline.from_pretrained(folder).transformer.state_dict()
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, rows in {"double_blocks_1_img_attn_qkv": 96, "single_blocks_0_linear1": 224}.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(3, 32, generator=generator)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 3, generator=generator)
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    check_stored(read_headers(file), str(folder))
    fuse(file, str(folder), tmp_path / "fused")
    after = DiffusionPipeline.from_pretrained(tmp_path / "fused").transformer.state_dict()
    added = {name: after[name] - before[name] for name in after if not torch.equal(after[name], before[name])}
    double, single = "transformer_blocks.1.attn.to_{}.weight", "single_transformer_blocks.0."
    paths = [double.format(part) for part in "qkv"]
    paths += [*(f"{single}attn.to_{part}.weight" for part in "qkv"), f"{single}proj_mlp.weight"]
    assert added.keys() == set(paths)
    for chosen, name in ((paths[:3], "double_blocks_1_img_attn_qkv"), (paths[3:], "single_blocks_0_linear1")):
        whole = tensors[f"lora_unet_{name}.lora_up.weight"] @ tensors[f"lora_unet_{name}.lora_down.weight"]
        torch.testing.assert_close(torch.cat([added[path] for path in chosen]), whole, rtol=1e-5, atol=1e-5)
    save_file(
        {f"lora_unet_double_blocks_9_img_mlp_0.lora_{side}.weight": torch.ones(2, 2) for side in ("up", "down")}, file
    )
    with pytest.raises(
        ValueError, match="the base lacks 1 of the modules: transformer.transformer_blocks.9.ff.net.0.proj"
    ):
        check_stored(read_headers(file), str(folder))


@pytest.mark.parametrize("build", [tiny_pipeline_flux, tiny_pipeline_3])
def test_what_was_fused_into_a_transformer_is_extracted(tmp_path, build):
    pipe = DiffusionPipeline.from_pretrained(saved(build))
    blocks = ("attn.to_q", "ff.net.2", "proj_mlp", "single_transformer_blocks.1.proj_out")
    components = {
        "transformer": random_factors(pipe.transformer, blocks, seed=0),
        "text_encoder": random_factors(pipe.text_encoder, ("q_proj",), seed=1),
    }
    if build is tiny_pipeline_3:
        components["text_encoder_2"] = random_factors(pipe.text_encoder_2, ("q_proj",), seed=2)
    export_lora(tmp_path / "lora", components, dtype=torch.float32, name="x")
    fuse(tmp_path / "lora", str(saved(build)), tmp_path / "fused")
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "fused")
    torch.nn.init.zeros_(tuned.transformer.proj_out.weight)  # in no block
    tuned.save_pretrained(tmp_path / "fused")
    report = extract(str(tmp_path / "fused"), str(saved(build)), tmp_path / "out", 8, dtype=torch.float32)
    assert report.elsewhere == ["transformer.proj_out.weight"]
    assert largest_error(deltas(read_lora(tmp_path / "out").components), deltas(components)) < 1e-4


def test_names_are_inverse_to_each_other():
    for stack, layers in LAYERS.items():
        for layer in layers:
            theirs = f"{stack}.7.{layer}"
            assert from_kohya_name(f"lora_unet_{theirs.replace('.', '_')}") == theirs
            assert {layer_of(part) for part in parts_of(theirs, 42)} == {theirs}
            assert sum(parts_of(theirs, 42).values()) == 42
    assert layer_of("x_embedder") is layer_of("proj_out") is None
    assert from_kohya_name("lora_unet_double_blocks_0_img_attn_q") is None


def test_split_is_inverse_to_join_and_keeps_what_is_zero():
    generator = torch.Generator().manual_seed(0)
    paths = {"attn.to_q": 6, "attn.to_v": 6, "proj_mlp": 24, "proj_out": 6}
    modules = {
        f"single_transformer_blocks.4.{leaf}": LoraFactors(
            torch.randn(2, 6, generator=generator), torch.randn(out, 2, generator=generator), 1.0
        )
        for leaf, out in paths.items()
    }
    back = split(join(modules))
    assert back.keys() == modules.keys()
    for path, factors in modules.items():
        assert torch.equal(back[path].lora_A, factors.lora_A)
        assert torch.equal(back[path].lora_B, factors.lora_B)
    zero = {path: f._replace(lora_B=torch.zeros_like(f.lora_B)) for path, f in modules.items()}
    assert not any(f.lora_B.any() for f in split(join(zero)).values())
    assert zero.keys() <= split(join(zero)).keys()


def test_what_kohya_has_no_name_for_is_exported_for_diffusers_alone(tmp_path, components, base):
    more = random_factors(base["transformer"], ("x_embedder",), seed=2)
    both = components | {"transformer": components["transformer"] | more}
    assert export_lora(tmp_path, both, name="x").files.keys() == {"diffusers"}
    with pytest.raises(ValueError, match="a kohya file is for a unet or FLUX.1's blocks"):
        export_lora(tmp_path, both, name="x", formats=("kohya",))
