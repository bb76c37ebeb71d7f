"""A race: several methods on the same draws (images, noise, timesteps), from the same seed, for as many steps.

    --compare lora lora+rite reslora-block+coto reslora-block:num_previous=2 lora:lora_alpha=16

A contender is a method with a shortcut, a schedule and an optimizer of pairs (`+`), and options that only it has (`:`);
everything else is shared. Each is a run of its own
in a folder of its own, and what it sees is a function of (seed, step) alone, so the race needs no cooperation.

    <output_dir>/<contender>/     the runs
    <output_dir>/race.json        losses, merge gaps and files of all of them
    <output_dir>/comparison.json  the settings by which the app shows them side by side
    <output_dir>/samples.png      their last validation images beside the base's
    <output_dir>/loss.png         their losses
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...methods.pair_optimizers import PAIR_OPTIMIZERS
from ...methods.schedules.settings import SCHEDULES
from ...rules import MERGE_EXACTLY, Shortcut
from ...utils.documents import parse_json
from ...utils.files import write_text
from ...utils.problems import BadInput, Interrupted, nearest, refuse
from ...utils.stopping import asked_to_stop
from ..options import DreamBoothOptions, override
from ..options.checks import Findings, check, quick_check
from .checkpoints import find_checkpoint
from .record import resolve_seed, versions
from .sheet import contact_sheet, save_image

SHARED = ("output_dir", "seed", "max_train_steps", "num_train_epochs", "compare", "config", "dry_run")
HEADS = ("lora", "dora", "reslora", *(f"reslora-{shortcut}" for shortcut in Shortcut))
APP_FORMAT_VERSION = 1  # of the app's settings files


def contender(word: str, options: DreamBoothOptions) -> DreamBoothOptions:
    """Options of one contender; raises `BadInput`."""
    head, _, settings = word.partition(":")
    head, *parts = head.split("+")
    method, _, shortcut = head.partition("-")
    if head not in HEADS:
        raise BadInput([f"--compare: got {word!r}, wanted {', '.join(HEADS)}{nearest(head, HEADS)}"])
    words, strange = words_of(parts)
    refuse(f"--compare: {word}: {problem}" for problem in strange)
    own = options.changed()
    own.use_dora = options.use_dora or method == "dora"
    method = "lora" if method == "dora" else method
    own.compare, own.method = None, method
    own.output_dir = str(Path(options.output_dir) / re.sub(r"[^\w.=+]+", "-", word))
    own.shortcut = shortcut or options.shortcut
    if method == "lora":
        own.shortcut = own.num_previous = own.merge_method = own.handover = None
    if method == "lora" or shortcut in MERGE_EXACTLY:
        own.distillation_steps = None  # these merge exactly
    words += [f"--{setting}" for setting in filter(None, settings.split(","))]
    given = override(own, words)
    if shared := [f"--{name}={value}" for name, value in given.values.items() if name in SHARED]:
        raise BadInput([f"--compare: {word} sets {', '.join(shared)}, which all contenders share"])
    problems = list(given.problems)
    if (own.schedule or "").startswith("prune"):
        problems.append("--schedule prune leaves a smaller model, and no LoRA that could be compared")
    refuse(f"--compare: {word}: {problem}" for problem in problems)
    return own


def words_of(parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """`(options, problems)` of what stands behind each `+` of a contender's name."""
    known = {"--schedule": [*SCHEDULES], "--optimizer": [*PAIR_OPTIMIZERS]}
    options, problems = [], []
    for flag, names in known.items():
        own = [part for part in parts if part in names]
        options += [f"{flag}={name}" for name in own]
        if len(own) > 1:
            problems.append(f"got +{' +'.join(own)}, and a run has one {flag}; wanted one of them")
    every = [name for names in known.values() for name in names]
    problems += [
        f"got +{part}, wanted +{', +'.join(every)}{nearest(part, every)}" for part in parts if part not in every
    ]
    return options, problems


def contenders(options: DreamBoothOptions) -> dict[str, DreamBoothOptions]:
    """Options by name; raises `BadInput` with the problems of all of them."""
    words = list(dict.fromkeys(name for word in options.compare or [] for name in split_names(word)))
    found: dict[str, DreamBoothOptions] = {}
    problems: dict[str, list[str]] = {}  # and who has them
    looks: dict[str, Findings] = {}
    folders: list[str] = []  # what is in them
    if len(words) < 2:
        problems[f"--compare: got {', '.join(words)}, wanted two contenders or more"] = words

    def quick(word: str) -> None:
        found[word] = contender(word, options)
        looks[word] = quick_check(found[word])

    for examine in (quick, lambda word: check(found[word], looks[word])):  # of all, before torch is waited for
        for word in words:
            try:
                examine(word)
            except BadInput as error:
                folders = folders or error.found
                for problem in error.problems:
                    problems.setdefault(problem, []).append(word)
        if problems:
            lines = [problem if who == words else f"{', '.join(who)}: {problem}" for problem, who in problems.items()]
            raise BadInput(lines, folders)
    return found


