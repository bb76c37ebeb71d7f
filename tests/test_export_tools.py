"""Tools for LoRA files against dense float64 arithmetic, on real tiny models."""

import json
import math
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from lora_factors import ATTENTION, CLIP, dense, largest_error, loaded_deltas, random_factors, wanted_deltas
from reslora_diffusion.core.functional import LoraFactors
from reslora_diffusion.export import (
    CheckFailed,
    combine,
    convert,
    export_lora,
    export_trained,
    extract,
    fuse,
    inspect_lora,
    read_lora,
    read_trained,
    resize,
    save_merged,
    verify_lora,
    write_lora_file,
)
from reslora_diffusion.export.factors import delta_norm, relative_error
from reslora_diffusion.export.ranks import smallest_rank
from tiny import tiny_pipeline, tiny_pipeline_folder

BASE = str(tiny_pipeline_folder())


def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)


@pytest.fixture(scope="module")
def components():
    pipe = pipeline()
    return {
        "unet": random_factors(pipe.unet, (*ATTENTION, "conv1"), 0, (2, 4), (0.5, 1.5)),
        "text_encoder": random_factors(pipe.text_encoder, CLIP, 1, (3,), (2.0,)),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory, components):
    """An exact file, in float32."""
    path = tmp_path_factory.mktemp("source") / "panda.safetensors"
    facts = {"base_model": "tiny", "trigger_words": "sks panda", "ss_epoch": "3"}
    write_lora_file(path, components, "kohya", dtype=torch.float32, facts=facts)
    return path


def strengthened(components, factor):
    return {
        c: {path: f._replace(scaling=f.scaling * factor) for path, f in modules.items()}
        for c, modules in components.items()
    }


def check(source, components, tolerance=1e-6):
    found = read_lora(source).components
    for component, factors in components.items():
        got = {path: delta for path, delta in wanted_deltas(found[component]).items() if delta.any()}
        assert largest_error(got, wanted_deltas(factors)) < tolerance


@pytest.mark.parametrize("shape", [(3, 7, 20), (7, 3, 20), (5, 5, 2), (1, 1, 30_000)])
def test_ranks_beyond_the_matrix_cost_no_more_than_the_file(tmp_path, shape):
    out, width, rank = shape
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
    factors = LoraFactors(A, B, 0.5)
    save_file({"unet.conv_in.lora_A.weight": A, "unet.conv_in.lora_B.weight": B / 2}, tmp_path / "x.safetensors")
    assert delta_norm(factors) == pytest.approx(dense(factors).norm().item())
    assert inspect_lora(tmp_path / "x.safetensors").norm == pytest.approx(dense(factors).norm().item())


def test_norms_and_errors_need_no_dense_matrix(components):
    for factors in components["unet"].values():
        assert delta_norm(factors) == pytest.approx(dense(factors).norm().item(), rel=1e-9)
        other = LoraFactors(factors.lora_A * 1.01, factors.lora_B, factors.scaling)
        assert relative_error(other, factors) == pytest.approx(0.01, rel=1e-4)
        assert relative_error(factors, factors) < 1e-6


# --------------------------------------------------------------------------------------------------- conversions


def test_there_and_back_through_every_dialect(tmp_path, source, components):
    convert(source, tmp_path / "a", "diffusers")
    convert(tmp_path / "a", tmp_path / "b", "peft")
    convert(tmp_path / "b", tmp_path / "c.safetensors", "kohya")
    convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors", "diffusers")
    for place in ("a", "b", "c.safetensors", "d.safetensors"):
        check(tmp_path / place, components)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "export_report.json",
        "pytorch_lora_weights.safetensors",
    ]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["text_encoder", "unet"]
    assert read_lora(tmp_path / "d.safetensors").metadata["reslora.trigger_words"] == "sks panda"
    kohya = read_lora(tmp_path / "c.safetensors").metadata
    assert kohya["ss_output_name"] == "c"
    with pytest.raises(ValueError, match="PEFT keeps its configuration beside"):
        convert(source, tmp_path / "e.safetensors", "peft")


