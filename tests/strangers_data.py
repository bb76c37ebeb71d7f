"""Data sets, images and saved comparisons as strangers hand them in: strategies, see `strangers`."""

import io
import json
import struct

from hypothesis import strategies as st
from PIL import Image

from strangers import Files, as_json, changed_object, damaged, texts, values


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
