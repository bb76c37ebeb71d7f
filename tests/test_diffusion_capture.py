"""`--cuda_graph`: a captured run is the run that it was captured from.

Without a GPU a tape of operators stands in for a graph (`tape`): the memory, the numbers baked in and the absence of
Python are those of a graph, the kernels are not. What would wait for the device, or bring something to it, shows
where the step computes on `meta`: such a tensor has no value to read, and nothing else may turn up beside it.
"""

import copy
import json
import shutil
from functools import partial

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dreambooth import PROMPT, SUBJECTS, arguments, script, train
from reslora_diffusion.diffusion import capture
from reslora_diffusion.diffusion.checks import check
from reslora_diffusion.diffusion.history import read_history
from reslora_diffusion.diffusion.optimizers import make_optimizer
from reslora_diffusion.problems import BadInput, Stopped
from tape import Tapes, waits_for_device
from test_train_dreambooth import assert_same, state
from tiny import saved, tiny_pipeline_3, tiny_pipeline_xl

# Learning rates that float32 holds exactly, as a graph reads them from a tensor: then nothing is rounded.
STEPS = {"max_train_steps": 4, "learning_rate": 2**-7, "lr_scheduler": "linear", "lr_warmup_steps": 0}


@pytest.fixture
def tapes(monkeypatch):
    made = Tapes()
    monkeypatch.setattr(capture, "why_not_captured", lambda device: None)
    monkeypatch.setattr(capture, "CudaGraphs", lambda: made)
    monkeypatch.setattr(capture, "WARM_UP", 1)
    return made


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Class pictures, so that they are painted once."""
    folder = tmp_path_factory.mktemp("classes")
    for number in range(3):
        Image.open(SUBJECTS / "teapot" / f"{number}.png").save(folder / f"{number}.png")
    return {"class_data_dir": folder, "class_prompt": "a sticker of a thing", "num_class_images": 3}


def several_sizes(folder):
    """Options with pictures of two shapes, masks, captions, and class pictures of a third."""
    (folder / "wide").mkdir()
    for number in range(3):
        picture = Image.open(SUBJECTS / "cake" / f"{number}.png").convert("RGBA").resize((96, 60))
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(folder / "wide" / f"{number}.png")
        (folder / "wide" / f"{number}.txt").write_text(f"a sticker of cake {number}")
    concept = {"instance_data_dir": str(folder / "wide"), "instance_prompt": "ohwx cake"}
    concept |= {"class_data_dir": str(SUBJECTS / "teapot"), "class_prompt": "a thing", "num_class_images": 2}
    square = {"instance_data_dir": str(SUBJECTS / "octopus"), "instance_prompt": "sks octopus"}
    (folder / "concepts.json").write_text(json.dumps([square, concept]))
    return {
        "instance_data_dir": None,
        "instance_prompt": None,
        "concepts": folder / "concepts.json",
        "with_prior_preservation": True,
        "aspect_ratio_buckets": "auto",
        "alpha_mask": True,
    }


def measured(folder):
    return [(row["loss"], row["grad_norm"]) for row in read_history(folder) if "loss" in row]


def assert_captured_equals_plain(folder, **options):
    """In every loss and norm, and in all that is trained, moments included; returns the captured run."""
    options = STEPS | {"checkpointing_steps": 2} | options
    plain, captured = (train(folder / name, cuda_graph=on, **options) for name, on in (("off", False), ("on", True)))
    assert measured(captured) == measured(plain)
    for step in (2, 4):
        assert_same(state(plain / f"checkpoint-{step}"), state(captured / f"checkpoint-{step}"))
    return captured


def test_everything_in_one_step(tmp_path, tapes, classes):
    assert_captured_equals_plain(
        tmp_path,
        shortcut="input",
        train_text_encoder=True,
        text_encoder_lr=2**-8,
        with_prior_preservation=True,
        lora_dropout=0.1,
        gradient_accumulation_steps=2,
        snr_gamma=5,
        scale_weight_norms=1.0,
        use_ema=True,
        validation_steps=2,
        **classes,
    )
    assert (tapes.recorded, tapes.replayed) == (2, 7 + 3)


def test_each_shape_has_a_graph(tmp_path, tapes):
    assert_captured_equals_plain(
        tmp_path,
        shortcut="middle",
        gradient_checkpointing=True,
        fused_attention=True,
        frugal_layers=True,
        gradient_accumulation_steps=2,
        **several_sizes(tmp_path),
    )
    assert tapes.recorded == 3  # squares, class pictures among them; wide pictures; the update


def test_a_handover_is_recorded_anew_and_a_resumed_run_continues_bit_for_bit(tmp_path, tapes):
    options = {"shortcut": "block", "handover": 0.5}
    whole = assert_captured_equals_plain(tmp_path, checkpointing_steps=1, **options)
    assert (tapes.recorded, tapes.forgotten) == (4, 1)
    for step in (1, 3):  # before the handover, and after
        resumed = tmp_path / f"from-{step}"
        shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        train(resumed, cuda_graph=True, resume_from_checkpoint="latest", checkpointing_steps=4, **STEPS, **options)
        assert_same(state(whole / "checkpoint-4"), state(resumed / "checkpoint-4"))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora", "mixed_precision": "fp16", "learning_rate": 2**-10},
        {"shortcut": "input", "optimizer": "sgd", "optimizer_args": ["momentum=0.5"], "handover": 0.5},
        {"shortcut": "none", "optimizer": "adam", "mixed_precision": "bf16", "loraplus_lr_ratio": 4},
    ],
    ids=["fp16", "sgd", "bf16"],
)
def test_other_optimizers_and_precisions(tmp_path, tapes, options):
    assert_captured_equals_plain(tmp_path, **options)
    assert tapes.recorded == (4 if "handover" in options else 2)


class Device(TorchDispatchMode):
    """Notes operators that need a value of a `meta` tensor, or have any other tensor to do with."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        there = [t for t in tree_flatten((args, kwargs, output))[0] if isinstance(t, torch.Tensor)]
        if waits_for_device(func, args) or any(tensor.device.type != "meta" for tensor in there):
            self.found.append(str(func))
        self.calls += 1
        return output


