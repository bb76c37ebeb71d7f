"""Time and memory of one training step, for every variant of `benchmarks.variants` in one process.

    python -m benchmarks.step [--device cpu|cuda] [--model NAME ...] [--output FILE]

Variants take turns (`benchmarks.timing`), and PEFT's LoRA is the yardstick. PEFT takes part twice: the ratio of the two
("peft again") is what noise alone does.

    CPU     processor time of one thread; models: a UNet that is bound by launching operations, the one of the embedded
            pipeline, one that is bound by arithmetic, a small Llama; float32. Processor time does not count what
            other processes do to the clock.
    CUDA    time between events, and host time per step, of SD1.5 and SDXL at batch 1, 4, 8 and a 1B Llama in bf16;
            eager, as a CUDA graph, compiled; memory by peak allocation. What matters most comes first, as many rounds
            of each case as fit its share of the time.

A step is forward, loss, backward; a whole step draws noise and timesteps for cached latents before, and clips and
updates by AdamW after. `overhead` is (t - floor) / (peft - floor), the share that is left of what PEFT adds.
"""

import argparse
import copy
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from reslora_diffusion.diffusion.train.capture import WARM_UP, CudaGraphs

from .models import SUBJECTS, Subject, output, repeated_blocks
from .results import FOLDER, write_results
from .timing import LEAST, MOST, clock_of, compare, cpu_time, peak_memory, table
from .variants import VARIANTS

AGAIN = "peft again"
LARGE = ("floor", "peft", AGAIN, "peft_autocast", "lora", "input", "block", "middle", "lora_frozen", "input_frozen")
LARGE += ("block_frozen", "middle_frozen")
MAIN = ("floor", "peft", AGAIN, "lora", "input", "block", "middle")
DEFAULT = [name for name in VARIANTS if not name.endswith("_frozen")] + ["lora_frozen", "input_frozen"]
# model, batch, number of rounds
CPU_CASES = [("tiny_unet", 1, 60), ("sticker_unet", 4, 20), ("proxy_unet", 2, 8), ("tiny_llama", 2, 30)]


class Case(NamedTuple):
    """A comparison on a GPU: a model of `benchmarks.models`, its batch size, and how steps are launched."""

    subject: str
    batch: int
    mode: str  # "eager", "graph", "whole step, eager", "whole step, graph", "compiled", "compiled blocks"

    def __str__(self) -> str:
        return f"{self.subject}, batch {self.batch}, {self.mode}"


CUDA_CASES = [Case("sd15", 4, "eager"), Case("sd15", 1, "eager"), Case("sd15", 1, "graph"), Case("sd15", 4, "graph")]
CUDA_CASES += [Case("sd15", batch, mode) for batch in (1, 4) for mode in ("whole step, eager", "whole step, graph")]
CUDA_CASES += [Case("sd15", 8, "eager"), Case("sd15", 8, "graph")]
CUDA_CASES += [Case("llama_1b", 1, "eager"), Case("llama_1b", 4, "eager")]
CUDA_CASES += [Case("sdxl", 1, "eager"), Case("sdxl", 1, "graph"), Case("sdxl", 4, "eager"), Case("sdxl", 8, "eager")]
CUDA_CASES += [Case("sd15", 4, "compiled")]


# --------------------------------------------------------------------------------------------------------- models


