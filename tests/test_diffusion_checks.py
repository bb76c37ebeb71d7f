"""Bad input: every problem in one message that says what was got and wanted, before weights are read."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dreambooth import SCRIPT, SUBJECTS, arguments, call, environment, script, train, words
from reslora_diffusion.diffusion.models.variants import variant_problems
from reslora_diffusion.utils.problems import BadInput, run_program
from tiny import tiny_pipeline_folder


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory):
    """The tiny pipeline's configuration and tokenizer: whoever loads it fails."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    shutil.copytree(tiny_pipeline_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def refused(tmp_path, without_weights):
    """Run with these options; returns what was said, after making sure that nothing was written."""

    def run(**options) -> str:
        output = tmp_path / "out"
        options = {"pretrained_model_name_or_path": without_weights} | options
        with pytest.raises(BadInput) as error:
            train(output, **options)
        assert not output.exists()
        return str(error.value)

    return run


def test_values_of_patterns_have_bounds_too(refused):
    """A negative rate would train away from the images, and NaN would spoil the adapter in the first step."""
    found = refused(lr_pattern=["attn1=-1", "attn2=0"], alpha_pattern=["to_q=nan", "to_k=-2", "to_v=2"])
    assert "--lr_pattern: got -1.0, wanted 0 or more" in found
    assert "--alpha_pattern: got nan, -2.0, wanted a number above 0" in found


