"""Bases whose linear layers are quantised: trained beside, exported and proved, by each package that is installed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from dreambooth import arguments, script, train
from models import flux, unet
from reslora_diffusion.diffusion.models.quantising import stored_bytes
from reslora_diffusion.diffusion.options.quantisation import KINDS
from reslora_diffusion.utils.problems import BadInput
from tiny import tiny_pipeline_folder

ON_CPU = [name for name, kind in KINDS.items() if "cpu" in kind.devices]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("int8wo", {"shortcut": "block", "validation_prompt": "a sticker"}),
        ("int8wo", {"shortcut": "middle", "train_text_encoder": True, "gradient_checkpointing": True}),
        ("int8wo", {"method": "lora", "use_dora": True}),
        ("float8wo", {"shortcut": "input", "merge_method": "paper_weight"}),
    ],
)
def test_a_run_beside_a_rounded_base_exports_a_lora_for_the_whole_one(
    kind: str, settings: dict, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    output = train(tmp_path / "out", quantization=kind, mixed_precision="bf16", **settings)
    file = output / "pytorch_lora_weights.safetensors"
    assert all(value.isfinite().all() for value in load_file(file).values())
    assert json.loads((output / "run.json").read_text())["options"]["quantization"] == kind
    pipeline = DiffusionPipeline.from_pretrained(tiny_pipeline_folder(), safety_checker=None)
    noisy = torch.randn(1, pipeline.unet.config.in_channels, 8, 8)
    texts = torch.randn(1, 5, pipeline.unet.config.cross_attention_dim)
    with torch.no_grad():
        before = pipeline.unet(noisy, 1, texts).sample
        pipeline.load_lora_weights(output, weight_name=file.name)
        assert (pipeline.unet(noisy, 1, texts).sample - before).abs().max() > 1e-4


def test_the_denoiser_alone_is_rounded(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from reslora_diffusion.diffusion.models.load import load_pipeline

    options = arguments(tmp_path, quantization="int8wo")
    pipeline = load_pipeline(options, torch.bfloat16)
    packed = [name for name, p in pipeline.unet.named_parameters() if type(p).__module__.startswith("torchao")]
    assert len(packed) == sum(isinstance(layer, nn.Linear) for layer in pipeline.unet.modules())
    assert not [p for p in pipeline.text_encoder.parameters() if type(p).__module__.startswith("torchao")]
    held = sum(p.numel() for p in pipeline.unet.parameters())
    with torch.device("meta"):
        whole = type(pipeline.unet).from_config(pipeline.unet.config)
    estimated = stored_bytes(whole, torch.bfloat16, "int8wo")
    assert held < estimated < 2 * held


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_reckoned_from_what_is_quantised(kind: str) -> None:
    """Of a transformer nearly all shrinks, of a UNet its convolutions do not."""
    model = flux()
    linear = [layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)]
    rest = sum(p.numel() for p in model.parameters()) - sum(linear)
    rows = sum(layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear))
    wanted = 2 * rest + sum(linear) * KINDS[kind].bits / 8 + rows * KINDS[kind].per_row
    assert stored_bytes(model, torch.bfloat16, kind) == pytest.approx(wanted, abs=len(linear))
    whole = 2 * sum(p.numel() for p in unet().parameters())
    convolutions = 2 * sum(layer.weight.numel() for layer in unet().modules() if isinstance(layer, nn.Conv2d))
    assert convolutions < stored_bytes(unet(), torch.bfloat16, kind) < whole


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_way_is_said_before_weights_are_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "reslora_diffusion.diffusion.models.load", None)  # nothing is loaded
    monkeypatch.setattr("reslora_diffusion.utils.environment.find_spec", lambda name: None)
    with pytest.raises(BadInput) as caught:
        script.main(arguments(tmp_path / "out", quantization=kind, schedule="prune", rank=0))
    text = "\n".join(caught.value.problems)
    assert f"needs the package {KINDS[kind].package}, which is not installed" in text
    assert "prune: quantised weights cannot be cut into" in text
    assert "--rank: got 0" in text


@pytest.mark.parametrize("kind", [name for name in KINDS if name not in ON_CPU])
def test_a_kind_that_the_device_lacks_names_those_that_it_has(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if PartialState().device.type != "cpu":
        pytest.skip("is of machines without a GPU")
    monkeypatch.setattr("reslora_diffusion.utils.environment.find_spec", lambda name: True)
    with pytest.raises(BadInput, match=r"and this run is on cpu; wanted int8wo or float8wo"):
        script.main(arguments(tmp_path / "out", quantization=kind, dry_run=True))


def test_a_base_that_is_no_model_hides_no_other_problem(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    options = arguments(tmp_path / "out", quantization="nf4", schedule="prune", rank=0)
    options.pretrained_model_name_or_path = str(tmp_path / "notes.txt")
    with pytest.raises(BadInput) as caught:
        script.main(options)
    text = "\n".join(caught.value.problems)
    assert "notes.txt is a single file of another kind" in text
    assert "quantised weights cannot be cut into" in text
    assert "--rank: got 0" in text
