"""Files as strangers hand them in: strategies of hypothesis for each kind, from sound ones to hostile ones.

Here are texts, numbers, damage, configurations and runs; `strangers_lora` has LoRA files, `strangers_data` data sets.

A strategy draws `{name: content}`, the files of one folder. Most draws begin with a sound file and change a part of it,
since what is wrong everywhere is refused by the first look. What once failed stands in `corpus/`.
"""

import json

import yaml
from hypothesis import strategies as st

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


def as_yaml(value: object) -> bytes:
    return yaml.safe_dump(value).encode()
