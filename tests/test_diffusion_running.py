"""The small parts around training: checkpoints, history, optimizers, averages, names, and a race."""

import json
import math
import os
import signal
import threading
import time

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from dreambooth import PROMPT, arguments, script, train
from reslora_diffusion.diffusion.train.checkpoints import (
    checkpoints_in,
    fault_of,
    find_checkpoint,
    write_checkpoint,
)
from reslora_diffusion.diffusion.train.ema import Ema
from reslora_diffusion.diffusion.train.history import History, NonFiniteLoss, plot_losses, read_history, smooth
from reslora_diffusion.diffusion.train.model_card import model_card, usage
from reslora_diffusion.diffusion.train.optimizers import fast_forward, make_lr_scheduler, make_optimizer
from reslora_diffusion.diffusion.train.record import export_name
from reslora_diffusion.diffusion.train.training_state import load_training_state, save_training_state
from reslora_diffusion.interruption import Interruption
from reslora_diffusion.utils.output_folder import alone_in
from reslora_diffusion.utils.problems import BadInput, Interrupted, Stopped, printable, run_program
from reslora_diffusion.utils.state_files import BrokenState

# ------------------------------------------------------------------------------------------------ checkpoints


def write_state(folder, step=0):
    save_training_state(folder / "state", {"a": torch.ones(3)}, facts={"step": step})


