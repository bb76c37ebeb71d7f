"""Description of a LoRA file: for which model it is, how large its updates are, and what is wrong with it."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from reslora_diffusion.core.functional import LoraFactors

from ..utils.problems import listing, printable
from .embeddings_header import is_embeddings
from .embeddings_inspection import EmbeddingsInspection, beside_note, inspect_embeddings
from .factors import computable, singular_values
from .geometry import BaseKind, family_of_widths, told_apart
from .header import Header, open_safetensors, read_headers, reading
from .keys import COMPONENTS, Dialect
from .limits import LOSSY_ERROR
from .product_shapes import PARTS, Product
from .products import ProductFactors
from .progress import progress
from .ranks import needed_rank
from .reader import check_twins
from .tables import table

LARGEST = 5  # modules shown by norm
LARGEST_NUMBER = 1e75  # in either factor: larger ones have no square in float64
# What a header may say about training: our name -> keys, the first that is there counts.
FACTS = {
    "title": ("modelspec.title", "ss_output_name"),
    "base model": ("reslora.base_model", "ss_sd_model_name"),
    "architecture": ("modelspec.architecture", "ss_base_model_version"),
    "trigger words": ("reslora.trigger_words", "modelspec.trigger_phrase", "ss_training_comment"),
    "method": ("reslora.method", "ss_network_module"),
    "shortcut": ("reslora.shortcut",),
    "num_previous": ("reslora.num_previous",),
    "merge method": ("reslora.merge_method",),
    "merge gap": ("reslora.merge_gap",),
    "steps": ("reslora.steps", "ss_steps"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "learning rate": ("reslora.learning_rate", "ss_learning_rate"),
    "batch size": ("reslora.train_batch_size", "ss_total_batch_size"),
    "resolution": ("reslora.resolution", "ss_resolution", "modelspec.resolution"),
    "images": ("reslora.num_train_images", "ss_num_train_images"),
    "seed": ("reslora.seed", "ss_seed"),
    "date": ("modelspec.date", "ss_training_finished_at"),
}
MARKS = {  # how a header names a family
    BaseKind.SD1: ("stable-diffusion-v1", "sd_v1"),
    BaseKind.SD2: ("stable-diffusion-v2", "sd_v2"),
    BaseKind.SDXL: ("stable-diffusion-xl", "sdxl"),
    BaseKind.FLUX: ("flux",),
}


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted module. `alpha` is None where the file states none; `rank_needed` keeps the error within 5 %.

    `magnitude` says of a DoRA whether lengths of "rows" or of "columns" were trained; `norm` is of lora_B lora_A then.
    """

    component: str
    path: str
    in_features: int
    out_features: int
    rank: int
    alpha: float | None
    scaling: float
    norm: float
    rank_needed: int
    finite: bool
    magnitude: str | None = None
    kind: str = "LoRA"


