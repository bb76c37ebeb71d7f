"""LoRA files as strangers hand them in: strategies, see `strangers`."""

import json
import struct

import numpy as np
from hypothesis import strategies as st

from reslora_diffusion.export.product_shapes import PARTS
from strangers import Files, as_json, changed_object, damaged, numbers, texts

UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
LLM = "model.layers.0.self_attn.q_proj"
NAMES = {
    "diffusers": [
        (f"unet.{UNET}", ".lora_A.weight", ".lora_B.weight"),
        (f"text_encoder.{CLIP}", ".lora_A.weight", ".lora_B.weight"),
    ],
    "kohya": [
        (f"lora_unet_{UNET.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"),
        (f"lora_te_{CLIP.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"),
        ("lora_unet_double_blocks_0_img_attn_qkv", ".lora_down.weight", ".lora_up.weight"),
    ],
    "peft": [(f"base_model.model.{LLM}", ".lora_A.weight", ".lora_B.weight")],
}
HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
SIDES = [[2, 16], [16, 2], [4, 4], [16, 16], [2, 2, 3, 3], [700, 700], [1, 250_000], [250_000, 1], [0, 4], [3]]
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6}
BITS |= {"I64": 64, "I32": 32, "I8": 8, "U8": 8, "BOOL": 8, "C64": 64, "X9": 8}
PEFT_NAMES = [
    "alpha_pattern",
    "rank_pattern",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "use_dora",
    "lora_alpha",
    "r",
]
PEFT_NAMES += [
    "init_lora_weights",
    "modules_to_save",
    "layers_to_transform",
    "bias",
    "peft_type",
    "fan_in_fan_out",
    "base_model_name_or_path",
]
PRODUCT_CONFIG = {"peft_type": "LOKR", "r": 2, "alpha": 4, "target_modules": ["q_proj"]}
SOUND_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
METADATA = [
    "modelspec.architecture",
    "ss_base_model_version",
    "reslora.base_model",
    "modelspec.title",
    "format",
    "ss_tag_frequency",
]
patterns = st.dictionaries(texts | st.sampled_from(["q_proj", r"layers\.\d+", "^a.b"]), numbers | texts, max_size=3)


@st.composite
def tensors(draw: st.DrawFn, layout: str) -> dict[str, tuple[str, list[int], bytes]]:
    """Tensors of a LoRA by name: `(dtype, shape, data)`."""
    found: dict[str, tuple[str, list[int], bytes]] = {}

    def put(name: str, dtype: str, shape: list[int]) -> None:
        size = int(np.prod(shape, dtype=object)) * BITS[dtype] // 8 if shape else BITS[dtype] // 8
        if 0 <= size <= 2**20 and dtype not in ("F4", "F6_E2M3") or 0 <= size <= 2**16:
            kind = draw(st.sampled_from(["ones", "zeros", "random", "all bits"]))
            body = {"zeros": b"\0", "all bits": b"\xff", "ones": b"\x3c"}.get(kind, b"")
            random = np.random.default_rng(0).integers(0, 60, size, dtype=np.uint8).tobytes() if not body else b""
            found[name] = (dtype, shape, body * size or random)

    for stem, down, up in draw(st.lists(st.sampled_from(NAMES[layout]), min_size=1, unique=True)):
        if draw(st.integers(0, 9)) == 0:
            stem = f"{stem.split('.')[0]}.{draw(texts)}" if layout != "kohya" else f"lora_unet_{draw(texts)}"
        dtype = draw(st.sampled_from(["F16", "F32", "BF16"]) | st.sampled_from(list(BITS)))
        rank, into, out = 2, draw(st.sampled_from([16, 32, 8])), draw(st.sampled_from([16, 32, 8]))
        if draw(st.integers(0, 5)) == 0:
            rank, into, out = draw(
                st.sampled_from([(1, 250_000, 250_000), (100_000, 1, 1), (0, 8, 8), (3, 0, 8), (1, 1, 500_000)])
            )
        tail = draw(st.sampled_from([[]] * 6 + [[1, 1], [3, 3], [1]]))
        put(f"{stem}{down}", dtype, [rank, into, *tail])
        put(f"{stem}{up}", dtype, [out, rank if draw(st.integers(0, 9)) else 3, *([1] * len(tail))])
        if draw(st.integers(0, 3)) == 0 or layout == "kohya":
            put(
                f"{stem}.alpha",
                draw(st.sampled_from(["F16", "F32", "I64", "BOOL"])),
                draw(st.sampled_from([[], [1], [2]])),
            )
    if draw(st.integers(0, 3)) == 0:  # a LoHa or LoKr, whole or torn
        parts = st.dictionaries(st.sampled_from([*PARTS]), st.sampled_from(SIDES), min_size=2, max_size=5)
        whole = st.sampled_from([{"lokr_w1": [4, 4], "lokr_w2": [4, 4]}, dict.fromkeys(HADA, [16, 16])])
        stem = NAMES[layout][0][0]
        for part, shape in draw(parts | whole).items():
            put(f"{stem}.{part}", draw(st.sampled_from(["F16", "F32", "F8_E4M3"])), shape)
    if draw(st.integers(0, 7)) == 0:
        put(
            draw(texts | st.sampled_from(["base_model.model.score.weight", "unet.x.dora_scale", "a.hada_w1"])),
            "F16",
            [1],
        )
    if draw(st.integers(0, 30)) == 0:
        for number in range(3000):
            put(f"unet.a{number}.lora_A.weight", "F8_E4M3", [1, 1])
            put(f"unet.a{number}.lora_B.weight", "F8_E4M3", [1, 1])
    return found


def safetensors(found: dict[str, tuple[str, list[int], bytes]], metadata: object = None) -> bytes:
    """A file of the format, by hand: whatever dtype and metadata."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    body = bytearray()
    for name, (dtype, shape, data) in found.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(body)


@st.composite
def lora_files(draw: st.DrawFn, damage: bool = True) -> Files:
    """A LoRA in one of the three layouts; PEFT's with its configuration."""
    layout = draw(st.sampled_from([*NAMES]))
    metadata = None
    if draw(st.booleans()):
        metadata = {draw(st.sampled_from(METADATA)): draw(texts) for _ in range(draw(st.integers(0, 3)))}
        if draw(st.booleans()):
            config = draw(changed_object(SOUND_CONFIG, PEFT_NAMES)) | {"alpha_pattern": draw(patterns)}
            metadata["lora_adapter_metadata"] = as_json({f"unet.{k}": v for k, v in config.items()}).decode()
    content = safetensors(draw(tensors(layout)), metadata)
    files = {"x.safetensors": content}
    if layout == "peft":
        config = draw(changed_object(draw(st.sampled_from([SOUND_CONFIG, SOUND_CONFIG, PRODUCT_CONFIG])), PEFT_NAMES))
        files = {"adapter_model.safetensors": content, "adapter_config.json": as_json(config)}
        if draw(st.integers(0, 5)) == 0:
            files["adapter_config.json"] = draw(damaged(st.just(files["adapter_config.json"])))
    if damage and draw(st.integers(0, 4)) == 0:
        name = next(iter(files))
        files[name] = draw(damaged(st.just(content)))
    return files
