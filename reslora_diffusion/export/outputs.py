"""The whole model's outputs: what PEFT computes from a written folder, against the merged training model.

Factors that arrived say nothing of a head that PEFT left out, or of layers that are trained beside them. So the folder
is loaded by plain PEFT on the base, and both models compute the same few random tokens:

    error = ||loaded - trained|| / ||trained - base||

PEFT loads into a hollow model without adapters, to which the layers of the training model are given, not copies of them
(`bare_model`): no weight is held twice. Where outputs cannot be compared, the report says why.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from reslora_diffusion.core.functional import LoraFactors
from reslora_diffusion.core.merging.merge import merged_forward
from reslora_diffusion.core.peft.variant import find_adapter
from reslora_diffusion.core.sharding import is_sharded

from ..utils.problems import is_out_of_memory, printable
from .bare import bare_model
from .beside import Beside, without_peft
from .factors import TOLERANCE, relative_error
from .keys import PEFT_PREFIX
from .loaders import quiet
from .sample_inputs import Inputs, candidates
from .state_dict import adapter_factors

AMPLIFIED = 10  # by what a deep model may enlarge an error of the factors
ROUNDINGS = 16  # of the model's precision: how far two ways to compute one output may be apart, relative to its norm
UNITS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22, torch.float64: 2**-48}
TF32 = 2**-11
SAME = TOLERANCE[torch.float32]


@dataclass(frozen=True)
class Outputs:
    """The result of a comparison, or the `reason` why there was none.

    Attributes:
        inputs: what both models computed.
        dtype: precision of the model.
        effect: ||trained - base|| / ||trained||.
        error: ||loaded - trained|| / ||trained - base||.
        allowed: the largest error that rounding explains; None where a cut of the rank changes outputs on purpose.
    """

    inputs: str | None = None
    dtype: str | None = None
    effect: float | None = None
    error: float | None = None
    allowed: float | None = None
    reason: str | None = None

    @property
    def problem(self) -> str | None:
        if self.error is None or self.allowed is None or self.error <= self.allowed:
            return None
        return (
            f"PEFT computes something else from the folder than the trained model, on {self.inputs}: off by "
            f"{self.error:.1e} of what the adapter changes, allowed {self.allowed:.1e}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {"compared": self.reason is None} | {k: v for k, v in asdict(self).items() if v is not None}

    def __str__(self) -> str:
        if self.reason is not None:
            return f"the outputs of the whole model were not compared: {self.reason}"
        return (
            f"outputs of the whole model by PEFT ({self.inputs}; {self.dtype}): off by {self.error:.1e} of the effect"
        )


class NotComparable(Exception):
    """Outputs cannot be compared, which is no fault of the export."""


@dataclass(frozen=True)
class OutputProof:
    """The trained model's side of the comparison. PEFT loads the folder into `base`, and `compare` ends it."""

    base: nn.Module
    compute: Callable[[nn.Module], Tensor]
    inputs: str
    precision: torch.dtype
    wanted: Tensor
    effect: float
    noise: float

    def compare(self, dtype: torch.dtype, cut: float = 0.0) -> Outputs:
        """Ask `base`, now that it has the folder's adapter.

        Args:
            dtype: precision of the folder.
            cut: what the choice of a rank cost the worst module, relative; it changes outputs on purpose.
        """
        try:
            error = (self.compute(self.base) - self.wanted).norm().item()
        except Exception as failure:  # whatever it is, it is no comparison
            return Outputs(reason=f"with the folder's adapter, {first_line(failure)}")
        return Outputs(
            inputs=self.inputs,
            dtype=str(self.precision).removeprefix("torch."),
            effect=self.effect / self.wanted.norm().item(),
            error=error / self.effect,
            allowed=None if cut > TOLERANCE[dtype] else AMPLIFIED * TOLERANCE[dtype] + self.noise / self.effect,
        )


def start_proof(
    model: nn.Module | None,
    factors: Mapping[str, LoraFactors],
    adapter_name: str,
    beside: Beside,
    inputs: Inputs | None = None,
) -> OutputProof | Outputs:
    """Return the comparison with PEFT's outputs that will be made, or why none will; arguments as in `output_proof`."""
    if model is None:
        return Outputs(reason="no trained model was given")
    try:
        return output_proof(model, factors, adapter_name, beside, inputs)
    except NotComparable as error:
        return Outputs(reason=str(error))


