"""Does a LoRA do what it says, in the programs that load it? Any file, not only ours.

structure     keys, partners, ranks (`header`); numbers finite and not all zero
base          every module is in the base, in its shape; without a base, only what the file itself tells
loaders       diffusers or PEFT load the file into a model without memory, and hold in every layer what it says
names         of a kohya file, in ComfyUI's and A1111's maps of the released bases
twins         the files of one export mean the same, and are those that its report describes
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..utils.documents import parse_json
from ..utils.problems import listing
from .base import check_base, misfits
from .dora import KOHYA_LOADERS, STRENGTH, by_base, is_dora, without_magnitudes
from .embeddings_header import SUFFIX
from .factors import Components
from .geometry import family_of, naming_of
from .header import DIFFUSERS_FILE, KOHYA_FOLDER, PEFT_FILE
from .inspection import sha256, stated
from .keys import COMPONENTS, Dialect, Naming
from .lora import REPORT_FILE
from .proof import (
    TOLERANCE,
    LoaderCheck,
    check_names,
    compare,
    diffusers_checks,
    errors_against,
    health_problems,
    misreading,
)
from .reader import LoraFile, read_lora
from .scaling import endless_fields, matched
from .single_file import config_of
from .tables import table

LARGEST_REPORT = 2**24  # bytes; the report of SDXL has half a million
SAME_BITS = TOLERANCE[torch.float32]  # a loader's reading of a file against ours: the same bits


@dataclass
class Verification:
    """The result of a verification: the checks that were made, and every problem found."""

    files: list[Path]
    family: str
    base: str | None
    modules: int
    checks: list[LoaderCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict:
        found = asdict(self) | {"files": [str(path) for path in self.files], "passed": self.passed}
        for check in found["checks"]:
            check["largest_relative_error"] = stated(check["largest_relative_error"])
        return found

    def __str__(self) -> str:
        rows = [(check.loader, check.file, f"{check.matched}/{check.expected}", check.error) for check in self.checks]
        against = f" against {self.base}" if self.base else ""
        return "\n".join(
            [
                f"{self.modules} modules of {self.family}{against}",
                *table(("read by", "file", "modules", "largest error"), rows),
                *(f"note: {note}" for note in self.notes),
                *(f"PROBLEM: {problem}" for problem in self.problems),
                "verified" if self.passed else "NOT verified",
            ]
        )


def verify_lora(source: str | Path, base: str | None = None, base_config: str | None = None) -> Verification:
    """Check a LoRA file or folder, and against a base if there is one.

    Args:
        source: a file, an export folder (both of its files are checked), a PEFT folder.
        base: folder or hub name of a diffusers pipeline or transformers model; only its configurations are read. Of one
            file its names and shapes say what it is, and `base_config` (by default the hub's) is read.

    >>> result = verify_lora("my_lora.safetensors", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    >>> print(result); result.passed

    Raises:
        ValueError: there is no LoRA in `source`, or no such base.
    """
    from .hollow import base_models

    if base:
        check_base(base)
        base = config_of(base, base_config)
    source = Path(source)
    recorded, problems = recorded_hashes(source)
    files, others = files_of(source, recorded)
    loras = [read_lora(path, beside=True, dora=True) for path in files]
    first = loras[0]
    components = first.components
    models = base_models(base, components) if base else {}
    result = Verification(
        files=[lora.path for lora in loras],
        family=str(family_of(components)),
        base=base,
        modules=sum(map(len, components.values())),
        problems=problems + health_problems(components),
        notes=[f"{path.name} is of another export than {REPORT_FILE}, and was not looked at" for path in others],
    )
    if more := [name for lora in loras for name in lora.beside]:
        result.notes.append(f"what stands beside the LoRA was not compared: {listing(more)}")
    if base:
        result.problems += misfits(components, models, base)
    for lora in loras:
        if base and result.problems:
            break  # loading into the wrong base would only repeat it
        checks, problems = loader_checks(lora, models)
        result.checks += checks
        result.problems += problems
        result.problems += [problem for check in checks if (problem := misreading(check, SAME_BITS))]
    result.problems += twin_problems(loras)
    result.problems += [
        f"{path.name} is not the file that {REPORT_FILE} describes"
        for path in [*files, *(source / name for name in recorded if name.endswith(SUFFIX))]
        if path.name in recorded and path.is_file() and sha256(path) != recorded[path.name]
    ]
    if is_dora(components):
        result.notes += [STRENGTH, *(KOHYA_LOADERS for lora in loras if lora.dialect is Dialect.KOHYA)]
    if first.dialect is not Dialect.PEFT and not components.keys() <= set(COMPONENTS):
        result.notes.append(f"the loader of {listing(components)} was not tried; only Stable Diffusion's are")
    return result


def files_of(source: Path, recorded: Mapping[str, str]) -> tuple[list[Path], list[Path]]:
    """The file, or the files of one export; and those beside them that its report does not know."""
    if not (source.is_dir() and (source / DIFFUSERS_FILE).is_file()):
        return [source], []
    kohya = sorted((source / KOHYA_FOLDER).glob("*.safetensors"))
    strange = [path for path in kohya if recorded and path.name not in recorded]
    return [source / DIFFUSERS_FILE, *(path for path in kohya if path not in strange)], strange


def recorded_hashes(folder: Path) -> tuple[dict[str, str], list[str]]:
    """File name -> sha256 by the report of an export, if there is one; and what is wrong with it."""
    report = folder / REPORT_FILE
    if not report.is_file():
        return {}, []
    try:
        if report.stat().st_size > LARGEST_REPORT:
            raise ValueError
        files = parse_json(report.read_text(encoding="utf-8"))["files"].values()
        return {Path(entry["path"]).name: entry["sha256"] for entry in files}, []
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, [f"{REPORT_FILE} is not a report of an export"]


def loader_checks(lora: LoraFile, models: dict) -> tuple[list[LoaderCheck], list[str]]:
    """The loaders of one file."""
    components = lora.components
    if lora.dialect is Dialect.PEFT:
        return peft_checks(lora, models)
    if not components.keys() <= set(COMPONENTS):
        return [], []
    family, naming = family_of(components), naming_of(components)
    if lora.dialect is Dialect.KOHYA and "transformer" in components:
        naming = Naming.FLUX
    if lora.dialect is Dialect.KOHYA and is_dora(components):
        return check_names(lora.path, components, family), []
    endless = [f for config in lora.configs.values() for c in components.values() for f in endless_fields(config, c)]
    if endless:
        return [], [f"diffusers was not tried: it may never end with the expressions in {listing(set(endless))}"]
    checks, problems = diffusers_checks([lora.path], components, SAME_BITS, naming, models)
    if lora.dialect is Dialect.KOHYA:
        checks += check_names(lora.path, components, family)
    return checks, problems


def peft_checks(lora: LoraFile, models: dict) -> tuple[list[LoaderCheck], list[str]]:
    """PEFT's own loading of each folder."""
    from peft import __version__

    from .hollow import like, placeholders
    from .loaders import load_peft

    checks, problems = [], []
    for component, modules in lora.components.items():
        config = lora.configs.get(component) or lora.configs.get("", {})
        targets = None
        if endless := endless_fields(config, modules):
            if endless != ["target_modules"]:
                problems.append(f"PEFT was not tried: it may never end with the expressions in {listing(endless)}")
                continue
            targets = matched(config["target_modules"], modules)
        model = like(models[component]) if component in models else placeholders({component: modules})[component]
        folder = lora.path.parent
        if len(lora.components) > 1:
            folder = folder.parent / component
        wanted: Components = {component: modules}
        try:
            got = {component: load_peft(folder, model, component, targets, factors_alone=True)}
        except ValueError as error:
            problems.append(str(error))
            continue
        checks.append(compare(f"PEFT {__version__}", f"{folder.name}/{PEFT_FILE}", got, wanted, SAME_BITS))
    return checks, problems


def twin_problems(loras: list[LoraFile]) -> list[str]:
    """Files of one export that do not mean the same."""
    first, *others = loras
    problems = []
    for other in others:
        found, wanted = other.components, first.components
        if by_base(found) != by_base(wanted):  # ComfyUI's rows, whose base is not at hand
            found, wanted = without_magnitudes(found), without_magnitudes(wanted)
        errors = errors_against(found, wanted)
        if unlike := [f"{c}.{path}" for (c, path), error in errors.items() if error > SAME_BITS]:
            problems.append(f"{other.path.name} differs from {first.path.name} in {listing(unlike)}")
    return problems
