"""The doors through which strangers' files come in: `doors()` names each, with its files and its reader."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save

import strangers
import strangers_data
import strangers_lora
from dreambooth import arguments
from fuzzing import Door
from strangers import Files


def source_in(folder: Path) -> Path:
    return folder if (folder / "adapter_config.json").exists() else folder / "x.safetensors"


def lora_doors(out: Path) -> Iterator[tuple[str, Door]]:
    from reslora_diffusion.export import convert, fuse, inspect_embeddings, inspect_lora, read_lora, resize, verify_lora
    from reslora_diffusion.export.base import check_stored
    from reslora_diffusion.export.header import read_headers
    from tiny import tiny_pipeline_folder

    def inspect(folder: Path) -> str:
        found = inspect_lora(source_in(folder))
        json.dumps(found.to_dict(), allow_nan=False)
        return str(found)

    def verify(folder: Path) -> str:
        found = verify_lora(source_in(folder))
        json.dumps(found.to_dict(), allow_nan=False)
        return str(found)

    def verify_on_base(folder: Path) -> str:
        return str(verify_lora(source_in(folder), str(tiny_pipeline_folder())))

    def converted(to: str) -> Callable[[Path], object]:
        return lambda folder: str(convert(source_in(folder), out / to, to)[0]).replace(str(out), "")

    def merge(folder: Path) -> str:
        headers = read_headers(source_in(folder))
        check_stored(headers, str(tiny_pipeline_folder()))
        return str(fuse(source_in(folder), str(tiny_pipeline_folder()), out / "fused", overwrite=True))

    def shrink(folder: Path) -> str:
        return str(resize(source_in(folder), out / "small", 1, allow_lossy=True)[0])

    files, refusals = strangers_lora.lora_files(), (ValueError,)
    yield "read", Door(files, lambda folder: bool(read_lora(source_in(folder))))
    yield "inspect", Door(files, inspect)
    yield "verify", Door(files, verify, slow=True)
    yield "verify-on-a-base", Door(files, verify_on_base, slow=True)
    for to in ("diffusers", "kohya", "peft"):
        yield f"convert-to-{to}", Door(files, converted(to), refusals, slow=True)
    yield "merge", Door(files, merge, refusals, slow=True)
    yield "resize", Door(files, shrink, refusals, slow=True)

    def tokens(folder: Path) -> str:
        found = inspect_embeddings(folder / "x_emb.safetensors")
        json.dumps(found.to_dict(), allow_nan=False)
        return str(found)

    rows = {"clip_l": torch.arange(6.0).reshape(2, 3), "clip_g": torch.ones(2, 4)}
    header = {"reslora.tokens": json.dumps({"TOK": ["<s0>", "<s1>"]}), "reslora.steps": "5"}
    yield "embeddings-of-new-tokens", Door(strangers.spoiled({"x_emb.safetensors": save(rows, header)}), tokens)


def option_doors() -> Iterator[tuple[str, Door]]:
    from dataclasses import fields

    from reslora_diffusion.diffusion.data.concepts import KINDS, read_concepts
    from reslora_diffusion.diffusion.options import parsing
    from reslora_diffusion.diffusion.options.checks import check
    from reslora_diffusion.diffusion.options.dreambooth import DreamBoothOptions
    from reslora_diffusion.llm import checks as llm_checks
    from reslora_diffusion.llm import reading
    from reslora_diffusion.llm.options import LlmOptions
    from reslora_diffusion.llm.options import parse as parse_llm
    from reslora_diffusion.llm.other_programs import AXOLOTL, FACTORY, REFUSED

    def config_in(folder: Path) -> str:
        return str(next(folder.iterdir()))

    def diffusion(folder: Path) -> str:
        return "\n".join(parsing.parse(["--config", config_in(folder)]).problems)

    def checked(folder: Path) -> None:
        words = ["--config", config_in(folder), "--output_dir", str(folder / "out")]
        check(parsing.parse(words))

    def language(folder: Path) -> None:
        words = ["--config", config_in(folder), "--output_dir", str(folder / "out")]
        options, values = parse_llm(LlmOptions, words, {})
        llm_checks.check(options, values, reading.option_problems(options), lambda: reading.read(options, 0))

    names = [field.name for field in fields(DreamBoothOptions)]
    own = [field.name for field in fields(LlmOptions)] + [
        "max_steps",
        "report_to",
        "learning_rate",
        "resume_from_checkpoint",
    ]
    yield "options-of-the-image-trainer", Door(strangers.configurations(names), diffusion)
    yield "checked-options-of-the-image-trainer", Door(strangers.configurations(names), checked)
    yield "options-of-the-language-trainer", Door(strangers.configurations(own), language)
    theirs = [*AXOLOTL, *FACTORY, *REFUSED, "base_model", "datasets", "dataset", "stage", "adapter"]
    yield "options-of-other-programs", Door(strangers.configurations(theirs), language)
    entries = strangers.configurations([*KINDS, "concepts"])
    yield "concepts", Door(entries, lambda folder: bool(read_concepts(Path(config_in(folder)))))


def data_doors() -> Iterator[tuple[str, Door]]:
    from reslora_diffusion.diffusion.data.scan import open_mask, open_upright, scan
    from reslora_diffusion.diffusion.options.checks import check
    from reslora_diffusion.llm import glue, reading
    from reslora_diffusion.llm.options import GlueOptions, LlmOptions

    def folder_of_images(folder: Path) -> str:
        found = scan(folder)
        for image in found.images:
            assert open_upright(image.path).mode == "RGB"
            open_mask(image, alpha=True)
        return "\n".join([*found.problems, *found.skipped])

    def trained_on(folder: Path) -> None:
        check(arguments(folder.with_name("out"), instance_data_dir=folder))

    def rows(task: str | None) -> Callable[[Path], object]:
        def read(folder: Path) -> str:
            found = reading.read(LlmOptions(task=task, dataset_name=str(folder / "train.jsonl")), 0)
            return "\n".join(found.notes)

        return read

    def classes(folder: Path) -> None:
        glue.read(GlueOptions(task_name="rte", dataset_name=str(folder)))

    def lines(*columns: str) -> st.SearchStrategy[Files]:
        return strangers_data.json_lines([*columns]).map(lambda content: {"train.jsonl": content})

    yield "a-folder-of-images", Door(strangers_data.image_folders(), folder_of_images)
    yield "images-to-train-on", Door(strangers_data.image_folders(), trained_on, slow=True)

    def dataset(folder: Path) -> None:
        given = {"instance_data_dir": None, "dataset_name": folder, "cache_dir": folder / "cache"}
        check(arguments(folder.with_name("out"), **given))

    yield "a-dataset-of-images", Door(strangers_data.parquet_files(), dataset, slow=True)
    yield "conversations", Door(lines("prompt", "response", "messages", "system"), rows(None))
    yield "glue-files", Door(strangers_data.glue_files(), classes)
    yield "word-problems", Door(lines("Body", "Question", "Equation", "Answer"), rows("svamp"))


def run_doors(out: Path) -> Iterator[tuple[str, Door]]:
    from safetensors.torch import save_file

    from app import runs
    from reslora_diffusion.diffusion.options.parsing import stored_options
    from reslora_diffusion.diffusion.train.checkpoints import fault_of, find_checkpoint, stored_facts
    from reslora_diffusion.diffusion.train.history import read_history
    from reslora_diffusion.export.trained import lora_of
    from reslora_diffusion.llm import resuming
    from reslora_diffusion.llm.options import LlmOptions
    from reslora_diffusion.llm.training_options import TrainingOptions
    from reslora_diffusion.utils.state_files import write_facts

    def shown(folder: Path) -> None:
        read_history(folder)
        run = runs.read_run("a", folder)
        run.smoothed(0.9), run.gaps, run.merged_at

    state = out / "sound" / "checkpoint-2" / "state"
    state.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(3)}, state / "state.safetensors")
    write_facts(state, {"step": 2, "options": {"rank": 4}, "versions": {}})
    sound = {f"checkpoint-2/state/{path.name}": path.read_bytes() for path in state.iterdir()}

    def diffusion(folder: Path) -> str:
        found = find_checkpoint(folder, "latest")
        if found is None:
            return fault_of(folder / "checkpoint-2") or "it has none"
        stored_options(stored_facts(found)["options"])
        return "whole"

    adapter = {
        "peft_type": "RESLORA",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": False,
        "target_modules": ["q_proj"],
        "shortcut": "input",
    }
    row = {"step": 2, "eval_loss": 1.25}
    stated = {"global_step": 2, "best_metric": 0.5, "best_global_step": 2, "log_history": [row], "max_steps": 4}
    language = {
        "checkpoint-2/adapter_config.json": strangers.as_json(adapter),
        "checkpoint-2/trainer_state.json": strangers.as_json(stated),
        "checkpoint-2/schedule.json": strangers.as_json({"option": None, "state": {}}),
        "checkpoint-2/adapter_model.safetensors": sound["checkpoint-2/state/state.safetensors"],
    }

    def resumed(folder: Path) -> str:
        given = TrainingOptions(
            resume_from_checkpoint="latest", output_dir=str(folder), max_steps=-1, metric_for_best_model="loss"
        )
        return str(resuming.checkpoint_of(given, LlmOptions())).replace(str(folder), "")

    yield "a-run-as-the-page-shows-it", Door(strangers.runs(), shown, (ValueError,))
    yield "a-checkpoint-of-the-image-trainer", Door(strangers.spoiled(sound), diffusion)
    yield "a-checkpoint-of-the-language-trainer", Door(strangers.spoiled(language), resumed)
    yield (
        "a-run-to-export",
        Door(strangers.spoiled(sound | {"run.json": b"{}"}), lambda f: bool(lora_of(f)), (ValueError,)),
    )


def base_doors() -> Iterator[tuple[str, Door]]:
    from llm_tiny import GROUPED
    from reslora_diffusion.diffusion.options.checks import check
    from reslora_diffusion.export.base import check_base
    from reslora_diffusion.llm.checks import model_problems
    from reslora_diffusion.llm.model_checks import stored_problems
    from reslora_diffusion.llm.options import LlmOptions
    from tiny import tiny_pipeline_folder

    base = tiny_pipeline_folder()
    small = [path for path in base.rglob("*.json") if path.stat().st_size < 20_000]
    sound = {path.relative_to(base).as_posix(): path.read_bytes() for path in small}
    whole = {path: path.relative_to(base) for path in base.rglob("*") if path.is_file() and path not in small}

    def complete(folder: Path) -> Path:
        for path, name in whole.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / name).exists():
                (folder / name).hardlink_to(path)
        return folder

    def trained(folder: Path) -> None:
        check(arguments(folder.with_name("out"), pretrained_model_name_or_path=complete(folder)))

    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **GROUPED}
    llm = strangers.spoiled(
        {"config.json": strangers.as_json(config), "generation_config.json": b"{}", "tokenizer_config.json": b"{}"}
    )

    def language(folder: Path) -> str:
        options = LlmOptions(model_name_or_path=str(folder), target_modules=["q_proj"], max_length=8)
        return "\n".join([*model_problems(str(folder)), *stored_problems(options)]).replace(str(folder), "")

    yield "a-pipeline", Door(strangers.spoiled(sound), trained, slow=True)
    yield (
        "a-pipeline-to-check-against",
        Door(strangers.spoiled(sound), lambda f: check_base(str(complete(f))), (ValueError,)),
    )
    yield "a-language-model", Door(llm, language)


def page_doors() -> Iterator[tuple[str, Door]]:
    from app import images as page_images
    from app import request, saved
    from app.forms import read_placeholders, read_request, read_seeds, read_strengths, read_train_request, unwritable
    from app.training import TrainLimits, request_problems
    from app.visits import Visit

    def opened(folder: Path) -> None:
        found = saved.open_saved(sorted(folder.iterdir()))
        asked = request.CompareRequest.from_dict(found.data, dict.fromkeys(request.digests_in(found.data), ""))
        if not (problems := request.problems(asked, request.Limits())):
            unwritable(asked)
            saved.saved_cells(found.data, asked, found.read)
            saved.saved_view(found.data, asked)
        return "\n".join(problems)

    def uploaded(folder: Path) -> None:
        for path in folder.iterdir():
            page_images.read_image(path)

    def visited(folder: Path) -> None:
        visit = Visit(folder)
        visit.fields(), visit.adapters(), visit.listed()
        asked = request.CompareRequest(prompts=("a", "b"), seeds=(1,), adapters=(request.Adapter("x", "", "0"),))
        visit.rounds(asked, [])

    def typed(folder: Path) -> None:
        fields = json.loads((folder / "fields.json").read_bytes())
        for read in (read_seeds, read_strengths, read_placeholders):
            try:
                read(fields["text"])
            except ValueError:
                pass
        asked = read_request(
            fields["text"],
            fields["more"],
            "1",
            ["x"],
            "1",
            True,
            "",
            fields["number"],
            fields["number"],
            "as saved",
            adapters={},
            limits=request.Limits(),
        )
        request.problems(asked, request.Limits())

    def asked_to_train(folder: Path) -> None:
        fields = json.loads((folder / "fields.json").read_bytes())
        found = read_train_request(
            fields["text"],
            "LoRA",
            fields["number"],
            "",
            4,
            fields["number"],
            1,
            False,
            "",
            4,
            fields["number"],
            fields["more"],
        )
        request_problems(found, 3, TrainLimits())

    typed_text = st.fixed_dictionaries({"text": strangers.texts, "more": strangers.texts, "number": strangers.numbers})
    fields = typed_text.map(lambda found: {"fields.json": strangers.as_json(found)})
    kept = {
        "fields.json": b"[]",
        "votes.json": b'{"columns": [0, 1], "pairs": [], "votes": [], "seen": []}',
        "adapters.json": b"{}",
    }
    yield "a-saved-comparison", Door(strangers_data.archives(), opened, (ValueError,))
    yield (
        "an-image-on-the-page",
        Door(strangers_data.images().map(lambda data: {"a.png": data}), uploaded, (ValueError,)),
    )
    yield "a-kept-visit", Door(strangers.spoiled(kept), visited, ())
    yield "fields-of-the-page", Door(fields, typed, (ValueError,))
    yield "a-training-from-the-page", Door(fields, asked_to_train, (ValueError,))


def doors(out: Path) -> dict[str, Door]:
    """Every door by its name; what they write goes below `out`."""
    groups = (lora_doors(out), option_doors(), data_doors(), run_doors(out), base_doors(), page_doors())
    return {name: door for group in groups for name, door in group}