def images(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(SUBJECTS / "octopus" / "0.png", folder / name)
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "--rank: got 0, wanted 1 or more"),
        ({"rank": 17}, "--rank is larger than layers of the unet: down_blocks.0"),
        ({"rank_pattern": ["attn1.to_q=40"]}, "attn1.to_q (16, 16) of rank 40"),
        ({"rank": 33, "train_text_encoder": True, "target_modules": ["to_q"]}, "layers of the text_encoder"),
        ({"shortcut": "sideways"}, "--shortcut: got 'sideways', wanted none, input, block, middle"),
        ({"shortcut": "blok"}, "--shortcut: got 'blok', wanted none, input, block, middle; did you mean block?"),
        ({"optimizer": "rit"}, "; did you mean rite?"),
        ({"shortcut": "input", "num_previous": 3}, "num_previous: got 3, wanted 1 or 0"),
        ({"merge_method": "guess"}, "--merge_method: got 'guess', wanted least_squares"),
        ({"target_modules": ["to_qq"]}, "target module 'to_qq' matches nothing in the unet; it has"),
        ({"target_modules": ["conv_norm_out"]}, "neither linear layers nor convolutions: conv_norm_out (a norm)"),
        ({"instance_data_dir": "/nowhere/at/all"}, "/nowhere/at/all is missing; wanted images"),
        ({"with_prior_preservation": True}, "--with_prior_preservation needs --class_data_dir"),
        (
            {"with_prior_preservation": True, "class_data_dir": "classes-not-there"},
            "--with_prior_preservation needs --class_prompt",
        ),
        ({"instance_prompt": None}, "--instance_prompt is required: 0.png"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "checkpoint-9 is no complete checkpoint"),
        ({"resolution": 60}, "--resolution: got 60, wanted a multiple of 8"),
        ({"resolution": 8}, "wanted a multiple of 8 that is at least 16"),
        ({"learning_rate": 0}, "--learning_rate: got 0.0, wanted a number above 0"),
        ({"learning_rate": "nan"}, "--learning_rate: got nan"),
        ({"snr_gamma": 5, "debiased_estimation_loss": True}, "both weight the loss"),
        ({"method": "lora", "shortcut": "block"}, "--shortcut is used only with --method reslora"),
        ({"text_encoder_lr": 1e-4}, "--text_encoder_lr is used only with --train_text_encoder"),
        ({"train_text_encoder": True, "pre_compute_text_embeddings": True}, "the embeddings change"),
        ({"class_labels_conditioning": "timesteps"}, "not supported, because only DeepFloyd"),
        ({"optimizer": "adam2000"}, "--optimizer: got 'adam2000', wanted"),
        ({"optimizer_args": ["speed=9"]}, "AdamW has no 'speed'"),
        ({"optimizer": "prodigy"}, "needs the package prodigyopt"),
        ({"lr_scheduler": "slow"}, "--lr_scheduler: got 'slow'"),
        ({"tokenizer_max_length": 77}, "--tokenizer_max_length: got 77, wanted at most 32"),
        ({"aspect_ratio_buckets": "64x64"}, "--aspect_ratio_buckets: got '64x64'"),
        ({"aspect_ratio_buckets": "60,68"}, "wanted each side a multiple of 8"),
        ({"handover": 1.5}, "--handover: got 1.5"),
        ({"distillation_steps": 9, "shortcut": "block"}, "--distillation_steps refines a merge that is not exact"),
        ({"distillation_steps": 9, "merge_method": "drop"}, "--distillation_steps refines what was fitted on data"),
        ({"distillation_steps": 9, "calibration_batches": 1}, "--distillation_steps holds out one"),
        (
            {"pretrained_model_name_or_path": "/nowhere/model"},
            "/nowhere/model is missing; wanted a folder",
        ),
        ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is required"),
        ({"pretrained_model_name_or_path": SUBJECTS}, "has no model_index.json; wanted a diffusers pipeline"),
        ({"export_name": "a/b"}, "--export_name: got 'a/b'"),
        ({"caption_extension": "txt"}, "--caption_extension: got 'txt', wanted that of text files, such as .txt"),
        ({"caption_extension": ".PNG"}, "--caption_extension: got '.PNG'"),
        ({"validation_split": 1}, "--validation_split: got 1.0, wanted 0 or more and below 1"),
        ({"validation_split": 0.95}, "--validation_split leaves nothing to train on; wanted two different images"),
        ({"keep_best": True}, "--keep_best needs images that are not trained on: --validation_split 0.2"),
        (
            {"keep_best": True, "validation_split": 0.2, "distillation_steps": 4, "shortcut": "input"},
            "refines the last",
        ),
        ({"validation_data_dir": SUBJECTS / "octopus"}, "0.png, 1.png, 2.png, 3.png, 4.png are trained on as well"),
        ({"validation_data_dir": SUBJECTS / "cake", "validation_split": 0.2}, "both say what to validate on"),
        ({"validation_data_dir": "/nowhere/images"}, "/nowhere/images"),
        ({"image_interpolation_mode": "fine"}, "--image_interpolation_mode: got 'fine', wanted nearest"),
        ({"lr_pattern": ["attnX=3"]}, "--lr_pattern: 'attnX' matches no adapted layer"),
        ({"rank_pattern": ["zzz=3"]}, "--rank_pattern: 'zzz' matches no adapted layer"),
        ({"compare": ["lora", "reslora-diagonal"]}, "--compare: got 'reslora-diagonal', wanted lora, dora, reslora"),
        ({"compare": ["lora", "reslora-blok"]}, "; did you mean reslora-block?"),
        ({"compare": ["lora", "lora+ritee"]}, "lora+ritee: got +ritee, wanted +coto, +restart, +fold"),
        ({"compare": ["lora", "lora+rite+pro"]}, "lora+rite+pro: got +rite +pro, and a run has one --optimizer"),
        (
            {"compare": ["lora", "reslora-middle+rite"]},
            "reslora-middle+rite: --optimizer rite: with `middle` one lora_B",
        ),
        ({"compare": ["lora"]}, "wanted two contenders or more"),
        ({"compare": ["lora", "reslora:seed=3"]}, "sets --seed=3, which all contenders share"),
        ({"compare": ["lora", "reslora:max-train-steps=3"]}, "sets --max_train_steps=3, which all contenders share"),
        ({"compare": ["lora", "reslora:rank=many"]}, "reslora:rank=many: --rank: got 'many', wanted a whole number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_problem_is_named(refused, options, said):
    assert said in refused(**options)


def test_methods_that_do_not_go_together_are_named_with_all_else(refused):
    said = refused(
        resolution=60,
        schedule="restart:stages=9",
        max_train_steps=6,
        optimizer="rite",
        shortcut="middle",
        use_dora=True,
    )
    for part in (
        "--resolution: got 60",
        "restart: a finished link is frozen",
        "restart: got 9 stages in 6 steps",
        "--use_dora: DoRA takes norms of W + B A",
        "--optimizer rite: with `middle` one lora_B",
        "--optimizer rite: DoRA's magnitude",
    ):
        assert part in said


def test_links_of_one_step_are_refused_before_anything_is_read(refused):
    """A warm-up makes the learning rate of a link's first step 0: the export would find that nothing was learned."""
    said = refused(schedule="restart:stages=3", shortcut="none", max_train_steps=3, lr_warmup_steps=1)
    assert "restart: got 3 stages in 3 steps, wanted more steps than stages" in said


def test_an_output_folder_that_cannot_be_made_is_named_before_anything_is_read(without_weights):
    for folder in (SUBJECTS / "panda" / "0.png" / "out", Path("/proc/out")):
        with pytest.raises(BadInput, match="--output_dir: .* cannot be made or written to"):
            train(folder, pretrained_model_name_or_path=without_weights, dry_run=True)


def test_resuming_says_what_it_passes_over_and_where_a_run_is_over(tmp_path, capsys):
    run = train(tmp_path / "run", max_train_steps=2, checkpointing_steps=2)
    with pytest.raises(BadInput, match="checkpoint-2 has 2 steps behind it; this run is to end at 1"):
        train(run, max_train_steps=1, resume_from_checkpoint="latest")
    broken = run / "checkpoint-9" / "state"
    broken.mkdir(parents=True)
    (broken / "state.json").write_text("junk")
    train(run, max_train_steps=3, resume_from_checkpoint="latest", learning_rate=0.02)
    said = capsys.readouterr().out
    assert "continued with --learning_rate 0.02; checkpoint-2 had 0.01" in said
    assert "passed over, as they are not whole: checkpoint-9" in said
    assert "continuing from" in said
    again = script.parse_args(["--config", str(run / "run.json"), "--output_dir", "elsewhere"])
    assert (again.max_train_steps, again.learning_rate, again.output_dir) == (3, 0.02, "elsewhere")
    assert not again.problems


def test_all_problems_come_in_one_message(refused, tmp_path):
    message = refused(
        rank=0,
        shortcut="sideways",
        target_modules=["nothing"],
        instance_data_dir=tmp_path / "missing",
        resolution=60,
        with_prior_preservation=True,
        resume_from_checkpoint="checkpoint-1",
    )
    assert message.startswith("7 problems:")
    for part in ("--rank", "--shortcut", "'nothing'", "missing", "--resolution", "--class_data_dir", "checkpoint-1"):
        assert part in message


def test_a_folder_that_is_empty(refused, tmp_path):
    assert "holds nothing; wanted images" in refused(instance_data_dir=images(tmp_path / "empty"))


def test_a_folder_of_stray_files_only(refused, tmp_path):
    folder = images(tmp_path / "stray")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "notes.md").write_text("hello")
    assert "holds only .DS_Store, notes.md; wanted images" in refused(instance_data_dir=folder)


