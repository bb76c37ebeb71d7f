"""The public names and where they are defined; `__init__.py` imports each on first use."""

from .embeddings import Embeddings, load_embeddings, read_embeddings, write_embeddings
from .embeddings_inspection import EmbeddingsInspection, inspect_embeddings
from .extraction import ExtractReport, extract
from .fusing import FuseReport, fuse
from .inspection import Inspection, inspect_lora
from .limits import CheckFailed
from .lora import export_lora, write_lora_file
from .peft_folder import export_peft, export_peft_components
from .pipeline import export_pipeline
from .reader import LoraFile, read_lora
from .report import ExportReport
from .tools import combine, convert, resize
from .trained import export_trained, read_trained, save_merged
from .verify import Verification, verify_lora

__all__ = [
    "CheckFailed",
    "Embeddings",
    "EmbeddingsInspection",
    "ExportReport",
    "ExtractReport",
    "FuseReport",
    "Inspection",
    "LoraFile",
    "Verification",
    "combine",
    "convert",
    "export_lora",
    "export_peft",
    "export_peft_components",
    "export_pipeline",
    "export_trained",
    "extract",
    "fuse",
    "inspect_embeddings",
    "inspect_lora",
    "load_embeddings",
    "read_embeddings",
    "read_lora",
    "read_trained",
    "resize",
    "save_merged",
    "verify_lora",
    "write_embeddings",
    "write_lora_file",
]
