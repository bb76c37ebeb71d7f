"""LoHa and LoKr of strangers, in LyCORIS's and PEFT's layouts: read, inspected, merged and cut to plain LoRA."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from reslora_diffusion.cli import app
from reslora_diffusion.export import convert, fuse, inspect_lora, read_lora, resize
from reslora_diffusion.export.product_shapes import LARGEST
from tiny import saved, tiny_pipeline

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # [32, 32]
FF = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"  # [256, 32]
CONV = "mid_block.resnets.0.conv1"  # [32, 32, 3, 3]
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def reference(parts: dict[str, Tensor], shape: tuple[int, ...], scale: float) -> np.ndarray:
    """dW in float64, entry by entry as LyCORIS's papers have it; `parts` without prefixes."""
    get = {name.partition("_")[2]: tensor.double().numpy() for name, tensor in parts.items()}

    def whole(side: str, middle: str) -> np.ndarray:
        if side in get:
            return get[side]
        a, b = get[f"{side}_a"], get[f"{side}_b"]
        if middle not in get:
            return sum(np.multiply.outer(a[:, r], b[r]) for r in range(len(b)))
        t = get[middle]
        made = np.zeros((a.shape[1], b.shape[1], *t.shape[2:]))
        for i in range(t.shape[0]):
            for j in range(t.shape[1]):
                made += a[i][:, None, None, None] * b[j][None, :, None, None] * t[i, j]
        return made

    if any(name.startswith("hada") for name in parts):
        return scale * (whole("w1", "t1") * whole("w2", "t2")).reshape(shape)
    one, two = whole("w1", ""), whole("w2", "t2")
    (a, c), (b, d) = one.shape, (two.shape[0], two.reshape(len(two), -1).shape[1])
    made = np.zeros((a * b, c * d))
    for i in range(a):
        for j in range(c):
            made[i * b : (i + 1) * b, j * d : (j + 1) * d] = one[i, j] * two.reshape(b, d)
    return scale * made.reshape(shape)


def loha(out: int, width: int, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"hada_{side}": random(out, rank) if side.endswith("a") else random(rank, width)
        for side in ("w1_a", "w1_b", "w2_a", "w2_b")
    }