def frozen(of: Subject, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The base model, with random weights."""
    torch.manual_seed(0)
    with device:
        model: nn.Module = of.make()
    model.train().requires_grad_(False)
    return nn.Module.to(model, dtype)


def build(
    variant: str, of: Subject, device: torch.device, dtype: torch.dtype, base: nn.Module | None = None
) -> nn.Module:
    """An adapted model of its own; it shares the frozen weights of `base`, where that is given."""
    base = frozen(of, device, dtype) if base is None else base
    model = copy.deepcopy(base, {id(each): each for each in [*base.parameters(), *base.buffers()]})
    torch.manual_seed(0)
    VARIANTS[variant.removesuffix(" again")].adapt(model, of.targets, device.type == "cuda")
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Models:
    """The variants of each subject, made when they are first asked for; those of one subject share their base."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.bases: dict[str, nn.Module] = {}
        self.made: dict[tuple[str, str], nn.Module] = {}

    def base(self, subject: str) -> nn.Module:
        """The frozen model."""
        if subject not in self.bases:
            self.bases[subject] = frozen(SUBJECTS[subject], self.device, self.dtype)
        return self.bases[subject]

    def __call__(self, subject: str, variant: str) -> nn.Module:
        key = (subject, variant)
        if key not in self.made:
            self.made[key] = build(variant, SUBJECTS[subject], self.device, self.dtype, self.base(subject))
        return self.made[key]

    def all(self, subject: str, variants: Sequence[str]) -> dict[str, nn.Module]:
        """Results by variant, of as many as there is memory for."""
        found = {}
        for variant in variants:
            try:
                found[variant] = self(subject, variant)
            except RuntimeError as error:
                print(f"{subject}: {variant} left out: {str(error).splitlines()[0]}", flush=True)
        return found

    def forget(self, subject: str) -> None:
        """Free the memory of a subject that is not needed any more."""
        self.bases.pop(subject, None)
        self.made = {key: model for key, model in self.made.items() if key[0] != subject}


# ---------------------------------------------------------------------------------------------------------- steps


def prepare(
    model: nn.Module, inputs: dict[str, Tensor], autocast: bool = False, mode: str = "eager", backend: str = "inductor"
) -> Callable:
    """A function that does one step of a model, and returns the loss."""
    parameters, device = trained(model), next(model.parameters()).device.type
    forward = torch.compile(output, dynamic=False, backend=backend) if mode == "compiled" else output
    if mode == "compiled blocks":
        for block in repeated_blocks(model):
            block.compile(dynamic=False, backend=backend)
    precision = partial(torch.autocast, device, torch.bfloat16) if autocast else nullcontext

    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        with precision():
            loss = forward(model, inputs).float().square().mean()
        loss.backward()
        return loss

    optimizer = torch.optim.AdamW(parameters, fused=True, capturable=device == "cuda")
    scheduler = DDPMScheduler()

    def whole_step() -> Tensor:
        latents, batch = inputs["sample"], len(inputs["sample"])
        noise = torch.randn_like(latents)
        times = torch.randint(len(scheduler), (batch,), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, times)
        with precision():
            loss = F.mse_loss(output(model, inputs | {"sample": noisy, "timestep": times}).float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return whole_step if mode.startswith("whole") else step


def as_graph(step: Callable[[], Any], graphs: CudaGraphs) -> Callable[[], Any]:
    """The step recorded once as a CUDA graph, and replayed."""
    with graphs.as_recorded():
        for _ in range(WARM_UP):
            step()
    return graphs.record(step)


# ---------------------------------------------------------------------------------------------------------- cases


def on_cpu(variants: list[str], scale: float, subjects: Sequence[str]) -> dict[str, Any]:
    """All cases of a CPU."""
    torch.set_num_threads(1)
    found = {}
    for subject, batch, rounds in CPU_CASES:
        if subject not in subjects:
            continue
        of, cpu = SUBJECTS[subject], torch.device("cpu")
        names = [name for name in variants if VARIANTS[name].on_cpu]
        if "unet" not in subject:
            names = [name for name in names if not name.endswith("_frozen")]
        inputs = of.inputs(batch, cpu, torch.float32)
        steps = {name: prepare(build(name, of, cpu, torch.float32), inputs) for name in [*names, AGAIN]}
        key = f"{subject}, batch {batch}, eager"
        found[key] = compare(steps, cpu_time, max(LEAST, round(rounds * scale)))
        print(f"\n{key}\n{table(found[key])}", flush=True)
    return found


def takes_part(name: str, case: Case) -> bool:
    """Return whether a variant is measured: not all fit a card at once, or the time."""
    if "llama" in case.subject and name.endswith("_frozen"):
        return False
    few = case.subject == "sdxl" or case.batch == 8
    return name in MAIN or (case.mode == "eager" and (name in LARGE or not few))


def measure(
    case: Case, names: list[str], models: Models, rounds: int, share: float, end: float, backend: str
) -> dict[str, dict[str, Any]]:
    """One case, of all the variants that can; what cannot is named. Empty if `floor` or `peft` cannot.

    Up to `share` there may be more than the least number of rounds; no variant begins after `end`.
    """
    device, steps, peaks = models.device, {}, {}
    inputs = SUBJECTS[case.subject].inputs(case.batch, device, models.dtype)
    graphs = CudaGraphs() if case.mode.endswith("graph") else None
    made = models.all(case.subject, names)
    gc.freeze()  # or each of many collections would go through all of the models
    for name, model in made.items():
        if time.monotonic() > end:
            print(f"{case}: {name} left out, the time is over", flush=True)
            continue
        try:
            step = prepare(model, inputs, VARIANTS[name.removesuffix(" again")].autocast, case.mode, backend)
            step()
            peaks[name] = peak_memory(device, step)
            steps[name] = step if graphs is None else as_graph(step, graphs)
            steps[name]()
        except RuntimeError as error:
            steps.pop(name, None)
            print(f"{case}: {name} left out: {str(error).splitlines()[0]}", flush=True)
    if not {"floor", "peft"} <= steps.keys():
        return {}
    measured = compare(steps, clock_of(device, steps["peft"]), rounds, share)
    return {name: values | ({"peak": peaks[name]} if peaks[name] else {}) for name, values in measured.items()}


def clean(models: Models, case: Case) -> None:
    """Free what a case leaves behind, models excepted."""
    if case.mode == "compiled blocks":
        for (subject, _), model in models.made.items():
            for block in repeated_blocks(model) if subject == case.subject else ():
                block._compiled_call_impl = None
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()


def measure_all(
    cases: Sequence[Case],
    variants: Sequence[str],
    models: Models,
    seconds: float,
    *,
    scale: float = 1.0,
    backend: str = "inductor",
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cases in order, as many as fit the time and the memory; what does not fit is named."""
    torch._dynamo.config.recompile_limit = 64  # variants share their code, each is compiled by itself
    until = time.monotonic() + seconds
    for place, case in enumerate(cases):
        now = time.monotonic()
        share = now + (until - now) / (len(cases) - place)
        if now > until:
            print(f"\n{case}: left out, {seconds:.0f} seconds are over", flush=True)
            continue
        names = [name for name in dict.fromkeys([*variants, AGAIN]) if takes_part(name, case)]
        try:
            found = measure(case, names, models, max(LEAST, round(MOST * scale)), share, until, backend)
        except RuntimeError as error:
            print(f"{case}: left out: {str(error).splitlines()[0]}", flush=True)
            found = {}
        if found:
            print(f"\n{case}\n{table(found)}", flush=True)
            yield str(case), found
        if case.subject not in {later.subject for later in cases[place + 1 :]}:
            models.forget(case.subject)
        clean(models, case)


def main() -> None:
    warnings.filterwarnings("ignore")
    subjects = [case[0] for case in [*CPU_CASES, *CUDA_CASES]]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", nargs="+", default=subjects, choices=list(dict.fromkeys(subjects)), metavar="NAME")
    parser.add_argument("--variant", nargs="+", default=DEFAULT, choices=VARIANTS, help="floor and peft are added")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rounds")
    parser.add_argument("--minutes", type=float, default=7.0, help="on a GPU, start no further case after this long")
    parser.add_argument("--output", help="result file (default: benchmarks/results/step-<device>.json)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device, or torch was installed without CUDA")
    variants = list(dict.fromkeys(["floor", "peft", *args.variant]))
    path = args.output or FOLDER / f"step-{args.device}.json"
    keep = partial(write_results, path, "step", clock="thread time" if args.device == "cpu" else "events")
    if args.device == "cpu":
        keep(on_cpu(variants, args.scale, args.model))
    else:
        found: dict[str, Any] = {}
        cases = [case for case in CUDA_CASES if case.subject in args.model]
        models = Models(torch.device("cuda"), torch.bfloat16)
        for case, values in measure_all(cases, variants, models, 60 * args.minutes, scale=args.scale):
            keep(found := found | {case: values})  # what there is stays, whatever comes after
        if not found:
            parser.exit(1, "no case fits this card\n")
    from .plots import plot_steps

    plot_steps(path)


if __name__ == "__main__":
    main()
