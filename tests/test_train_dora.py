"""`--use_dora` end to end, on tiny models: images, language models, a comparison; resumed, exported, refused."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dora_reference import decomposed
from dreambooth import arguments, script, train
from reslora_diffusion.diffusion.options.checks import check
from reslora_diffusion.diffusion.train.optimizers import parameter_groups
from reslora_diffusion.export import inspect_lora, read_lora, verify_lora
from reslora_diffusion.llm.trainer import ExportedTrainer
from reslora_diffusion.utils.problems import BadInput
from test_llm_script import folders, problems, run  # noqa: F401
from test_train_dreambooth_methods import assert_same, state
from tiny import tiny_pipeline_folder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
WEIGHTS = "pytorch_lora_weights.safetensors"


def test_images_with_both_kinds_of_file_and_resumed_bit_for_bit(tmp_path):
    options = {"use_dora": True, "shortcut": "block", "train_text_encoder": True, "use_ema": True, "schedule": "coto"}
    options |= {"max_train_steps": 4, "checkpointing_steps": 2, "save_precision": "fp32"}
    whole = train(tmp_path / "whole", **options)
    again = tmp_path / "again"
    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    train(again, **options, resume_from_checkpoint="latest")
    assert_same(state(again, 4), state(whole, 4))
    assert_same(load_file(again / WEIGHTS), load_file(whole / WEIGHTS))
    assert any("magnitude" in name for name in state(whole, 4))

    assert inspect_lora(whole).is_dora
    assert verify_lora(whole, str(tiny_pipeline_folder())).passed
    report = json.loads((whole / "export_report.json").read_text())
    assert any(check["loader"] == "ComfyUI's rule" for check in report["loaders"])
    base, loaded = (StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder()) for _ in range(2))
    loaded.load_lora_weights(whole)
    moved = 0
    for component, modules in read_lora(whole / WEIGHTS, dora=True).components.items():
        for path, f in modules.items():
            names = (path, path.removeprefix("text_model."))
            weight = next(m for n, m in getattr(base, component).named_modules() if n in names).weight
            layer = next(m for n, m in getattr(loaded, component).named_modules() if n in names)
            layer.merge()
            exact = decomposed(weight, *f, f.magnitude.values)
            assert (layer.get_base_layer().weight - exact).norm() < 1e-5 * exact.norm()
            moved += not torch.allclose(f.magnitude.values.flatten(), weight.norm(dim=1), rtol=1e-4)
    assert moved > 10
    assert json.loads((whole / "merge_report.json").read_text())["gap"] == pytest.approx(0, abs=1e-6)


def test_the_best_step_keeps_its_lengths_through_a_resumed_run(tmp_path):
    """--keep_best exports an earlier step as it was: a DoRA with the magnitudes of that step."""
    options = {"use_dora": True, "shortcut": "none", "learning_rate": 30.0, "save_precision": "fp32"}
    options |= {"max_train_steps": 4, "checkpointing_steps": 1, "validation_steps": 1, "validation_split": 0.2}
    options |= {"keep_best": True}
    whole = train(tmp_path / "run", **options)
    best = json.loads((whole / "merge_report.json").read_text())["step"]
    assert best < 4, "the last step is best, and nothing is tried"
    exported = load_file(whole / WEIGHTS)
    assert any("magnitude" in name for name in exported)
    assert_same(exported, load_file(whole / f"checkpoint-{best}" / WEIGHTS))
    again = tmp_path / "again"
    shutil.copytree(whole / "checkpoint-3", again / "checkpoint-3")
    train(again, **options, resume_from_checkpoint="latest")
    assert_same(load_file(again / WEIGHTS), exported)


def test_lengths_do_not_decay(tmp_path):
    names = ("a.lora_A.default.weight", "a.lora_B.default.weight", "a.lora_magnitude_vector.default.weight")
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in names}
    options = arguments(tmp_path, use_dora=True, adam_weight_decay_text_encoder=0.5, loraplus_lr_ratio=16)
    for component in ("unet", "text_encoder"):
        groups = parameter_groups({component: parameters}, options, 1)
        found = {id(p): group for group in groups for p in group["params"]}
        assert found[id(parameters[names[2]])]["weight_decay"] == 0
        assert found[id(parameters[names[2]])]["lr"] == found[id(parameters[names[0]])]["lr"]
        assert found[id(parameters[names[0]])].get("weight_decay") != 0


def test_a_comparison_of_dora_with_lora(tmp_path):
    options = {"compare": ["lora", "dora", "reslora-block:use_dora=true"], "validation_prompt": "a sticker"}
    script.main(arguments(tmp_path, **options, max_train_steps=2, num_validation_images=1))
    kinds = {path.parent.name: inspect_lora(path).is_dora for path in tmp_path.glob(f"*/{WEIGHTS}")}
    assert kinds == {"lora": False, "dora": True, "reslora-block-use_dora=true": True}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shortcut": "input"}, "--use_dora: DoRA takes norms of W + B A"),
        ({"shortcut": "middle"}, "use_dora: DoRA takes norms of W + B A"),
        ({"shortcut": "block", "optimizer": "rite"}, "--optimizer rite: DoRA's magnitude"),
        ({"shortcut": "block", "schedule": "fold"}, "fold: `block` is all that DoRA has to fold"),
        ({"scale_weight_norms": 1.0, "shortcut": "none"}, "--use_dora: --scale_weight_norms bounds"),
        ({"compare": ["lora", "reslora-input"]}, "reslora-input: --use_dora: DoRA takes norms"),
    ],
)
def test_what_does_not_go_with_it_is_said_before_a_model_is_loaded(tmp_path, options, said):
    given = arguments(tmp_path / "run", use_dora=True, **options)
    with pytest.raises(BadInput) as caught:
        script.main(given) if "compare" in options else check(given)
    assert said in str(caught.value)


@pytest.mark.parametrize("options", [{"method": "lora"}, {"shortcut": "block"}], ids=["peft", "block"])
def test_a_language_model(folders, tmp_path, options):  # noqa: F811
    options = options | {"use_dora": True, "task": None, "dataset_name": folders["talks"], "weight_decay": 0.5}
    options |= {"load_best_model_at_end": False, "export_dtype": "float32", "learning_rate": 0.01}
    whole = run(folders, tmp_path / "whole", **options)
    (tmp_path / "again").mkdir()
    (whole / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    again = run(folders, tmp_path / "again", **options, resume_from_checkpoint="latest")
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert_same(found, expected)
    config = json.loads((whole / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"]) == ("LORA", True)
    report = json.loads((whole / "export_report.json").read_text())
    assert report["outputs"]["compared"]
    assert verify_lora(whole, str(folders["model"])).passed
    base = AutoModelForCausalLM.from_pretrained(folders["model"])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["model"]), whole)
    tokens = torch.arange(3, 12)[None]
    by_transformers = AutoModelForCausalLM.from_pretrained(whole)
    with torch.no_grad():
        assert torch.allclose(by_transformers(tokens).logits, loaded(tokens).logits, atol=1e-5)
        assert (loaded(tokens).logits - base(tokens).logits).abs().max() > 1e-3
    trainer = object.__new__(ExportedTrainer)
    decayed = trainer.get_decay_parameter_names(loaded)
    assert any("lora_A" in name for name in decayed)
    assert not any("magnitude" in name for name in decayed)
    plain = run(folders, tmp_path / "plain", **options | {"use_dora": False})
    assert "use_dora" not in json.loads((plain / "adapter_config.json").read_text())


def test_another_kind_does_not_continue_a_run_of_language(folders, tmp_path):  # noqa: F811
    options = {"task": None, "dataset_name": folders["talks"], "shortcut": "block"}
    run(folders, tmp_path / "out", **options, use_dora=True)
    found = problems(folders, tmp_path, **options, resume_from_checkpoint="latest")
    assert any("was trained with use_dora True, got False" in problem for problem in found)
    found = problems(folders, tmp_path / "other", **options | {"shortcut": "input"}, use_dora=True, optimizer="rite")
    assert any("use_dora: DoRA takes norms" in problem for problem in found)
