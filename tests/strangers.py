"""Files as strangers hand them in: strategies of hypothesis for each kind, from sound ones to hostile ones.

A strategy draws `{name: content}`, the files of one folder. Most draws begin with a sound file and change a part of it,
since what is wrong everywhere is refused by the first look. What once failed stands in `corpus/`.
"""

import io
import json
import struct

import numpy as np
import yaml
from hypothesis import strategies as st
from PIL import Image

Files = dict[str, bytes]

ODD_TEXTS = [
    "",
    " ",
    "\x1b[2J\x1b[31mEVERYTHING IS FINE\x1b[0m",
    "x\nreslora: healthy: every number finite",
    "\u202elive",
    "\x00",
    "../../../etc/passwd",
    "/etc/passwd",
    "https://example.org/x",
    "a" * 5000,
    "a." * 2000,
    "0_" * 2000,
    "((\\w|\\.)+)+!",
    "a{99999999999}",
    ".*" * 30 + "!",
    "(" * 500 + ")" * 500,
    "[",
    "\\",
    "<script>alert(1)</script>",
    "{prompt}",
    "${HOME}",
    "nan",
    "1e999",
    "9" * 5000,
    "none",
    "true",
    "2001-99-99",
    "con",
    "-rf",
    "é",
    "e\u0301",
    "\ufeff",
    "\u2028",
    "\U0001f600",
]
texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=20)
numbers = st.sampled_from([0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e308, 1e-320, -0.0]) | st.integers()
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


