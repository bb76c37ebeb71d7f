"""`--cuda_graph`: a captured run is the run that it was captured from.

Without a GPU a tape of operators stands in for a graph (`tape`): the memory, the numbers baked in and the absence of
Python are those of a graph, the kernels are not. What would wait for the device, or bring something to it, shows
where the step computes on `meta`: such a tensor has no value to read, and nothing else may turn up beside it.
"""

import shutil
import subprocess
import sys
from dataclasses import fields
from functools import partial

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dreambooth import ROOT, SUBJECTS, arguments, environment, script, several_sizes, train, train_without_export, words
from reslora_diffusion.diffusion.data.sampling import Batch
from reslora_diffusion.diffusion.options.checks import check
from reslora_diffusion.diffusion.train import capture
from reslora_diffusion.diffusion.train.history import read_history
from reslora_diffusion.diffusion.train.optimizers import make_optimizer
from reslora_diffusion.utils.problems import BadInput, Stopped
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
    """Class images, so that they are generated once."""
    folder = tmp_path_factory.mktemp("classes")
    for number in range(3):
        Image.open(SUBJECTS / "teapot" / f"{number}.png").save(folder / f"{number}.png")
    return {"class_data_dir": folder, "class_prompt": "a sticker of a thing", "num_class_images": 3}


def with_model(options):
    """The options, with a small model of a family where its name stands."""
    build = {"xl": tiny_pipeline_xl, "3": tiny_pipeline_3}.get(options.get("pretrained_model_name_or_path"))
    return options | ({"pretrained_model_name_or_path": saved(build)} if build else {})


def measured(folder):
    return [(row["loss"], row["grad_norm"]) for row in read_history(folder) if "loss" in row]


def assert_captured_equals_plain(folder, **options):
    """In every loss and norm, and in all that is trained, moments included; returns the captured run."""
    options = STEPS | {"checkpointing_steps": 4} | options
    plain = train_without_export(folder / "off", cuda_graph=False, **options)
    captured = train(folder / "on", cuda_graph=True, **options)
    assert measured(captured) == measured(plain)
    checkpoints = sorted(plain.glob("checkpoint-*"))
    assert plain / "checkpoint-4" in checkpoints
    for checkpoint in checkpoints:
        assert_same(state(checkpoint), state(captured / checkpoint.name))
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
        low_memory_layers=True,
        gradient_accumulation_steps=2,
        **several_sizes(tmp_path),
    )
    assert tapes.recorded == 3  # squares, class images among them; wide images; the update


def test_a_handover_is_recorded_anew_and_a_resumed_run_continues_bit_for_bit(tmp_path, tapes):
    options = {"shortcut": "block", "handover": 0.5}
    whole = assert_captured_equals_plain(tmp_path, checkpointing_steps=1, **options)
    assert (tapes.recorded, tapes.forgotten) == (4, 2)  # at the handover, and at the end
    for step in (1, 3):  # before the handover, and after
        resumed = tmp_path / f"from-{step}"
        shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        more = STEPS | options | {"checkpointing_steps": 4}
        train_without_export(resumed, cuda_graph=True, resume_from_checkpoint="latest", **more)
        assert_same(state(whole / "checkpoint-4"), state(resumed / "checkpoint-4"))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora", "mixed_precision": "fp16", "learning_rate": 2**-10},
        {"shortcut": "input", "optimizer": "sgd", "optimizer_args": ["momentum=0.5"], "handover": 0.5},
        {"shortcut": "none", "optimizer": "adam", "mixed_precision": "bf16", "loraplus_lr_ratio": 4},
        {"shortcut": "input", "train_text_encoder": True, "text_encoder_lr": 2**-7}
        | {"pretrained_model_name_or_path": "xl"},
    ],
    ids=["fp16", "sgd", "bf16", "xl"],  # where a text encoder's last layer has no gradients
)
def test_other_optimizers_precisions_and_models(tmp_path, tapes, options):
    assert_captured_equals_plain(tmp_path, **with_model(options))
    assert tapes.recorded == (4 if "handover" in options else 2)


