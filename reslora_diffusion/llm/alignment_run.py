"""The part of a run that DPO and GRPO share: what comes before and after TRL's trainer.

run = AlignmentRun.prepare(options, given, seed)      reads the files of the model, and shows the rows as TRL takes them
run.train(PreferenceTrainer, training, checkpoint)   run.json first, then results.json, history.json, the LoRA
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from peft import TaskType
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments, set_seed

from reslora_diffusion import calibrate

from ..utils.problems import refuse, say
from .adapter_trainer import AdapterTrainer, is_reslora
from .alignment import Aligned, as_text, read
from .checks import launcher_problems
from .encoder import Encoded, Encoder
from .encoding import Collator
from .model_checks import length_problems
from .models import (
    adapter_config,
    context_length,
    embedding_rows,
    load_config,
    load_model,
    load_tokenizer,
    save_generation,
    target_problems,
)
from .options import PreferenceOptions, RewardOptions
from .preflight import past_the_end
from .publishing import take_destination
from .rescue import enough_memory, rescued
from .results import export_lora, final, history, start_record, write_json
from .showing import preferences, questions
from .trainer import calibration_batches, run_model, shortcut_of

KIND = TaskType.CAUSAL_LM
LONGEST = 1024  # tokens, unless the context is shorter or --max_length says otherwise


@dataclass(frozen=True)
class AlignmentRun:
    """One training by TRL.

    Args:
        rows: `{"prompt": ..., "chosen": ..., "rejected": ...}` or `{"prompt": ..., "wanted": ...}`.
        longest: most tokens of a prompt and its answer.
    """

    options: PreferenceOptions | RewardOptions
    config: PreTrainedConfig
    encoder: Encoder
    rows: Sequence[dict[str, Any]]
    longest: int
    notes: Sequence[str] = ()

    @classmethod
    def prepare(cls, options: PreferenceOptions | RewardOptions, given: Aligned | None, seed: int) -> "AlignmentRun":
        """Look at the model's files, weights apart, and show what is learned. Rows of None have yet to be fetched.

        Raises:
            BadInput: the model's configuration or tokenizer does not serve, or the rows do not.
        """
        config = load_config(options, KIND)
        context = context_length(config)
        refuse([*target_problems(config, options, KIND), *length_problems(context, options.max_length)])
        encoder = Encoder(load_tokenizer(options, config), rows=embedding_rows(config))
        longest = options.max_length or min(LONGEST, context or LONGEST)
        given = given or read(options, seed)
        more = preferences if isinstance(options, PreferenceOptions) else questions
        notes = [*given.notes, *more(given.rows, encoder, longest)]
        say(notes)
        return cls(options, config, encoder, given.rows, longest, notes)

    def train(
        self, kind: type[AdapterTrainer], training: TrainingArguments, checkpoint: str | None, **more: Any
    ) -> Path:
        """Train, merge, export, upload if asked; return the output folder.

        Args:
            kind: a trainer of TRL's with our checkpoints.
            more: arguments of its own.

        Raises:
            BadInput: the adapter cannot be trained as processes are launched.
            Stopped: training, merging or exporting failed; a checkpoint of what was trained is kept, and the message
                says where.
            Interrupted: a signal came.
        """
        options = self.options
        refuse(launcher_problems(options, training))
        destination = take_destination(training)
        set_seed(training.seed)
        with enough_memory(options, training):
            trainer = kind(
                load_model(options, self.config, KIND),
                args=training,
                train_dataset=Dataset.from_list(as_text(self.rows, self.encoder)),
                processing_class=self.encoder.tokenizer,
                peft_config=adapter_config(options, KIND),
                options=options,
                **more,
            )
        model, output = trainer.adapted, trainer.output_folder
        shortcut = shortcut_of(model)
        refuse(past_the_end(trainer, checkpoint))
        start_record(trainer, options, examples={"train": len(self.rows)}, notes=self.notes)
        with rescued(trainer, options, "training"):
            trainer.train(resume_from_checkpoint=checkpoint)
        with rescued(trainer, options, "merging"):
            if is_reslora(model):
                calibrate(model, self.calibration(trainer.args), run_model)
        with rescued(trainer, options, "exporting"):
            if trainer.is_world_process_zero():
                logged = history(trainer)
                found = {"method": options.method, "shortcut": shortcut, "steps": trainer.state.global_step}
                write_json(output / "results.json", found | {"final": final(logged)})
                write_json(output / "history.json", logged)
            export_lora(trainer, options, KIND)
            if trainer.is_world_process_zero():
                save_generation(cast(PreTrainedModel, model.get_base_model()), output)
        if destination and trainer.is_world_process_zero():
            print(f"pushed to {destination.send(output)}")
        return output

    def calibration(self, training: TrainingArguments) -> list[Any]:
        """Batches that merging is fitted on: prompts with the answer that is preferred, or alone."""
        encoder, count = self.encoder, self.options.calibration_examples
        examples: list[Encoded] = []
        for row in self.rows[: 4 * count]:
            answer = row.get("chosen")
            ids = encoder.encode_prompt(row["prompt"])
            if answer:
                ids = encoder.encode(encoder.sequences([*row["prompt"], *answer])[-1])["input_ids"]
            ids = ids[: self.longest]
            examples.append(Encoded(input_ids=ids, labels=ids, end=ids[-1]))
        assert encoder.tokenizer.pad_token_id is not None, "load_tokenizer sets it"
        return calibration_batches(examples, Collator(encoder.tokenizer.pad_token_id, multiple_of=1), training, count)
