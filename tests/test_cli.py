"""The `reslora` command: examples, exit codes, and what it does not wait for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lora_factors import ATTENTION, random_factors
from reslora_diffusion.cli import app
from reslora_diffusion.export import export_lora, read_lora, write_lora_file
from reslora_diffusion.export.base import check_stored
from reslora_diffusion.export.checks import files_and_weights
from reslora_diffusion.export.header import read_headers
from reslora_diffusion.export.hollow import fitting_models
from tiny import tiny_pipeline_folder, tiny_unet

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("export", "inspect", "verify", "merge", "resize", "combine", "convert", "extract", "methods")
LANGUAGE = ("train-llm", "glue", "dpo", "grpo")
TRAINING = ("train", *LANGUAGE, "tune", "compare", "chat", "evaluate", "env")  # tests/test_programs.py
SITE = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
BASE = str(tiny_pipeline_folder())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "panda.safetensors"
    write_lora_file(path, {"unet": random_factors(tiny_unet(), ATTENTION, 0)}, "kohya", facts={"shortcut": "input"})
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command in an empty folder; returns exit code and output."""
    monkeypatch.chdir(tmp_path)

    def call(*words) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(word) for word in words])
        return result.exit_code, result.output

    return call


def written(tmp_path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run, command):
    code, output = run(command, "--help")
    assert code == 0
    assert f"Example:\n    reslora {command} " in output


