"""Exports in the programs that load them: real diffusers pipelines, and a process that does not know this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from forks import run_forked
from lora_factors import ATTENTION, CLIP, largest_error, loaded_deltas, random_factors, wanted_deltas
from reslora_diffusion import ResLoraConfig, attach, merged_factors
from reslora_diffusion.export import CheckFailed, export_lora, export_peft, read_lora, save_merged, write_lora_file
from reslora_diffusion.export.factors import padded
from tiny import tiny_pipeline_folder

DIFFUSERS = "pytorch_lora_weights.safetensors"
TRIGGER = 's\u00f6s \t \u2028 "sks" \x7f'
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def fresh_pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder(), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def components():
    """Mixed ranks and scalings, which is what loaders misread most."""
    pipe = fresh_pipeline()
    return {
        "unet": random_factors(pipe.unet, (*ATTENTION, "ff.net.2", "conv1", "proj_in"), 0, (2, 3, 4), (0.5, 1.0, 3.7)),
        "text_encoder": random_factors(pipe.text_encoder, CLIP, 1, (4, 1), (2.0, 0.3)),
    }


@pytest.fixture(scope="module")
def out(tmp_path_factory, components):
    folder = tmp_path_factory.mktemp("export") / "out"
    facts = {"base_model": "tiny", "shortcut": "input", "trigger_words": "sks", "steps": 7, "ss_epoch": "3"}
    export_lora(folder, components, name="panda", dtype=torch.float32, facts=facts)
    return folder


def check_pipe(pipe, components, tolerance=1e-6):
    assert largest_error(loaded_deltas(pipe.unet), wanted_deltas(components["unet"])) < tolerance
    assert largest_error(loaded_deltas(pipe.text_encoder), wanted_deltas(components["text_encoder"])) < tolerance


def test_both_files_load_into_text_to_image_and_mean_what_was_exported(out, components):
    for path in (out / DIFFUSERS, out / "kohya" / "panda.safetensors"):
        pipe = fresh_pipeline()
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        check_pipe(pipe, components)


def test_a_folder_loads_by_its_name_alone(out, components):
    pipe = fresh_pipeline()
    pipe.load_lora_weights(str(out))
    check_pipe(pipe, components)


@pytest.mark.parametrize("kind", [AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_it_loads_into_the_other_pipelines(out, components, kind):
    pipe = kind.from_pipe(fresh_pipeline())
    pipe.load_lora_weights(out)
    check_pipe(pipe, components)


def test_a_block_shortcut_leaves_the_trainer_whole(tmp_path):
    """Attached by the core, exported, loaded by plain diffusers: the same numbers, at rank (num_previous + 1) r."""
    trained, plain = fresh_pipeline().unet, fresh_pipeline()
    attach(trained, ResLoraConfig(r=2, lora_alpha=3, target_modules=list(ATTENTION), shortcut="block", num_previous=2))
    torch.manual_seed(0)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(2, 16, 8, 8), torch.tensor([500, 20]), torch.randn(2, 5, 32)
    with torch.no_grad():
        base, wanted = plain.unet(*inputs).sample, trained(*inputs).sample
        facts = {"shortcut": "block", "num_previous": 2}
        report = export_lora(tmp_path, {"unet": merged_factors(trained)}, dtype=torch.float32, facts=facts)
        assert report.rank == 6
        plain.load_lora_weights(tmp_path)
        got = plain.unet(*inputs).sample
    assert (wanted - base).abs().max() > 0.1
    assert torch.allclose(got, wanted, atol=1e-4)


def test_images_are_those_of_the_merged_weights(out, components):
    def generate(pipe) -> np.ndarray:
        start = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(3), "output_type": "np"}
        text = pipe("a photo of a dog", height=64, width=64, **settings).images[0]
        image = AutoPipelineForImage2Image.from_pipe(pipe)
        image.set_progress_bar_config(disable=True)
        return np.concatenate([text, image("a dog", start, strength=1.0, **settings).images[0]])

    base, merged, loaded = fresh_pipeline(), fresh_pipeline(), fresh_pipeline()
    for component, deltas in components.items():
        modules = {n.removeprefix("text_model."): m for n, m in getattr(merged, component).named_modules()}
        for name, delta in wanted_deltas(deltas).items():
            weight = modules[name].weight
            weight.data += delta.float().reshape(weight.shape)
    loaded.load_lora_weights(out)
    reference = generate(merged)
    assert np.abs(generate(base) - reference).max() > 0.01
    assert np.abs(generate(loaded) - reference).max() < 1e-4


def test_a_process_without_this_package_loads_the_files(out):
    program = f"""