def test_a_folder_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file is not a folder" in refused(instance_data_dir=tmp_path / "file")


def test_images_that_do_not_decode(refused, tmp_path):
    folder = images(tmp_path / "broken", "good.png")
    (folder / "text.jpg").write_text("not an image")
    (folder / "half.png").write_bytes((SUBJECTS / "octopus" / "0.png").read_bytes()[:200])
    message = refused(instance_data_dir=folder)
    assert "2 unreadable images" in message
    assert "text.jpg" in message
    assert "half.png" in message


def test_captions_of_images_that_are_not_there(refused, tmp_path):
    folder = images(tmp_path / "captions", "a.png")
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")
    (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "c"}\n{"file_name": "a.png"}\n')
    message = refused(instance_data_dir=folder)
    assert "captions without an image: b.txt" in message
    assert "names images that are not there: c.png" in message
    assert "line 2: got" in message


def test_captions_under_the_extension_of_kohyas_scripts(refused, tmp_path):
    """Trained without, every image would have the same prompt."""
    folder = images(tmp_path / "captions", "a.png")
    (folder / "a.caption").write_text("a dog")
    wanted = "has captions that are not read: a.caption; wanted --caption_extension .caption"
    assert wanted in refused(instance_data_dir=folder)
    assert "not read" not in refused(instance_data_dir=folder, caption_extension=".caption", rank=0)
    (folder / "a.txt").write_text("a cat")
    assert "not read" not in refused(instance_data_dir=folder, rank=0)