def tucker(out: int, width: int, rank: int = 2) -> dict[str, Tensor]:
    parts = {
        f"hada_{side}": random(rank, out if side.endswith("a") else width) for side in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    return parts | {"hada_t1": random(rank, rank, 3, 3), "hada_t2": random(rank, rank, 3, 3)}


# name -> module, parts, alpha, scaling by LyCORIS's rule
CASES = {
    "loha": (Q, loha(32, 32), 1.0, 1 / 2),
    "loha of a large rank": (Q, loha(32, 32, 7), 3.0, 3 / 7),
    "loha without alpha": (FF, loha(256, 32), None, 1.0),
    "loha of a flat convolution": (CONV, loha(32, 32 * 9), 4.0, 4 / 2),
    "loha with middle tensors": (CONV, tucker(32, 32), 1.0, 1 / 2),
    "lokr of whole matrices": (Q, {"lokr_w1": random(4, 8), "lokr_w2": random(8, 4)}, 99.0, 1.0),
    "lokr": (FF, {"lokr_w1": random(16, 4), "lokr_w2_a": random(16, 3), "lokr_w2_b": random(3, 8)}, 2.0, 2 / 3),
    "lokr of four factors": (
        Q,
        {"lokr_w1_a": random(4, 2), "lokr_w1_b": random(2, 4), "lokr_w2_a": random(8, 2), "lokr_w2_b": random(2, 8)},
        1.0,
        1 / 2,
    ),
    "lokr whole second": (
        Q,
        {"lokr_w1_a": random(4, 3), "lokr_w1_b": random(3, 4), "lokr_w2": random(8, 8)},
        1.0,
        1 / 3,
    ),
    "lokr of a convolution": (CONV, {"lokr_w1": random(4, 4), "lokr_w2": random(8, 8, 3, 3)}, 5.0, 1.0),
    "lokr of a flat convolution": (
        CONV,
        {"lokr_w1": random(4, 4), "lokr_w2_a": random(8, 2), "lokr_w2_b": random(2, 8 * 9)},
        1.0,
        1 / 2,
    ),
    "lokr with a middle tensor": (
        CONV,
        {"lokr_w1": random(4, 4), "lokr_t2": random(2, 2, 3, 3), "lokr_w2_a": random(2, 8), "lokr_w2_b": random(2, 8)},
        1.0,
        1 / 2,
    ),
}
SHAPES = {Q: (32, 32), FF: (256, 32), CONV: (32, 32, 3, 3)}


def kohya_file(path, cases):
    tensors = {}
    for name, (module, parts, alpha, _) in cases.items():
        stem = f"{'lycoris' if 'middle' in name else 'lora_unet'}_{module.replace('.', '_')}"
        tensors |= {f"{stem}.{part}": tensor.clone() for part, tensor in parts.items()}
        tensors |= {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
    save_file(tensors, path, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def base_weights():
    return UNet2DConditionModel.from_pretrained(saved(tiny_pipeline), subfolder="unet").state_dict()


@pytest.mark.parametrize("name", CASES)
def test_updates_are_those_of_lycoris(name, tmp_path):
    """Of each form: dW, its norm, and the smallest rank that loses at most 5 %."""
    module, parts, _, scale = CASES[name]
    file = kohya_file(tmp_path / "x.safetensors", {name: CASES[name]})
    factors = read_lora(file, products=True).components["unet"][module]
    wanted = reference(parts, SHAPES[module], scale)
    got = factors.update().numpy().reshape(SHAPES[module])
    assert np.abs(got - wanted).max() < 1e-9 * np.abs(wanted).max()
    (facts,) = (seen := inspect_lora(file)).modules
    values = np.linalg.svd(wanted.reshape(len(wanted), -1), compute_uv=False)
    energy = np.cumsum((values**2)[::-1])[::-1]
    assert facts.norm == pytest.approx(math.sqrt(energy[0]), rel=1e-9)
    assert facts.rank_needed == (energy > 0.05**2 * energy[0]).sum()
    assert seen.kind == facts.kind == ("LoHa" if "loha" in name else "LoKr")
    assert seen.to_dict()["kind"] in str(seen)
    assert seen.healthy


def several(*names):
    return {name: CASES[name] for name in names}


FILES = [
    several("loha", "loha without alpha", "loha with middle tensors"),
    several("lokr of whole matrices", "lokr", "lokr with a middle tensor"),
    several("lokr of four factors", "lokr of a flat convolution"),
    several("loha of a flat convolution", "lokr"),
]


@pytest.mark.parametrize("cases", FILES, ids=lambda cases: ", ".join(cases))
def test_a_file_is_merged_exactly(cases, base_weights, tmp_path):
    fuse(kohya_file(tmp_path / "x.safetensors", cases), str(saved(tiny_pipeline)), tmp_path / "merged", scale=0.5)
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet").state_dict()
    changed = {module: 0.5 * reference(parts, SHAPES[module], scale) for module, parts, _, scale in cases.values()}
    for name, weight in base_weights.items():
        delta = changed.get(name.removesuffix(".weight"), np.zeros(()))
        error = np.abs((merged[name].double() - weight.double()).numpy() - delta).max()
        assert error < 3e-6 * max(1, np.abs(delta).max()), name


CONFIGS = [
    LoHaConfig(r=3, alpha=2, target_modules=[Q, FF], rank_pattern={"to_q": 2}, init_weights=False),
    LoHaConfig(r=2, alpha=4, target_modules=[CONV, Q], use_effective_conv2d=True, init_weights=False),
    LoHaConfig(r=2, alpha=4, target_modules=[CONV, "mid_block.attentions.0.proj_in"], init_weights=False),
    LoKrConfig(
        r=2, alpha=3, target_modules=[Q, FF], decompose_both=True, alpha_pattern={"to_q": 5}, init_weights=False
    ),
    LoKrConfig(r=64, alpha=3, target_modules=[Q, FF, CONV], decompose_factor=4, init_weights=False),  # whole matrices
    LoKrConfig(r=2, alpha=3, target_modules=[CONV], use_effective_conv2d=True, init_weights=False),
    LoKrConfig(r=2, alpha=3, target_modules=[CONV], init_weights=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.peft_type.value}-{c.r}-{c.use_effective_conv2d}")
def test_peft_agrees_on_its_own_files(config, base_weights, tmp_path):
    """Merged by `reslora merge` and by PEFT: the same weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(saved(tiny_pipeline), subfolder="unet")
    model = get_peft_model(unet, config)
    model.save_pretrained(tmp_path / "adapters" / "unet")
    wanted = model.merge_and_unload().state_dict()
    assert any(not torch.equal(wanted[name], base_weights[name]) for name in wanted)
    command = ["merge", str(tmp_path / "adapters"), "--base", str(saved(tiny_pipeline)), str(tmp_path / "merged")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet").state_dict()
    for name, weight in wanted.items():
        assert torch.allclose(merged[name], weight, atol=1e-5), name


def test_a_plain_lora_is_made_and_its_loss_said(tmp_path):
    """The nearest of a rank, in each program's names; a rank that loses more must be allowed, and is counted."""
    cases = several("loha", "lokr")
    file = kohya_file(tmp_path / "x.safetensors", cases)
    with pytest.raises(ValueError, match=r"LoHa and LoKr is no plain LoRA of a small rank; wanted --rank N: \d+ would"):
        convert(file, tmp_path / "out", "diffusers")
    with pytest.raises(ValueError, match="a plain LoRA of rank 1 holds .* of what the LoHa and LoKr changes"):
        convert(file, tmp_path / "out", "diffusers", rank=1)
    assert not (tmp_path / "out").exists()
    (report,) = convert(file, tmp_path / "small.safetensors", "kohya", rank=1, allow_lossy=True, dtype=torch.float32)
    assert "a plain LoRA of rank 1 holds" in str(report)
    made = read_lora(tmp_path / "small.safetensors").components["unet"]
    for module, parts, _, scale in cases.values():
        delta = reference(parts, SHAPES[module], scale)
        U, S, V = np.linalg.svd(delta, full_matrices=False)
        got = (made[module].scaling * made[module].lora_B.double() @ made[module].lora_A.double()).numpy()
        assert np.abs(got - S[0] * np.outer(U[:, 0], V[0])).max() < 1e-5 * S[0]
    (report,) = resize(file, tmp_path / "auto.safetensors", "auto", dtype=torch.float32)
    assert report.rank == inspect_lora(file).rank_needed
    convert(file, tmp_path / "exact", "peft", rank=32, dtype=torch.float32)
    exact = read_lora(tmp_path / "exact").components["unet"][Q]
    got = exact.scaling * exact.lora_B.double() @ exact.lora_A.double()
    assert np.abs(got.numpy() - reference(CASES["loha"][1], (32, 32), 0.5)).max() < 1e-5


def test_flux_in_the_names_of_its_code_is_taken_apart(tmp_path):
    """q, k and v are one layer there; each gets its rows."""
    parts = {"lokr_w1": random(4, 4), "lokr_w2": random(24, 8)}  # [96, 32]
    tensors = {f"lora_unet_double_blocks_0_img_attn_qkv.{name}": tensor for name, tensor in parts.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors", products=True).components["transformer"]
    delta = reference(parts, (96, 32), 1.0)
    for place, name in enumerate(("to_q", "to_k", "to_v")):
        own = found[f"transformer_blocks.0.attn.{name}"]
        assert np.abs(own.update().numpy() - delta[32 * place : 32 * place + 32]).max() < 1e-9
        assert own.singular_values()[0].item() == pytest.approx(np.linalg.norm(delta[32 * place : 32 * place + 32], 2))


STEM = f"lora_unet_{Q.replace('.', '_')}"
REFUSED = [
    ({"lokr_w1": (4, 4)}, "lokr_w2_a is missing"),
    ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4)}, "hada_w2_a is missing"),
    ({"hada_w1_a": (4, 2), "hada_w1_b": (3, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 4)}, "have no product"),
    ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 5)}, "two products have shapes"),
    ({"lokr_w1": (4, 4), "lokr_w2": (4, 4), "lokr_w2_a": (4, 2)}, "lokr_w2 is there whole and in parts"),
    ({"lokr_w1": (4, 4, 1), "lokr_w2": (4, 4)}, "have no Kronecker product"),
    ({"lokr_w1": (4, 4), "lokr_w2": (4, 4), "dora_scale": (1, 16)}, "LoKr with the length of weights trained too"),
    ({"lokr_w1": (4, 4), "lokr_w2": (4, 4), "lora_up.weight": (4, 4)}, "it is a plain LoRA too"),
    ({"lokr_w1": (9000, 2), "lokr_w2": (9000, 2)}, f"numbers, wanted 1 to {LARGEST}"),
    ({"lokr_w1": (0, 4), "lokr_w2": (4, 4)}, "has 0 numbers"),
    ({"weight": (4,), "on_input": ()}, "holds (IA)3, not plain LoRA"),
    ({"diff": (4, 4)}, "holds full weight differences, not plain LoRA"),
    ({"oft_blocks": (4, 4)}, "holds OFT, not plain LoRA"),
]