import sys
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({str(tiny_pipeline_folder())!r}, safety_checker=None)
pipe.load_lora_weights({str(out)!r}, adapter_name="a")
pipe.load_lora_weights({str(out / "kohya")!r}, weight_name="panda.safetensors", adapter_name="b")
pipe.set_adapters(["a", "b"], [0.5, 0.5])
assert "reslora_diffusion" not in sys.modules
print(pipe.get_list_adapters())
"""
    done = run_forked(program)
    assert done.returncode == 0, done.stderr
    assert "'unet': ['a', 'b'], 'text_encoder': ['a', 'b']" in done.stdout


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_any_choice_of_modules_loads(tmp_path, component):
    """diffusers reads kohya's text encoders right only if there is an out_proj; whatever is adapted must arrive."""
    choices = {
        "unet": [("to_k",), ("net.2", "proj_in"), ("conv1", "time_emb_proj"), ("conv_in", "linear_1"), ("s.0.conv",)],
        "text_encoder": [("q_proj", "v_proj"), ("fc1",), ("k_proj", "fc2"), ("out_proj",)],
    }
    pipe = fresh_pipeline()
    model = getattr(pipe, component)
    for number, targets in enumerate(choices[component]):
        factors = random_factors(model, targets, number)
        assert factors
        export_lora(tmp_path / str(number), {component: factors}, dtype=torch.float32, name="x")
        for place, file in ((tmp_path / str(number), DIFFUSERS), (tmp_path / str(number) / "kohya", "x.safetensors")):
            pipe.load_lora_weights(place, weight_name=file)
            got = {name: delta for name, delta in loaded_deltas(model).items() if delta.any()}
            assert largest_error(got, wanted_deltas(factors)) < 1e-6
            pipe.unload_lora_weights()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_what_rounding_costs(tmp_path, components, dtype):
    report = export_lora(tmp_path, components, dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / DIFFUSERS).values()} == {dtype}
    assert 0 < report.largest_error < TOLERANCE[dtype]
    pipe = fresh_pipeline()
    pipe.load_lora_weights(tmp_path)
    check_pipe(pipe, components, TOLERANCE[dtype])


def test_the_diffusers_file_is_portable(out, components):
    """No alphas, one rank, metadata that says the same, CLIP keys in both layouts: every version reads it alike."""
    with safe_open(out / DIFFUSERS, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
        ranks = {file.get_slice(k).get_shape()[0] for k in keys if "lora_A" in k}
    assert ranks == {4}
    assert not any("alpha" in key for key in keys)
    stated = json.loads(metadata["lora_adapter_metadata"])
    assert {name.partition(".")[2] for name in stated} == {"r", "lora_alpha", "target_modules"}
    for component, modules in components.items():
        assert stated[f"{component}.r"] == stated[f"{component}.lora_alpha"] == 4
        assert stated[f"{component}.target_modules"] == sorted(name.removeprefix("text_model.") for name in modules)
    assert all(key.startswith(("unet.", "text_encoder.")) for key in keys)
    layer = "encoder.layers.0.mlp.fc1.lora_A.weight"
    assert {f"text_encoder.{layer}", f"text_encoder.text_model.{layer}"} <= keys
    assert len(keys) == 2 * len(components["unet"]) + 4 * len(components["text_encoder"])


def test_the_kohya_header_tells_the_truth(out):
    path = out / "kohya" / "panda.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        alphas = {file.get_tensor(k).item() for k in file.keys() if k.endswith(".alpha")}
        assert all(k.startswith(("lora_unet_", "lora_te_text_model_encoder_")) for k in file.keys())
    assert alphas == {4.0}
    assert {"ss_network_dim": "4", "ss_network_alpha": "4.0", "ss_v2": "False"}.items() <= metadata.items()
    assert {
        "ss_output_name": "panda",
        "ss_sd_model_name": "tiny",
        "ss_steps": "7",
        "ss_epoch": "3",
    }.items() <= metadata.items()
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert metadata["reslora.shortcut"] == "input"
    assert metadata["reslora.version.diffusers"]


def test_hashes_are_those_of_kohyas_trainer(out):
    """sd-scripts: over the file saved with ss_* alone, from the end of its header; the old one over a middle slice."""
    import hashlib
    import io

    from safetensors.torch import save

    path = out / "kohya" / "panda.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stream = io.BytesIO(save(load_file(path), {k: v for k, v in metadata.items() if k.startswith("ss_")}))
    length = int.from_bytes(stream.read(8), "little")
    stream.seek(8 + length)
    assert metadata["sshs_model_hash"] == hashlib.sha256(stream.read()).hexdigest()
    stream.seek(0x100000)
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]


