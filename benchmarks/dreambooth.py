"""The success of the demo's DreamBooth on the embedded pipeline: held-out subjects, by LoRA and ResLoRA.

    python -m benchmarks.dreambooth [--subjects NAME ...] [--seeds N ...] [--model FOLDER] [--output FILE]

Each subject is trained as `make demo` does it, by LoRA and by ResLoRA. From each seed (of the images; the training has
the demo's own) there is an image on each of three backgrounds on which no training image shows the subject, and one of
the class on the same background. The judge of the recipe, which knows no network, names what it sees among all
subjects, the held-out ones included:

    subject       share of the images whose subject is the trained one
    background    share of the images on the background that the prompt names
    class         share of the images of "an animal" that are an animal, and not the subject

The base, without an adapter, answers the same prompts. The intervals are Wilson's, for 95 %, as if images were
independent; those of one subject come from one training, so the true ones are wider. A run that was broken off goes on
when it is started again: finished subjects stay in the result file, finished trainings in --work_dir.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from .results import FOLDER, write_results

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = ROOT / "assets" / "subjects"
MEASURES = ("subject", "background", "class")


@cache
def recipe() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The demo, and the recipe's drawings and judge; they stand beside the scripts, outside of any package."""
    sys.path.insert(0, str(ROOT / "train_scripts"))
    import demo
    import sticker_data
    import sticker_judge

    return demo, sticker_data, sticker_judge


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    _, data, _ = recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=data.HELD_OUT, default=list(data.HELD_OUT), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of the images")
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "sticker-sd", help="folder of a pipeline")
    parser.add_argument("--max_train_steps", type=int, help="of each training (default: the demo's)")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "dreambooth", help="trainings and images")
    parser.add_argument("--output", type=Path, default=FOLDER / "dreambooth.json")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ one subject


def new_backgrounds(subject: str) -> list[str]:
    """Three colours on which no training image shows the subject."""
    _, data, judge = recipe()
    seen = {judge.judge_background(Image.open(file)) for file in sorted((SUBJECTS / subject).glob("*.png"))}
    return [colour for colour in data.BACKGROUNDS if colour not in seen][:3]


def teach(args: argparse.Namespace, subject: str) -> tuple[argparse.Namespace, dict[str, float]]:
    """Both trainings of a subject, unless they are there; the demo's options and the seconds of each."""
    demo, data, _ = recipe()
    words = ["--pretrained_model_name_or_path", args.model, "--instance_data_dir", SUBJECTS / subject]
    words += ["--class_noun", data.HELD_OUT[subject][1], "--output_dir", args.work_dir / subject]
    words += ["--max_train_steps", args.max_train_steps] if args.max_train_steps else []
    options = demo.parse_args([str(word) for word in words])
    seconds = {}
    for method in demo.RUNS.values():
        done = options.output_dir / method / "seconds.json"  # written when the training has ended
        if not done.is_file():
            done_after = demo.train(options, method)
            done.write_text(json.dumps(done_after))
        seconds[method] = json.loads(done.read_text())
    return options, seconds


def generate(args: argparse.Namespace, options: argparse.Namespace, colours: list[str]) -> Path:
    """Images of the subject, then of the class, on each background: `<label>/<number of the prompt>-<seed>.png`."""
    demo, _, _ = recipe()
    noun = options.class_noun
    prompts = [f"{what} on a {colour} background" for what in whats(demo, options, noun) for colour in colours]
    folder = options.output_dir / "judged"
    words = ["--pretrained_model_name_or_path", args.model, "--prompt", *prompts, "--seed", *args.seeds]
    words += [f"--guidance_scale={options.guidance_scale}", "--resolution=64", f"--output_dir={folder}"]
    words += ["--lora", *(f"{label}={options.output_dir / method}" for label, method in demo.RUNS.items())]
    demo.call("generate.py", words)
    return folder


def whats(demo: ModuleType, options: argparse.Namespace, noun: str) -> tuple[str, str]:
    return demo.instance_prompt(options), f"a sticker of {demo.article(noun)}"


