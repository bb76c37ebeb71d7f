"""Stage b: the tests that need a GPU, and every kernel against a naive ResLoRA in float64 (tests/reference.py).

A model whose base weights are rounded to a precision is compared with the same rounded weights in float64: the output,
and the gradients of all factors, by |x - x_reference| / |x_reference|. A kernel passes within `LIMITS`. Each shortcut
runs through each kernel that the model has, launched one by one; the fastest kernel is also replayed as a CUDA graph,
with other inputs than it was recorded with, and at the end, as time allows, models are compiled.
"""

import copy
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reslora_diffusion import ResLoraConfig, attach
from reslora_diffusion.diffusion.train.capture import WARM_UP, CudaGraphs

from ..forced import FUSED, GROUPED, force, kernels_of
from ..models import SUBJECTS, output
from ..results import write_results
from ..step import frozen
from .stages import ROOT, environment, reason, stage_args

sys.path.insert(0, str(ROOT / "tests"))
from reference import adapt_naively  # noqa: E402

MODELS, TINY_MODELS = ("proxy_unet", "tiny_llama"), ("tiny_unet", "tiny_llama")
SHORTCUTS = {"none": 1, "input": 1, "block": 2, "middle": 2}  # with how many predecessors a block reaches
# Errors of the output and of the gradients that count as rounding.
LIMITS = {torch.float32: (1e-5, 1e-4), torch.float16: (5e-3, 2e-2), torch.bfloat16: (4e-2, 1e-1)}
RANK = 8
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)


# ---------------------------------------------------------------------------------------------- pytest


