"""`reslora tune [options of the search] train|train-llm [options of the training]`.

    reslora tune --share 0.3 train --instance_data_dir my_dog --instance_prompt "a photo of sks dog" ...
    reslora tune --search learning_rate lora_alpha rank train-llm --model_name_or_path ... --dataset_name my_data.jsonl
    reslora train --config lora-dreambooth-model/tune/run.yaml

`tune` is the same for a program such as the page.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.option_parser import Reader
from ..utils.problems import BadInput, Interrupted, refuse, run_program
from .settings import Settings, setting_problems

if TYPE_CHECKING:
    from .outcome import Outcome
    from .study import Progress, Trainee

PROGRAMS = ("train", "train-llm")


def parse(words: Sequence[str]) -> tuple[Settings, str | None, list[str]]:
    """The search's options, the program, and the options of its training; problems are in the first."""
    place = next((n for n, word in enumerate(words) if word in PROGRAMS), None)
    own = list(words if place is None else words[:place])
    given = Reader(Settings, "reslora tune").command_line(own)
    settings = Settings(**given.values)
    settings.problems = given.problems
    if place is None:
        settings.problems.append(f"got no training; wanted {' or '.join(PROGRAMS)} and its options after the search's")
        return settings, None, []
    return settings, words[place], list(words[place + 1 :])


def tune(program: str, words: Sequence[str], settings: Settings, progress: "Progress | None" = None) -> "Outcome":
    """Search, and write what was found.

    Args:
        program: `train` or `train-llm`.
        words: the options of its command line.
        progress: called with facts after each measurement of a trial (trial, step, steps, loss, options).

    Raises:
        BadInput: every problem of the search and of the training, before a model is loaded.
        Interrupted: Ctrl-C; the study is kept, and the same command continues it.
    """
    problems = list(setting_problems(settings))
    trainee, output = {"train": dreambooth, "train-llm": llm}[program](words, settings, problems)
    from .outcome import conclude
    from .study import open_study, search

    folder = settings.place(output)
    folder.mkdir(parents=True, exist_ok=True)
    alike = {"program": program, "trial_steps": settings.steps_of_a_trial(trainee.steps), **trainee.identity}
    study = open_study(settings, folder, alike)
    try:
        search(trainee, settings, study, progress or show)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted("the search; the same command continues it") from None
    return conclude(trainee, settings, study, folder, program)


def show(facts: Mapping[str, Any]) -> None:
    point = ", ".join(f"{name} {value}" for name, value in facts["options"].items() if value is not None)
    step = f"step {facts['step']} of {facts['steps']}"
    print(f"trial {facts['trial']}, {step}: held-out loss {facts['loss']:.5f} ({point})", flush=True)


def dreambooth(words: Sequence[str], settings: Settings, problems: list[str]) -> "tuple[Trainee, str]":
    """The trainee of `reslora train`. One image of five is held out unless the command says what to hold out."""
    from ..diffusion.options import parse as parse_training
    from ..diffusion.options.checks import check
    from ..diffusion.train.schedules import settings_of

    plan = None
    try:
        args = parse_training(words)
        if not args.validation_split and not args.validation_data_dir:
            args.validation_split = 0.2
            if args.keep_best:
                args.given.add("validation_split")  # else the training that follows has all images
        problems += [f"--{name}: a search has no use for it" for name in ("compare", "dry_run") if getattr(args, name)]
        problems += [*bound_to_a_method(args, settings), *of_the_last_step(lambda: settings_of(args))]
        if args.distillation_steps:
            problems.append(
                "--distillation_steps: refines the last step, and a search is for a run that keeps its best"
            )
        plan = check(args)
        few = [c.instance.folder for c in plan.concepts if not c.validated]
        problems += [f"{folder}: no image can be held out; wanted two or more" for folder in few]
    except BadInput as error:
        problems += error.problems
    refuse(problems)
    from .diffusion import DreamBooth

    assert plan is not None, "without one there were problems"
    return DreamBooth(args, plan, settings.held_out_draws), args.output_dir


def llm(words: Sequence[str], settings: Settings, problems: list[str]) -> "tuple[Trainee, str]":
    """The trainee of `reslora train-llm`, which holds out rows by its own options."""
    from ..llm.methods import settings_of
    from .llm import read

    try:
        command = read(words)
        problems += bound_to_a_method(command.options, settings)
        problems += of_the_last_step(lambda: settings_of(command.options))
    except BadInput as error:
        problems += error.problems
    refuse(problems)
    from .llm import Language

    return Language(command, settings.held_out_draws), str(command.training.output_dir)


def bound_to_a_method(options: object, settings: Settings) -> list[str]:
    """Options that only some of the methods have, where methods are searched."""
    if "method" not in settings.search:
        return []
    given = [
        name for name in ("num_previous", "merge_method", "distillation_steps") if getattr(options, name) is not None
    ]
    return [f"--{name}: not every method has it; wanted it without --search method" for name in given]


def of_the_last_step(schedule: Callable[[], Any]) -> list[str]:
    """A schedule that does not go with `keep_best`, by which trials count and which `run.yaml` asks for."""
    with suppress(BadInput):  # said by the trainer's own checks
        settings = schedule()
        if settings is not None and "best" in settings.conflicts:
            return [f"--schedule {settings.name}: a search is for a run that keeps its best step; wanted it without"]
    return []


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def program() -> None:
        settings, name, rest = parse(sys.argv[1:] if words is None else words)
        if name is None:
            refuse([*setting_problems(settings)])
        assert name is not None, "without one there was a problem"
        outcome = tune(name, rest, settings)
        print(outcome)
        print(
            f"written: {', '.join(str(Path(outcome.folder, name)) for name in ('run.yaml', 'tune.json', 'tune.png'))}"
        )

    return run_program(program)