def test_a_caption_that_is_not_text(refused, tmp_path):
    folder = images(tmp_path / "latin", "a.png")
    (folder / "a.txt").write_bytes("Käse".encode("latin-1"))
    assert "a.txt is not text in UTF-8" in refused(instance_data_dir=folder)


def test_a_mask_of_another_size(refused, tmp_path):
    folder, masks = images(tmp_path / "subject", "a.png", "b.png"), tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (64, 64)).save(masks / "a.png")
    Image.new("L", (32, 64)).save(masks / "b.png")
    Image.new("L", (64, 64)).save(masks / "z.png")
    message = refused(instance_data_dir=folder, mask_data_dir=masks)
    assert "b.png is (32, 64), b.png is (64, 64)" in message
    assert "masks of images that are not there: z" in message


def test_a_concepts_file_with_faults(refused, tmp_path):
    path = tmp_path / "concepts.json"
    path.write_text(
        json.dumps(
            [
                {"instance_prompt": "x", "reapets": 2},
                {"instance_data_dir": "y", "repeats": 0, "caption_extension": "txt"},
            ]
        )
    )
    message = refused(instance_data_dir=None, concepts=path)
    assert "concept 1: unknown key 'reapets'" in message
    assert "concept 1: instance_data_dir is missing" in message
    assert "concept 2: repeats is 0" in message
    assert "concept 2, caption_extension: got 'txt', wanted that of text files" in message


def test_a_model_of_another_family(refused, tmp_path, without_weights):
    folder = shutil.copytree(without_weights, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "IFPipeline"}))
    said = refused(pretrained_model_name_or_path=folder)
    assert "is a IFPipeline; wanted Stable Diffusion 1.x or 2.x" in said


def test_an_autoencoder_of_another_family(refused, tmp_path, without_weights):
    config = json.loads((without_weights / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.13025}))
    said = refused(pretrained_vae_model_name_or_path=tmp_path)
    assert "has scaling_factor 0.13025" in said
    assert "of another family" in said


def test_an_inpainting_model(refused, tmp_path, without_weights):
    folder = shutil.copytree(without_weights, tmp_path / "inpainting")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 33}))
    assert "takes 33 channels and latents have 16" in refused(pretrained_model_name_or_path=folder)


