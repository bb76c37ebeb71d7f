"""`python -m benchmarks.gpu`: every stage walks on a CPU, none stops the next, and what is wrong is called so."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.utils import import_utils

from benchmarks import forced, report
from benchmarks.gpu import __main__ as stages
from benchmarks.gpu import correctness, kernels, steps
from benchmarks.gpu.stages import STAGES, Stage
from benchmarks.models import SUBJECTS, output, repeated_blocks
from benchmarks.step import AGAIN, Models, build, frozen
from benchmarks.variants import VARIANTS
from reslora_diffusion import explain_kernels
from tape import Tapes

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "benchmarks" / "gpu_kit.sh"
CPU = torch.device("cpu")
# What the GPU machine has of the packages that we need; what these need is there as well, in versions of its own.
PRESENT = """
accelerate filelock huggingface-hub matplotlib numpy packaging pillow psutil pyyaml regex requests safetensors
tensorboard torch tqdm transformers typer
""".split()


# ------------------------------------------------------------------------------------------------ the stages


def font_is_there() -> bool:
    sys.path.insert(0, str(ROOT / "train_scripts"))
    import sticker_data

    return any(Path(path).is_file() for path in sticker_data.FONT_PATHS)


@pytest.mark.slow
def test_every_stage_walks_on_a_cpu(tmp_path: Path) -> None:
    chosen = [stage for stage in STAGES if stage.letter != "g" or font_is_there()]
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    command += ["--stages", "".join(stage.letter for stage in chosen)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr
    for stage in chosen:
        assert re.search(rf"^{stage.letter}  {stage.name} +\d+ +{stage.seconds}   done$", said.stdout, re.MULTILINE)
    found = {stage.name: json.loads((tmp_path / stage.file).read_text()) for stage in chosen}
    assert set(found["language"]["results"]) == {str(case) for cases in steps.TINY_CASES.values() for case in cases}
    assert all(row["passed"] for row in found["correctness"]["results"]["cases"])
    assert {"plain", "fused", "grouped"} <= set(next(iter(found["kernels"]["results"].values())))
    assert found["run"]["results"]["reslora block"]["seconds"] > 0
    report.document({"step-cuda": found["language"], "kernels-cuda": found["kernels"], "run-cuda": found["run"]})


def stand_ins(monkeypatch: pytest.MonkeyPatch, programs: dict[str, str]) -> None:
    """Stages that are small programs; `FILE` in them is the file of the stage."""
    made = tuple(Stage(letter, letter * 3, "", f"{letter}.json", 1, "") for letter in programs)
    monkeypatch.setattr(stages, "STAGES", made)

    def command(stage: Stage, args: object, seconds: float) -> list[str]:
        return [sys.executable, "-c", f"FILE = {str(args.out / stage.file)!r}\n{programs[stage.letter]}"]  # type: ignore[attr-defined]

    monkeypatch.setattr(stages, "command_of", command)


GOOD = "import json; json.dump({'summary': ['all is well']}, open(FILE, 'w'))"


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    child = tmp_path / "child"
    hangs = "import subprocess; p = subprocess.Popen(['sleep', '99']); "
    hangs += f"open({str(child)!r}, 'w').write(str(p.pid)); p.wait()"
    stand_ins(monkeypatch, {"a": "raise ValueError('no card')", "b": hangs, "c": GOOD})
    monkeypatch.setattr(stages, "LEAST", 0.1)
    wait = stages.run_stage
    monkeypatch.setattr(
        stages,
        "run_stage",
        lambda stage, args, seconds, limit: wait(stage, args, seconds, 3 if stage.letter == "b" else limit),
    )
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out"), "--stages", "abc", "--budget", "60"])
    assert stages.main() == 1
    said = capsys.readouterr().out
    end = said[said.index("outcome") :]
    assert "failed with exit code 1: ValueError: no card" in end
    assert "stopped after 3 s" in end
    assert "done" in end
    assert "all is well" in end
    failed = json.loads((tmp_path / "out" / "a.json").read_text())
    assert failed["kind"] == "failed"
    assert "ValueError: no card" in failed["log"][-1]
    for _ in range(600):  # what a stage has started ends with it
        if not Path(f"/proc/{child.read_text()}").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process that a stage started outlived it")


def test_results_of_an_earlier_call_are_not_taken_for_those_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stand_ins(monkeypatch, {"a": "pass"})
    (tmp_path / "a.json").write_text(json.dumps({"summary": ["from last time"]}))
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--stages", "a"])
    assert stages.main() == 0
    assert "from last time" not in capsys.readouterr().out


def test_after_the_budget_no_stage_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stand_ins(monkeypatch, {"a": GOOD, "b": GOOD})
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--stages", "ab", "--budget", "0.5"])
    assert stages.main() == 1
    assert capsys.readouterr().out.count("left out, the time is over") == 2


def test_faults_of_the_command_line_are_named_together(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    words = ["--out", str(tmp_path / "file"), "--stages", "az", "--budget", "0", "--diffusers_script", "nowhere.py"]
    with pytest.raises(SystemExit) as end:
        stages.parse_args(words)
    assert end.value.code == 2
    said = capsys.readouterr().err
    for part in ("no stage 'z'", "--budget: got 0", "no file nowhere.py", "is a file, wanted a folder"):
        assert part in said


# ------------------------------------------------------------------------------------------------ what is measured


@pytest.mark.parametrize("variant", ["lora", "input", "block", "middle"])
def test_a_forced_kernel_computes(variant: str) -> None:
    of = SUBJECTS["tiny_unet"]
    model, inputs = build(variant, of, CPU, torch.float32), of.inputs(1, CPU, torch.float32)
    kernels_ = forced.kernels_of(model)
    assert kernels_ == ("plain", "fused", "runlora", "grouped")
    for kernel in kernels_:
        forced.force(model, kernel)
        output(model, inputs)
        used = Counter(name for name, _ in explain_kernels(model).layers.values())
        if kernel in ("plain", "fused") or (kernel == "runlora" and variant in ("lora", "block")):
            assert set(used) == {kernel}
        else:
            assert kernel in used
            assert set(used) <= {kernel, "fused", "plain"}


def test_a_wrong_kernel_is_found() -> None:
    setting = correctness.Setting("tiny_llama", "block", torch.float32, CPU)
    assert setting.effect > 0.01
    assert all(row["passed"] for row in setting.eager())
    name, factor = next((n, f) for n, f in setting.factors.items() if n.endswith("lora_B"))
    factor.data *= 1.01
    assert not any(row["passed"] for row in setting.eager()), name


@pytest.mark.parametrize("subject", ["tiny_unet", "tiny_llama"])
def test_a_replay_is_judged_by_the_inputs_that_it_got(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tape of operators, which stands in for a CUDA graph."""
    monkeypatch.setattr(correctness, "CudaGraphs", Tapes)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        import_utils, "is_cuda_stream_capturing", lambda: True
    )  # transformers asks nothing of values then
    setting = correctness.Setting(subject, "middle", torch.float32, CPU)
    assert [row["passed"] for row in setting.graph()] == [True]
    setting.reference = lambda inputs: setting.wanted  # what the recorded inputs would give
    assert [row["passed"] for row in setting.graph()] == [False]


