"""ResLoRA under trainers that know nothing of it: transformers.Trainer and TRL's SFTTrainer, stopped and resumed."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments, set_seed

from llm_tiny import SHORTCUTS, VOCABULARY, build, config
from reslora_diffusion import get_adapter

ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(3, VOCABULARY, (32, 8), generator=torch.Generator().manual_seed(3)).tolist()
]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def arguments(folder, **kwargs) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **defaults | kwargs)


def trainer(folder, shortcut: str, stop_at: int | None = None, **kwargs) -> Trainer:
    set_seed(0)
    reach = 1 if shortcut == "input" else 2
    model = get_peft_model(build("llama"), config("llama", shortcut=shortcut, num_previous=reach, lora_dropout=0.1))
    callbacks = [StopAt(stop_at)] if stop_at else []
    return Trainer(model, arguments(folder, **kwargs), train_dataset=ROWS, callbacks=callbacks)


def factors(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_resumed_run_ends_like_an_uninterrupted_one(shortcut, tmp_path):
    whole = trainer(tmp_path / "whole", shortcut)
    before = factors(whole.model)
    whole.train()
    trainer(tmp_path / "parts", shortcut, stop_at=3).train()
    resumed = trainer(tmp_path / "parts", shortcut)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    after, again = factors(whole.model), factors(resumed.model)
    assert all((after[name] - before[name]).abs().max() > 1e-4 for name in after)
    for name, value in after.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "whole" / "checkpoint-6")
    assert get_adapter(loaded).config.shortcut == shortcut
    for name, value in factors(loaded).items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_checkpointing_under_a_trainer_changes_nothing(shortcut, tmp_path):
    plain = trainer(tmp_path / "a", shortcut, max_steps=2)
    plain.train()
    checkpointed = trainer(tmp_path / "b", shortcut, max_steps=2, activation_checkpointing=True)
    checkpointed.train()
    for name, value in factors(plain.model).items():
        torch.testing.assert_close(factors(checkpointed.model)[name], value, rtol=1e-4, atol=1e-5)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("prepared", [False, True])
def test_trl_trains_saves_and_resumes_from_a_configuration_or_prepared(prepared, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2}"} for i in range(24)])

    def sft_trainer():
        set_seed(0)
        model, adapter = build("llama"), config("llama", shortcut="middle", num_previous=2, lora_dropout=0.1)
        settings = trl.SFTConfig(
            str(tmp_path),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            max_length=16,
        )
        return trl.SFTTrainer(
            get_peft_model(model, adapter) if prepared else model,
            settings,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=None if prepared else adapter,
        )

    sft = sft_trainer()
    before = factors(sft.model)
    assert len(before) == 36
    sft.train()
    after = factors(sft.model)
    assert sum((value - before[name]).abs().max() > 0 for name, value in after.items()) == 36
    assert not get_adapter(sft.model).skipped
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "checkpoint-4")
    assert get_adapter(loaded).config.num_previous == 2
    resumed = sft_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in factors(resumed.model).items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=0)
