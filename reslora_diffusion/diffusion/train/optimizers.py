"""The optimizer by name, and its parameter groups.

group      one component, one factor (lora_A, lora_B, DoRA's magnitude), one factor on the learning rate
lr         of the component, times `--loraplus_lr_ratio` for lora_B (LoRA+, arXiv 2402.12354), times `--lr_pattern`
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ...methods import optimizers
from ...methods.optimizers import FactorPair, PairOptimizer
from ...methods.optimizers.parameters import literal, parameters_of, unknown_settings
from ...utils.options import is_import_path
from ..models.architecture import matches
from ..options import DreamBoothOptions
from ..options.training import PACKAGED

# What a run decides, not a checkpoint: a run may go on with another learning rate than it had.
DECIDED = ("lr", "initial_lr", "betas", "eps", "weight_decay", "capturable", "train_mode")
LIKE_ADAM = ("adamw", "adamw8bit", "prodigy", "adafactor")  # of other libraries, with the defaults of Adam's options
WITH_FUSED_STEP = ("Adam", "AdamW", "SGD")  # on every device: one kernel for many tensors, which a CUDA graph can hold


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of an optimizer by its name in the options.

    Raises:
        KeyError: this version of torch does not have it.
        ImportError: the module or the class is not there.
        TypeError: the class is no optimizer.
    """
    if name in PACKAGED:
        return imported(PACKAGED[name].path)
    if is_import_path(name):
        return imported(name)
    if name == "adafactor":  # with an external learning rate, as diffusion trainers use it
        return imported("transformers.optimization.Adafactor")
    if name in optimizers.OPTIMIZERS:
        return optimizers.OPTIMIZERS[name]
    name = "sgd" if name == "sgdnesterov" else name
    return {kind.lower(): getattr(torch.optim, kind) for kind in dir(torch.optim)}[name]


def imported(path: str) -> type[torch.optim.Optimizer]:
    """A class by its dotted path; raises `ImportError` if there is none, `TypeError` if it is no optimizer."""
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module), name, None)
    if kind is None:
        raise ImportError(f"{module} has no {name}")
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise TypeError(f"{path} is no torch.optim.Optimizer")
    return kind


def name_of(options: DreamBoothOptions) -> str:
    return "adamw8bit" if options.use_8bit_adam else options.optimizer


def settings(kind: type[torch.optim.Optimizer], options: DreamBoothOptions) -> dict[str, Any]:
    """Keyword arguments: those of Adam and Prodigy where the optimizer knows them, then `--optimizer_args`."""
    known = parameters_of(kind)
    chosen: dict[str, Any] = {
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
        "fused": True,  # one kernel for many tensors, and a step with non-finite gradients is skipped on the device
        "capturable": options.cuda_graph and torch.cuda.is_available(),
        "momentum": 0.9 if options.optimizer.startswith("sgdnesterov") else None,
        "nesterov": True if options.optimizer.startswith("sgdnesterov") else None,
        "relative_step": False,
        "scale_parameter": False,
        "beta3": options.prodigy_beta3,
        "decouple": options.prodigy_decouple,
        "use_bias_correction": options.prodigy_use_bias_correction,
        "safeguard_warmup": options.prodigy_safeguard_warmup,
    }
    chosen = {name: value for name, value in chosen.items() if name in known and own_default(name, value, known)}
    if issubclass(kind, PairOptimizer):  # where one has a default of its own, that of the command line is not meant
        own = inspect.signature(kind).parameters
        flags = {"eps": "adam_epsilon", "weight_decay": "adam_weight_decay"}
        chosen = {n: v for n, v in chosen.items() if n not in own or flags.get(n) in options.given}
    elif not kind.__module__.startswith("torch.optim") and options.optimizer not in LIKE_ADAM:
        meant = {
            "betas": ("adam_beta1", "adam_beta2"),
            "eps": ("adam_epsilon",),
            "weight_decay": ("adam_weight_decay",),
        }
        chosen = {n: v for n, v in chosen.items() if n not in meant or options.given & {*meant[n]}}
    if kind.__module__.startswith("torch.optim") and kind.__name__ not in WITH_FUSED_STEP:
        chosen.pop("fused", None)
    return chosen | {name: literal(value) for name, value in options.optimizer_args.items()}


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer trains other weights than those to be used; `train` and `eval` switch them."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


@contextmanager
def used_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, parameters hold what is to be used (arXiv 2405.15682, x); after it, to the bit what they held before."""
    free: Any = optimizer
    if not is_schedule_free(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = [parameter.detach().clone() for parameter in parameters]
    free.eval()
    try:
        yield
    finally:
        free.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, held, strict=True):
                parameter.copy_(value)


def own_default(name: str, value: Any, known: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether a class takes an option: not one whose own default has another form, as CAME has three betas and
    two epsilons, and not None in place of a number."""
    default = known[name].default
    unlike = isinstance(default, tuple) and (not isinstance(value, tuple) or len(value) != len(default))
    return not unlike and (value is not None or default is None)