@pytest.mark.parametrize(("parts", "said"), REFUSED, ids=lambda value: None if isinstance(value, dict) else value[:30])
@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_what_is_no_product_is_one_message(command, parts, said, tmp_path):
    save_file({f"{STEM}.{name}": torch.ones(shape) for name, shape in parts.items()}, tmp_path / "bad.safetensors")
    more = ["--base", str(saved(tiny_pipeline)), str(tmp_path / "out")] if command == "merge" else []
    result = CliRunner().invoke(app, [command, str(tmp_path / "bad.safetensors"), *more])
    assert result.exit_code == 2, result.output
    text = " ".join(result.output.split())
    assert "bad.safetensors" in text
    assert text.count(said) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"surprise": 3}, "surprise is 3, no field of LoHa and LoKr"),
        ({"alpha": "many"}, "lora_alpha is 'many', wanted a number"),
        ({"r": None, "peft_type": "LOKR"}, "r is None, wanted a number"),
        ({"peft_type": "OFT"}, "is OFT by its adapter_config.json"),
    ],
)
def test_configurations_of_peft_are_read_field_by_field(change, said, tmp_path):
    tensors = {"base_model.model.layer.lokr_w1": torch.ones(2, 2), "base_model.model.layer.lokr_w2": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LOKR", "r": 4, "alpha": 2, "target_modules": ["layer"]} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="adapter_model") as error:
        read_lora(tmp_path, products=True)
    assert said in str(error.value)


def test_those_that_do_nothing_or_are_broken_are_said_so(tmp_path, base_weights):
    parts = CASES["lokr"][1]
    for name, value, said in (("zero", 0.0, "all 1 modules are zero"), ("broken", float("nan"), "NaN or infinity")):
        case = {"lokr": (FF, parts | {"lokr_w1": torch.full((16, 4), value)}, 1.0, 1.0)}
        file = kohya_file(tmp_path / f"{name}.safetensors", case)
        assert said in str(inspect_lora(file))
        with pytest.raises(ValueError, match=said):
            fuse(file, str(saved(tiny_pipeline)), tmp_path / "out")
        with pytest.raises(ValueError, match=said):
            convert(file, tmp_path / "out", "kohya", rank=4)
    other = kohya_file(
        tmp_path / "other.safetensors", {"x": (Q, {"lokr_w1": random(4, 4), "lokr_w2": random(4, 8)}, 1.0, 1.0)}
    )
    with pytest.raises(ValueError, match=r"to_q \[32, 32\], the LoRA's \[16, 32\]"):
        fuse(other, str(saved(tiny_pipeline)), tmp_path / "out")


def test_commands_that_cannot_use_them_say_what_can(tmp_path):
    file = kohya_file(tmp_path / "x.safetensors", several("lokr"))
    before = file.read_bytes()
    for command in (["verify", str(file), "--base", str(saved(tiny_pipeline))], ["combine", str(file), str(file)]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2, result.output
        assert "convert FILE --to kohya --rank N" in " ".join(result.output.split())
    assert file.read_bytes() == before