def test_a_launcher_that_passes_ctrl_c_on_does_not_quit_at_once(monkeypatch):
    """The terminal tells every process of its group; torchrun tells its workers once more."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interruption(Accelerator(cpu=True)) as interruption:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert interruption.requested()
        interruption.echo_until = time.monotonic() - 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_a_limit_removes_what_was_written_first(tmp_path):
    """A checkpoint of more steps may be damaged, or of an attempt that was given up: what was just written stays."""

    def write(folder):
        (folder / "state").mkdir()
        (folder / "state" / "state.json").write_text("{}")

    for step, age in ((10, 30), (2, 20)):
        os.utime(write_checkpoint(tmp_path, step, write), (time.time() - age,) * 2)
    write_checkpoint(tmp_path, 3, write, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    write_checkpoint(tmp_path, 1, write, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_checkpoints_are_found_by_step_and_incomplete_ones_are_not(tmp_path):
    for step in (2, 10, 4):
        write_checkpoint(tmp_path, step, lambda folder, step=step: write_state(folder, step))
    (tmp_path / "checkpoint-20" / "state").mkdir(parents=True)
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-4") == tmp_path / "checkpoint-4"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-2")) == tmp_path / "checkpoint-2"
    assert find_checkpoint(tmp_path, "checkpoint-20") is None
    assert find_checkpoint(tmp_path / "elsewhere", "latest") is None


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_torn_file_makes_a_checkpoint_incomplete(tmp_path, name):
    write_checkpoint(tmp_path, 1, write_state)
    path = tmp_path / "checkpoint-1" / "state" / name
    assert fault_of(tmp_path / "checkpoint-1") is None
    path.write_bytes(path.read_bytes()[:-4])
    assert fault_of(tmp_path / "checkpoint-1")


def test_one_flipped_bit_anywhere_in_a_state_is_found(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, lambda folder, step=step: write_state(folder, step))
    for path in sorted((tmp_path / "checkpoint-2" / "state").iterdir()):
        whole = path.read_bytes()
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            assert fault_of(tmp_path / "checkpoint-2"), (path.name, place)
            assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1"
            with pytest.raises((BrokenState, FileNotFoundError)):
                load_training_state(tmp_path / "checkpoint-2" / "state")
        path.write_bytes(whole)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-2"


def test_a_missing_moment_is_found_with_checksums_and_without(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = save_training_state(tmp_path / "state", {}, model=model, optimizer=optimizer, facts={"step": 1})
    tensors = load_file(state / "state.safetensors")
    lost = "optimizer.state.weight.exp_avg_sq"
    save_file({name: value for name, value in tensors.items() if name != lost}, state / "state.safetensors")
    with pytest.raises(BrokenState, match=f"state.safetensors lacks {lost}"):
        load_training_state(state, model=model, optimizer=optimizer)

    facts = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps({k: v for k, v in facts.items() if k not in ("sha256", "tensors")}))
    with pytest.raises(BrokenState, match="lacks moments: state.weight.exp_avg_sq"):  # of an earlier version
        load_training_state(state, model=model, optimizer=optimizer)


def test_what_a_killed_run_left_is_removed_while_the_folder_is_locked(tmp_path):
    write_checkpoint(tmp_path, 1, write_state)
    (tmp_path / "checkpoint-1").rename(tmp_path / ".checkpoint-1.replaced")  # killed between two renames
    for name in (".export-abc", ".checkpoint-4.partial", ".writable-x", ".run.json.0123abcd.partial"):
        (tmp_path / name / "state").mkdir(parents=True)
    (tmp_path / ".mine").write_text("stays")
    with alone_in(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "checkpoint-1"]
        assert fault_of(tmp_path / "checkpoint-1") is None


def test_a_checkpoint_that_fails_leaves_the_old_one_and_no_rest(tmp_path):
    write_checkpoint(tmp_path, 1, write_state)

    def fail(folder):
        write_state(folder)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_checkpoint(tmp_path, 1, fail, limit=1)
    assert fault_of(tmp_path / "checkpoint-1") is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


# ------------------------------------------------------------------------------------------------ history


def test_history_is_written_as_it_is_read_and_cut_where_a_run_resumes(tmp_path):
    history = History(tmp_path, every=2)
    for step in range(1, 5):
        history.add_step(step, torch.tensor(1.0 / step), torch.tensor(0.5), 1e-3)
        assert history.is_due() == (step % 2 == 0)
        if history.is_due():
            history.flush()
    history.write([{"step": 4, "validation_loss": 0.3}])
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2, 3, 4, 4]
    again = History(tmp_path, first_step=3)
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2, 3]
    assert again.smoothed == pytest.approx(smooth([1, 1 / 2, 1 / 3])[-1])
    assert History(tmp_path).rows == read_history(tmp_path) == []


def test_a_line_that_was_cut_off_does_not_keep_a_run_from_going_on(tmp_path):
    history = History(tmp_path)
    history.write([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])
    history.path.write_text(history.path.read_text()[:-9])
    assert History(tmp_path, first_step=1).rows == read_history(tmp_path) == [{"step": 1, "loss": 0.5}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_what_is_not_finite_is_an_error_and_is_not_written(tmp_path, loss, norm):
    history = History(tmp_path, every=3)
    for step, values in enumerate([(1.0, 1.0), (loss, norm), (1.0, 1.0)], 1):
        history.add_step(step, *map(torch.tensor, values), lr=1e-3)
    with pytest.raises(NonFiniteLoss, match="step 2"):
        history.flush()
    assert [row["step"] for row in read_history(tmp_path)] == [1]


def test_infinite_gradients_are_expected_with_fp16(tmp_path):
    history = History(tmp_path, overflows=True)
    history.add_step(1, torch.tensor(1.0), torch.tensor(math.inf), 1e-3)
    history.flush()
    assert read_history(tmp_path)[0]["grad_norm"] is None


def test_smoothing_has_no_bias_towards_the_start():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    values = [1.0, 5.0, 2.0]
    weights = [0.9**2, 0.9, 1.0]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert smooth(values, 0.9)[-1] == pytest.approx(expected)


def test_the_plot_is_an_image_of_every_run(tmp_path):
    rows = [{"step": n, "loss": 1 / (n + 1)} for n in range(1, 20)] + [{"step": 5, "validation_loss": 0.2}]
    plot_losses({"LoRA": rows, "ResLoRA": rows[:5], "empty": []}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------ optimizers


def components() -> dict[str, dict[str, nn.Parameter]]:
    def factors(prefix):
        return {
            f"{prefix}.{leaf}.lora_{side}.default.weight": nn.Parameter(torch.ones(2, 2))
            for leaf in ("attn1.to_q", "attn2.to_k")
            for side in "AB"
        }

    return {"unet": factors("down_blocks.0"), "text_encoder": factors("encoder.layers.0")}


def rates(tmp_path, **options) -> dict[str, float]:
    parts = components()
    optimizer = make_optimizer(parts, arguments(tmp_path, **options), processes=2)
    names = {id(p): f"{part}.{name}" for part, named in parts.items() for name, p in named.items()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_learning_rates_by_component_factor_and_pattern(tmp_path):
    found = rates(
        tmp_path,
        learning_rate=1e-3,
        train_text_encoder=True,
        text_encoder_lr=1e-4,
        loraplus_lr_ratio=16.0,
        lr_pattern=["attn2.to_k=0.5"],
    )
    assert len(found) == 8
    for name, lr in found.items():
        expected = 1e-3 if name.startswith("unet") else 1e-4
        expected *= 16 if "lora_B" in name else 1
        expected *= 0.5 if "attn2" in name else 1
        assert lr == pytest.approx(expected), name


def test_the_learning_rate_is_scaled_by_all_that_is_averaged_over(tmp_path):
    found = rates(tmp_path, learning_rate=1e-3, scale_lr=True, train_batch_size=3, gradient_accumulation_steps=5)
    assert list(found.values()) == pytest.approx([1e-3 * 3 * 5 * 2] * 8)


def test_settings_reach_the_optimizer(tmp_path):
    made = make_optimizer(
        components(),
        arguments(tmp_path, adam_beta1=0.8, adam_weight_decay=0.5, optimizer_args=["amsgrad=True", "eps=1e-3"]),
    )
    assert type(made) is torch.optim.AdamW
    group = made.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["amsgrad"], group["eps"]) == ((0.8, 0.999), 0.5, True, 1e-3)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
def test_a_schedule_can_be_put_where_it_would_be(tmp_path, name):
    args = arguments(tmp_path, lr_scheduler=name, lr_warmup_steps=3)
    stepped, jumped = (make_lr_scheduler(make_optimizer(components(), args), args, 10) for _ in range(2))
    for _ in range(5):
        stepped.optimizer.step()
        stepped.step()
    fast_forward(jumped, 5)
    for _ in range(3):
        assert [g["lr"] for g in stepped.optimizer.param_groups] == [g["lr"] for g in jumped.optimizer.param_groups]
        for schedule in (stepped, jumped):
            schedule.optimizer.step()
            schedule.step()


def test_the_average_forgets_its_start_and_steps_aside():
    live = {"a": nn.Parameter(torch.zeros(2))}
    ema = Ema(live, decay=0.9)
    expected = 0.0
    for step in range(1, 30):
        with torch.no_grad():
            live["a"].fill_(float(step))
        ema.update(live, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.average["a"].tolist() == pytest.approx([expected] * 2)
    with ema.in_place_of(live):
        assert live["a"].tolist() == pytest.approx([expected] * 2)
    assert live["a"].tolist() == [29.0] * 2


# ------------------------------------------------------------------------------------------------ programs


def test_exit_codes(capsys):
    def raising(error):
        def program():
            raise error

        return program

    assert run_program(lambda: None) == 0
    assert run_program(raising(Interrupted("after step 3"))) == 0
    assert run_program(raising(BadInput(["a", "b"]))) == 2
    assert run_program(raising(Stopped("nan"))) == 1
    assert run_program(raising(OSError(28, "No space left on device"))) == 1
    assert run_program(raising(KeyboardInterrupt())) == 130
    before = signal.getsignal(signal.SIGTERM)
    assert run_program(lambda: signal.raise_signal(signal.SIGTERM)) == 130
    signal.signal(signal.SIGTERM, before)
    assert "2 problems:\n  - a\n  - b" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        run_program(raising(FileNotFoundError(2, "a mistake of ours")))


def test_the_second_signal_acts_as_before():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have begun deaf to it
    with Interruption(Accelerator(cpu=True)) as interruption:
        assert not interruption.requested()
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_training_may_run_in_a_thread_which_hears_no_signals():
    heard = []

    def work():
        with Interruption(Accelerator(cpu=True)) as interruption:
            heard.append(interruption.requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [False]


@pytest.mark.parametrize(
    ("folder", "name"), [("my dog", "my-dog"), ("-x-", "x"), ("ünï", "ünï"), ("a.b_c+1", "a.b_c+1"), ("§", "lora")]
)
def test_the_exported_file_is_named_after_the_folder(tmp_path, folder, name):
    assert export_name(arguments(tmp_path / folder)) == name


# ------------------------------------------------------------------------------------------------ a race


def test_a_race_ends_in_one_comparison_that_the_app_opens(tmp_path, capsys):
    from app.request import CompareRequest

    folder = train(
        tmp_path / "race",
        seed=None,
        compare=["lora,reslora-block", "reslora-input:handover=0.5,rank=2"],
        max_train_steps=2,
        num_validation_images=1,
        validation_prompt=[PROMPT],
    )
    names = ["lora", "reslora-block", "reslora-input:handover=0.5,rank=2"]
    figures = json.loads((folder / "race.json").read_text())
    assert list(figures["contenders"]) == names
    options = [
        json.loads((folder / name / "run.json").read_text())["options"]
        for name in ("lora", "reslora-block", "reslora-input-handover=0.5-rank=2")
    ]
    assert [(o["method"], o["shortcut"], o["rank"], o["handover"]) for o in options] == [
        ("lora", None, 4, None),
        ("reslora", "block", 4, None),
        ("reslora", "input", 2, 0.5),
    ]
    assert len({o["seed"] for o in options}) == 1
    firsts = [read_history(path.parent)[1]["loss"] for path in sorted(folder.glob("*/metrics.jsonl"))]
    assert firsts == pytest.approx([firsts[0]] * 3, rel=1e-5)
    for name in ("samples.png", "loss.png"):
        assert (folder / name).is_file()

    settings = json.loads((folder / "comparison.json").read_text())
    paths = {adapter["sha256"]: str(folder) for adapter in settings["adapters"]}
    request = CompareRequest.from_dict(settings, paths)
    assert [adapter.label for adapter in request.adapters] == names
    assert request.prompts == (PROMPT,)
    assert "reslora-block" in capsys.readouterr().out


def test_problems_of_contenders_say_whose_they_are(tmp_path):
    args = arguments(tmp_path / "race", compare=["lora:rank=0", "reslora-input:rank=0", "reslora-block:lora_alpha=-1"])
    with pytest.raises(BadInput) as error:
        script.main(args)
    assert "lora:rank=0, reslora-input:rank=0: --rank: got 0" in str(error.value)
    assert "reslora-block:lora_alpha=-1: --lora_alpha: got -1.0" in str(error.value)
    assert not (tmp_path / "race").exists()


class Wrapping(torch.optim.Adam):
    """Puts the moments one level deeper in `state_dict()`, as bitsandbytes' optimizers do."""

    KEY = "__bnb_optimizer_quant_state__"

    def state_dict(self):
        found = super().state_dict()
        states = {
            key: {"step": v["step"], self.KEY: {n: x for n, x in v.items() if n != "step"}}
            for key, v in found["state"].items()
        }
        return found | {"state": states}