def optimizer_problems(options: DreamBoothOptions) -> list[str]:
    """Settings that the optimizer does not take. Names and optional packages are checked elsewhere."""
    try:
        kind = optimizer_class(name_of(options))
    except (ImportError, TypeError) as error:
        return [f"--optimizer: {error}"] if is_import_path(name_of(options)) else []
    except KeyError:
        return [f"--optimizer: torch {torch.__version__} has no {options.optimizer}"]
    problems = unknown_settings(kind, options.optimizer_args)
    if options.cuda_graph and not issubclass(kind, PairOptimizer) and not settings(kind, options).get("fused"):
        fused = ", ".join(name.lower() for name in WITH_FUSED_STEP)
        problems.append(f"--cuda_graph records the optimizer too: got {kind.__name__} unfused, wanted {fused}, fused")
    pairs: Any = {"pairs": []} if issubclass(kind, PairOptimizer) else {}
    if not problems:
        try:
            cast(Any, kind)(
                [nn.Parameter(torch.zeros(2, 2))], lr=options.learning_rate, **pairs, **settings(kind, options)
            )
        except (ValueError, TypeError, RuntimeError) as error:
            problems.append(f"--optimizer {options.optimizer}: {error}")
    return problems


def learning_rate_factor(options: DreamBoothOptions, processes: int) -> int:
    """The factor of `--scale_lr` on `--learning_rate`; a `--text_encoder_lr` is taken as it is, as in diffusers."""
    return options.train_batch_size * options.gradient_accumulation_steps * processes if options.scale_lr else 1


def parameter_groups(
    components: Mapping[str, Mapping[str, nn.Parameter]], options: DreamBoothOptions, processes: int
) -> list[dict[str, Any]]:
    """Groups of equal learning rate. `components`: parameters by component and name."""
    scale = learning_rate_factor(options, processes)
    groups: dict[tuple, dict[str, Any]] = {}
    for component, parameters in components.items():
        text = component.startswith("text_encoder")
        base = (options.text_encoder_lr if text else None) or options.learning_rate * scale
        decay = options.adam_weight_decay_text_encoder if text else None
        for name, parameter in parameters.items():
            layer, _, factor = name.partition(".lora_")
            pattern = next((f for regex, f in options.lr_pattern.items() if matches(regex, layer)), 1.0)
            lr = base * pattern * (options.loraplus_lr_ratio or 1.0 if factor.startswith("B") else 1.0)
            own = {} if decay is None else {"weight_decay": decay}
            magnitude = factor.startswith("magnitude")
            if magnitude:
                own = {"weight_decay": 0.0}  # a length, whose zero is no smaller a change
            group = groups.setdefault((component, lr, magnitude), {"params": [], "lr": lr, **own})
            group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(
    components: Mapping[str, Mapping[str, nn.Parameter]],
    options: DreamBoothOptions,
    processes: int = 1,
    pairs: Sequence[FactorPair] = (),
) -> torch.optim.Optimizer:
    """The optimizer of the adapters. `pairs`: of their factors, for those that see them together."""
    kind: Any = optimizer_class(name_of(options))
    own = {"pairs": pairs} if issubclass(kind, PairOptimizer) else {}
    groups = parameter_groups(components, options, processes)
    optimizer = kind(groups, lr=options.learning_rate, **own, **settings(kind, options))
    if is_schedule_free(optimizer):
        optimizer.train()
    return optimizer


def warmup_steps(options: DreamBoothOptions, max_train_steps: int) -> int:
    """`--lr_warmup_steps`, a share of all steps if it is below 1."""
    given = options.lr_warmup_steps
    return round(given * max_train_steps) if given < 1 else int(given)


def make_lr_scheduler(
    optimizer: torch.optim.Optimizer, options: DreamBoothOptions, max_train_steps: int
) -> LRScheduler:
    return get_scheduler(
        options.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=warmup_steps(options, max_train_steps),
        num_training_steps=max_train_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )


def fast_forward(lr_scheduler: LRScheduler, step: int) -> None:
    """Put a fresh schedule where it is after `step` steps."""
    lr_scheduler.last_epoch, lr_scheduler._step_count = step, step + 1
    lambdas = cast(LambdaLR, lr_scheduler).lr_lambdas  # as all of diffusers' schedules are
    rates = zip(lr_scheduler.optimizer.param_groups, lr_scheduler.base_lrs, lambdas, strict=True)
    for group, base, factor in rates:
        group["lr"] = base * factor(step)
    lr_scheduler._last_lr = [group["lr"] for group in lr_scheduler.optimizer.param_groups]
