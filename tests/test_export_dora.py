"""DoRA in files: written for each loader and proved there; read in the layouts of strangers; merged, converted, cut."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from app.adapters import AdapterShelf
from dora_reference import decomposed
from lora_factors import random_factors
from reslora_diffusion import ResLoraConfig, attach, merged_factors
from reslora_diffusion.cli import app
from reslora_diffusion.core.functional import LoraFactors, Magnitude, with_magnitude
from reslora_diffusion.export import (
    combine,
    convert,
    export_lora,
    export_peft,
    fuse,
    inspect_lora,
    read_lora,
    resize,
    verify_lora,
)
from reslora_diffusion.export.geometry import naming_of
from reslora_diffusion.export.keys import classic_path, to_kohya
from tiny import tiny_pipeline_folder

LINEAR, CONVOLUTIONS = ("to_q", "to_v", "to_out.0"), ("conv1",)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())


def run(pipe: StableDiffusionPipeline) -> torch.Tensor:
    torch.manual_seed(0)
    latents, prompt = torch.randn(1, 16, 8, 8), torch.randint(1, 500, (1, 8))
    with torch.no_grad():
        states = pipe.text_encoder(prompt)[0]
        return pipe.unet(latents, torch.tensor([400]), states).sample


def trained(shortcut: str) -> tuple[StableDiffusionPipeline, dict]:
    """A pipeline with a DoRA that does something on its UNet and text encoder, and its merged factors."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
    generator = torch.Generator().manual_seed(2)
    for model, targets in ((pipe.unet, LINEAR), (pipe.text_encoder, ("q_proj", "v_proj", "out_proj", "fc1"))):
        attach(model, ResLoraConfig(r=3, target_modules=list(targets), shortcut=shortcut, use_dora=True))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * noise)
                elif "lora_" in name:
                    parameter.copy_(0.2 * noise)
    models = {"unet": pipe.unet.eval(), "text_encoder": pipe.text_encoder.eval()}
    return pipe, {component: merged_factors(model) for component, model in models.items()}