def on_meta(run, batches):
    """The run and its batches as shapes alone, as they would lie on a device."""
    for model in run.adapters.models.values():
        model.to("meta")
    run.collect_tensors()
    run.optimizer = make_optimizer(run.adapters.by_component(), run.args)
    run.scaler = torch.amp.GradScaler("meta", init_scale=1.0)
    batches = copy.deepcopy(batches)
    for tensor in capture.tensors_in(batches):
        if tensor is not None:
            tensor.data = tensor.to("meta")
    return batches


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora"},
        {"shortcut": "input", "train_text_encoder": True, "with_prior_preservation": True, "lora_dropout": 0.1},
        {"shortcut": "block", "loss_type": "huber", "gradient_checkpointing": True, "mixed_precision": "bf16"},
        {"shortcut": "middle", "snr_gamma": 5, "alpha_mask": True, "train_text_encoder": True, "scale_weight_norms": 1},
        {"shortcut": "input", "resolution": 64, "pretrained_model_name_or_path": "xl", "train_text_encoder": True},
        {"shortcut": "middle", "resolution": 64, "pretrained_model_name_or_path": "3", "train_text_encoder": True},
    ],
    ids=["lora", "input", "block", "middle", "xl", "3"],
)
def test_a_step_waits_for_nothing_and_brings_nothing_to_the_device(tmp_path, monkeypatch, classes, options):
    """In the form that a GPU computes in, once the first step has been."""
    if name := options.get("pretrained_model_name_or_path"):
        options |= {"pretrained_model_name_or_path": saved({"xl": tiny_pipeline_xl, "3": tiny_pipeline_3}[name])}
    options |= classes if options.get("with_prior_preservation") else {}
    args = arguments(tmp_path, fused_attention=options.get("method") != "lora", frugal_layers=True, **options)
    run, _ = script.prepare(args, check(args))
    batches = on_meta(run, run.batches(0, 0))
    monkeypatch.setattr("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"])
    run.adapters.train()
    total = torch.zeros((), device="meta")
    step = capture.CapturedStep(
        partial(script.backward, run, run.denoiser, total), partial(script.update, run), run.optimizer, Tapes()
    )
    for _ in range(2):
        with Device() as device:
            for batch in batches:
                step.backward(batch)
            step.update()
    assert device.calls > 1000
    assert device.found == []
