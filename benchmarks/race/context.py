"""Parts of docs/evidence.md around its tables: names, tasks, which defaults follow, and what was not run."""

import math
from collections.abc import Sequence

from reslora_diffusion.diffusion.options import DreamBoothOptions
from reslora_diffusion.llm.training_options import TrainingOptions

from .analysis import Analysis
from .guidance import near, within
from .methods import ADAPTERS, ADDITIONS, parse_method
from .plan import Plan
from .plots import envelope
from .statistics import verdict
from .words import signed, table

NAMES = """Names of methods are an adapter and what is added to it:

- `lora`, `pissa`, `dora`, `rslora`: PEFT's adapters. `reslora-input`, `reslora-block`, `reslora-middle`: ResLoRA with
  that shortcut, over `num_previous` earlier layers. `input` and `middle` become a plain LoRA by least squares.
- `+fold`: the shortcut is folded into a plain LoRA at `fold_at` of the steps, and that is trained on (`--handover`).
- `+distill`: the merged model is taught what the unmerged one predicts.
- `+loraplus`, `+rite`, `+pro`, `+scaled_adamw`, `+reflora`: the optimizer. `+coto`, `+restart`: the schedule. See
  [methods.md](methods.md).
- A control is a method at the best setting of `lora`, with one thing changed and nothing tuned again."""

TASKS = {
    "word_problems": (
        "arithmetic word problems",
        "The embedded language model (8 layers) learns to answer arithmetic word problems and is judged by problems of "
        "templates that it never saw: loss of the answer's tokens in nats, and the share of answers that are exactly "
        "right. The seed decides the adapter's first values and the order of the rows.",
    ),
    "chain_sums": (
        "sums, by a real language model",
        "SmolLM2-135M-Instruct learns sums of two or three numbers (`chain_sum` of reasoning-gym) and is judged by 200 "
        "others: loss of the answer's tokens in nats, and the share of answers that are exactly right.",
    ),
    "stickers": (
        "images of one subject",
        "The embedded Stable Diffusion learns one subject from four images and is judged by a fifth: loss on fixed "
        "noise. **A seed is a subject**, so the standard deviations are those between subjects, and only the paired "
        "differences compare methods. Of twelve generated images it is counted how many show the subject and how many "
        "have the background that the prompt names; the loss of another subject says how far the model has drifted.",
    ),
}
SMALL = (
    "- A Stable Diffusion of full size, or any other diffusion model than the embedded one.\n"
    "- Language models above 135 million parameters, and trainings of more than a few hundred steps, which the "
    "papers' claims are about.\n"
    "- Trainings on a GPU or in reduced precision: every run here is float32 on a CPU.\n"
    "- More than one or two tuning seeds, or several ranks."
)


def place(plan: Plan) -> str:
    """A race, in words for somebody who has read nothing of it."""
    return f"{TASKS[plan.task.name][0]} (`{plan.name}`)"


def defaults(tuned: Sequence[Analysis]) -> str:
    """Defaults of both trainers beside what the races say of them."""
    raced = [analysis for analysis in tuned if analysis.reference is not None]
    if not raced:
        return ""
    rows = [row for analysis in raced if (row := rates(analysis))]
    head = [
        "trainer",
        "default",
        "race",
        "best for LoRA there",
        "learning rates within 2 % of it",
        "the default rate is",
    ]
    return f"## Which defaults follow\n\n{shortcut(raced)}\n\n{table(head, rows)}\n\n" + (
        "The last two columns are of the trials: the least loss at each learning rate, with alpha at its best there. "
        "A default rate outside of that range does not follow from the race: tune it. `reslora tune` begins at the "
        "defaults."
    )


def shortcut(raced: Sequence[Analysis]) -> str:
    """Say what the races tell of the default method."""
    name = "lora" if DreamBoothOptions.method == "lora" else "reslora-block"
    compared = [(a.plan, e.comparison, e.p) for a in raced if (e := a.methods.get(name)) and e.comparison]
    found = [(plan, c, verdict(c, p)) for plan, c, p in compared if not math.isnan(p)]
    said = [f"{signed(c.difference)} on {place(plan)} ({word})" for plan, c, word in found]
    kinds = {word for _, _, word in found}
    text = f"Both trainers train `--method {DreamBoothOptions.method}` unless told otherwise"
    if name == "lora" or not found:
        return f"{text}."
    text += f", with `--shortcut block`. Its loss less that of tuned LoRA is {'; '.join(said)}."
    if "worse" in kinds:
        return f"{text} **So this default does not follow from the races: take `--method lora`.**"
    if "better" in kinds:
        return f"{text} So this default follows from the races."
    return (
        f"{text} So the races give no reason for it and none against it: it is the method that this package is for. "
        "`--method lora` trains plain LoRA, which is simpler and, as far as was shown, as good."
    )


def rates(analysis: Analysis) -> list[str]:
    """Return the row of one race in the table of learning rates."""
    assert analysis.reference is not None, "the caller has looked"
    if analysis.plan.task.name == "stickers":
        trainer, rate, alpha = "`reslora train`", DreamBoothOptions.learning_rate, 1
        schedule = DreamBoothOptions.lr_scheduler
    else:
        trainer, rate, alpha = "`reslora train-llm`", TrainingOptions.learning_rate, 2
        schedule = TrainingOptions.lr_scheduler_type
    task = analysis.plan.task
    setting, (low, high) = analysis.reference.setting, near(envelope(analysis.trials[analysis.plan.reference]))
    return [
        trainer,
        f"{rate:g}, alpha = {alpha} x rank, {schedule}",
        place(analysis.plan),
        f"{setting['learning_rate']:g}, alpha = {setting['alpha_over_rank']:g} x rank, {task.lr_scheduler}",
        within(low, high),
        "inside" if low <= rate <= high else "below" if rate < low else "above",
    ]


def not_run(plans: Sequence[Plan]) -> str:
    """Parts of methods that no plan has, and what all races have in common."""
    methods = [parse_method(word) for plan in plans for word in plan.methods]
    raced = {part for method in methods for part in (method.adapter, *method.additions)}
    missing = [f"`{part}`" for part in ADAPTERS if part not in raced]
    missing += [f"`+{part}`" for part in ADDITIONS if part not in raced]
    first = f"- {', '.join(missing)}: `benchmarks.race` takes them, and no plan has them yet.\n" if missing else ""
    return f"## What was not run\n\n{first}{SMALL}"
