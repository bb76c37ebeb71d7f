"""A frozen model held in 4 or 8 bits, of which `--dtype` is what it computes in.

    --load_in_4bit                            bitsandbytes: NF4, its constants quantised again (as QLoRA has it)
    --load_in_8bit                            bitsandbytes: LLM.int8()
    --load_in_8bit --quantized_by torchao     int8 weights, a scale for each row
    --load_in_4bit --quantized_by torchao     int4 weights, a scale for each 32 (on GPUs)

Adapters stay in float32 and the export is a plain LoRA for the model in whatever precision; it was trained beside the
rounded one. Layers that carry no shortcut, and models that are stored quantised and would be merged into, are refused.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..utils.environment import missing_packages
from ..utils.model_files import Files, Unknown
from .options import BACKENDS, ModelOptions

if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin

WITHOUT_SHORTCUTS = ("awq", "aqlm", "eetq")  # PEFT computes these adapters in layers of its own
GROUP = 32
HEADS = ["classifier", "score"]  # of sequence classifiers; they are trained as a whole


def is_quantised(options: ModelOptions) -> bool:
    return options.load_in_4bit or options.load_in_8bit


def quantisation_problems(options: ModelOptions) -> Iterator[str]:
    """Faults that need no file to be opened."""
    if options.quantized_by not in BACKENDS:  # said by the option's choices
        return
    if not is_quantised(options):
        if options.quantized_by != BACKENDS[0]:
            yield f"--quantized_by {options.quantized_by}: does nothing without --load_in_4bit or --load_in_8bit"
        return
    if options.load_in_4bit and options.load_in_8bit:
        yield "--load_in_4bit, --load_in_8bit: got both, wanted one"
    flag = "--load_in_4bit" if options.load_in_4bit else "--load_in_8bit"
    yield from missing_packages([(flag, options.quantized_by, options.quantized_by)])
    if options.load_in_4bit and options.quantized_by == "torchao" and find_spec("torch"):
        import torch

        if not torch.cuda.is_available():
            yield "--load_in_4bit --quantized_by torchao: needs a GPU; wanted --quantized_by bitsandbytes"


def stored_quantisation(options: ModelOptions) -> str | None:
    """The method by which the model's files on this machine are quantised; None if they are not, or do not say."""
    try:
        config = Files(str(options.model_name_or_path), options.model_revision).json("config.json")
        return quantisation_of(config)
    except (Unknown, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def quantisation_of(config: Mapping[str, Any]) -> str | None:
    """The method that a model's config.json names."""
    stored = config.get("quantization_config")
    return str(stored.get("quant_method", "unknown")) if isinstance(stored, Mapping) else None


def stored_quantisation_problems(config: Mapping[str, Any], options: ModelOptions) -> Iterator[str]:
    """Yield what a model that is stored quantised cannot do. `config`: its config.json."""
    if (method := quantisation_of(config)) is None:
        return
    named = f"--model_name_or_path {options.model_name_or_path}: is quantised already ({method})"
    if is_quantised(options):
        yield f"{named}; wanted it without --load_in_4bit and --load_in_8bit, or the original model"
    if method in WITHOUT_SHORTCUTS and options.method == "reslora":
        yield f"{named}, and such layers carry no shortcuts; wanted --method lora, or another quantisation"
    if getattr(options, "save_merged_model", False):
        yield f"{named}, and merging would round its weights again; wanted --save_merged_model false"


def quantisation(options: ModelOptions, classifies: bool = False) -> "QuantizationConfigMixin | None":
    """Return what `from_pretrained` is given; None for a model in its own precision."""
    if not is_quantised(options):
        return None
    if options.quantized_by == "torchao":
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        kind = Int4WeightOnlyConfig(group_size=GROUP) if options.load_in_4bit else Int8WeightOnlyConfig()
        return TorchAoConfig(kind, modules_to_not_convert=HEADS if classifies else None)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=options.load_in_4bit,
        load_in_8bit=options.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=options.dtype,
        llm_int8_skip_modules=HEADS if classifies else None,
    )
