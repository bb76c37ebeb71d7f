"""`--schedule` and `--optimizer` of the language-model scripts, end to end on a tiny model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from reslora_diffusion.methods.optimizers import OPTIMIZERS
from reslora_diffusion.methods.pair_optimizers import PAIR_OPTIMIZERS
from test_llm_script import folders, problems, run  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers about names that it still accepts
WEIGHTS = "adapter_model.safetensors"
ENTIRE = [
    {"schedule": "coto", "shortcut": "middle", "lora_dropout": 0.1, "torch_compile": False},
    {"schedule": "restart:stages=2,momentum=0.5,warmup=1", "shortcut": "block", "optimizer": "rite"},
    {"schedule": "restart:ranks=2/1", "shortcut": "none", "gradient_accumulation_steps": 2},
    {"schedule": "restart:stages=2,momentum=0.5,merge=true", "shortcut": "block"},
    {"schedule": "ranks:ratio=0.5,every=1", "shortcut": "none", "optimizer": "scaled_adamw"},
    {"schedule": "fold:at=0.5", "shortcut": "input", "optimizer": "rite"},
    {"schedule": "coto", "shortcut": "block", "optimizer": "reflora"},
    {"optimizer": "pro", "method": "lora", "optimizer_args": "damping=1e-6"},
]


@pytest.mark.parametrize("options", ENTIRE, ids=lambda options: "-".join(map(str, options.values())))
def test_a_run_resumed_in_the_middle_is_the_uninterrupted_one(folders, tmp_path, options):  # noqa: F811
    """Step 2 of 4 is the knot of two links."""
    options = options | {"task": None, "dataset_name": folders["talks"], "load_best_model_at_end": False}
    whole = run(folders, tmp_path / "whole", **options)
    (tmp_path / "again").mkdir()
    (whole / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    again = run(folders, tmp_path / "again", **options, resume_from_checkpoint="latest")
    expected, found = load_file(whole / WEIGHTS), load_file(again / WEIGHTS)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert any(value.any() for name, value in expected.items() if "lora_B" in name)
    results = json.loads((whole / "results.json").read_text())
    rank = json.loads((whole / "adapter_config.json").read_text())["r"]
    if "restart" in options.get("schedule", ""):
        assert rank == (2 * (2 + 2) if options["shortcut"] == "block" else 2 + 1)
        assert results["merging"]["gap"] == pytest.approx(0, abs=1e-6)
        assert "merge" in options["schedule"] or any(
            "lora_A_frozen.0" in name for name in load_file(tmp_path / "again" / "checkpoint-2" / WEIGHTS)
        )


def test_the_best_step_of_an_earlier_link_is_exported_as_it_was(folders, tmp_path):  # noqa: F811
    """The first step has the largest loss, and that is what is asked for."""
    output = run(
        folders,
        tmp_path / "out",
        task=None,
        dataset_name=folders["talks"],
        shortcut="none",
        schedule="restart:ranks=2/1",
        eval_steps=1,
        save_steps=1,
        warmup_steps=0,
        greater_is_better=True,
        save_total_limit=None,
    )
    results = json.loads((output / "results.json").read_text())
    assert results["best_step"] == 1
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2
    assert results["merging"]["loss_merged"] == pytest.approx(results["best_metric"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"schedule": "restart:stage=2"}, ["restart: got the setting 'stage'"]),
        ({"schedule": "restart:stages=9", "shortcut": "middle"}, ["depends on activations", "9 stages in 4 steps"]),
        ({"schedule": "restart:stages=4", "shortcut": "none"}, ["4 stages in 4 steps, wanted more steps"]),
        ({"schedule": "restart:ranks=8/4", "shortcut": "block", "handover_at": 0.5}, ["rank 2", "--handover_at is"]),
        ({"schedule": "restart:merge=1", "shortcut": "none", "dtype": "bfloat16"}, ["which would round them away"]),
        ({"schedule": "coto", "method": "lora"}, ["wanted --method reslora --shortcut none"]),
        ({"schedule": "fold", "shortcut": "block"}, ["fold: block merges exactly"]),
        ({"optimizer": "ritt"}, ["--optimizer: got 'ritt'", "did you mean rite?"]),
        (
            {"schedule": "restart:stages=9", "optimizer": "pro", "shortcut": "middle", "use_dora": True},
            [
                "restart: a finished link",
                "9 stages in 4 steps",
                "--use_dora: DoRA takes norms of W + B A",
                "--optimizer pro: with `middle` one lora_B",
                "--optimizer pro: DoRA's magnitude",
            ],
        ),
        ({"shortcut": "blok", "optimizer": "rite", "use_dora": True}, ["did you mean block?", "DoRA's magnitude"]),
        ({"optimizer": "pro", "optimizer_args": "damp=1"}, ["LoraPro has no 'damp'; it has "]),
        ({"optimizer": "rite", "optimizer_args": "eps=-1"}, ["--optimizer rite: Invalid epsilon value"]),
        ({"optimizer_args": "damping=1"}, ["--optimizer_args: are those of --optimizer, which is not given"]),
        (
            {"schedule": "prune:ratio=2", "shortcut": "none", "optimizer": "ritt"},
            ["prune: ratio: got 2.0, wanted a number above 0 and below 1", "did you mean rite?"],
        ),
        (
            {"schedule": "prune", "shortcut": "middle", "save_merged_model": True, "load_best_model_at_end": True},
            ["`middle` depends on activations", "an early step is the best", "wanted no --save_merged_model"],
        ),
        (
            {"schedule": "prune:ratio=0.9", "shortcut": "none", "load_best_model_at_end": False},
            [
                "ratio=0.9 would leave model.layers.0.self_attn without heads: it has 2",
                "channels of model.layers.0.mlp",
            ],
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_model_is_loaded(folders, tmp_path, options, wanted):  # noqa: F811
    found = "\n".join(problems(folders, tmp_path, **options))
    for part in wanted:
        assert part in found


def test_more_links_than_steps_are_refused_before_the_first_where_epochs_count_the_steps(folders, tmp_path):  # noqa: F811
    more = {"task": None, "dataset_name": folders["talks"], "per_device_train_batch_size": 16, "max_steps": None}
    found = problems(
        folders,
        tmp_path,
        **more,
        shortcut="none",
        schedule="restart:stages=9",
        num_train_epochs=1,
        save_strategy="no",
        eval_strategy="no",
        load_best_model_at_end=False,
    )
    assert found == ["restart: got 9 stages in 2 steps, wanted more steps than stages"]


def test_another_schedule_does_not_continue_a_run(folders, tmp_path):  # noqa: F811
    options = {"task": None, "dataset_name": folders["talks"], "shortcut": "block"}
    output = run(folders, tmp_path / "out", **options, schedule="coto")
    found = problems(folders, tmp_path, **options, resume_from_checkpoint="latest")
    assert any("was trained with --schedule 'coto', got None" in problem for problem in found)
    assert (output / "checkpoint-4" / "schedule.json").is_file()


def test_names_of_optimizers_stand_in_one_order_everywhere():
    assert tuple(OPTIMIZERS) == tuple(PAIR_OPTIMIZERS)


def test_a_run_that_prunes_leaves_a_smaller_model_and_resumes_bit_for_bit(folders, tmp_path):  # noqa: F811
    options = {"task": None, "dataset_name": folders["talks"], "load_best_model_at_end": False, "shortcut": "none"}
    options |= {"schedule": "prune:ratio=0.5,every=1", "target_modules": "all-linear"}
    whole = run(folders, tmp_path / "out", **options)
    (tmp_path / "again").mkdir()
    (whole / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    again = run(folders, tmp_path / "again", **options, resume_from_checkpoint="latest")
    stored, found = (load_file(folder / "pruned" / "model.safetensors") for folder in (whole, again))
    assert stored.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in stored.items())
    assert not (whole / WEIGHTS).exists()
    report = json.loads((whole / "pruning_report.json").read_text())
    assert report["loaded_by"] == "from_pretrained"
    assert report["loss_pruned"] == pytest.approx(report["loss_masked"], rel=1e-5)
    assert report["loss_pruned"] != pytest.approx(report["loss_base"], rel=1e-4)
    assert set(report["kept"].values()) == {"1 of 2", "24 of 48"}
    model = AutoModelForCausalLM.from_pretrained(whole / "pruned")
    assert sum(p.numel() for p in model.parameters()) == report["parameters_after"] < report["parameters_before"]
    assert AutoTokenizer.from_pretrained(whole / "pruned")("Mia").input_ids
    shutil.rmtree(whole / "checkpoint-4")
    assert any("holds a pruned model already" in problem for problem in problems(folders, tmp_path, **options))


def test_a_handover_under_deepspeed_is_refused_like_a_fold(folders, tmp_path):  # noqa: F811
    """DeepSpeed takes the optimizer step from copies of the factors that a fold replaces."""
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    options = {"shortcut": "input", "deepspeed": tmp_path / "zero.json"}
    for asked in ({"handover_at": 0.5}, {"schedule": "fold"}):
        found = "\n".join(problems(folders, tmp_path / "out", **options, **asked))
        assert "DeepSpeed takes the optimizer step itself" in found, asked