def test_models_of_one_subject_share_their_frozen_weights_alone() -> None:
    models = Models(CPU, torch.float32)
    one, other, base = models("tiny_unet", "block"), models("tiny_unet", "peft"), models.base("tiny_unet")
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    for model in (one, other):
        frozen_, trained = [], []
        for parameter in model.parameters():
            (trained if parameter.requires_grad else frozen_).append(parameter.data_ptr())
        assert set(frozen_) == shared
        assert trained
        assert not set(trained) & shared
    fresh = build("block", SUBJECTS["tiny_unet"], CPU, torch.float32)
    inputs = SUBJECTS["tiny_unet"].inputs(1, CPU, torch.float32)
    assert torch.equal(output(fresh, inputs), output(one, inputs))
    assert not torch.equal(output(base, inputs), output(one, inputs))


@pytest.mark.parametrize("subject", ["tiny_unet", "tiny_llama"])
def test_repeated_blocks_hold_the_adapted_layers(subject: str) -> None:
    model = frozen(SUBJECTS[subject], CPU, torch.float32)
    targets = SUBJECTS[subject].targets
    within = {module for block in repeated_blocks(model) for module in block.modules()}
    adapted = [module for name, module in model.named_modules() if name.endswith(tuple(f".{t}" for t in targets))]
    assert adapted
    assert within.issuperset(adapted)