def split_names(word: str) -> list[str]:
    """`lora,reslora-input` is two names; a comma after a colon separates settings."""
    return word.split(",") if ":" not in word else [word]


def race(options: DreamBoothOptions, run: Callable[[DreamBoothOptions], Path]) -> Path:
    """Let `run` train every contender, one after the other; returns the folder of the comparison.

    Raises:
        Interrupted: a signal came in the last step of a contender, which finishes all the same.
    """
    if not options.validation_prompt and options.instance_prompt:
        options.validation_prompt = [options.instance_prompt]
    runs = contenders(options)
    from accelerate import PartialState
    from accelerate.utils import gather_object

    asked_to_stop.clear()
    state = PartialState()
    if options.seed is None:
        resumed = [find_checkpoint(Path(own.output_dir), "latest") for own in runs.values()]
        options.seed = resolve_seed(options, next(filter(None, resumed), None), state)
    folders = {}
    for number, (name, own) in enumerate(runs.items(), 1):
        own.seed = options.seed
        state.print(f"\n--- {name}, {number} of {len(runs)}", flush=True)
        folders[name] = run(own)
        if number < len(runs) and any(gather_object([asked_to_stop.is_set()])):
            raise Interrupted(f"after {name}, {number} of {len(runs)}; continue by --resume_from_checkpoint latest")
    options.validation_guidance_scale = own.validation_guidance_scale  # the family's, if none was given
    if not options.dry_run and state.is_main_process:
        write_comparison(Path(options.output_dir), folders, options)
    return Path(options.output_dir)


def write_comparison(output: Path, folders: dict[str, Path], options: DreamBoothOptions) -> None:
    from .history import plot_losses, read_history

    plot_losses({name: read_history(folder) for name, folder in folders.items()}, output / "loss.png")
    stated = {name: (folder / "merge_report.json").read_text(encoding="utf-8") for name, folder in folders.items()}
    reports = {name: parse_json(text) for name, text in stated.items()}
    figures = {
        name: {key: value for key, value in report.items() if key != "output_errors"} | {"folder": str(folders[name])}
        for name, report in reports.items()
    }
    shared = {"seed": options.seed, "versions": versions(), "contenders": figures}
    write_text(output / "race.json", json.dumps(shared, indent=2))
    if options.validation_prompt and options.num_validation_images:
        write_text(output / "comparison.json", json.dumps(app_settings(folders, options), indent=2))
        save_image(draw_sheet(folders, options), output / "samples.png")
    width = max(map(len, figures))
    for name, row in figures.items():
        print(f"{name:<{width}}  trained {row['loss_trained']:.5f}  as exported {row['loss_merged']:.5f}")


def app_settings(folders: dict[str, Path], options: DreamBoothOptions) -> dict[str, Any]:
    """A comparison of all exported files on the same prompts, as the app reads it."""
    files = {name: folder / "pytorch_lora_weights.safetensors" for name, folder in folders.items()}
    return {
        "format_version": APP_FORMAT_VERSION,
        "prompts": options.validation_prompt,
        "seeds": list(range(options.num_validation_images)),
        "adapters": [
            {"label": name, "file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for name, path in files.items()
        ],
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.validation_guidance_scale,
    }


def draw_sheet(folders: dict[str, Path], options: DreamBoothOptions) -> Image.Image:
    """Columns: where they start, which is the base (step 0 of any of them), then each contender's last images."""
    prompts, each = options.validation_prompt or [], range(options.num_validation_images)
    names = [f"{p}-{n}.png" for p in range(len(prompts)) for n in each]
    steps = {name: sorted((folder / "samples").glob("step-*")) for name, folder in folders.items()}
    start = "start" if options.network_weights or options.train_text_encoder_ti else "base"
    chosen = {start: next(iter(steps.values()))[0], **{name: found[-1] for name, found in steps.items()}}
    columns = {label: [folder / name for name in names] for label, folder in chosen.items()}
    return contact_sheet(columns, [prompt for prompt in prompts for _ in each])