def damaged(content: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A file as it is, cut off, with some bytes changed, or something else altogether."""

    @st.composite
    def change(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(content))
        kind = draw(st.sampled_from(["as it is"] * 4 + ["cut", "bytes", "doubled", "other"]))
        if kind == "cut":
            return bytes(data[: draw(st.integers(0, len(data)))])
        if kind == "bytes" and data:
            for _ in range(draw(st.integers(1, 8))):
                data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        if kind == "doubled":
            return bytes(data) * 2
        if kind == "other":
            data = bytearray(draw(st.sampled_from([b"", b"[" * 100_000, b"\xff\xfe\0", b"PK\x03\x04", b"\x80\x04."])))
        return bytes(data)

    return change()


def as_json(value: object) -> bytes:
    """JSON whatever the value; numbers of more digits than Python writes are written."""
    try:
        return json.dumps(value).encode(errors="surrogatepass")
    except ValueError:
        return b'{"r": ' + b"9" * 5000 + b"}"


@st.composite
def changed_object(draw: st.DrawFn, sound: dict, names: list[str] | None = None) -> dict:
    """A JSON object with some of its values replaced, removed or added."""
    found = dict(sound)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([*sound, *(names or []), ""]) | texts)
        if draw(st.booleans()):
            found.pop(name, None)
        else:
            found[name] = draw(values)
    return found


# ------------------------------------------------------------------------------------------------------ LoRA files

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
        config = draw(changed_object(SOUND_CONFIG, PEFT_NAMES))
        files = {"adapter_model.safetensors": content, "adapter_config.json": as_json(config)}
        if draw(st.integers(0, 5)) == 0:
            files["adapter_config.json"] = draw(damaged(st.just(files["adapter_config.json"])))
    if damage and draw(st.integers(0, 4)) == 0:
        name = next(iter(files))
        files[name] = draw(damaged(st.just(content)))
    return files


# --------------------------------------------------------------------------------------------------- configurations

LAUGH = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
ODD_YAML = [
    LAUGH,
    "&a [*a]",
    "a: 0x" + "f" * 60_000,
    "rank: " + "1:" * 30_000 + "1",
    "a: 2001-99-99",
    "a: !!python/object:os.system x",
]
ODD_YAML += [
    "? [a]\n: 1",
    "a: !!binary x",
    "? {a: 1}\n: 1",
    "rank: 0x" + "f" * 5000,
    "a: !!set {x}",
    "[" * 60_000,
    "- " * 30_000,
    "rank: 1\n" * 8000,
]
ODD_TOML = [
    "a." * 30_000 + "b=1",
    "a=" + "[" * 60_000,
    "rank=0x" + "f" * 60_000,
    "rank=2001-99-99",
    "[" + "a." * 30_000 + "a]",
    "rank = nan",
]


@st.composite
def configurations(draw: st.DrawFn, names: list[str]) -> Files:
    """A file for `--config`, in any of the formats."""
    suffix = draw(st.sampled_from([".json", ".yaml", ".yml", ".toml"]))
    if suffix == ".toml":
        lines = [
            f"{json.dumps(draw(st.sampled_from(names) | texts))} = {as_toml(draw(scalars))}"
            for _ in range(draw(st.integers(0, 4)))
        ]
        content = draw(st.just("\n".join(lines)) | st.sampled_from(ODD_TOML)).encode(errors="surrogatepass")
    else:
        content = as_json(
            draw(st.dictionaries(st.sampled_from(names) | texts, values, max_size=5) | values)
        )  # JSON is YAML
        if suffix != ".json" and draw(st.booleans()):
            content = draw(st.sampled_from(ODD_YAML)).encode()
    return {f"config{suffix}": draw(damaged(st.just(content)))}


def as_toml(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    try:
        return "nan" if value is None else str(value).lower()
    except ValueError:
        return "9" * 5000


# ------------------------------------------------------------------------------------------------------------ data


@st.composite
def json_lines(draw: st.DrawFn, columns: list[str]) -> bytes:
    """Rows of a data set, some of which are none."""
    lines = []
    for _ in range(draw(st.integers(0, 6))):
        row = {name: draw(texts if draw(st.integers(0, 4)) else values) for name in columns if draw(st.integers(0, 9))}
        lines.append(draw(damaged(st.just(as_json(row)))) if draw(st.integers(0, 5)) == 0 else as_json(row))
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + b"\n".join(lines)


def encoded(image: Image.Image, kind: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few kilobytes that stands for 150 million pixels."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = 12_000, 12_500
    squeeze, line = zlib.compressobj(9), b"\0" * (1 + width // 8)
    rows = b"".join(squeeze.compress(line) for _ in range(height)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BOMB = bomb()
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/etc/passwd) (r) file\nshowpage\n%%EOF\n"


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """An image of any mode and format, perhaps damaged; or something else under an image's name."""
    if draw(st.integers(0, 14)) == 0:
        return draw(
            st.sampled_from([BOMB, EPS, b"", b"GIF89a", b"RIFF\xff\xff\xff\xffWEBP", b"II*\0", b"\x89PNG\r\n\x1a\n"])
        )
    kind, modes = draw(
        st.sampled_from(
            [
                ("PNG", ["1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"]),
                ("JPEG", ["L", "RGB", "CMYK"]),
                ("WEBP", ["RGB", "RGBA"]),
                ("GIF", ["P", "L"]),
                ("TIFF", ["1", "L", "RGB", "RGBA", "CMYK", "F", "I;16"]),
                ("BMP", ["1", "L", "RGB"]),
            ]
        )
    )
    mode = draw(st.sampled_from(modes))
    size = draw(st.sampled_from([(8, 8), (1, 1), (1, 300), (9, 5)]))
    more: dict[str, object] = {}
    if kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        if draw(st.booleans()):
            more["icc_profile"] = draw(damaged(st.just(PROFILE)))
        if draw(st.booleans()):
            more["exif"] = draw(damaged(st.just(EXIF)))
    try:
        content = encoded(Image.new(mode, size), kind, **more)
    except Exception:  # Pillow itself refuses such a profile or EXIF
        content = encoded(Image.new("RGB", size), "PNG")
    return draw(damaged(st.just(content)))


def exif() -> bytes:
    found = Image.Exif()
    found[0x0112] = 6
    return found.tobytes()


def profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


EXIF, PROFILE = exif(), profile()


@st.composite
def image_folders(draw: st.DrawFn) -> Files:
    """Images, captions beside them, metadata.jsonl."""
    files: Files = {}
    for number in range(draw(st.integers(0, 3))):
        suffix = draw(st.sampled_from([".png", ".jpg", ".webp", ".gif", ".tif"]))
        files[f"{number}{suffix}"] = draw(images())
        if draw(st.booleans()):
            files[f"{number}.txt"] = draw(damaged(texts.map(lambda text: text.encode(errors="surrogatepass"))))
    if draw(st.booleans()):
        files["metadata.jsonl"] = draw(json_lines(["file_name", "text"]))
    return files


@st.composite
def glue_files(draw: st.DrawFn) -> Files:
    """A task's folder as GLUE's authors publish it."""
    rows = [["index", "sentence1", "sentence2", "label"]]
    for number in range(draw(st.integers(0, 4))):
        label = draw(st.sampled_from(["entailment", "not_entailment"]) | texts)
        rows.append([str(number), draw(texts), draw(texts), label])
    content = "\n".join("\t".join(row) for row in rows).encode(errors="surrogatepass")
    return {name: draw(damaged(st.just(content))) for name in ("train.tsv", "dev.tsv")}


PLACES = [
    "/etc/passwd",
    "../../etc/hostname",
    "https://example.org/a.png",
    "a.png",
    "\0",
    "file:///etc/passwd",
    "a" * 300,
]


@st.composite
def parquet_files(draw: st.DrawFn) -> Files:
    """A data set of images as parquet; rows may hold an image, or the name of a file."""
    import pyarrow
    import pyarrow.parquet

    rows = []
    for _ in range(draw(st.integers(0, 3))):
        inside = draw(st.booleans())
        rows.append({"bytes": draw(images()) if inside else None, "path": draw(st.none() | st.sampled_from(PLACES))})
    feature = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    kinds = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table(
        {"image": pyarrow.array(rows, kinds), "text": pyarrow.array(["x"] * len(rows), pyarrow.string())}
    )
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return {"train.parquet": draw(damaged(st.just(buffer.getvalue())))}


# ------------------------------------------------------------------------------------------------- runs, checkpoints


@st.composite
def runs(draw: st.DrawFn) -> Files:
    """What a training run leaves behind, as the page reads it."""
    row = {"step": 1, "loss": 0.5, "validation_loss": 0.25, "merge_gap": 0.1}
    lines = [as_json(draw(changed_object(row))) for _ in range(draw(st.integers(0, 4)))]
    record = {
        "command": ["x"],
        "options": draw(changed_object({"method": "reslora", "shortcut": "block", "validation_prompt": ["a"]})),
    }
    report = {"loss_trained": 0.1, "loss_merged": 0.2, "loss_base": 0.3, "output_errors": {"a": 0.1}, "step": 3}
    return {
        "metrics.jsonl": draw(damaged(st.just(b"\n".join(lines)))),
        "run.json": draw(damaged(st.just(as_json(draw(changed_object(record)))))),
        "merge_report.json": draw(damaged(st.just(as_json(draw(changed_object(report)))))),
    }


@st.composite
def spoiled(draw: st.DrawFn, sound: Files) -> Files:
    """A folder with one file of it damaged, missing, or, of a JSON object, holding something else."""
    name = draw(st.sampled_from(sorted(sound)))
    if draw(st.integers(0, 4)) == 0:
        return {other: content for other, content in sound.items() if other != name}
    content = sound[name]
    if name.endswith(".json") and content.startswith(b"{") and draw(st.booleans()):
        content = as_json(draw(changed_object(json.loads(content))))
    return sound | {name: draw(damaged(st.just(content)))}


# -------------------------------------------------------------------------------------------------------- the page

SETTINGS = {
    "format_version": 1,
    "prompts": ["a {x}"],
    "seeds": [1],
    "strengths": [1.0],
    "placeholders": {"x": ["cat"]},
    "adapters": [{"label": "a", "file": "a.safetensors", "sha256": "0"}],
    "include_base": True,
    "view": {"name": "Grid", "row": 0, "left": 0, "right": 1},
    "pictures": [{"row": 0, "column": 0, "file": "a.png", "painted_with": "base", "seconds": 1.0}],
}


@st.composite
def archives(draw: st.DrawFn) -> Files:
    """A comparison as the page saves it: an archive, or settings with images beside them."""
    import zipfile

    settings = draw(damaged(st.just(as_json(draw(changed_object(SETTINGS))))))
    image = draw(images())
    if draw(st.booleans()):
        return {"settings.json": settings, "a.png": image}
    buffer = io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))
    ) as archive:
        archive.writestr("settings.json", settings)
        archive.writestr("images/a.png", image)
    return {"comparison.zip": draw(damaged(st.just(buffer.getvalue())))}


def as_yaml(value: object) -> bytes:
    return yaml.safe_dump(value).encode()