@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_the_files_of_a_training_mean_what_was_trained(tmp_path, pipeline, shortcut):
    pipe, components = trained(shortcut)
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    report = export_lora(tmp_path, components, dtype=torch.float32, models=models, name="dora")
    assert report.largest_error < 1e-5
    assert {check.loader.split()[0] for check in report.checks} >= {"diffusers", "ComfyUI's"}
    assert "diffusers drops its dora_scale" in str(report)

    wanted, base = run(pipe), run(pipeline)
    assert (wanted - base).abs().max() > 1e-3
    fresh = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
    fresh.load_lora_weights(tmp_path)
    assert torch.allclose(run(fresh), wanted, atol=1e-4)

    kohya = load_file(tmp_path / "kohya" / "dora.safetensors")
    naming = naming_of(components)
    for component, modules in components.items():
        bases = dict(getattr(pipeline, component).named_modules())
        for path, f in modules.items():
            weight = bases[path].weight
            name = to_kohya(component, classic_path(component, path), naming)
            A, B, alpha, scale = (
                kohya[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
            )
            assert scale.shape == (len(weight), 1)
            assert scale.dtype == torch.float32
            got = decomposed(weight, A, B, float(alpha) / len(A), scale, "base rows")
            exact = decomposed(weight, f.lora_A, f.lora_B, f.scaling, f.magnitude.values)
            assert (got - exact).norm() < 1e-5 * (exact - weight).norm()
            as_lora = decomposed(weight, A, B, float(alpha) / len(A), weight.norm(dim=1, keepdim=True), "base rows")
            assert (as_lora - exact).norm() > 0.1 * (exact - weight).norm()
    assert verify_lora(tmp_path, str(tiny_pipeline_folder())).passed
    assert inspect_lora(tmp_path).is_dora
    if shortcut == "block":
        assert report.rank == 6


def test_half_precision_keeps_the_lengths(tmp_path):
    """A magnitude in fp16 would be off by more than many a dW is large."""
    _, components = trained("none")
    export_lora(tmp_path, components, name="dora")
    for path, marker in (
        (tmp_path / "pytorch_lora_weights.safetensors", "magnitude"),
        (tmp_path / "kohya" / "dora.safetensors", "dora_scale"),
    ):
        kinds = {t.dtype for name, t in load_file(path).items() if marker in name}
        assert kinds == {torch.float32}
        with_header = inspect_lora(path)
        assert with_header.dtypes.keys() == {"F16"}


def test_a_folder_of_peft(tmp_path, pipeline):
    pipe, components = trained("block")
    export_peft(tmp_path, components["unet"], dtype=torch.float32, task_type=None, model=pipe.unet, component="unet")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    fresh = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
    loaded = PeftModel.from_pretrained(fresh.unet, tmp_path)
    states = torch.randn(1, 8, 32)
    args = torch.randn(1, 16, 8, 8), torch.tensor([400]), states
    with torch.no_grad():
        wanted, got = pipe.unet(*args).sample, loaded(*args).sample
        assert torch.allclose(got, wanted, atol=1e-4)
        assert (wanted - pipeline.unet(*args).sample).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------- of strangers


def stranger(tmp_path, pipeline, layout: str) -> tuple:
    """A file as another program would write it: (path, factors, lengths by module, axis)."""
    targets = (*LINEAR, *CONVOLUTIONS)
    factors = random_factors(pipeline.unet, targets, seed=1, scalings=(0.5, 1.0), std=0.2)
    generator = torch.Generator().manual_seed(5)
    tensors, lengths = {}, {}
    bases = dict(pipeline.unet.named_modules())
    for path, f in factors.items():
        W = bases[path].weight.detach()
        trailing = (1,) * (W.ndim - 2)
        fresh = W.flatten(1).norm(dim=1) if layout != "columns" else W.transpose(0, 1).flatten(1).norm(dim=1)
        m = lengths[path] = fresh * (1 + 0.2 * torch.randn(fresh.shape, generator=generator))
        name = f"lora_unet_{path.replace('.', '_')}"
        if layout == "peft":
            tensors[f"unet.{path}.lora_A.weight"] = f.lora_A
            tensors[f"unet.{path}.lora_B.weight"] = f.lora_B * f.scaling
            tensors[f"unet.{path}.lora_magnitude_vector"] = m if W.ndim == 2 else m.reshape(1, -1, 1, 1)
            continue
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = f.lora_A, f.lora_B
        tensors[f"{name}.alpha"] = torch.tensor(f.scaling * len(f.lora_A))
        shape = (1, -1, *trailing) if layout == "columns" else (-1, 1, *trailing)
        tensors[f"{name}.dora_scale"] = m.reshape(shape)
    path = tmp_path / f"{layout}.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return path, factors, lengths, "columns" if layout == "columns" else "rows"


@pytest.mark.parametrize("layout", ["peft", "kohya", "columns"])
def test_a_stranger_s_dora_is_merged_as_its_formula_says(tmp_path, pipeline, layout):
    path, factors, lengths, axis = stranger(tmp_path, pipeline, layout)
    seen = inspect_lora(path)
    assert seen.healthy
    assert {m.magnitude for m in seen.modules} == {axis}
    assert "a DoRA for" in str(seen)
    assert any("diffusers drops" in note for note in seen.notes) == (layout != "peft")
    for scale in (1.0, 0.5):
        fuse(path, str(tiny_pipeline_folder()), tmp_path / f"fused{scale}", scale=scale, dtype=torch.float32)
        fused = StableDiffusionPipeline.from_pretrained(tmp_path / f"fused{scale}")
        bases, merged = dict(pipeline.unet.named_modules()), dict(fused.unet.named_modules())
        for name, f in factors.items():
            W = bases[name].weight.double()
            exact = decomposed(W, f.lora_A, f.lora_B, f.scaling, lengths[name], axis)
            wanted = W + scale * (exact - W)
            assert (exact - W).norm() > 1e-2 * W.norm()
            assert (merged[name].weight - wanted).norm() < 1e-6 * wanted.norm(), name
    result = verify_lora(path, str(tiny_pipeline_folder()))
    assert result.passed, result


def test_who_does_not_know_what_to_do_with_it_refuses_it(tmp_path, pipeline):
    path, *_ = stranger(tmp_path, pipeline, "peft")
    with pytest.raises(ValueError, match="holds DoRA, not plain LoRA"):
        read_lora(path)
    with pytest.raises(ValueError, match="holds DoRA, not plain LoRA"):
        combine([path, path], tmp_path / "both")


def test_conversions(tmp_path, pipeline):
    base = str(tiny_pipeline_folder())
    path, factors, lengths, _ = stranger(tmp_path, pipeline, "peft")
    bases = dict(pipeline.unet.named_modules())
    # for LyCORIS without a base, for ComfyUI with one, and back
    (report,) = convert(path, tmp_path / "as_trained.safetensors", "kohya")
    assert "as LyCORIS trains them" in str(report)
    (report,) = convert(path, tmp_path / "for_comfyui.safetensors", "kohya", base=base)
    assert "ComfyUI's rule" in str(report)
    for name, kohya_axis in (("as_trained", "rows"), ("for_comfyui", "base rows")):
        tensors = load_file(tmp_path / f"{name}.safetensors")
        for module, f in factors.items():
            key, W = f"lora_unet_{module.replace('.', '_')}", bases[module].weight
            A, B, alpha = (tensors[f"{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
            got = decomposed(W, A, B, float(alpha) / len(A), tensors[f"{key}.dora_scale"], kohya_axis)
            exact = decomposed(W, f.lora_A, f.lora_B, f.scaling, lengths[module])
            assert (got - exact).norm() < 1e-5 * (exact - W).norm()
        fuse(tmp_path / f"{name}.safetensors", base, tmp_path / f"fused_{name}", dtype=torch.float32)
        merged = dict(StableDiffusionPipeline.from_pretrained(tmp_path / f"fused_{name}").unet.named_modules())
        for module, f in factors.items():
            exact = decomposed(bases[module].weight, f.lora_A, f.lora_B, f.scaling, lengths[module])
            assert (merged[module].weight - exact).norm() < 1e-6 * exact.norm()
    with pytest.raises(ValueError, match="norms of the base, as ComfyUI has them"):
        convert(tmp_path / "for_comfyui.safetensors", tmp_path / "back", "diffusers")
    for source, more in (("as_trained", {}), ("for_comfyui", {"base": base})):
        convert(tmp_path / f"{source}.safetensors", tmp_path / f"back_{source}", "diffusers", **more)
        back = read_lora(tmp_path / f"back_{source}", dora=True).components["unet"]
        for module, m in lengths.items():
            assert torch.allclose(back[module].magnitude.values.flatten(), m, rtol=1e-5)
    convert(path, tmp_path / "peft", "peft")
    assert verify_lora(tmp_path / "peft" / "unet").passed
    # lengths of columns have no form in PEFT
    columns, *_ = stranger(tmp_path, pipeline, "columns")
    with pytest.raises(ValueError, match="are of columns"):
        convert(columns, tmp_path / "no", "diffusers")
    assert not (tmp_path / "no").exists()
    (report,) = convert(columns, tmp_path / "plain", "diffusers", base=base, rank=64, allow_lossy=True)
    assert "of what the DoRA changes" in str(report)
    assert not inspect_lora(tmp_path / "plain").is_dora


def test_a_plain_lora_of_a_dora(tmp_path, pipeline):
    """At full rank it is exact; at a smaller one the loss is said, and a large one must be allowed."""
    base = str(tiny_pipeline_folder())
    path, factors, lengths, _ = stranger(tmp_path, pipeline, "kohya")
    bases = dict(pipeline.unet.named_modules())
    convert(path, tmp_path / "exact", "diffusers", base=base, rank=1000, dtype=torch.float32)
    plain = read_lora(tmp_path / "exact").components["unet"]
    for module, f in factors.items():
        W = bases[module].weight.double()
        change = decomposed(W, f.lora_A, f.lora_B, f.scaling, lengths[module]) - W
        A, B, scaling = plain[module]
        got = scaling * B.double().flatten(1) @ A.double().flatten(1)
        assert (got.reshape(W.shape) - change).norm() < 1e-4 * change.norm()
    result = CliRunner().invoke(
        app,
        ["convert", str(path), "--to", "kohya", "-o", str(tmp_path / "x.safetensors"), "--base", base, "--rank", "2"],
    )
    assert result.exit_code == 1
    assert "of what the DoRA changes" in result.output
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(ValueError, match="wanted --base MODEL beside --rank"):
        convert(path, tmp_path / "x", "diffusers", rank=4)


def test_resizing_keeps_the_lengths(tmp_path, pipeline):
    path, _, lengths, _ = stranger(tmp_path, pipeline, "peft")
    resize(path, tmp_path / "small", 2, allow_lossy=True)
    small = read_lora(tmp_path / "small", dora=True).components["unet"]
    assert {len(f.lora_A) for f in small.values()} == {2}
    for module, m in lengths.items():
        assert torch.allclose(small[module].magnitude.values.flatten(), m)


def test_broken_magnitudes_are_named(tmp_path, pipeline):
    path, *_ = stranger(tmp_path, pipeline, "kohya")
    tensors = load_file(path)
    first = next(name for name in tensors if name.endswith("to_q.dora_scale"))
    for value, said in (
        (torch.ones(3, 1), "magnitudes of neither rows nor columns in 1 modules"),
        (torch.full_like(tensors[first], float("nan")), "NaN"),
    ):
        save_file(tensors | {first: value}, tmp_path / "broken.safetensors")
        with pytest.raises(ValueError, match=said):
            fuse(tmp_path / "broken.safetensors", str(tiny_pipeline_folder()), tmp_path / "out")
    lonely = {name: t for name, t in tensors.items() if not name.startswith(first.removesuffix("dora_scale") + "lora")}
    save_file(lonely, tmp_path / "lonely.safetensors")
    with pytest.raises(ValueError, match="alpha and dora_scale without lora_A and lora_B|dora_scale and alpha without"):
        inspect_lora(tmp_path / "lonely.safetensors")


def test_factors_of_a_dora_are_three_and_a_magnitude() -> None:
    import copy
    import pickle

    A, B = torch.ones(2, 3), torch.ones(4, 2)
    f = with_magnitude(LoraFactors(A, B, 1.0), Magnitude(torch.ones(4, 1)))
    for same in (copy.deepcopy(f), pickle.loads(pickle.dumps(f)), f._replace(scaling=2.0)):
        assert torch.equal(same.magnitude.values, torch.ones(4, 1))
    first, second, scaling = f
    assert (first is A, second is B, scaling) == (True, True, 1.0)


def test_the_page_generates_with_what_was_trained(tmp_path, pipeline):
    """A DoRA of diffusers' layout is loaded as one; a kohya file goes by its own rows."""
    for layout in ("peft", "kohya"):
        path, factors, lengths, _ = stranger(tmp_path, pipeline, layout)
        pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder())
        shelf = AdapterShelf(pipe)
        shelf.load(shelf.card(path, "a").adapter)
        bases = dict(pipeline.unet.named_modules())
        for name, layer in pipe.unet.named_modules():
            if name in factors:
                layer.merge()
                f = factors[name]
                exact = decomposed(bases[name].weight, f.lora_A, f.lora_B, f.scaling, lengths[name])
                assert (layer.get_base_layer().weight - exact).norm() < 1e-5 * exact.norm()