def test_one_memory_saving_form_is_put_on_at_a_time() -> None:
    model = frozen(SUBJECTS["tiny_unet"], CPU, torch.float32)
    for name, wanted in kernels.LOW_MEMORY.items():
        kernels.only(model, name)
        found = {type(module.__dict__["forward"]) for module in model.modules() if "forward" in module.__dict__}
        assert found == set(wanted)
    kernels.only(model, None)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_kernel_that_gains_nowhere_is_named() -> None:
    def row(ratio: float, peak: float) -> dict:
        return {"ratio": [ratio] * 3, "peak": peak}

    results = {
        "first": {"plain": row(1, 2), "fused": row(0.9, 2), "grouped": row(0.98, 2), "low memory": row(1.01, 1)},
        "second": {"plain": row(1, 2), "fused": row(1.1, 2), "grouped": row(1.05, 2), "slow": row(1.2, 1)},
    }
    said = {line.partition(":")[0]: line for line in kernels.verdicts(results)}
    assert [name for name, line in said.items() if "may be deleted" in line] == ["grouped", "slow"]
    assert "+10.0% of the time" in said["fused"]
    assert "+50.0% of the peak memory" in said["low memory"]


# ------------------------------------------------------------------------------------------------ the kit


def lacking_for(name: str) -> set[str]:
    """The packages that a package needs, directly or through others, and that the GPU machine lacks."""
    found: set[str] = set()
    todo = [name]
    while todo:
        for line in distribution(todo.pop()).requires or []:
            requirement = Requirement(line)
            needed = canonicalize_name(requirement.name)
            if needed in {*found, *PRESENT} or not (requirement.marker is None or requirement.marker.evaluate()):
                continue
            found.add(needed)
            todo.append(needed)
    return found


def test_the_kit_has_what_the_machine_lacks() -> None:
    (names,) = re.findall(r"^lacking=\((.*)\)$", KIT.read_text(encoding="utf-8"), re.MULTILINE)
    assert {canonicalize_name(name) for name in names.split()} == lacking_for("reslora-diffusion")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "got 0 arguments"),
        (["/tmp"], "wanted a folder inside"),
        (["."], "wanted a folder inside"),
        (["docs"], "git does not ignore docs"),
        ([".gpu-kit-test", "nowhere.py"], "no file nowhere.py"),
        ([".venv"], "has other files than a kit"),
    ],
)
def test_the_kit_goes_where_nothing_is_lost(words: list[str], complaint: str) -> None:
    if words == [".venv"] and not (ROOT / ".venv").is_dir():
        pytest.skip("no virtual environment here")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no repository")
    done = subprocess.run([KIT, *words], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 2
    assert complaint in done.stderr


# ------------------------------------------------------------------------------------------------ pretraining


def test_pretraining_goes_on_from_a_pipeline(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "train_scripts"))
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTokenizer

    import pretrain_sticker_pipeline as recipe
    from sticker_models import StickerModel

    pipeline = ROOT / "assets" / "sticker-sd"
    recipe.copy_finished_parts(pipeline, tmp_path)
    channels = AutoencoderKL.load_config(tmp_path / "vae")["latent_channels"]
    model = StickerModel(CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"), channels)
    assert model.load_weights(pipeline) == []
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    for name, value in unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], value), name
    assert (tmp_path / "vae" / "config.json").is_file()


@pytest.mark.parametrize("words", [["--start_from", "nowhere"], ["--start_from", "assets/sticker-sd"]])
def test_pretraining_refuses_a_start_that_is_none_or_would_be_overwritten(words: list[str], monkeypatch) -> None:
    sys.path.insert(0, str(ROOT / "train_scripts"))
    import pretrain_sticker_pipeline as recipe

    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        recipe.parse_args(words)
    assert end.value.code == 2


def test_every_variant_of_a_step_has_a_name_in_the_report() -> None:
    assert {*VARIANTS, AGAIN} <= report.NAMES.keys()