TAPED = """
import sys
sys.path[:0] = [{tests!r}]
import dreambooth
from reslora_diffusion.diffusion.train import capture
from tape import Tapes
tapes = Tapes()
capture.why_not_captured, capture.CudaGraphs, capture.WARM_UP = lambda device: None, lambda: tapes, 1
dreambooth.script.main(dreambooth.script.parse_args(sys.argv[1:]))
print("recorded", tapes.recorded, "replayed", tapes.replayed)
"""


@pytest.mark.slow
def test_several_processes_average_gradients_between_their_graphs(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(TAPED.format(tests=str(ROOT / "tests")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(program)]
    options = STEPS | {"shortcut": "middle", "gradient_accumulation_steps": 2, "checkpointing_steps": 4}
    for name, captured in (("off", False), ("on", True)):
        done = subprocess.run(
            [*launch, *words(tmp_path / name, cuda_graph=captured, **options)],
            env=environment() | {"ACCELERATE_USE_CPU": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("recorded 2 replayed 10" if captured else "recorded 0") == 2
    assert_same(*(state(tmp_path / name / "checkpoint-4") for name in ("off", "on")))


# ------------------------------------------------------------------------------------------------ nothing waits


class Device(TorchDispatchMode):
    """Notes operators that need a value of a `meta` tensor, or have any other tensor to do with."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        in_place = func is torch.ops.aten._fused_adamw_.tensor_lr  # torch has no version of it for `meta`
        output = None if in_place else func(*args, **(kwargs or {}))
        there = [t for t in tree_flatten((args, kwargs, output))[0] if isinstance(t, torch.Tensor)]
        if waits_for_device(func, args) or any(tensor.device.type != "meta" for tensor in there):
            self.found.append(str(func))
        self.calls += 1
        return output


def shapes(value):
    """A batch, or a part of it, as it would lie on a device whose values are not known."""
    if isinstance(value, tuple):
        return type(value)(*map(shapes, value))
    if isinstance(value, Batch):
        return Batch(**{field.name: shapes(getattr(value, field.name)) for field in fields(value)})
    return None if value is None else value.to("meta")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora"},
        {"shortcut": "input", "train_text_encoder": True, "with_prior_preservation": True, "lora_dropout": 0.1},
        {"shortcut": "block", "loss_type": "huber", "gradient_checkpointing": True, "mixed_precision": "bf16"},
        {"shortcut": "middle", "snr_gamma": 5, "alpha_mask": True, "train_text_encoder": True, "scale_weight_norms": 1},
        {"shortcut": "input", "pretrained_model_name_or_path": "xl", "train_text_encoder": True},
        {"shortcut": "middle", "pretrained_model_name_or_path": "3", "train_text_encoder": True},
    ],
    ids=["lora", "input", "block", "middle", "xl", "3"],
)
def test_a_step_waits_for_nothing_and_brings_nothing_to_the_device(tmp_path, monkeypatch, classes, options):
    """In the form that a GPU computes in, once the first step has been."""
    options = with_model(options)
    options |= classes if options.get("with_prior_preservation") else {}
    args = arguments(tmp_path, fused_attention=options.get("method") != "lora", low_memory_layers=True, **options)
    run, _ = script.prepare(args, check(args))
    batches = [shapes(batch) for batch in run.batches(0, 0)]
    optimizers = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    for model in run.adapters.models.values():
        model.to("meta").train()
    run.collect_tensors()
    run.optimizer = make_optimizer(run.adapters.by_component(), args)
    run.scaler = torch.amp.GradScaler("meta", init_scale=1.0)
    total = torch.zeros((), device="meta")
    step = capture.CapturedStep(
        partial(script.backward, run, run.denoiser, total), partial(script.update, run), run.optimizer, Tapes()
    )
    first, second = Device(), Device()
    for device in (first, second):
        with device:
            for batch in batches:
                step.backward(batch)
            step.update()
    assert first.found != []  # tables of the noise schedule come along
    assert second.found == []
    assert second.calls > 1000


# ------------------------------------------------------------------------------------------------ what cannot be


def test_a_machine_without_a_gpu_says_so_once_and_trains(tmp_path, capsys):
    folder = train(tmp_path / "out", cuda_graph=True, max_train_steps=1)
    assert len(measured(folder)) == 1
    assert capsys.readouterr().out.count("trains without a CUDA device; going on without graphs") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "rmsprop"}, "got RMSprop unfused, wanted adam, adamw, sgd, fused"),
        ({"optimizer": "adafactor"}, "got Adafactor unfused"),
        ({"optimizer_args": ["fused=False"]}, "got AdamW unfused"),
        ({"gradient_checkpointing": True, "lora_dropout": 0.1}, "cannot repeat a dropout"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_before_a_model_is_loaded(tmp_path, options, said):
    check(arguments(tmp_path, **options))
    with pytest.raises(BadInput, match=f"--cuda_graph.*{said}"):
        check(arguments(tmp_path, cuda_graph=True, **options))


def test_a_base_that_fsdp_shards_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(BadInput, match="--cuda_graph cannot record how FSDP gathers the base"):
        check(arguments(tmp_path, cuda_graph=True))


def test_a_step_that_cannot_be_recorded_stops_the_run_with_the_reason(tmp_path, tapes, monkeypatch):
    def fails(function):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(tapes, "record", fails)
    with pytest.raises(Stopped, match="--cuda_graph: the step cannot be recorded: operation not permitted.*capturing"):
        train(tmp_path, cuda_graph=True)


def test_nothing_random_is_kept_for_a_recomputation_that_draws_nothing(tmp_path):
    for dropout in (0.0, 0.1):
        args = arguments(tmp_path, lora_dropout=dropout, gradient_checkpointing=True, train_text_encoder=True)
        run, _ = script.prepare(args, check(args))
        modules = [module for model in run.adapters.models.values() for module in model.modules()]
        functions = [m._gradient_checkpointing_func for m in modules if getattr(m, "gradient_checkpointing", False)]
        kept = {getattr(f, "function", f).keywords["preserve_rng_state"] for f in functions}
        assert kept == {dropout > 0}


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"shortcut": "input", "lora_dropout": 0.1, "gradient_accumulation_steps": 2, "scale_weight_norms": 1.0},
        {"shortcut": "block", "handover": 0.5, "mixed_precision": "bf16", "use_ema": True},
        {"shortcut": "middle", "gradient_checkpointing": True, "mixed_precision": "fp16", "snr_gamma": 5},
        {"shortcut": "none", "optimizer": "sgd", "compile": True},
    ],
    ids=["input", "block", "middle", "compiled"],
)
def test_on_a_gpu_a_captured_run_equals_an_eager_one(tmp_path, monkeypatch, classes, options):
    """In six steps, as closely as sums in another order allow; and no replay waits for the device."""
    close = 1e-2 if "mixed_precision" in options else 1e-3
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(capture, "WARM_UP", 1)
    call, replays = capture.Recorded.__call__, []

    def without_waiting(self, *inputs):
        if capture.signature(inputs) not in self.recordings:
            return call(self, *inputs)
        replays.append(inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(self, *inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(capture.Recorded, "__call__", without_waiting)
    options = STEPS | classes | {"max_train_steps": 6, "checkpointing_steps": 6, "validation_steps": 3} | options
    options |= {"train_text_encoder": True, "with_prior_preservation": True}
    plain, captured = (train(tmp_path / name, cuda_graph=on, **options) for name, on in (("off", False), ("on", True)))
    assert len(replays) >= 4
    for got, wanted in zip(measured(captured), measured(plain), strict=True):
        assert got[0] == pytest.approx(wanted[0], rel=close)
        assert got[1] == wanted[1] or got[1] == pytest.approx(wanted[1], rel=close)  # None where fp16 overflowed
    first, second = (state(folder / "checkpoint-6") for folder in (plain, captured))
    assert first.keys() == second.keys()
    for name in first:
        if "lora_B" in name and not name.startswith("optimizer"):  # zero before the first step
            assert (first[name] - second[name]).norm() <= 10 * close * first[name].norm(), name
