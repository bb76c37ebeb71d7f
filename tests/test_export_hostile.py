"""Files of strangers: every reader ends soon, with a value or one printable message, whatever stands in them."""

import json
import struct
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from typer.testing import CliRunner

from llm_tiny import GROUPED
from reslora_diffusion import ResLoraConfig
from reslora_diffusion.cli import app
from reslora_diffusion.export import convert, fuse, inspect_lora, read_lora, resize, verify_lora
from reslora_diffusion.export.scaling import SECONDS, Patterns, matched
from reslora_diffusion.plain_lora import FIELDS, KEEPS_THE_BASE
from reslora_diffusion.utils.problems import BadInput, printable
from test_export_input import refusal

PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PEFT_PATH = "base_model.model.model.layers.0.self_attn.q_proj"
EIGHT_BY_TWO = np.ones((2, 8), np.float16).tobytes()


def written(path, tensors, metadata=None):
    """A safetensors file by hand: name -> (dtype, shape, bytes)."""
    header, body = ({"__metadata__": metadata} if metadata else {}), b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    return path


def pair(path=PATH, dtype="F16", data=EIGHT_BY_TWO):
    return {f"{path}.lora_A.weight": (dtype, [2, 8], data), f"{path}.lora_B.weight": (dtype, [8, 2], data)}


def peft_folder(folder, **config):
    written(folder / "adapter_model.safetensors", pair(PEFT_PATH))
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


# ------------------------------------------------------------------------------------------ configurations


def test_every_field_of_peft_has_a_meaning():
    assert FIELDS.keys() == {field.name for field in fields(LoraConfig)}


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA", "tomorrow's"]
)
def test_factors_of_a_moved_base_are_refused_at_every_door(tmp_path, init):
    folder = peft_folder(tmp_path / "adapter", init_lora_weights=init)
    embedded = {f"unet.{name}": value for name, value in {"r": 2, "lora_alpha": 2, "init_lora_weights": init}.items()}
    file = written(tmp_path / "x.safetensors", pair(), {"lora_adapter_metadata": json.dumps(embedded)})
    for source in (folder, file):
        message = refusal(source)
        assert f"init_lora_weights is {init!r}" in message
        for door in (
            lambda: convert(source, tmp_path / "out", "peft"),  # noqa: B023
            lambda: resize(source, tmp_path / "out", 1),  # noqa: B023
            lambda: verify_lora(source),  # noqa: B023
            lambda: fuse(source, "nowhere", tmp_path / "out"),  # noqa: B023
        ):
            with pytest.raises(BadInput) as caught:
                door()
            assert str(caught.value) == message
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="init_lora_weights: got"):
        ResLoraConfig(init_lora_weights=init)