def test_an_output_folder_that_is_a_file_or_holds_another_run(tmp_path, without_weights):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file, wanted a folder"):
        train(tmp_path / "file", pretrained_model_name_or_path=without_weights)
    train(tmp_path / "run", max_train_steps=1, checkpointing_steps=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match="holds checkpoint-1 of an earlier run; wanted another folder, or --resume"):
        train(tmp_path / "run")
    with pytest.raises(BadInput, match="was trained with --rank 4, got 2; wanted the same"):
        train(tmp_path / "run", rank=2, resume_from_checkpoint="latest")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_checkpoint_from_before_block_was_the_default_is_not_taken_for_block(tmp_path, monkeypatch):
    """A shortcut that was not given was not recorded either, and meant `input`."""
    from reslora_diffusion.diffusion.train import record

    given = ["--pretrained_model_name_or_path=model", "--instance_data_dir=data", "--instance_prompt=a"]
    args, asked_for_input = script.parse_args(given), script.parse_args([*given, "--shortcut=input"])
    stored = {"step": 1, "options": args.recorded()}
    monkeypatch.setattr(record, "stored_facts", lambda folder: stored)
    message = "was trained with --shortcut 'input', got 'block'; wanted the same"
    assert [fault for fault in record.differences(args, tmp_path) if message in fault]
    assert not list(record.differences(asked_for_input, tmp_path))
    stored["options"] = args.recorded() | {"shortcut": "block"}
    assert not list(record.differences(args, tmp_path))


def test_the_exit_code_is_2_and_the_message_is_all_there_is(tmp_path, without_weights):
    done = call(tmp_path / "out", rank=0, pretrained_model_name_or_path=without_weights)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["1 problem:", "  - --rank: got 0, wanted 1 or more"]


def test_a_repository_that_cannot_be_reached(refused, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "--push_to_hub: nobody/nothing cannot be written to" in refused(
        push_to_hub=True, hub_model_id="nobody/nothing"
    )


def test_a_dry_run_says_what_it_found_and_writes_nothing(tmp_path, without_weights, capsys):
    folder = images(tmp_path / "subject", "a.png", "b.png")
    Image.new("RGB", (100, 40)).save(folder / "small.png")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "a.txt").write_text("a photo of a dog " * 20)
    (folder / "b.txt").write_text("\n")
    train(
        tmp_path / "out",
        instance_data_dir=folder,
        pretrained_model_name_or_path=without_weights,
        dry_run=True,
        aspect_ratio_buckets="auto",
        max_train_steps=40,
        repeats=2,
    )
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for line in (
        "3 images",
        "1 with captions of their own",
        "2 without a caption, or with an empty one, fall back to the prompt 'a sticker of sks animal': "
        "b.png, small.png",
        "skipped: .DS_Store (hidden)",
        "identical: a.png, b.png",
        "enlarged: small.png",
        "sizes: 2 of 64x64, 1 of 80x48",
        "tokens cut off the end of 'a photo of a dog",
        "40 steps of 2 images: 13.3 passes of 3 steps",
        "1 process",
        "trained parameters",
        "on paper: ",
    ):
        assert line in said, said


def test_what_is_in_the_folders_is_told_although_something_else_is_wrong(tmp_path, without_weights, capsys):
    folder = images(tmp_path / "subject", "a.png", "b.png")
    (folder / "notes.md").write_text("hello")
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a dog"}\n')
    options = {"instance_data_dir": folder, "pretrained_model_name_or_path": without_weights, "resolution": 128}
    assert run_program(lambda: train(tmp_path / "out", **options, rank=0, variant="fp16", dry_run=True)) == 2
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"instance: 2 images in {folder}, 1 with captions of their own",
        "  1 without a caption, or with an empty one, fall back to the prompt 'a sticker of sks animal': a.png",
        "  skipped: notes.md (not an image)",
        "  identical: a.png, b.png",
        "  smaller than they are trained at, enlarged: a.png, b.png",
    ]
    assert said.err.strip().splitlines() == [
        "2 problems:",
        "  - --rank: got 0, wanted 1 or more",
        f"  - --variant: got 'fp16', which no part of {without_weights} has; there: no weights at all",
    ]


def test_a_race_with_a_fault_tells_once_what_is_in_the_folders(tmp_path):
    with pytest.raises(BadInput, match="got 0, wanted 1 or more") as error:
        train(tmp_path / "out", rank=0, compare=["lora", "reslora-block"])
    assert [line.split(" in ")[0] for line in error.value.found if not line.startswith(" ")] == ["instance: 5 images"]


