"""DPO and GRPO: what TRL is given, and three real steps of each on the embedded model."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_tiny import ROOT, load_script
from reslora_diffusion.llm import showing
from reslora_diffusion.llm.alignment import Reward, preferences
from reslora_diffusion.llm.encoder import Encoder
from reslora_diffusion.llm.results import final
from reslora_diffusion.llm.resuming import fault_of
from reslora_diffusion.llm.tasks import TASKS
from reslora_diffusion.utils.problems import BadInput, Stopped

FOLDER = ROOT / "assets" / "tiny-llm"
PROMPT = [{"role": "user", "content": "2 + 2"}]


def turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_preference_is_a_prompt_and_two_answers():
    wanted = [{"prompt": PROMPT, "chosen": [turn("4")], "rejected": [turn("5")]}]
    assert preferences([{"prompt": "2 + 2", "chosen": "4", "rejected": "5"}]) == wanted
    assert preferences([{"chosen": [*PROMPT, turn("4")], "rejected": [*PROMPT, turn("5")]}]) == wanted
    with pytest.raises(BadInput, match="train row 1: chosen and rejected answer different prompts"):
        preferences([{"chosen": [*PROMPT, turn("4")], "rejected": [*PROMPT, turn("?"), *PROMPT, turn("5")]}])
    with pytest.raises(BadInput, match="rows are response .*, wanted 'chosen' and 'rejected'"):
        preferences([{"prompt": "2 + 2", "response": "4"}])


def test_what_is_compared_is_shown_and_an_answer_that_is_cut_to_nothing_is_refused():
    """TRL cuts behind --max_length, and drops rows of which nothing is left, or learns nothing from them."""
    encoder = Encoder(AutoTokenizer.from_pretrained(FOLDER))
    rows = [
        {"prompt": "2 + 2", "chosen": "4", "rejected": "5 or more"},
        {"prompt": "2 " * 40, "chosen": "4", "rejected": "5"},
    ]
    found = list(showing.preferences(preferences(rows), encoder, 200))
    assert found[0].startswith("tokens in an example: ")
    assert [line for line in found if "[[" in line][1:] == [
        "| Answer:[[ 4</s>]]",
        "first row, the rejected answer in [[ ]]:",
        "| Answer:[[ 5 or more</s>]]",
    ]
    with pytest.raises(BadInput, match="cut to --max_length 20, nothing is left of an answer in row 2"):
        list(showing.preferences(preferences(rows), encoder, 20))
    cut = list(showing.preferences(preferences(rows[:1]), encoder, 15))
    assert "train: 1 of 2 answers are cut behind 15 tokens of prompt and answer" in cut


def test_results_are_of_the_last_tenth_of_the_steps():
    logged = [{"loss": float(step), "epoch": 1.0, "step": step, "said": "x"} for step in range(20)]
    assert final(logged) == {"loss": 18.5}
    assert final(logged[:3]) == {"loss": 2.0}
    assert final([]) == {}


def test_right_answers_are_rewarded():
    reward = Reward(TASKS["svamp"])
    texts = ["( 2 + 2 ). The answer is 4.", "The answer is 5.", "nothing"]
    assert reward(completions=texts, wanted=["4"] * 3, prompts=[""] * 3) == [1.0, 0.0, 0.0]
    assert reward(completions=[[turn("The answer is 4.0.")]], wanted=["4"]) == [1.0]


def words(output, **options) -> list[str]:
    given = {
        "model_name_or_path": FOLDER,
        "output_dir": output,
        "max_steps": 3,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "rank": 2,
        "shortcut": "middle",
        "calibration_examples": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "export_dtype": "float32",
    }
    return [f"--{name}={value}" for name, value in (given | options).items()]


def assert_plain_and_trained(output) -> None:
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert json.loads((output / "results.json").read_text())["steps"] == 3
    run = json.loads((output / "run.json").read_text())
    assert (run["options"]["rank"], run["chains"]["links"] > 0, run["held_in"]["trained"]) == (2, True, "float32")
    assert run["trained_parameters"] > 0
    assert run["examples"]["train"] in (12, 16)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(FOLDER), output).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        moved = model(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - moved).abs().max() > 1e-4


def preference_file(folder):
    rows = [{"prompt": f"{i} + 1", "chosen": f"The answer is {i + 1}.", "rejected": "No."} for i in range(12)]
    (folder / "preferences.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "preferences.jsonl"


def problem_file(folder):
    told = "Mia has {a} shells. Mia finds {b} more shells."  # the model was trained on sums that are told so
    asked = {"Question": "How many shells does Mia have now?"}
    pairs = [(a, b) for a in range(11, 15) for b in range(21, 25)]
    rows = [asked | {"Body": told.format(a=a, b=b), "Equation": f"( {a} + {b} )", "Answer": a + b} for a, b in pairs]
    (folder / "problems.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "problems.jsonl"


REWARDED = {
    "task": "svamp",
    "max_new_tokens": 24,
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "temperature": 1.5,
}


@pytest.mark.slow
def test_dpo_prefers_what_was_chosen_after_three_steps(tmp_path):
    pytest.importorskip("trl")
    script = load_script("train_dpo_reslora")
    output = script.main(words(tmp_path / "out", dataset_name=preference_file(tmp_path)))
    assert_plain_and_trained(output)
    logged = json.loads((output / "history.json").read_text())
    assert logged[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: the adapter starts at the base
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert logged[-1]["rewards/margins"] > 0
    found = json.loads((output / "results.json").read_text())
    assert (found["shortcut"], found["final"]["rewards/margins"]) == ("middle", logged[-1]["rewards/margins"])


@pytest.mark.slow
def test_grpo_rewards_right_answers_for_three_steps(tmp_path):
    pytest.importorskip("trl")
    script = load_script("train_grpo_reslora")
    output = script.main(words(tmp_path / "out", dataset_name=problem_file(tmp_path), **REWARDED))
    assert_plain_and_trained(output)
    logged = json.loads((output / "history.json").read_text())
    assert len(logged) == 3
    assert any(0 < row["rewards/exact_match/mean"] < 1 for row in logged)
    assert any(row["grad_norm"] > 0 for row in logged)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_what_was_trained_is_kept_if_the_export_fails(name, tmp_path):
    """No checkpoint is written on the way: without a rescue, all that was trained would be gone."""
    pytest.importorskip("trl")
    script = load_script(f"train_{name}_reslora")
    given = {"dataset_name": preference_file(tmp_path)}
    if name == "grpo":
        given = {"dataset_name": problem_file(tmp_path), **REWARDED}
    whole = script.main(words(tmp_path / "whole", **given))
    blocked = tmp_path / "out" / "export_report.json"
    blocked.mkdir(parents=True)
    with pytest.raises(Stopped) as caught:
        script.main(words(tmp_path / "out", **given))
    assert "exporting failed" in str(caught.value)
    assert "checkpoint-3 is kept, continue by --resume_from_checkpoint latest" in str(caught.value)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert (checkpoint / "checksums.json").is_file()
    assert fault_of(checkpoint) is None
    blocked.rmdir()
    resumed = script.main(words(tmp_path / "out", **given, resume_from_checkpoint="latest"))
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


@pytest.mark.slow
def test_dpo_trains_by_the_optimizer_that_was_asked_for(tmp_path):
    """`reslora dpo --optimizer` was once taken and ignored: the same factors came out as of AdamW."""
    pytest.importorskip("trl")
    script, rows = load_script("train_dpo_reslora"), preference_file(tmp_path)
    runs = [
        script.main(words(tmp_path / name, dataset_name=rows, shortcut="block", **options))
        for name, options in (("adamw", {}), ("scaled", {"optimizer": "scaled_adamw"}))
    ]
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in runs)
    assert any((found[key] - value).abs().max() > 1e-3 * value.abs().max() for key, value in expected.items())


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_options_without_a_part_in_it_are_refused(name, tmp_path):
    script = load_script(f"train_{name}_reslora")
    given = {"schedule": "coto", "handover_at": 0.5, "distillation_steps": 4, "eval_strategy": "epoch"}
    with pytest.raises(BadInput) as caught:
        script.main(words(tmp_path / "out", **given))
    message = str(caught.value)
    for part in (
        "--schedule: got 'coto', but works in reslora train-llm alone",
        "--handover_at: got 0.5, but",
        "--distillation_steps: got 4, but",
        "there are no validation rows here",
    ):
        assert part in message


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_all_problems_come_together(name, tmp_path):
    script = load_script(f"train_{name}_reslora")
    bad = words(tmp_path / "out", beta=-1, shortcut="sideways", dtype="int4")
    with pytest.raises(BadInput) as caught:
        script.main(bad)
    message = str(caught.value)
    for part in (
        "--beta: got -1.0",
        "sideways",
        "--dtype: got 'int4'",
        "--task" if name == "grpo" else "--dataset_name",
    ):
        assert part in message
    assert len(set(caught.value.problems)) == len(caught.value.problems)  # each is said once


@pytest.mark.parametrize("kind", ["PreferenceTrainer", "RewardTrainer"])
def test_no_training_is_reported_to_the_hub(kind):
    """The name is TRL's own: if it goes, this has to be looked at anew."""
    pytest.importorskip("trl")
    from trl.trainer.base_trainer import _BaseTrainer

    from reslora_diffusion.llm import alignment_trainers

    assert _BaseTrainer._send_telemetry is not alignment_trainers.Unreported._send_telemetry
    assert getattr(alignment_trainers, kind)._send_telemetry is alignment_trainers.Unreported._send_telemetry