def output_proof(
    model: nn.Module,
    factors: Mapping[str, LoraFactors],
    adapter_name: str,
    beside: Beside,
    inputs: Inputs | None = None,
) -> OutputProof:
    """Compute the outputs of the merged training model, and prepare a base of the same weights for PEFT to load into.

    Args:
        model: the trained one with its adapters.
        factors: what is exported, by module path.
        adapter_name: of the adapter that they are.
        beside: what was trained beside them.
        inputs: keyword arguments of the model's forward; found by its kind if not given.

    Raises:
        NotComparable: says why.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    refuse_parts(model)
    refuse_others(model, factors, adapter_name)
    trained = without_peft(model)
    precision, mixed = precision_of(trained)
    compute = partial(outputs_of, autocast=precision if mixed else None)
    try:
        tried = [inputs] if inputs else candidates(trained, trained_tokens(beside))
        given, plain = accepted(trained, tried, compute)
        is_ours = find_adapter(model, adapter_name) is not None
        with merged_forward(model, adapter_name) if is_ours else nullcontext():
            wanted = compute(trained, given)
        base = bare_model(trained, beside)
        again = compute(base, given)
    except NotComparable:
        raise
    except Exception as error:  # a model of any kind, in a place where an export must not be lost
        raise NotComparable(first_line(error)) from error
    effect = (wanted - plain).norm().item()
    rounding = max(unit(precision, wanted.device), packed_unit(trained))
    noise = ROUNDINGS * rounding * wanted.norm().item()
    if not wanted.isfinite().all():
        raise NotComparable("those of the trained model are not finite")
    if not (again - plain).norm().item() <= noise:
        raise NotComparable(f"a new {type(trained).__name__} with the same weights computes something else")
    if not effect > noise:
        raise NotComparable("what the adapter changes in them is less than rounding")
    said = ", ".join(f"{name} {list(value.shape)}" for name, value in given.items())
    return OutputProof(base, partial(compute, given=given), said, precision, wanted, effect, noise)


# ------------------------------------------------------------------------------------------- what can be compared


def refuse_parts(model: nn.Module) -> None:
    """Raise `NotComparable` if this process does not hold the model as a whole."""
    parameters: list[Any] = list(model.parameters())
    if any(is_sharded(p) or hasattr(p, "ds_id") or not p.numel() for p in parameters):
        raise NotComparable("the weights are sharded over several processes")
    if any(p.is_meta for p in parameters):
        raise NotComparable("weights are offloaded")
    if len(devices := {str(p.device) for p in parameters}) > 1:
        raise NotComparable(f"the weights are on several devices ({', '.join(sorted(devices))})")


def refuse_others(model: nn.Module, factors: Mapping[str, LoraFactors], adapter_name: str) -> None:
    """Raise `NotComparable` if the factors are not what the model computes with."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not any(adapter_name in layer.lora_A for layer in layers):
        raise NotComparable(f"the model given is a base without the adapter {adapter_name!r}")
    active = {name for layer in layers for name in layer.active_adapters}
    if active != {adapter_name} or any(layer.merged for layer in layers):
        raise NotComparable(f"the model computes with {', '.join(sorted(active))}, not {adapter_name!r} alone")
    own = {path.removeprefix(PEFT_PREFIX): f for path, f in adapter_factors(model, adapter_name).items()}
    if own.keys() != factors.keys() or any(relative_error(own[n], factors[n]) > SAME for n in own):
        raise NotComparable(f"the factors given are not those of the model's adapter {adapter_name!r} now")


def precision_of(model: nn.Module) -> tuple[torch.dtype, bool]:
    """The coarsest precision that a model computes in, and whether it needs autocast for others beside it."""
    held = {p.dtype for p in (*model.parameters(), *model.buffers()) if p.dtype in UNITS}
    coarsest = max(held, key=UNITS.__getitem__, default=torch.float32)
    return coarsest, len(held) > 1 and coarsest.itemsize == 2


def unit(precision: torch.dtype, device: torch.device) -> float:
    """The relative error of one rounding; what TensorFloat-32 leaves of float32, where it is allowed."""
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return max(UNITS[precision], TF32 if tf32 else 0.0)


def packed_unit(model: nn.Module) -> float:
    """The relative rounding of bitsandbytes' 4-bit layers that have been packed for a CPU with AVX512-BF16, else 0.

    Where no gradient is asked for, these compute in bfloat16 whatever their inputs are.
    """
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    return UNITS[torch.bfloat16] if any(getattr(s, "packing_format_for_cpu", False) for s in states) else 0.0


# ------------------------------------------------------------------------------------------------------- computing


def accepted(model: nn.Module, tried: Iterable[Inputs], compute: Callable[..., Tensor]) -> tuple[Inputs, Tensor]:
    """The first inputs that a model takes, and its outputs without its adapters."""
    reason = f"the inputs of {type(model).__name__} are not known"
    for given in tried:
        try:
            with adapters_off(model):
                return given, compute(model, given)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"{type(model).__name__} does not take {', '.join(given)} ({first_line(error)})"
    raise NotComparable(f"{reason}; give some to export_peft (inputs={{...}})")


@torch.no_grad()
def outputs_of(model: nn.Module, given: Inputs, autocast: torch.dtype | None = None) -> Tensor:
    """All floating-point outputs of a model in evaluation mode, as one vector."""
    device = next(model.parameters()).device.type
    context: AbstractContextManager = torch.autocast(device, autocast) if autocast else nullcontext()
    with evaluating(model), context, quiet():
        found: Any = model(**given)
    values = list(found.values()) if isinstance(found, Mapping) else found if isinstance(found, tuple) else [found]
    tensors = [value for value in values if torch.is_tensor(value) and value.is_floating_point()]
    if not tensors:
        raise NotComparable(f"{type(model).__name__} gives no numbers")
    return torch.cat([tensor.float().flatten() for tensor in tensors])


def trained_tokens(beside: Beside) -> list[int]:
    """Ids of the tokens that have been trained."""
    found = beside.fields.get("trainable_token_indices") or []
    return [token for part in found.values() for token in part] if isinstance(found, dict) else list(found)


@contextmanager
def unmoved(model: nn.Module | None) -> Iterator[None]:
    """Afterwards, what was trained is trained again: PEFT freezes a base that it loads into."""
    trained = [p for p in model.parameters() if p.requires_grad] if model is not None else []
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no dropout is drawn, and mixed precision that accelerate put around the forward is off."""
    modes = {module: module.training for module in model.modules()}
    around = model.__dict__.pop("forward") if "_original_forward" in model.__dict__ else None
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        if around is not None:
            model.__dict__["forward"] = around


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, a model computes without its adapters; what is trained stays so."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                stack.callback(setattr, module, "_disable_adapters", module._disable_adapters)
                module._disable_adapters = True
        yield


def first_line(error: Exception) -> str:
    """Return the error in one line."""
    if is_out_of_memory(error):
        return "the memory does not suffice for a forward of the model"
    return printable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