@pytest.mark.parametrize(
    ("unet", "vae", "variant", "said"),
    [
        ("model.safetensors", "model.fp16.bin", None, "got None, and the vae in {} has fp16; --variant fp16?"),
        ("model.bf16.safetensors", "model.fp16.bin", "bf16", "the vae in {} has fp16; --variant fp16?"),
        ("model.bf16-00001-of-00002.safetensors", "model.bin", "fp16", "no part of {} has; there: bf16, plain ones"),
        ("model.fp16-00001-of-00002.safetensors", "model.bin", "fp16", None),
        ("diffusion_pytorch_model.safetensors", "model.bin", None, None),
    ],
)
def test_weights_of_a_variant_are_looked_for_by_name(tmp_path, without_weights, unet, vae, variant, said):
    folder = shutil.copytree(without_weights, tmp_path / "model")
    for part, name in (("unet", unet), ("vae", vae)):
        (folder / part / name).touch()
    args = arguments(tmp_path / "out", pretrained_model_name_or_path=folder, variant=variant)
    problems = list(variant_problems(args))
    assert len(problems) == (said is not None)
    assert said is None or said.format(folder) in problems[0]


def test_a_precision_of_the_launcher_that_is_none_of_ours_is_named(refused, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "--mixed_precision: accelerate launch was given 'fp8', wanted no, fp16, bf16" in refused()


def test_arguments_are_not_changed_by_checking(tmp_path):
    from reslora_diffusion.diffusion.options.checks import check

    args = arguments(tmp_path / "out")
    before = dict(vars(args))
    check(args)
    assert vars(args) == before


@pytest.mark.parametrize("words", [["--no_such_option"], ["--pretrained_model_name_or_path", "/nowhere/model"], []])
def test_what_no_library_is_needed_for_is_said_without_one(words):
    """An import of torch and diffusers takes longer than all the rest of such an answer."""
    code = (
        "import sys; from reslora_diffusion.diffusion.options.checks import check\n"
        "from reslora_diffusion.diffusion.options import parse\n"
        "try: check(parse(sys.argv[1:]))\n"
        "except ValueError as error: print(error)\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert "--pretrained_model_name_or_path" in done.stdout
    assert "--instance_data_dir is required" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_a_file_without_a_model_and_an_address_are_no_models_and_are_said_so(refused, tmp_path):
    file = tmp_path / "dreamlike.safetensors"
    file.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    said = refused(pretrained_model_name_or_path=file, rank=0)
    assert f"{file} holds no tensors; wanted a whole Stable Diffusion" in said
    assert "--rank: got 0" in said
    assert "is a single file" in refused(pretrained_vae_model_name_or_path=file)
    said = refused(pretrained_model_name_or_path="https://huggingface.co/nobody/sks")
    assert "is an address; wanted a folder, or the hub's OWNER/NAME" in said


def test_a_hub_out_of_reach_is_the_reason_given_and_flags_come_first(tmp_path):
    """The real client, and an endpoint at which nobody listens."""
    code = "import time, train_dreambooth_reslora as s; time.sleep = lambda seconds: print('waits', seconds)\n"
    code += "raise SystemExit(s.run_program(lambda: s.main(s.parse_args())))"
    command = [sys.executable, "-c", code, *words(tmp_path / "out", pretrained_model_name_or_path="nobody/sks", rank=0)]
    reached = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    reached = environment(SCRIPT.parent) | reached
    done = subprocess.run(command, env=reached, capture_output=True, text=True)
    assert done.returncode == 2
    assert "waits" not in done.stdout
    problems = [line for line in done.stderr.splitlines() if line.startswith("  - ")]
    assert problems[0] == "  - --rank: got 0, wanted 1 or more"
    assert "nobody/sks" in problems[1]
    assert "it is not on this machine, and http://127.0.0.1:9 cannot be reached" in problems[1]
    assert "model_index" not in done.stderr
