"""Is a training better after `reslora tune` than with the trainer's defaults? On the two embedded models.

    python -m benchmarks.tuned stickers [--subjects panda]          writes benchmarks/results/tuned-stickers.json
    python -m benchmarks.tuned word-problems [--seeds 0 1 2]        writes benchmarks/results/tuned-word-problems.json

Each case trains twice: with the defaults, and with the `run.yaml` of a search that had 30 % of the training's time.
Both are judged by the exported LoRA on data that neither saw: the fifth image of a subject on fixed noise, or the test
rows. `benchmarks.race report` puts them into docs/evidence.md.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .results import FOLDER, write_results

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "train_scripts"
SHARE = 0.3
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


def tuned_and_not(
    program: str, words: Sequence[str], folder: Path, train: Callable[[list[str]], Path], judge: Callable[[Path], float]
) -> dict[str, Any]:
    """Losses of both trainings, and what the search found and took."""
    from reslora_diffusion.tuning.command import parse, tune

    began = time.monotonic()
    plain = train([*words, "--output_dir", str(folder / "defaults")])
    trained_in = time.monotonic() - began
    settings, name, rest = parse(["--share", str(SHARE), program, *words, "--output_dir", str(folder / "tuned")])
    assert name == program, "the words begin with it"
    began = time.monotonic()
    found = tune(program, rest, settings)
    searched_in = time.monotonic() - began
    config = found.folder / "run.yaml"
    best = train(["--config", str(config)])
    return {
        "loss_defaults": judge(plain),
        "loss_tuned": judge(best),
        "options": found.best if found.gain.is_shown else {},
        "trials": found.trials,
        "expected_gain": found.gain.gain,
        "share_spent": found.budget.spent / found.training_seconds,
        "search_wall_seconds": round(searched_in, 1),
        "training_wall_seconds": round(trained_in, 1),
    }


@app.command()
def stickers(
    subjects: Annotated[list[str] | None, typer.Option(help="their names; default: all")] = None, steps: int = 200
) -> None:
    """The embedded pipeline: four images of a subject to learn, the fifth to judge by."""
    places = sorted((ROOT / "assets" / "subjects").iterdir())
    numbers = {place.name: number for number, place in enumerate(places)}
    if strangers := [name for name in subjects or () if name not in numbers]:
        raise typer.BadParameter(f"--subjects: got {', '.join(strangers)}; wanted some of {', '.join(numbers)}")
    sys.path.insert(0, str(SCRIPTS))
    from diffusers import StableDiffusionPipeline

    import train_dreambooth_reslora as script

    from .race.tasks import Stickers

    task, cases = Stickers(), {}

    def judge(output: Path, subject: int) -> float:
        pipeline = StableDiffusionPipeline.from_pretrained(task.folder)
        pipeline.load_lora_weights(output)
        return task.measure(pipeline.unet.eval(), "test", subject)["loss"]

    for name in subjects or numbers:
        subject = numbers[name]
        with tempfile.TemporaryDirectory() as temporary:
            images = Path(temporary, "images")
            images.mkdir()
            for path in sorted(places[subject].glob("*.png"))[:-1]:
                shutil.copy(path, images)
            words = ["--pretrained_model_name_or_path", str(task.folder), "--resolution", "64", "--seed", str(subject)]
            words += ["--instance_data_dir", str(images), "--instance_prompt", task.prompt(name)]
            words += ["--max_train_steps", str(steps), "--report_to", "none", "--validation_epochs", "100000"]
            cases[name] = tuned_and_not(
                "train",
                words,
                Path(temporary),
                lambda given: script.main(script.parse_args(given)),
                lambda output, subject=subject: judge(output, subject),  # type: ignore[misc]
            ) | {"loss_base": task.measure(task.base().eval(), "test", subject)["loss"]}
            write("stickers", cases, steps)


@app.command()
def word_problems(
    seeds: Annotated[list[int] | None, typer.Option(help="of the training")] = None, steps: int = 100
) -> None:
    """The embedded language model on word problems; judged by the loss of the test rows' answers."""
    sys.path.insert(0, str(SCRIPTS))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import train_llm_reslora as script
    from reslora_diffusion.llm.encoding import Collator
    from reslora_diffusion.llm.trainer import batches_of, run_model
    from reslora_diffusion.tuning.llm import Language, read

    model, cases = ROOT / "assets" / "tiny-llm", {}
    data = model / "word_problems"

    def judge(output: Path | None, folder: Path, words: Sequence[str]) -> float:
        """The loss on the test rows, which `folder` offers as validation rows."""
        language = Language(read([*words, "--dataset_name", str(folder), "--output_dir", str(folder / "none")]), 10**6)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if output is not None:
            network = PeftModel.from_pretrained(network, output)
        collate = Collator(language.tokenizer.pad_token_id)
        with torch.no_grad():
            losses = [float(run_model(network.eval(), b).loss) for b in batches_of(language.held_out, collate, 1)]
        return sum(losses) / len(losses)

    for seed in seeds or [0, 1, 2]:
        with tempfile.TemporaryDirectory() as temporary:
            test = Path(temporary, "test")
            test.mkdir()
            shutil.copy(data / "train.jsonl", test / "train.jsonl")
            shutil.copy(data / "test.jsonl", test / "validation.jsonl")
            shared = ["--model_name_or_path", str(model), "--task", "svamp", "--seed", str(seed)]
            shared += ["--max_steps", str(steps), "--eval_base", "false", "--max_new_tokens", "4"]
            words = [*shared, "--dataset_name", str(data), "--max_eval_examples", "50"]
            cases[f"seed {seed}"] = tuned_and_not(
                "train-llm",
                words,
                Path(temporary),
                script.main,
                lambda output, test=test, shared=shared: judge(output, test, shared),  # type: ignore[misc]
            ) | {"loss_base": judge(None, test, shared)}
            write("word-problems", cases, steps)


def write(name: str, cases: dict[str, Any], steps: int) -> None:
    write_results(FOLDER / f"tuned-{name}.json", "tuned", cases, steps=steps, share=SHARE)


if __name__ == "__main__":
    app()