def test_moments_of_8_bit_optimizers_are_restored(tmp_path):
    def step(model, optimizer, numbers):
        for number in numbers:
            model(torch.full((2, 3), float(number))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    whole = torch.nn.Linear(3, 2)
    optimizer = Wrapping(whole.parameters(), lr=0.1)
    step(whole, optimizer, range(3))
    save_training_state(tmp_path / "state", dict(whole.named_parameters()), model=whole, optimizer=optimizer)
    resumed = torch.nn.Linear(3, 2)
    again = Wrapping(resumed.parameters(), lr=0.1)
    tensors, _ = load_training_state(tmp_path / "state", model=resumed, optimizer=again)
    resumed.load_state_dict(tensors)
    step(whole, optimizer, range(3, 6))
    step(resumed, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_program_on_a_model_card_has_what_it_needs_and_no_path_of_the_machine(tmp_path):
    (tmp_path / "vae").mkdir()
    args = arguments(
        tmp_path / "out",
        pretrained_model_name_or_path="a/base",
        pretrained_vae_model_name_or_path=tmp_path / "vae",
        revision="main",
        variant="fp16",
        skip_t5=True,
        rescale_betas_zero_snr=True,
    )
    program = "\n".join(usage(args, 'a "dog"'))
    compile(program, "card", "exec")
    for part in (
        'base = "a/base"\n',
        'vae = "../vae"  # relative to this folder',
        'revision="main", variant="fp16", text_encoder_3=None, tokenizer_3=None',
        "vae=AutoencoderKL.from_pretrained(vae))",
        'rescale_betas_zero_snr=True, timestep_spacing="trailing")',
        'pipe(prompt="a \\"dog\\"")',
    ):
        assert part in program, program
    args.pretrained_model_name_or_path = "/usr"
    assert 'base = "path/to/usr"  # put' in "\n".join(usage(args, "x"))


@pytest.mark.parametrize("prompt", ["a \U0001f600 cat", 'x"\n---\nlicense: mit', "\x1b[31mred", "\ud800", "a <b>`cat`"])
def test_front_matter_of_a_model_card_is_yaml_whatever_the_prompt(tmp_path, prompt):
    card = model_card(arguments(tmp_path / "out"), "lora", prompt, [], [])
    assert all(c.isprintable() or c == "\n" for c in card)
    _, front, text = card.split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["instance_prompt"] == printable(prompt)
    assert "license" not in found
    text.encode()