@dataclass(frozen=True)
class Inspection:
    """All of it, as data (`to_dict`) and as a page of text (`str`). `problems` make a file useless, `notes` do not."""

    files: list[Path]
    size_bytes: int
    sha256: list[str]
    dialect: Dialect
    family: BaseKind
    modules: list[ModuleFacts]
    dtypes: dict[str, int]
    facts: dict[str, str]
    metadata: dict[str, str]
    problems: list[str]
    notes: list[str]

    @property
    def healthy(self) -> bool:
        return not self.problems

    @property
    def is_dora(self) -> bool:
        return any(m.magnitude for m in self.modules)

    @property
    def kind(self) -> str:
        """LoRA, DoRA, LoHa or LoKr, or several of them."""
        found = dict.fromkeys("DoRA" if m.magnitude else m.kind for m in self.modules)
        return "DoRA" if "DoRA" in found else " and ".join(found)

    @property
    def norm(self) -> float:
        """Frobenius norm over all modules together."""
        return sum(m.norm**2 for m in self.modules) ** 0.5

    @property
    def rank_needed(self) -> int:
        """The smallest rank at which no module loses more than `LOSSY_ERROR`."""
        return max(m.rank_needed for m in self.modules)

    def of(self, component: str) -> list[ModuleFacts]:
        return [m for m in self.modules if m.component == component]

    @property
    def components(self) -> list[str]:
        present = {m.component for m in self.modules}
        return [component for component in (*COMPONENTS, "model") if component in present]

    def to_dict(self) -> dict:
        return {
            "files": [str(path) for path in self.files],
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "dialect": str(self.dialect),
            "family": str(self.family),
            "dora": self.is_dora,
            "kind": self.kind,
            "components": {component: len(self.of(component)) for component in self.components},
            "ranks": dict(sorted(Counter(m.rank for m in self.modules).items())),
            "rank_needed": self.rank_needed,
            "alphas": sorted({m.alpha for m in self.modules if m.alpha is not None and m.finite}),
            "dtypes": self.dtypes,
            "norm": stated(self.norm),
            "healthy": self.healthy,
            "problems": self.problems,
            "notes": self.notes,
            "facts": self.facts,
            "metadata": self.metadata,
            "modules": [{name: stated(value) for name, value in asdict(m).items()} for m in self.modules],
        }

    def __str__(self) -> str:
        rows = []
        for component in self.components:
            modules = self.of(component)
            alphas = sorted({f"{m.alpha:g}" for m in modules if m.alpha is not None}) or ["none (= rank)"]
            norms = [m.norm for m in modules]
            rows.append(
                (
                    component,
                    len(modules),
                    listing(map(str, sorted({m.rank for m in modules})), 6),
                    max(m.rank_needed for m in modules),
                    listing(alphas),
                    f"{sum(n**2 for n in norms) ** 0.5:.3g}",
                    f"{min(norms):.2g} to {max(norms):.2g}",
                )
            )
        largest = sorted(self.modules, key=lambda m: -m.norm)[:LARGEST]
        head = ("component", "modules", "ranks", "needed", "alphas", "norm", "norms of modules")
        lines = [
            f"{printable(', '.join(map(str, self.files)), None)}: {self.size_bytes / 2**20:.1f} MiB",
            f"a {self.kind} for {self.family}, in {self.dialect} keys, stored as {', '.join(self.dtypes)}",
            f"sha256 {listing(self.sha256, 8)}",
            "",
            *table(head, rows),
            "",
            f"a rank of {self.rank_needed} would hold it with at most {LOSSY_ERROR:.0%} error in any module",
            "strongest: " + listing(f"{m.component}.{m.path} ({m.norm:.2g})" for m in largest),
        ]
        if self.facts:
            lines += ["", *table(("its header says", ""), [(k, printable(v)) for k, v in self.facts.items()])]
        lines += ["", *(f"note: {note}" for note in self.notes)]
        lines += [f"PROBLEM: {problem}" for problem in self.problems] or ["healthy: every number finite, not all zero"]
        return "\n".join(lines)