def judge_images(folder: Path, subject: str, colours: list[str], seeds: Iterable[int]) -> dict[str, list[int]]:
    """[right, all] for each measure."""
    _, data, judge = recipe()
    noun = data.HELD_OUT[subject][1]
    kinds = {s.name: s.category for s in data.subjects()} | {name: kind for name, (_, kind) in data.HELD_OUT.items()}
    right = {measure: [0, 0] for measure in MEASURES}

    def count(measure: str, is_right: bool) -> None:
        right[measure][0] += is_right
        right[measure][1] += 1

    for n, colour in enumerate(colours):
        for seed in seeds:
            own, ordinary = (Image.open(folder / f"{k}-{seed}.png") for k in (n, n + len(colours)))
            count("subject", judge.judge_subject(own, held_out=True) == subject)
            count("background", judge.judge_background(own) == colour)
            name = judge.judge_subject(ordinary, held_out=True)
            count("class", name != subject and kinds[name] == noun)
    return right


def measure(args: argparse.Namespace, subject: str) -> dict[str, Any]:
    options, seconds = teach(args, subject)
    colours = new_backgrounds(subject)
    folder = generate(args, options, colours)
    judged = {path.name: judge_images(path, subject, colours, args.seeds) for path in sorted(folder.iterdir())}
    return {"backgrounds": colours, "seconds": seconds, "right": judged}


# ------------------------------------------------------------------------------------------------ all subjects


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share, shrunk = right / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / shrunk
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / shrunk
    return max(0.0, middle - half), min(1.0, middle + half)


def summary(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """{column: {measure: share, low, high, images}} over all subjects."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for label in next(iter(found.values()))["right"]:
        for name in MEASURES:
            right, total = (sum(each["right"][label][name][i] for each in found.values()) for i in (0, 1))
            low, high = wilson(right, total)
            table.setdefault(label, {})[name] = {"share": right / total, "low": low, "high": high, "images": total}
    return table


def lines(found: dict[str, dict[str, Any]]) -> Iterable[str]:
    for label, row in summary(found).items():
        cells = (f"{name} {v['share']:6.1%} ({v['low']:.1%} to {v['high']:.1%})" for name, v in row.items())
        yield f"{label:8} " + "   ".join(cells)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the facts that a result file must share for its subjects to count."""
    demo, _, _ = recipe()
    named = {name: vars(demo.parse_args([]))[name] for name in ("rank", "learning_rate", "shortcut", "guidance_scale")}
    steps = args.max_train_steps or demo.parse_args([]).max_train_steps
    try:
        model = str(args.model.resolve().relative_to(ROOT))
    except ValueError:
        model = str(args.model)
    return {"model": model, "weights": fingerprint(args.model), "seeds": args.seeds, "steps": steps, **named}


def fingerprint(model: Path) -> str:
    """The start of the SHA-256 of all weights: results of other weights do not count."""
    digest = hashlib.sha256()
    for file in sorted(model.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def name_of(settings: Mapping[str, Any]) -> str:
    """The name of a folder for trainings of these settings; seeds are of images."""
    trained = {name: value for name, value in settings.items() if name != "seeds"}
    return hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()[:16]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    wanted, found = settings(args), {}
    args.work_dir = args.work_dir / name_of(wanted)
    if args.output.is_file():
        before = json.loads(args.output.read_text(encoding="utf-8"))
        if before["settings"] == wanted:
            found = before["results"]["subjects"]
    for subject in args.subjects:
        if subject in found:
            continue
        began = time.monotonic()
        found[subject] = measure(args, subject)
        results = {"subjects": found, "all": summary(found)}
        write_results(args.output, "dreambooth", results, quiet=True, settings=wanted)
        print(f"\n{subject}: {time.monotonic() - began:.0f} s", *lines({subject: found[subject]}), sep="\n", flush=True)
    print(f"\n{len(found)} subjects", *lines(found), f"written: {args.output}", sep="\n")


if __name__ == "__main__":
    main()