def test_help_lists_the_commands(run):
    code, output = run("--help")
    assert code == 0
    listed = [line.split()[0] for line in output.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == [*COMMANDS, *TRAINING]


def test_inspect(run, source, tmp_path):
    code, output = run("inspect", source)
    assert code == 0
    assert "a LoRA for a custom Stable Diffusion geometry, in kohya keys" in output
    code, output = run("inspect", source, "--json")
    data = json.loads(output)
    assert code == 0
    assert data["ranks"] == {"4": 56}
    assert data["facts"]["shortcut"] == "input"
    assert len(data["modules"]) == 56
    save_file(
        {name: t * 0 if "lora_up" in name else t for name, t in load_file(source).items()}, tmp_path / "0.safetensors"
    )
    assert run("inspect", "0.safetensors")[0] == 1
    code, output = run("inspect", "nothing.safetensors")
    assert (code, output) == (2, "reslora: nothing.safetensors does not exist\n")


def test_verify(run, source):
    code, output = run("verify", source, "--base", BASE)
    assert code == 0
    assert "56/56" in output
    assert output.endswith("verified\n")
    code, output = run("verify", source, "--json")
    assert json.loads(output)["passed"] is True
    assert run("verify", source, "--base", "./nowhere")[0] == 2


def test_verify_fails_for_another_base(run, tmp_path):
    unet = random_factors(tiny_unet(), ("to_q",), 0)
    strange = {f"down_blocks.9.{path}": f for path, f in unet.items()}
    write_lora_file(tmp_path / "x.safetensors", {"unet": strange}, "diffusers")
    code, output = run("verify", "x.safetensors", "--base", BASE)
    assert code == 1
    assert "PROBLEM: the base lacks" in output
    assert output.endswith("NOT verified\n")


def test_resize(run, source, tmp_path):
    code, output = run("resize", source, "--rank", "2")
    assert code == 1
    assert "loses more than 5%" in output
    assert written(tmp_path) == []
    code, output = run("resize", source, "--rank", "2", "--allow_lossy")
    assert code == 0
    assert "energy kept" in output
    assert written(tmp_path) == [
        "panda-rank2/export_report.json",
        "panda-rank2/kohya/panda-rank2.safetensors",
        "panda-rank2/pytorch_lora_weights.safetensors",
    ]
    for rank in ("0", "-3", "many"):
        assert run("resize", source, "--rank", rank)[0] == 2


def test_convert(run, source, tmp_path):
    assert run("convert", source, "--to", "diffusers", "--dtype", "fp32")[0] == 0
    assert run("convert", "panda-diffusers", "--to", "kohya")[0] == 0
    assert run("convert", "panda-diffusers", "--to", "peft", "-o", "peft")[0] == 0
    assert written(tmp_path) == [
        "panda-diffusers-kohya.safetensors",
        "panda-diffusers/export_report.json",
        "panda-diffusers/pytorch_lora_weights.safetensors",
        "peft/unet/adapter_config.json",
        "peft/unet/adapter_model.safetensors",
        "peft/unet/export_report.json",
    ]
    assert set(read_lora("panda-diffusers-kohya.safetensors").dtypes) == {"float32"}
    assert run("convert", source, "--to", "webui")[0] == 2


def test_combine(run, source, tmp_path):
    assert run("combine", source, source, "--weights", "0.5,-0.25", "-o", "a.safetensors")[0] == 0
    assert run("combine", source, source, "--weights", "0.5", "-0.25", "-o", "b.safetensors")[0] == 0
    a, b = load_file("a.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    code, output = run("combine", source, source, "--weights", "0.5")
    assert (code, output) == (2, "reslora: got 1 weights for 2 files; wanted one for each, or none\n")
    assert run("combine", source, source, "--nonsense")[0] == 2
    assert run("combine", source, source, "--weights", "a,b")[0] == 2
    with pytest.raises(ValueError, match="got x, wanted a number"):
        files_and_weights(["a"], ["x"])


def test_merge_and_extract(run, source, tmp_path):
    code, output = run("merge", source, "fused", "--base", BASE)
    assert code == 0
    assert "56 modules of" in output
    code, output = run("merge", source, "fused", "--base", BASE)
    assert code == 2
    assert "is not empty" in output
    code, output = run("extract", "fused", BASE, "--rank", "4", "-o", "again.safetensors")
    assert code == 0
    assert "100.0% of the change of 56 modules is in the LoRA" in output
    assert (tmp_path / "again.safetensors").is_file()
    assert run("extract", "fused", "./no", "--rank", "4")[0] == 2


def test_export(run, tmp_path):
    components = {"unet": random_factors(tiny_unet(), ATTENTION, 0)}
    export_lora(tmp_path / "panda" / "checkpoint-5", components, name="panda", facts={"shortcut": "block"})
    code, output = run(
        "export", "panda", "out", "--export_rank", "auto", "--dtype", "bf16", "--name", "bear", "--base", BASE
    )
    assert code == 0, output
    assert {"out/kohya/bear.safetensors", "out/export_report.json"} <= set(written(tmp_path))
    assert set(read_lora("out").dtypes) == {"bfloat16"}
    code, output = run("export", "panda/checkpoint-5", "full")
    assert code == 0
    assert "a block shortcut merges exactly at full rank, here 4, hence the default" in output
    assert run("export", "panda", "out", "--export_rank", "1")[0] == 1
    assert run("export", "nowhere", "out")[0] == 2


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["export", "--help"], 0),
        (["verify", "{broken}"], 2),
        (["resize", "{source}", "--rank", "x"], 2),
        (["export", "nowhere", "out"], 2),
        (["verify", "{source}", "--base", "/nowhere"], 2),
        (["merge", "{source}", "out", "--base", "/nowhere"], 2),
        (["merge", "{source}", "{taken}", "--base", BASE], 2),
        (["merge", "{other}", "out", "--base", BASE], 2),
        (["combine", "{source}", "{source}", "--weights", "1"], 2),
        (["extract", BASE, "{taken}", "--rank", "4"], 2),
    ],
)
def test_answers_that_need_no_torch_do_not_wait_for_it(source, tmp_path, words, code):
    """Nor for diffusers, transformers or PEFT: help and bad input are a matter of a moment."""
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(source.read_bytes()[:-5])
    other, taken = tmp_path / "other.safetensors", tmp_path / "taken"
    save_file({f"lora_unet_{SITE}.{part}.weight": torch.ones(4, 4) for part in ("lora_down", "lora_up")}, other)
    taken.mkdir()
    (taken / "config.json").write_text("{}")
    words = [word.format(source=source, broken=broken, other=other, taken=taken) for word in words]
    program = f"""
import sys
from reslora_diffusion.cli import main
sys.argv = ["reslora", *{words!r}]
try:
    main()
except SystemExit as stop:
    slow = {{"torch", "diffusers", "transformers", "peft"}} & sys.modules.keys()
    print("code", stop.code, "slow", sorted(slow))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"code {code} slow []" in done.stdout, done.stderr


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_lora_for_another_base_is_told_by_headers_as_by_models(tmp_path, component):
    site = SITE if component == "unet" else "text_model_encoder_layers_0_self_attn_q_proj"
    path, prefix = tmp_path / "other.safetensors", {"unet": "lora_unet", "text_encoder": "lora_te"}[component]
    tensors = {f"{prefix}_{site}.lora_{part}.weight": torch.ones(4, 4) for part in ("down", "up")}
    absent = site.replace("_0_", "_9_", 1)
    save_file(tensors | {name.replace(site, absent): value.clone() for name, value in tensors.items()}, path)
    with pytest.raises(ValueError, match="modules have other shapes in the base") as quick:
        check_stored(read_headers(path), BASE)
    with pytest.raises(ValueError, match="the base lacks 1 of the modules") as slow:
        fitting_models(read_lora(path).components, BASE)
    assert str(quick.value) == str(slow.value)


PROGRAMS = [f"train_scripts/{name}.py" for name in ("demo", "demo_llm", "generate", "answer_with_peft")]


@pytest.mark.parametrize("program", [*PROGRAMS, "app/__main__.py", "benchmarks/report.py", "benchmarks/startup.py"])
def test_help_of_other_programs_needs_no_torch_either(program):
    package = program.removesuffix(".py").replace("/", ".").removesuffix(".__main__")
    start = f"run_module({package!r}" if not program.startswith("train_scripts") else f"run_path({program!r}"
    code = (
        f"import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.{start}, run_name='__main__')\n"
        "except SystemExit as stop: print('code', stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "usage: " in done.stdout, done.stderr
    assert done.stdout.endswith("code 0 False\n")


def test_the_console_script_exits_with_the_code(source, tmp_path):
    for words, code in ((["inspect", source], 0), (["inspect", tmp_path / "no"], 2), (["frobnicate"], 2)):
        command = [sys.executable, "-m", "reslora_diffusion.cli", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("verify",), ("merge", "out"), ("export", "out")])
def test_a_hub_that_cannot_be_reached_is_named_at_once(run, source, monkeypatch, waits, words):
    """Not after a minute of retries, and not as a fault of the model."""
    from huggingface_hub import constants

    from reslora_diffusion.utils.hub import unreachable

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    unreachable.cache_clear()
    command, *rest = words
    code, output = run(command, source, *rest, "--base", "nobody/no-model-of-that-name")
    unreachable.cache_clear()
    assert code == 2
    assert "is no folder here and not in the hub's cache, and http://127.0.0.1:9 cannot be reached" in output
    assert waits == []


@pytest.mark.parametrize("words", [("verify",), ("merge", "out")])
def test_a_lora_is_no_base(run, source, words):
    command, *rest = words
    code, output = run(command, source, *rest, "--base", source)
    assert code == 2
    assert "is a LoRA, which is trained on a base" in output


def test_all_that_is_wrong_is_in_one_message(run, source, tmp_path):
    """An unknown option, a value that cannot be, and files that are not there."""
    code, output = run("resize", "nowhere.safetensors", "--rank", "none", "--frobnicate", "3", "--dtype", "fp99")
    assert code == 2
    assert "4 problems" in output
    for part in ("No such option: --frobnicate", "'fp99'", "rank must be 'full'", "nowhere.safetensors does not exist"):
        assert part in output, output
    code, output = run("merge", "nowhere.safetensors", "out", "--base", "/nowhere", "--scale", "much")
    assert (code, "--scale" in output, "nowhere.safetensors does not exist" in output) == (2, True, True)
    assert "/nowhere does not exist" in output
    code, output = run("merge", "--rnak=3", source, "out", "--base", "/nowhere", "--scale", "nan")
    assert "No such option: --rnak" in output
    assert "/nowhere does not exist" in output
    assert "wanted a finite number" in output
    code, output = run("combine", source, "a.safetensors", "b.safetensors", "--weights", "x", "--rank", "0")
    for part in ("a.safetensors does not exist", "b.safetensors does not exist", "got x, wanted a number", "got '0'"):
        assert part in output, output
    assert run("verify", source, "--frobnicate")[1].count("No such option") == 1
    assert run("verify", "--help")[0] == 0
    assert written(tmp_path) == []