def stated(value: object) -> object:
    """A value as JSON has it, which knows no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inspect_file(source: Path) -> Inspection | EmbeddingsInspection:
    """Look at a LoRA, or at a file of embeddings of new tokens; raises `ValueError` if it is neither."""
    return inspect_embeddings(source) if source.is_file() and is_embeddings(source) else inspect_lora(source)


def inspect_lora(source: str | Path) -> Inspection:
    """Look at any LoRA file or folder.

    >>> print(inspect_lora("my_lora.safetensors"))

    Raises:
        ValueError: it is no LoRA file, with everything that is wrong with it.
    """
    headers = read_headers(source, beside=True, dora=True, products=True)
    modules = [facts for header in headers for facts in module_facts(header)]
    widths: dict[str, dict[str, int]] = defaultdict(dict)
    for m in modules:
        widths[m.component][m.path] = m.in_features
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    family = told_apart(family_of_widths(widths), metadata)
    files = [header.path for header in headers]
    return Inspection(
        files=files,
        size_bytes=sum(path.stat().st_size for path in files),
        sha256=[sha256(path) for path in files],
        dialect=headers[0].dialect,
        family=family,
        modules=modules,
        dtypes=dict(
            Counter(h.dtypes[name] for h in headers for name, key in h.keys.items() if key.part in ("A", "B", *PARTS))
        ),
        facts=header_facts(metadata),
        metadata=metadata,
        problems=faults(modules),
        notes=notes(headers[0], family, modules) + beside_note(headers[0].path),
    )


def module_facts(header: Header) -> Iterator[ModuleFacts]:
    """One module after the other, in the order of the file."""
    with reading(header.path), open_safetensors(header.path) as file:
        check_twins(header, file)
        for (component, path), names in progress(list(header.modules().items()), "measuring"):
            if (product := header.product(names)) is not None:
                tensors = {part: file.get_tensor(name) for part, name in names.items()}
                yield product_facts(header, (component, path), product, tensors)
                continue
            A, B = (computable(file.get_tensor(names[side])).double() for side in "AB")
            rank, alpha = A.shape[0], float(file.get_tensor(names["alpha"]).item()) if "alpha" in names else None
            scaling = header.scaling(component, path, rank, alpha)
            largest = torch.stack([A.abs().amax(), scaling * B.abs().amax()])
            stretched = header.axis(names)
            lengths = computable(file.get_tensor(stretched[0])).double() if stretched else torch.ones(1)
            finite = bool((largest.abs() < LARGEST_NUMBER).all() and (lengths.abs() < LARGEST_NUMBER).all())
            values = singular_values(LoraFactors(A, B, scaling)) if finite else None
            yield ModuleFacts(
                component,
                path,
                in_features=A.shape[1],
                out_features=B.shape[0],
                rank=rank,
                alpha=scaling * rank if alpha is None and header.configs else alpha,
                scaling=scaling,
                norm=float("nan") if values is None else values.norm().item(),
                rank_needed=rank if values is None else needed_rank(values),
                finite=finite,
                magnitude=("rows", "columns")[stretched[1]] if stretched else None,
            )


def product_facts(
    header: Header, place: tuple[str, str], product: Product, tensors: dict[str, torch.Tensor]
) -> ModuleFacts:
    """One module of a LoHa or LoKr."""
    alpha = float(tensors.pop("alpha").item()) if "alpha" in tensors else None
    tensors = {part: computable(tensor).double() for part, tensor in tensors.items()}
    scaling = header.product_scaling(*place, product.rank, alpha)
    largest = torch.stack([tensor.abs().amax().clamp_min(1) for tensor in tensors.values()]).prod().item()
    finite = largest < LARGEST_NUMBER and math.isfinite(scaling)  # NaN is not
    values = ProductFactors(product, tensors, scaling).singular_values() if finite else None
    out, width = product.shape[:2]
    return ModuleFacts(
        *place,
        in_features=width,
        out_features=out,
        rank=product.rank or min(out, math.prod(product.shape[1:])),
        alpha=alpha,
        scaling=scaling,
        norm=float("nan") if values is None else values.norm().item(),
        rank_needed=1 if values is None else needed_rank(values),
        finite=finite,
        kind=product.kind,
    )


def faults(modules: list[ModuleFacts]) -> list[str]:
    """Reasons why nobody can use the file."""
    broken = [f"{m.component}.{m.path}" for m in modules if not m.finite]
    problems = [f"{len(broken)} of {len(modules)} modules hold NaN or infinity: {listing(broken)}"] if broken else []
    if not any(m.norm or m.magnitude for m in modules):
        problems.append(f"all {len(modules)} modules are zero: the file changes nothing")
    return problems


def notes(header: Header, family: BaseKind, modules: list[ModuleFacts]) -> list[str]:
    """Facts that its user may want to know."""
    found = []
    if zero := [f"{m.component}.{m.path}" for m in modules if m.norm == 0 and not m.magnitude]:
        found.append(f"{len(zero)} of {len(modules)} modules are zero: {listing(zero)}")
    scalings = {round(m.scaling, 9) for m in modules}
    alphas = {m.alpha for m in modules}
    if header.dialect is Dialect.KOHYA and len(alphas) > 1 and family not in (BaseKind.FLUX, BaseKind.CHROMA):
        found.append(
            f"{len(alphas)} different alphas in a kohya file: diffusers applies one of them to every module; "
            "`reslora convert --to diffusers` writes a file that it reads right"
        )
    if header.dialect is Dialect.DIFFUSERS and "transformer" not in {m.component for m in modules}:
        found.append("ComfyUI and A1111 want kohya keys: `reslora convert --to kohya`")
        if header.configs and scalings != {1.0}:
            found.append("its scaling stands in lora_adapter_metadata, which diffusers before 0.34 ignores")
    if products := sorted({m.kind for m in modules} - {"LoRA"}):
        found.append(
            f"a {' and '.join(products)}, which pipelines do not load: `reslora convert FILE --to diffusers --rank N` "
            "makes a plain LoRA of it, `reslora merge` adds it to a base exactly"
        )
    if axes := sorted({m.magnitude for m in modules if m.magnitude}):
        found.append(f"a DoRA, which trains the length of {' and '.join(axes)}; norms above are of lora_B lora_A alone")
        if header.dialect is Dialect.KOHYA:
            found.append(
                "diffusers drops its dora_scale with a warning, and would load something else: "
                "`reslora convert --to diffusers`"
            )
        if header.dialect is Dialect.KOHYA and "rows" in axes:
            found.append("A1111 knows the length of columns alone, and would compute something else")
    says = (header.metadata.get("modelspec.architecture") or header.metadata.get("ss_base_model_version", "")).lower()
    said = next((f for f, marks in MARKS.items() if any(mark in says for mark in marks)), None)
    if said and family in MARKS and said is not family:
        found.append(f"its header says {said}, its shapes say {family}")
    if header.beside:
        kinds = listing(dict.fromkeys(header.beside.values()))
        found.append(f"beside the LoRA it holds {kinds}, which PEFT alone loads: {listing(header.beside)}")
    return found


def header_facts(metadata: dict[str, str]) -> dict[str, str]:
    """Training facts in any trainer's header, under our names."""
    found = {}
    for name, keys in FACTS.items():
        value = next((metadata[key] for key in keys if metadata.get(key) not in (None, "", "None")), None)
        if value is not None:
            found[name] = value
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
