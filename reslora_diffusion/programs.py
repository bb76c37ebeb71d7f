"""Programs as commands: `reslora train`, `train-llm`, `glue` and `compare` of the repository's folders, `tune`, `env`.

    reslora train --instance_data_dir my_dog ...                 in this process: on a signal it saves and ends
    reslora train --num_processes 2 ...                          by `accelerate launch`, which is waited for
    reslora train --config_file fsdp2.yaml ...                   likewise, as accelerate's configuration says
    reslora train-llm --seeds 5 --grid learning_rate=1e-4,3e-4   many runs, one after the other (`llm.sweep`)

Everything else is the program's own option. Nothing stands between the terminal and a training in this process. Where
several processes train, Ctrl-C and SIGTERM are passed on to each of them, and the command returns when all have saved.
"""

import json
import os
import platform
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from .llm.commands import chat, evaluate
from .utils.documents import parse_json
from .utils.processes import ask_to_stop, passing_on, start_apart
from .utils.versions import installed_version

PACKAGES = (
    "reslora-diffusion torch diffusers transformers peft accelerate safetensors tokenizers huggingface-hub numpy "
    "pillow gradio datasets trl bitsandbytes xformers triton"
).split()
LAUNCH_OPTIONS = (
    "--config_file --num_processes --num_machines --machine_rank --main_process_ip --main_process_port --gpu_ids"
).split()
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def beside(name: str) -> Path:
    """A folder of the repository's top level: in a wheel it lies inside the package."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


def launch_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Options of `accelerate launch` among the words of a command line, and the rest.

    >>> launch_words(["--num_processes", "2", "--rank=4"])
    (['--num_processes', '2', '--multi_gpu'], ['--rank=4'])
    """
    launch, rest, words = [], [], list(words)
    while words:
        word = words.pop(0)
        if word.partition("=")[0] in LAUNCH_OPTIONS:
            launch += [word] if "=" in word or not words else [word, words.pop(0)]
        elif word == "--multi_gpu":
            launch.append(word)
        else:
            rest.append(word)
    names = {word.partition("=")[0] for word in launch}
    if names and not {"--config_file", "--multi_gpu"} & names:
        launch.append("--multi_gpu")  # without it accelerate starts one process, whatever number is asked for
    return launch, rest


def start(script: str, words: list[str]) -> int:
    """Run a program with these options; returns its exit code."""
    launch, rest = launch_words(words)
    path = beside("train_scripts") / script
    if launch:
        return wait_for([sys.executable, "-m", "accelerate.commands.launch", *launch, str(path), *rest])
    sys.argv = [str(path), *rest]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0


def wait_for(command: list[str]) -> int:
    """Run a launcher, pass signals on to the processes that it started, and wait for its end.

    The launcher is in a session of its own: it does not see Ctrl-C, which would end it before they have saved.
    """
    launcher = start_apart(command)

    def pass_on() -> None:
        import psutil  # accelerate needs it too

        workers = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
        for worker in workers or ([psutil.Process(launcher.pid)] if launcher.poll() is None else []):
            ask_to_stop(worker)

    with passing_on(pass_on):
        return launcher.wait()


def train(context: typer.Context) -> None:
    """Teach a diffusion model a subject (train_dreambooth_reslora.py); `reslora train --help` lists its options."""
    raise typer.Exit(start("train_dreambooth_reslora.py", context.args))


def train_llm(context: typer.Context) -> None:
    """Fine-tune a language model (train_llm_reslora.py)."""
    raise typer.Exit(start_or_sweep("train-llm", "train_llm_reslora.py", context.args))


def glue(context: typer.Context) -> None:
    """Fine-tune a classifier on a GLUE task (train_glue_reslora.py)."""
    raise typer.Exit(start_or_sweep("glue", "train_glue_reslora.py", context.args))


def start_or_sweep(command: str, script: str, words: list[str]) -> int:
    """One run, or with --seeds or --grid many (see `llm.sweep`)."""
    from .llm.sweep import run, sweep_of

    sweep = sweep_of(words, default_output=f"reslora-{command.removeprefix('train-')}")
    if sweep is None:
        return start(script, words)
    return run(sweep, [sys.executable, "-m", "reslora_diffusion.cli", command])


def dpo(context: typer.Context) -> None:
    """Teach a language model which answers are preferred, by DPO (train_dpo_reslora.py)."""
    raise typer.Exit(start_or_sweep("dpo", "train_dpo_reslora.py", context.args))


def grpo(context: typer.Context) -> None:
    """Reward a language model for right answers, by GRPO (train_grpo_reslora.py)."""
    raise typer.Exit(start_or_sweep("grpo", "train_grpo_reslora.py", context.args))


def compare(context: typer.Context) -> None:
    """Open the page that compares LoRA with ResLoRA."""
    sys.argv = ["reslora compare", *context.args]
    open_page()


def tune(context: typer.Context) -> None:
    """Search learning rate and alpha for a training on your own data: `reslora tune train ...`."""
    from .tuning.command import main

    raise typer.Exit(main(context.args))


def open_page() -> None:
    """The page of `app/`, as `reslora compare` and `reslora-compare` start it."""
    page = beside("app")
    sys.path.insert(0, str(page.parent))
    name = "reslora_diffusion.app" if page.parent.name == "reslora_diffusion" else "app"
    runpy.run_module(name, run_name="__main__")


def env(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="an output_dir: its options are printed too")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Print what a bug report needs: versions, devices, and the options of a run."""
    found = environment(run)
    typer.echo(
        json.dumps(found, indent=2) if as_json else "\n".join(f"- {name}: {value}" for name, value in found.items())
    )


def environment(run: Path | None = None) -> dict[str, str]:
    """Versions and devices by name; with a run also its command and options, which hold no secrets."""
    import torch

    found = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {package: installed_version(package) for package in PACKAGES}
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}"
    found["devices"] = f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "no CUDA device"
    if torch.backends.mps.is_available():
        found["devices"] = "Apple MPS"
    found["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    settings = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF")
    found |= {name: os.environ[name] for name in settings if name in os.environ}
    if run is not None:
        try:
            record = parse_json((run / "run.json").read_text(encoding="utf-8"))
            found |= {"command": " ".join(record["command"]), "options": json.dumps(record["options"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{run} has no run.json that can be read: {error}") from error
    return found


def add_commands(app: typer.Typer) -> None:
    for name, program in {
        "train": train,
        "train-llm": train_llm,
        "glue": glue,
        "dpo": dpo,
        "grpo": grpo,
        "tune": tune,
        "compare": compare,
    }.items():
        app.command(name, add_help_option=False, context_settings=PASSED_ON)(program)
    app.command("chat")(chat)
    app.command("evaluate")(evaluate)
    app.command("env")(env)