def run_tests(device: str, seconds: float) -> dict[str, Any]:
    """The outcome of the tests that are marked `gpu`; those that do not end in time have failed."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-vv", "--tb=short"]
    with tempfile.TemporaryFile("w+") as said:
        try:
            code = subprocess.run(
                [*command, *files], cwd=ROOT, env=environment(), timeout=seconds, stdout=said, stderr=subprocess.STDOUT
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        said.seek(0)
        log = said.read()
    print(log[-6000:], flush=True)
    outcomes = dict(OUTCOME.findall(log))
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    if code is None:
        failed.append(f"not all ended within {seconds:.0f} s")
    elif code and not failed:
        failed.append(f"pytest ended with exit code {code}")
    counts = Counter(outcomes.values())
    return {"passed": counts["PASSED"], "skipped": counts["SKIPPED"], "failed": failed}


# ---------------------------------------------------------------------------------------------- the reference

Found = tuple[Tensor, dict[str, Tensor]]  # the output, and the gradient of each factor


def distance(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """|x - y| / |y| of all pairs together."""
    over, under = (sum(each) for each in zip(*[parts(x.double(), y.double()) for x, y in pairs], strict=True))
    return float((over / under) ** 0.5)


def parts(x: Tensor, y: Tensor) -> tuple[float, float]:
    return (x - y).square().sum().item(), y.square().sum().item()


def error(got: Found, wanted: Found) -> tuple[float, float]:
    """Relative errors of the output, and of the gradients of all factors."""
    assert got[1].keys() == wanted[1].keys(), "both have gradients of the same factors"
    return distance([(got[0], wanted[0])]), distance([(got[1][name], wanted[1][name]) for name in wanted[1]])


def factors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """`<layer>.lora_A` and `<layer>.lora_B` of an adapted model, by name."""
    return {
        f"{name}.{side}": getattr(module, side)["default"].weight
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
        for side in ("lora_A", "lora_B")
    }


def step_of(forward: Callable[[], Tensor], parameters: dict[str, nn.Parameter], probe: Tensor) -> Callable[[], Found]:
    """A forward, and a backward from a fixed random direction."""

    def step() -> Found:
        for parameter in parameters.values():
            parameter.grad = None
        result = forward()
        torch.autograd.backward(result, probe.to(result.dtype))
        return result.detach(), {name: parameter.grad for name, parameter in parameters.items()}

    return step


class Setting:
    """One adapted model, with what the float64 reference computes with the same weights."""

    def __init__(self, subject: str, shortcut: str, dtype: torch.dtype, device: torch.device) -> None:
        of = SUBJECTS[subject]
        self.name = f"{subject}, {shortcut}, {str(dtype).removeprefix('torch.')}"
        self.dtype, self.limits = dtype, LIMITS[dtype]
        cpu = torch.device("cpu")  # where numbers are drawn: a recording that failed may leave the device unable to
        base = frozen(of, cpu, dtype).eval().to(device)
        self.inputs, self.others = (
            {name: value.to(device) for name, value in of.inputs(2, cpu, dtype).items()} for _ in range(2)
        )
        self.model = copy.deepcopy(base)
        reach = SHORTCUTS[shortcut]
        attach(self.model, ResLoraConfig(r=RANK, target_modules=of.targets, shortcut=shortcut, num_previous=reach))
        self.factors = factors_of(self.model)
        generator = torch.Generator().manual_seed(1)
        for factor in self.factors.values():
            factor.data = (0.2 * torch.randn(factor.shape, generator=generator) / factor.shape[1] ** 0.5).to(device)
        with torch.no_grad():
            unadapted = output(base, self.inputs)
        probe = torch.randn(unadapted.shape, generator=generator) / unadapted[0].numel() ** 0.5
        self.probe = probe.to(device)
        self.base, self.shortcut = base, shortcut
        self.wanted = self.reference(self.inputs)
        self.effect = distance([(unadapted, self.wanted[0])])

    def reference(self, inputs: dict[str, Tensor]) -> Found:
        """Compute ResLoRA as the paper writes it, with the same weights in float64."""
        exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        model = copy.deepcopy(self.base).double()
        layers = dict(self.model.named_modules())
        names = [name.removesuffix(".lora_A") for name in self.factors if name.endswith(".lora_A")]
        given = {
            name: (self.factors[f"{name}.lora_A"], self.factors[f"{name}.lora_B"], layers[name].scaling["default"])
            for name in names
        }
        blocks = adapt_naively(model, given, self.shortcut, SHORTCUTS[self.shortcut], lambda m: output(m, exact))
        parameters = {f"{n}.{side}": getattr(b, side) for n, b in blocks.items() for side in ("lora_A", "lora_B")}
        return step_of(lambda: output(model, exact), parameters, self.probe)()

    def judged(self, mode: str, kernel: str, got: Found, wanted: Found) -> dict[str, Any]:
        """One line of the results."""
        errors = error(got, wanted)
        passed = all(each <= limit for each, limit in zip(errors, self.limits, strict=True))
        return {"case": f"{self.name}, {kernel}, {mode}", "output": errors[0], "gradients": errors[1], "passed": passed}

    def eager(self) -> Iterator[dict[str, Any]]:
        step = step_of(lambda: output(self.model, self.inputs), self.factors, self.probe)
        for kernel in kernels_of(self.model):
            force(self.model, kernel)
            step()  # what a kernel learns in the first forward, it uses in the second
            yield self.judged("eager", kernel, step(), self.wanted)

    def graph(self) -> Iterator[dict[str, Any]]:
        """Recorded with some inputs, replayed with others."""
        kernel = GROUPED if GROUPED in kernels_of(self.model) else FUSED
        force(self.model, kernel)
        inputs = {name: value.clone() for name, value in self.inputs.items()}
        step, graphs = step_of(lambda: output(self.model, inputs), self.factors, self.probe), CudaGraphs()
        with graphs.as_recorded():
            for _ in range(WARM_UP):
                step()
        found: list[Found] = []
        replay = graphs.record(lambda: found.append(step()))
        for name, value in self.others.items():
            inputs[name].copy_(value)
        replay()
        torch.cuda.synchronize()
        yield self.judged("graph", kernel, found[0], self.reference(self.others))

    def compiled(self, backend: str) -> Iterator[dict[str, Any]]:
        torch._dynamo.reset()
        forward = torch.compile(output, dynamic=False, backend=backend)
        step = step_of(lambda: forward(self.model, self.inputs), self.factors, self.probe)
        yield self.judged("compiled", "as chosen", step(), self.wanted)
        torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- the stage


def compare(args: Any, until: float) -> Iterator[dict[str, Any]]:
    """All cases, those that are quick first; a case that raises has failed."""
    device = torch.device(args.device)
    models = TINY_MODELS if args.tiny else MODELS
    dtypes = (torch.float32, torch.bfloat16) if args.tiny else tuple(LIMITS)

    def attempt(name: str, cases: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        try:
            yield from cases()
        except Exception as problem:
            yield {"case": name, "passed": False, "error": reason(problem)}

    def setting(subject: str, shortcut: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
        made = Setting(subject, shortcut, dtype, device)
        if made.effect < 0.01:
            yield {"case": made.name, "passed": False, "error": f"the adapter changes the output by {made.effect:.1e}"}
        yield from attempt(f"{made.name}, eager", made.eager)
        if device.type == "cuda":
            yield from attempt(f"{made.name}, graph", made.graph)

    def compiled(subject: str, shortcut: str) -> Iterator[dict[str, Any]]:
        made = Setting(subject, shortcut, torch.float32, device)
        yield from made.compiled("eager" if args.tiny else "inductor")

    for subject in models:
        for dtype in dtypes:
            for shortcut in SHORTCUTS:
                yield from attempt(
                    f"{subject}, {shortcut}, {dtype}", lambda s=subject, k=shortcut, d=dtype: setting(s, k, d)
                )
    for shortcut, subject in (("block", models[1]), ("middle", models[1]), ("block", models[0]), ("input", models[0])):
        name = f"{subject}, {shortcut}, compiled"
        if time.monotonic() > until or (args.tiny and subject == models[0]):
            print(f"{name}: left out, the time is over", flush=True)
            continue
        yield from attempt(name, lambda s=subject, k=shortcut: compiled(s, k))


def main() -> None:
    args = stage_args(__doc__)
    warnings.filterwarnings("ignore")
    torch.backends.cudnn.allow_tf32 = False
    until = time.monotonic() + args.seconds
    tests = run_tests(args.device, 0.6 * args.seconds)
    rows: list[dict[str, Any]] = []
    for row in compare(args, until - 0.25 * args.seconds):
        shown = ", ".join(f"{key} {row[key]:.1e}" for key in ("output", "gradients") if key in row)
        print(f"{'passed' if row['passed'] else 'FAILED'}  {row['case']}  {row.get('error', shown)}", flush=True)
        rows.append(row)
        keep(args.output, tests, rows, quiet=True)
    keep(args.output, tests, rows)
    failed = len(tests["failed"]) + sum(not row["passed"] for row in rows)
    sys.exit(f"{failed} checks failed" if failed else None)


def keep(file: Path, tests: dict[str, Any], rows: list[dict[str, Any]], quiet: bool = False) -> None:
    """Write what is known, and the largest error of each precision."""
    failed = [row for row in rows if not row["passed"]]
    summary = [f"pytest -m gpu: {tests['passed']} passed, {tests['skipped']} skipped, {len(tests['failed'])} failed"]
    summary += [f"    failed: {name}" for name in tests["failed"]]
    summary.append(f"against float64: {len(rows) - len(failed)} passed, {len(failed)} failed")
    summary += [f"    failed: {row['case']}: {row.get('error', row.get('gradients'))}" for row in failed[:8]]
    for dtype in LIMITS:
        name = str(dtype).removeprefix("torch.")
        of = [row for row in rows if "output" in row and f", {name}," in row["case"]]
        if of:
            worst = [max(row[key] for row in of) for key in ("output", "gradients")]
            summary.append(f"    {name}: largest error of outputs {worst[0]:.1e}, of gradients {worst[1]:.1e}")
    write_results(file, "correctness", {"tests": tests, "cases": rows}, quiet=quiet, summary=summary)


if __name__ == "__main__":
    main()