def write_everything(folder: Path) -> None:
    """Every kind of LoRA file, of factors that depend on nothing."""
    pipe = fresh_pipeline()
    unet = random_factors(pipe.unet, ATTENTION, 0, (2, 4), (0.5, 1.0))
    components = {"unet": unet, "text_encoder": random_factors(pipe.text_encoder, CLIP, 1)}
    facts = {"steps": 7, "trigger_words": TRIGGER, "ss_tag_frequency": '{"a": {"b": 1}}', "seed": 3}
    export_lora(folder, components, name="panda", facts=facts)
    save_merged(folder, components, facts)
    export_peft(folder / "peft", unet, component="unet", facts=facts)


def test_equal_factors_make_equal_bytes_in_every_process(tmp_path):
    write_everything(tmp_path / "here")
    code = "import sys, pathlib, test_export_lora; test_export_lora.write_everything(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "1"}, cwd=Path(__file__).parent)
    paths = sorted(path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*.safetensors"))
    assert len(paths) == 4
    for path in (*paths, Path("peft", "adapter_config.json")):
        assert (tmp_path / "here" / path).read_bytes() == (tmp_path / "there" / path).read_bytes(), path
    for path in paths:
        with safe_open(tmp_path / "here" / path, "pt") as file:
            assert file.metadata()["reslora.trigger_words"] == TRIGGER
            assert "modelspec.date" not in file.metadata()


def test_a_date_is_written_where_one_is_stated(tmp_path, components, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    write_lora_file(tmp_path / "a.safetensors", components, "kohya")
    write_lora_file(tmp_path / "b.safetensors", components, "kohya", facts={"modelspec.date": "2020-02-02"})
    dates = []
    for name in ("a", "b"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            dates.append(file.metadata()["modelspec.date"])
    assert dates == ["1970-01-02T00:00:00+00:00", "2020-02-02"]


def test_the_report_says_what_was_proved(out, components):
    report = json.loads((out / "export_report.json").read_text())
    count = sum(map(len, components.values()))
    assert {check["matched"] for check in report["loaders"]} == {count}
    assert report["loaders"][0]["loader"].startswith("diffusers ")
    assert report["versions"].keys() >= {"diffusers", "peft", "transformers"}
    assert len(report["modules"]) == count
    assert report["largest_relative_error"] < 1e-6
    assert report["energy_kept"] == pytest.approx(1)


def test_padding_and_folding_change_nothing(components):
    factors = components["unet"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    wanted = wanted_deltas({"x": factors})["x"]
    assert torch.allclose(wanted_deltas({"x": padded(factors, 9)})["x"], wanted)


def test_ranks(tmp_path, components):
    """A cut is the nearest LoRA of that rank; auto is the smallest rank that loses at most 5 %."""
    with pytest.raises(CheckFailed, match="rank 1 loses more than 5%.*rank 'auto' or 'full'.*--allow_lossy"):
        export_lora(tmp_path / "a", components, rank=1)
    assert not (tmp_path / "a").exists()
    report = export_lora(tmp_path / "b", components, rank=1, allow_lossy=True, dtype=torch.float32)
    got = read_lora(tmp_path / "b").components["unet"]
    kept, total = 0.0, 0.0
    for (component, path), loss in report.losses.items():
        wanted = wanted_deltas(
            {"x": components[component][path.removeprefix("text_model.") if component != "unet" else path]}
        )["x"]
        values = torch.linalg.svdvals(wanted)
        assert loss.relative_error == pytest.approx((values[1:].norm() / values.norm()).item(), abs=1e-6)
        kept, total = kept + values[0].item() ** 2, total + values.norm().item() ** 2
        if component == "unet":
            error = (wanted_deltas({"x": got[path]})["x"] - wanted).norm() / wanted.norm()
            assert error.item() == pytest.approx(loss.relative_error, abs=1e-5)
    assert report.energy_kept == pytest.approx(kept / total)
    automatic = export_lora(tmp_path / "c", components, rank="auto")
    assert max(loss.relative_error for loss in automatic.losses.values()) <= 0.05
    assert "energy kept" in str(report)


def test_full_rank_is_no_more_than_the_matrices_can_have(tmp_path):
    factors = random_factors(fresh_pipeline().unet, ("to_q",), 0, (70,))
    report = export_lora(tmp_path, {"unet": factors}, dtype=torch.float32)
    assert report.rank == 32
    assert report.largest_error < 1e-6
    got = read_lora(tmp_path).components["unet"]
    assert largest_error(wanted_deltas(got), wanted_deltas(factors)) < 1e-6


def test_a_block_export_says_why_it_is_at_full_rank(tmp_path, components):
    report = export_lora(tmp_path, {"unet": components["unet"]}, facts={"shortcut": "block"})
    assert "block shortcut merges exactly at full rank, here 4" in str(report)


def test_one_file_of_any_name(tmp_path, components):
    for dialect in ("kohya", "diffusers"):
        path = tmp_path / f"{dialect}.safetensors"
        write_lora_file(path, components, dialect, dtype=torch.float32)
        pipe = fresh_pipeline()
        pipe.load_lora_weights(tmp_path, weight_name=path.name)
        check_pipe(pipe, components)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["diffusers.safetensors", "kohya.safetensors"]


def test_parameters_are_taken_as_they_come(tmp_path, components):
    """In the graph, in half precision, not contiguous: as a training loop holds them."""
    taken = {
        path: f._replace(lora_A=f.lora_A.bfloat16().T.contiguous().T.requires_grad_(), lora_B=f.lora_B.bfloat16())
        for path, f in components["unet"].items()
        if f.lora_A.ndim == 2
    }
    report = export_lora(tmp_path, {"unet": taken}, dtype=torch.float32)
    assert report.largest_error < 1e-6
    with pytest.raises(ValueError, match="formats: got .'peft'., wanted 'diffusers', 'kohya' or both"):
        export_lora(tmp_path, {"unet": taken}, formats=["peft"])


def test_files_are_readable_as_the_umask_allows(out):
    plain = out / "plain"
    plain.touch()
    assert (out / DIFFUSERS).stat().st_mode == plain.stat().st_mode
    plain.unlink()


def test_the_base_is_checked_and_used_where_it_is_given(tmp_path, components):
    pipe = fresh_pipeline()
    export_lora(tmp_path / "fits", components, models={"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    narrow = {"unet": {path: f._replace(lora_A=f.lora_A[:, :-1]) for path, f in components["unet"].items()}}
    with pytest.raises(ValueError, match="other shapes in the base"):
        export_lora(tmp_path / "no", narrow, models={"unet": pipe.unet})
    strange = {"unet": {f"up_blocks.7.{path}": f for path, f in components["unet"].items()}}
    with pytest.raises(ValueError, match="the base lacks"):
        export_lora(tmp_path / "no", strange, models={"unet": pipe.unet})
    assert not (tmp_path / "no").exists()