@pytest.mark.parametrize("init", [True, False, *KEEPS_THE_BASE])
def test_other_initialisations_are_plain(tmp_path, init):
    """PEFT's own merge is what the product's is held against, after a step of training."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**GROUPED))
    base.save_pretrained(tmp_path / "base")
    if init == "eva":  # asks for activations first; what it leaves is a configuration
        pytest.skip("needs a pass over data")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "adapter")
    fuse(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "fused")
    wanted = model.merge_and_unload().state_dict()
    got = load_file(tmp_path / "fused/model.safetensors")
    path = "model.layers.0.self_attn.q_proj.weight"
    plain = load_file(tmp_path / "base/model.safetensors")[path]
    assert (wanted[path] - plain).norm() > 0.01
    torch.testing.assert_close(got[path], wanted[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alora_invocation_tokens", [5, 6]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["experts.down_proj"]),
        ("arrow_config", {"top_k": 3}),
        ("megatron_config", {"x": 1}),
        ("a_field_of_the_future", 3),
    ],
)
def test_fields_that_change_the_computation_are_refused_by_name(tmp_path, field, value):
    message = refusal(peft_folder(tmp_path, **{field: value}))
    assert f"adapter_config.json: {field} is {value!r}, which" in message
    assert read_lora(peft_folder(tmp_path, **{field: None})).components


# -------------------------------------------------------------------------------------------------- expressions


def test_patterns_mean_what_peft_means():
    from peft.utils.other import get_pattern_key

    patterns = {r"layers\.0.*q_proj": 8, "^model.layers.1.v_proj": 3, "v_proj": 4, r"(self|cross)_attn\.k": 5, "q": 6}
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.v_proj", "x.model.layers.1.v_proj", "my_v_proj"]
    names += ["a.cross_attn.k", "layers.2.q", "other"]
    ours = Patterns(patterns)
    for name in names:
        assert ours.find([name]) == patterns.get(get_pattern_key(patterns, name)), name


@pytest.mark.parametrize(
    "pattern",
    [
        r"((\w|\.)+)+!",
        "a{99999999999}",
        "((a{90}){90}){90}",
        "(" * 5000 + ")" * 5000,
        "(a|a)*b",
        r"(?<=x*)y",
        "[",
        "\\",
    ],
)
def test_expressions_that_may_not_end_are_not_run(tmp_path, pattern):
    begin = time.process_time()
    assert "alpha_pattern" in refusal(peft_folder(tmp_path / "p", alpha_pattern={pattern: 1}))
    metadata = {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {pattern: 1}})}
    assert "alpha_pattern" in refusal(written(tmp_path / "x.safetensors", pair(), metadata))
    assert time.process_time() - begin < 2


SLOW = ".*" * 12 + "[!?]"


def test_expressions_have_a_time_together():
    patterns = Patterns({f"{SLOW}{n}": 1 for n in range(100)})
    names = [f"model.{'a.' * 200}{n}!x" for n in range(300)]
    begin = time.process_time()
    with pytest.raises(ValueError, match="takes more than"):
        [patterns.find([name]) for name in names]
    with pytest.raises(ValueError, match="takes more than"):
        matched(SLOW, names)
    assert time.process_time() - begin < 8 * SECONDS


@pytest.mark.parametrize("field", ["rank_pattern", "exclude_modules", "target_modules"])
def test_peft_is_not_given_what_may_never_end(tmp_path, field):
    """Its own matching of any of these takes longer than a test may."""
    expression = ".*" * 30 + "!"
    peft_folder(tmp_path, **{field: {expression: 4} if field == "rank_pattern" else expression})
    begin = time.process_time()
    found = verify_lora(tmp_path)
    assert not found.passed
    assert time.process_time() - begin < 5


def test_expressions_that_are_in_use_are_run(tmp_path):
    """Unsloth writes such ones."""
    names = r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.self.*)"
    assert read_lora(peft_folder(tmp_path, target_modules=names)).components
    assert verify_lora(tmp_path).passed
    assert not verify_lora(peft_folder(tmp_path, target_modules=names.replace("self", "mlp"))).passed


# ----------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"peft_type":"LORA","lora_alpha":' + "9" * 400 + "}", '{"peft_type":"LORA","r":' + "9" * 5000],
)
def test_configurations_that_make_python_fail(tmp_path, text):
    peft_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    assert len(refusal(tmp_path)) < 1000


@pytest.mark.parametrize(
    "config",
    [{"lora_alpha": "x"}, {"alpha_pattern": [1]}, {"alpha_pattern": {"q_proj": None}}, {"lora_alpha": True}],
)
def test_what_states_no_number(tmp_path, config):
    assert "wanted a" in refusal(peft_folder(tmp_path, **config))


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F8_E8M0", 8), ("I8", 8), ("C64", 64)])
def test_types_that_are_not_read(tmp_path, dtype, bits):
    assert f"are {dtype}, not" in refusal(written(tmp_path / "x.safetensors", pair(dtype=dtype, data=bytes(2 * bits))))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_eight_bit_floats_are_read_exactly(tmp_path, dtype):
    torch.manual_seed(0)
    A, B = torch.randn(2, 8).to(dtype), torch.randn(8, 2).to(dtype)
    save_file({f"{PATH}.lora_A.weight": A, f"{PATH}.lora_B.weight": B}, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "diffusers")
    rounding = 1e-6 if dtype is torch.float64 else 0.0  # a written file holds float32 at most
    for name, error in (("x", 0.0), ("y", rounding)):
        factors = read_lora(tmp_path / f"{name}.safetensors").components["unet"][PATH.removeprefix("unet.")]
        delta = factors.lora_B.double() @ factors.lora_A.double()
        torch.testing.assert_close(delta, B.double() @ A.double(), rtol=error, atol=error)
    assert verify_lora(tmp_path / "x.safetensors").passed
    assert inspect_lora(tmp_path / "x.safetensors").healthy
    resize(tmp_path / "x.safetensors", tmp_path / "z.safetensors", 1, allow_lossy=True)


def test_numbers_that_only_a_square_makes_infinite(tmp_path):
    huge = np.full((2, 8), 1e200).tobytes()
    assert not inspect_lora(written(tmp_path / "x.safetensors", pair(dtype="F64", data=huge))).healthy


# ------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        "\x1b[2J\x1b[31mEVERYTHING IS FINE\x1b[0m",
        "x\nreslora: healthy: every number finite\nverified",
        f"{PATH}\x1b[32m.lora_A.weight",
        "unet..to_q.lora_A.weight",
        "‮live",
    ],
)
def test_names_are_shown_printable(tmp_path, name):
    file = written(tmp_path / "x.safetensors", {**pair(), name: ("F16", [1], b"\0\0")})
    for message in (refusal(file), CliRunner().invoke(app, ["inspect", str(file)]).output):
        assert all(c.isprintable() or c == "\n" for c in message)
        assert "\nreslora: healthy" not in message
        assert "\nverified" not in message
    assert printable("\ud800x\x00") == " x "


def test_long_names_are_refused_soon_and_shown_short(tmp_path):
    file = written(tmp_path / "x.safetensors", {"lora_unet_" + "0_" * 400_000 + "0.alpha": ("F16", [], b"\0\0")})
    begin = time.process_time()
    message = refusal(file)
    assert "more than 500 characters" in message
    assert len(message) < 1000
    assert time.process_time() - begin < 2


def test_a_layer_number_is_no_reason_to_make_so_many_layers(tmp_path):
    path = "text_encoder.text_model.encoder.layers.99999999.self_attn.q_proj"
    begin = time.process_time()
    assert not verify_lora(written(tmp_path / "x.safetensors", pair(path))).passed
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("leaf", ["forward", "training", "add_module"])
def test_names_that_torch_has_taken(tmp_path, leaf):
    assert not verify_lora(written(tmp_path / "x.safetensors", pair(f"unet.{leaf}.x"))).passed


def test_both_clip_layouts(tmp_path):
    classic = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    other = EIGHT_BY_TWO[:-2] + b"\0\0"
    both = pair(classic) | pair(classic.replace("text_model.", ""), data=other)
    assert "given twice, with different values" in refusal(written(tmp_path / "x.safetensors", both))
    nan = np.full((2, 8), np.nan, np.float16).tobytes()
    both = pair(classic, data=nan) | pair(classic.replace("text_model.", ""), data=nan)
    file = written(tmp_path / "x.safetensors", both)
    assert "NaN or infinity" in inspect_lora(file).problems[0]
    assert "NaN or infinity" in verify_lora(file).problems[0]


def test_whatever_a_library_raises_is_one_message(tmp_path):
    with pytest.raises(BadInput):
        read_lora(written(tmp_path / "x.safetensors", pair(), {"lora_adapter_metadata": '{"unet.alpha_pattern": 1}'}))


# ------------------------------------------------------------------------------------ what stands beside a LoRA


def beside(kind, tmp_path):
    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = LlamaForCausalLM(LlamaConfig(**GROUPED))
    if kind == "head":
        model, settings["task_type"] = LlamaForSequenceClassification(model.config), "SEQ_CLS"
    elif kind == "tokens":
        settings["trainable_token_indices"] = [3, 4]
    else:
        settings["modules_to_save"] = ["lm_head"]
    peft = get_peft_model(model, LoraConfig(**settings))
    peft.save_pretrained(tmp_path / "adapter")
    return peft


@pytest.mark.parametrize(
    ("kind", "said"), [("head", "a trained head"), ("tokens", "trained tokens"), ("lm_head", "output layer")]
)
def test_trained_modules_beside_a_lora(tmp_path, kind, said):
    assert isinstance(beside(kind, tmp_path), PeftModel)
    found = inspect_lora(tmp_path / "adapter")
    assert found.healthy
    assert len(found.modules) == 3
    assert any(said in note for note in found.notes)
    with pytest.raises(ValueError, match=f"{said}.*beside the LoRA, which would be lost"):
        convert(tmp_path / "adapter", tmp_path / "out", "peft")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F16"])
def test_many_small_tensors_take_no_longer_than_a_large_one(tmp_path, dtype):
    data = b"\x3c" * (1 if dtype.startswith("F8") else 2)
    names = [f"unet.a{n}.lora_{side}.weight" for n in range(2000) for side in "AB"]
    file = written(tmp_path / "x.safetensors", {name: (dtype, [1, 1], data) for name in names})
    begin = time.process_time()
    assert len(inspect_lora(file).modules) == 2000
    assert len(read_lora(file).components["unet"]) == 2000
    assert time.process_time() - begin < 10  # 106 s once: the file was opened again for every tensor