def test_conversion_repairs_what_diffusers_misreads(tmp_path, components):
    """A kohya file of per-module ranks and alphas, as kohya's trainer with conv_dim writes it."""
    source = tmp_path / "mixed.safetensors"
    tensors = {}
    for number, (path, f) in enumerate(components["unet"].items()):
        name = "lora_unet_" + path.replace(".", "_")
        alpha = 1.0 + number % 3
        scaling = alpha / f.lora_A.shape[0]
        tensors[f"{name}.lora_down.weight"] = f.lora_A
        tensors[f"{name}.lora_up.weight"] = f.lora_B * f.scaling / scaling
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, source)
    check(source, {"unet": components["unet"]})
    assert "3 different alphas in a kohya file: diffusers applies one" in str(inspect_lora(source))
    broken = verify_lora(source, BASE)
    assert not broken.passed
    assert "reads" in broken.problems[0]
    convert(source, tmp_path / "whole", "diffusers")
    assert verify_lora(tmp_path / "whole", BASE).passed
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path / "whole")
    assert largest_error(loaded_deltas(pipe.unet), wanted_deltas(components["unet"])) < 1e-6


def test_files_that_diffusers_itself_saves_are_read_with_their_alphas(tmp_path):
    pipe = pipeline()
    layers, metadata = {}, {}
    for component, targets in (("unet", list(ATTENTION)), ("text_encoder", ["q_proj", "fc1"])):
        model = getattr(pipe, component)
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=targets, rank_pattern={targets[0]: 2}, alpha_pattern={targets[1]: 1}
        )
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(model)
        metadata[f"{component}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers, **metadata)
    found = read_lora(tmp_path)
    for component in ("unet", "text_encoder"):
        wanted = loaded_deltas(getattr(pipe, component))
        assert largest_error(wanted_deltas(found.components[component]), wanted) < 1e-6
    assert "lora_adapter_metadata, which diffusers before 0.34 ignores" in str(inspect_lora(tmp_path))
    resize(tmp_path, tmp_path / "out", "full")
    check(tmp_path / "out", found.components)


# ------------------------------------------------------------------------------------------------ resize, combine


def test_resize_is_the_truncated_svd(tmp_path, source, components):
    with pytest.raises(CheckFailed, match="loses more than 5%"):
        resize(source, tmp_path / "no.safetensors", 1)
    assert not (tmp_path / "no.safetensors").exists()
    resize(source, tmp_path / "one.safetensors", 1, allow_lossy=True)
    found = read_lora(tmp_path / "one.safetensors")
    for path, factors in components["unet"].items():
        U, S, Vh = torch.linalg.svd(dense(factors), full_matrices=False)
        nearest = S[0] * U[:, :1] @ Vh[:1]
        assert (dense(found.components["unet"][path]) - nearest).norm() < 1e-5 * nearest.norm()
    resize(source, tmp_path / "more", 16)
    check(tmp_path / "more", components)


def test_auto_is_the_smallest_rank_within_five_percent(components):
    rank = smallest_rank(components)
    losses = {}
    for k in (rank - 1, rank):
        values = [torch.linalg.svdvals(dense(f)) for modules in components.values() for f in modules.values()]
        losses[k] = max((v[k:].norm() / v.norm()).item() for v in values)
    assert losses[rank] <= 0.05 < losses[rank - 1]


def test_combine_is_the_weighted_sum(tmp_path, source, components):
    pipe = pipeline()
    other = {"unet": random_factors(pipe.unet, ("to_q", "ff.net.2"), 7, (3,), (1.0,))}
    second = tmp_path / "style.safetensors"
    write_lora_file(second, other, "diffusers", dtype=torch.float32, facts={"trigger_words": "flat style"})
    combine([source, second], tmp_path / "both", [0.7, -0.4])
    pipe.load_lora_weights(tmp_path / "both")
    first, style = wanted_deltas(components["unet"]), wanted_deltas(other["unet"])
    wanted = {name: 0.7 * first.get(name, 0) - 0.4 * style.get(name, 0) for name in dict.fromkeys([*first, *style])}
    assert largest_error(loaded_deltas(pipe.unet), wanted) < 1e-6
    metadata = read_lora(tmp_path / "both").metadata
    assert metadata["reslora.combined_from"] == "0.7 x panda.safetensors + -0.4 x style.safetensors"
    assert metadata["reslora.trigger_words"] == "sks panda, flat style"
    with pytest.raises(ValueError, match="got 1 weights for 2 files"):
        combine([source, second], tmp_path / "no", [1.0])
    narrow = {"unet": {path: f._replace(lora_A=f.lora_A[:, :-1]) for path, f in other["unet"].items()}}
    write_lora_file(tmp_path / "narrow.safetensors", narrow, "kohya")
    with pytest.raises(ValueError, match=r"cannot be combined:\n  - \d+ modules have different shapes"):
        combine([second, tmp_path / "narrow.safetensors"], tmp_path / "no")
    assert not (tmp_path / "no").exists()


# --------------------------------------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def fused(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("fused") / "model"
    report = fuse(source, BASE, folder, scale=0.5)
    assert report.rounding < 1e-6
    return folder


def parameters(model) -> dict[str, torch.Tensor]:
    return {name.removeprefix("text_model."): p.detach().double() for name, p in model.named_parameters()}


def test_fuse_adds_the_delta_and_nothing_else(fused, components):
    base, result = pipeline(), StableDiffusionPipeline.from_pretrained(fused)
    for component in ("unet", "text_encoder", "vae"):
        before, after = parameters(getattr(base, component)), parameters(getattr(result, component))
        deltas = wanted_deltas(components.get(component, {}))
        assert before.keys() == after.keys()
        for name, weight in before.items():
            delta = deltas.pop(name.removesuffix(".weight"), None)
            wanted = weight if delta is None else weight + 0.5 * delta.reshape(weight.shape)
            assert torch.allclose(after[name], wanted, atol=1e-6)
        assert not deltas


def test_fuse_is_what_fuse_lora_does(fused, source, tmp_path):
    pipe = pipeline()
    pipe.load_lora_weights(source.parent, weight_name=source.name)
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    ours = parameters(StableDiffusionPipeline.from_pretrained(fused).unet)
    for name, weight in parameters(pipe.unet).items():
        assert torch.allclose(ours[name], weight, atol=1e-6)


def test_fuse_replaces_only_when_told_to(fused, source, tmp_path):
    with pytest.raises(ValueError, match="is not empty"):
        fuse(source, BASE, fused)
    copy = tmp_path / "copy"
    shutil.copytree(fused, copy)
    report = fuse(source, BASE, copy, dtype=torch.bfloat16, overwrite=True)
    assert report.dtype == "bfloat16"
    assert 1e-4 < report.rounding < 1e-1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]
    assert {t.dtype for t in load_file(copy / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.bfloat16
    }
    with pytest.raises(CheckFailed, match="overflows torch.float16"):
        fuse(source, BASE, tmp_path / "large", scale=1e8, dtype=torch.float16)
    assert not (tmp_path / "large").exists()


def test_extract_finds_what_was_fused(fused, components, tmp_path):
    """The exact LoRA comes back, if it has the rank for it."""
    report = extract(str(fused), BASE, tmp_path / "x", 4, modules="all", dtype=torch.float32)
    assert report.energy_kept == pytest.approx(1, abs=1e-6)
    assert report.energy_elsewhere == 0
    halved = strengthened(components, 0.5)
    check(tmp_path / "x", halved, 1e-4)
    without = extract(str(fused), BASE, tmp_path / "y.safetensors", 1)
    assert 0 < without.energy_elsewhere < 1
    assert any("conv1" in name for name in without.elsewhere)
    assert 0.3 < without.energy_kept < 1
    values = {path: torch.linalg.svdvals(dense(f)) for path, f in halved["unet"].items() if "attn" in path}
    for path, v in values.items():
        assert without.losses["unet", path].energy_kept == pytest.approx((v[0] / v.norm()).item() ** 2, rel=1e-3)
    assert "of the whole change is in" in str(without)


def test_extract_refuses_what_is_not_alike(tmp_path, fused):
    with pytest.raises(ValueError, match="are equal in all such modules"):
        extract(BASE, BASE, tmp_path / "x", 4)
    other = tmp_path / "wide"
    tiny_pipeline(other)
    config = json.loads((other / "model_index.json").read_text())
    config["unet"] = ["diffusers", "UNet2DModel"]
    (other / "model_index.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="are not alike: unet: UNet2DModel and UNet2DConditionModel"):
        extract(str(other), BASE, tmp_path / "x", 4)
    with pytest.raises(ValueError, match=r"rank: got 0.*\n.*modules: got 'some'"):
        extract(BASE, BASE, tmp_path / "x", 0, modules="some")
    assert not (tmp_path / "x").exists()


# -------------------------------------------------------------------------------------------------- verify, inspect


def test_verify_loads_into_the_base_and_into_placeholders(tmp_path, components):
    export_lora(tmp_path, components, name="x")
    for base in (BASE, None):
        result = verify_lora(tmp_path, base)
        assert result.passed, str(result)
        assert [check.file for check in result.checks] == ["pytorch_lora_weights.safetensors", "x.safetensors"]
        assert {check.matched for check in result.checks} == {result.modules}
        assert max(check.largest_relative_error for check in result.checks) < 1e-6
    convert(tmp_path, tmp_path / "peft", "peft")
    result = verify_lora(tmp_path / "peft", BASE)
    assert result.passed
    assert len(result.checks) == 2


def test_verify_notices_a_file_that_was_changed(tmp_path, components):
    export_lora(tmp_path, components, name="x")
    path = tmp_path / "kohya" / "x.safetensors"
    tensors = load_file(path)
    save_file({name: t * 2 if "lora_up" in name and "attn2" in name else t for name, t in tensors.items()}, path)
    problems = "\n".join(verify_lora(tmp_path, BASE).problems)
    assert "x.safetensors differs from pytorch_lora_weights.safetensors in unet." in problems
    assert "x.safetensors is not the file that export_report.json describes" in problems


def test_verify_leaves_older_exports_beside_it_alone(tmp_path, components):
    export_lora(tmp_path, {"unet": components["unet"]}, name="old")
    export_lora(tmp_path, components, name="new")
    result = verify_lora(tmp_path)
    assert result.passed
    assert result.notes == ["old.safetensors is of another export than export_report.json, and was not looked at"]
    report = json.loads((tmp_path / "export_report.json").read_text())
    assert report["files"]["kohya"]["path"] == "kohya/new.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_inspect_measures_the_dense_update(tmp_path, components, dtype):
    path = tmp_path / "x.safetensors"
    tensors = {}
    for name, f in components["unet"].items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = f.lora_A.to(dtype), f.lora_B.to(dtype)
        tensors[f"{key}.alpha"] = torch.tensor(1.5)
    save_file(tensors, path)
    found = inspect_lora(path)
    reference = read_lora(path).components["unet"]
    for module in found.modules:
        wanted = dense(reference[module.path])
        assert module.norm == pytest.approx(wanted.norm().item(), rel=1e-6)
        assert module.rank == reference[module.path].lora_A.shape[0]
        assert module.alpha == 1.5
        values = torch.linalg.svdvals(wanted)
        k = module.rank_needed
        assert (values[k:].norm() / values.norm()) <= 0.05 < (values[k - 1 :].norm() / values.norm())
    assert found.rank_needed == smallest_rank({"unet": reference})
    assert found.norm == pytest.approx(
        math.sqrt(sum(dense(f).norm().item() ** 2 for f in reference.values())), rel=1e-6
    )
    json.dumps(found.to_dict(), allow_nan=False)


def test_inspect_says_what_it_is_and_what_is_wrong(tmp_path, source, components):
    found = inspect_lora(source)
    assert found.healthy
    assert found.facts["trigger words"] == "sks panda"
    assert found.facts["base model"] == "tiny"
    text = str(found)
    assert "a LoRA for a custom Stable Diffusion geometry, in kohya keys, stored as F32" in text
    tensors = load_file(source)
    first = next(name for name in tensors if "lora_up" in name)
    save_file(tensors | {first: tensors[first] * float("nan")}, tmp_path / "nan.safetensors")
    found = inspect_lora(tmp_path / "nan.safetensors")
    assert not found.healthy
    assert "1 of" in found.problems[0]
    json.dumps(found.to_dict(), allow_nan=False)
    zeros = {name: t * 0 if "lora_up" in name else t for name, t in tensors.items()}
    save_file(zeros, tmp_path / "zero.safetensors")
    assert "the file changes nothing" in inspect_lora(tmp_path / "zero.safetensors").problems[0]


def test_inspect_notices_a_header_that_contradicts_the_shapes(tmp_path):
    wide = LoraFactors(torch.ones(1, 768), torch.ones(320, 1), 1.0)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    file = tmp_path / "x.safetensors"
    write_lora_file(file, {"unet": {path: wide}}, "kohya")
    tensors = load_file(file)
    save_file(tensors, file, metadata={"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    assert inspect_lora(file).notes == ["its header says Stable Diffusion XL, its shapes say Stable Diffusion 1.x"]


# ------------------------------------------------------------------------------------------------------------ runs


def make_run(folder, components, steps=(10, 20), finished=True):
    """A training's output folder, as the trainer lays it out."""
    for step in steps:
        scaled = strengthened(components, step)
        facts = {"steps": step, "shortcut": "input", "base_model": "tiny"}
        checkpoint = folder / f"checkpoint-{step}"
        export_lora(checkpoint, scaled, name=folder.name, facts=facts)
        (checkpoint / "state").mkdir()
        save_merged(checkpoint / "state", scaled)
        if finished and step == steps[-1]:
            export_lora(folder, scaled, name=folder.name, facts=facts)
    (folder / "run.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def small():
    return {"unet": random_factors(pipeline().unet, ("to_q",), 2, (3,), (0.7,))}


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_is_exported_in_full_precision(tmp_path, small, finished):
    run = make_run(tmp_path / "panda", small, finished=finished)
    trained = read_trained(run)
    assert set(trained.lora.dtypes) == {"float32"}
    assert trained.name == "panda"
    export_trained(run, tmp_path / "out", dtype=torch.float32, base=BASE)
    check(tmp_path / "out", strengthened(small, 20))
    assert read_lora(tmp_path / "out" / "kohya" / "panda.safetensors").metadata["reslora.steps"] == "20"
    export_trained(run / "checkpoint-10", tmp_path / "ten.safetensors", name="x", dtype=torch.float32)
    check(tmp_path / "ten.safetensors", strengthened(small, 10))
    with pytest.raises(CheckFailed, match="allow_lossy"):
        export_trained(run, tmp_path / "no", rank=1)


def test_a_run_without_full_precision_or_without_a_lora(tmp_path, small):
    run = make_run(tmp_path / "panda", small, steps=(10,))
    (run / "checkpoint-10" / "state" / "merged.safetensors").unlink()
    assert set(read_trained(run).lora.dtypes) == {"float16"}
    empty = tmp_path / "empty"
    (empty / "state").mkdir(parents=True)
    with pytest.raises(ValueError, match="has trained, but holds no LoRA yet"):
        read_trained(empty)


def test_merged_factors_of_another_lora_are_not_taken(tmp_path, small):
    run = make_run(tmp_path / "panda", small)
    save_merged(run / "checkpoint-20" / "state", small)
    assert set(read_trained(run).lora.dtypes) == {"float16"}
