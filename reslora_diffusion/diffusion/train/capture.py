"""`--cuda_graph`: a training step launched as CUDA graphs instead of kernel by kernel.

    backward(batch)   forward and backward; adds to the step's loss and gradients     a graph for each shape of batches
    update()          unscale, clip, optimizer, zero the gradients                    one graph

Two kinds, because one would be needed for every sequence of shapes that a step can accumulate, and because what happens
once for several batches has its place between graphs: seeding dropout, averaging over processes.

A graph repeats kernels with the arguments they had, so what changes from step to step is written into tensors that
stay where they are: the batch, the learning rates, and by torch itself the seed and offset of its generator, so that
`torch.manual_seed` acts on a replay as on an eager step. Whatever outlives a graph (weights, moments, the loss scale,
sums of gradients and loss) is allocated outside; the memory pool is scratch, and all graphs share it in any order.

The first calls with new shapes are ordinary ones, on the stream that is recorded from: they count as steps, and they
leave behind what is made once (moments, workspaces, compiled kernels). Recording executes nothing. So a captured run
takes the steps that an uncaptured one takes, with learning rates rounded to float32.
"""

import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ...utils.problems import Stopped
from ..options import DreamBoothOptions

WARM_UP = 3  # calls before a recording, as in torch's own examples
Backward = Callable[[Any], object]  # of a batch: a dataclass of tensors
Update = Callable[[], Tensor]


class Recorder(Protocol):
    """A way to record launches and to launch them again."""

    def as_recorded(self) -> AbstractContextManager:
        """Inside, calls run as they will be recorded."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return a call that repeats what `function` does on the device; `function` itself changes nothing there."""

    def forget(self) -> None:
        """Drop what was recorded, which may still be running."""


class CudaGraphs:
    """Graphs that share a memory pool."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.forget()

    def forget(self) -> None:
        torch.cuda.synchronize()
        self.pool = torch.cuda.graph_pool_handle()  # one whose graphs are all gone cannot be used again

    @contextmanager
    def as_recorded(self) -> Iterator[None]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        gc.collect()  # while recording, nothing on the device may be freed by chance
        graph = torch.cuda.CUDAGraph()
        # Threads of NCCL or of a logger may ask the device for something meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


def tensors_in(value: Any) -> Iterator[Tensor | None]:
    """Tensors of nested lists, tuples and dataclasses, and None where one may be absent."""
    if value is None or isinstance(value, Tensor):
        yield value
        return
    for inner in [getattr(value, f.name) for f in fields(value)] if is_dataclass(value) else value:
        yield from tensors_in(inner)


def signature(value: Any) -> tuple:
    """The values that must be equal for one recording to serve."""
    return tuple(None if t is None else (t.shape, t.dtype) for t in tensors_in(value))


class Recorded:
    """A function that is recorded once for each signature of its inputs."""

    def __init__(self, function: Callable[..., Tensor | None], recorder: Recorder) -> None:
        self.function, self.recorder = function, recorder
        self.forget()

    def forget(self) -> None:
        self.calls: Counter[tuple] = Counter()
        self.recordings: dict[tuple, tuple[Any, list[Tensor], Callable[[], None]]] = {}

    def __call__(self, *inputs: Any) -> Tensor | None:
        key = signature(inputs)
        if key not in self.recordings:
            self.calls[key] += 1
            if self.calls[key] <= WARM_UP:
                with self.recorder.as_recorded():
                    return self.function(*inputs)
            self.recordings[key] = self.record(copy.deepcopy(inputs))
        own, result, replay = self.recordings[key]
        for mine, given in zip(tensors_in(own), tensors_in(inputs), strict=True):
            if mine is not None and given is not None:  # alike in both, by the signature
                mine.copy_(given, non_blocking=True)
        replay()
        return result[0].clone() if result else None  # before another graph writes there

    def record(self, inputs: Any) -> tuple[Any, list[Tensor], Callable[[], None]]:
        result: list[Tensor] = []

        def function() -> None:
            value = self.function(*inputs)
            result[:] = [] if value is None else [value]

        try:
            return inputs, result, self.recorder.record(function)
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__:  # what ends a recording complains of it once more
                cause = cause.__context__
            reason = str(cause).partition("\n")[0]
            raise Stopped(f"--cuda_graph: the step cannot be recorded: {reason}. Go on without it") from error


class Step:
    """The two parts of a training step, as they are written."""

    def __init__(self, backward: Backward, update: Update) -> None:
        self.backward, self.update = backward, update

    def forget(self) -> None:
        """Drop recordings, as parameters, or what is computed with them, are others now, or training is over."""


class CapturedStep(Step):
    """The two parts of a training step, recorded and replayed."""

    def __init__(
        self, backward: Backward, update: Update, optimizer: torch.optim.Optimizer, recorder: Recorder
    ) -> None:
        self.optimizer, self.recorder = optimizer, recorder
        self.sums: dict[Tensor, Tensor] = {}
        device = self.parameters()[0].device
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.recorded_update = Recorded(partial(self.update_sums, update), recorder)
        self.recorded_backward = Recorded(partial(self.add_to_sums, backward), recorder)
        super().__init__(self.recorded_backward, self.update_at_rates)

    def forget(self) -> None:
        self.recorder.forget()
        self.recorded_backward.forget()
        self.recorded_update.forget()
        self.set_gradients(dict.fromkeys(self.parameters()))
        self.sums = {}

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @staticmethod
    def set_gradients(gradients: dict[Tensor, Any]) -> None:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def add_to_sums(self, backward: Backward, batch: Any) -> None:
        """`backward`, whose gradients are added to the sums a few dozen at once instead of one by one."""
        parameters = self.parameters()
        self.set_gradients(dict.fromkeys(parameters))
        backward(batch)
        found = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        if known := [parameter for parameter in found if parameter in self.sums]:
            torch._foreach_add_([self.sums[p] for p in known], [found[p] for p in known])
        self.sums = found | self.sums
        self.set_gradients(self.sums)

    def update_sums(self, update: Update) -> Tensor:
        """`update`, which reads its learning rates from tensors and leaves sums of zero."""
        groups = self.optimizer.param_groups
        given = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        try:
            norm = update()
        finally:
            for group, rate in zip(groups, given, strict=True):
                group["lr"] = rate
        torch._foreach_zero_(list(self.sums.values()))
        self.set_gradients(self.sums)
        return norm

    def update_at_rates(self) -> Tensor:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            rate.fill_(group["lr"])
        norm = self.recorded_update()
        assert norm is not None, "an update returns the norm of the gradient"
        torch.autograd.graph.increment_version(self.parameters())  # a replay changes them behind autograd's back
        return norm


def why_not_captured(device: torch.device) -> str | None:
    """The reason why CUDA graphs cannot run here, if any."""
    return None if device.type == "cuda" else "this machine trains without a CUDA device"


def whole_step(
    backward: Backward,
    update: Update,
    optimizer: torch.optim.Optimizer,
    options: DreamBoothOptions,
    device: torch.device,
    say: Callable[[str], object],
) -> Step:
    """The step in the form that was asked for, if the machine can."""
    if not options.cuda_graph:
        return Step(backward, update)
    if reason := why_not_captured(device):
        say(f"--cuda_graph: {reason}; going on without graphs")
        return Step(backward, update)
    return CapturedStep(backward, update, optimizer, CudaGraphs())
