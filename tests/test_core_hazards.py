"""What training loops do to a model, each against the naive float64 reference: gradients must not notice.

The reference runs every forward with its own backward, without checkpointing, and its gradients are added up.
"""

import contextlib
import copy
import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models import build, inputs, output, randomise
from reslora_diffusion import ResLoraConfig, attach, get_adapter
from reslora_diffusion.core.adapter import Adapter
from reslora_diffusion.core.layer import Packed
from reslora_diffusion.core.packed import Packer
from test_core_shortcuts import adapted, assert_same_gradients, loss_of, reference_of

MODELS = ("unet", "clip", "llama")
SHORTCUTS = [("input", 1), ("block", 2), ("middle", 2), ("middle", None)]


def forward_backward(name: str, model: nn.Module) -> None:
    loss_of(output(name, model, inputs(name))).backward()


def two_forwards_one_backward(name: str, model: nn.Module) -> None:
    first, second = output(name, model, inputs(name)), output(name, model, inputs(name, seed=1))
    (loss_of(first) + loss_of(second)).backward()


def evaluation_between(name: str, model: nn.Module) -> None:
    out = output(name, model, inputs(name))
    with torch.no_grad():
        output(name, model, inputs(name, batch=3, seed=2))
    loss_of(out).backward()


def accumulation(name: str, model: nn.Module) -> None:
    for seed in (0, 1):
        loss_of(output(name, model, inputs(name, seed=seed))).backward()


def exception_in_mid_forward(name: str, model: nn.Module) -> None:
    victim = list(get_adapter(model).layers.values())[len(get_adapter(model).layers) // 2]

    def fail(module: nn.Module, args: tuple) -> None:
        raise ZeroDivisionError

    hook = victim.register_forward_pre_hook(fail)
    with contextlib.suppress(ZeroDivisionError):
        output(name, model, inputs(name, seed=3))
    hook.remove()
    assert get_adapter(model).context.scope is None
    forward_backward(name, model)


PATTERNS = {
    forward_backward: (0,),
    two_forwards_one_backward: (0, 1),
    evaluation_between: (0,),
    accumulation: (0, 1),
    exception_in_mid_forward: (0,),
}


def enable_checkpointing(name: str, model: nn.Module) -> None:
    """Each library's own switch."""
    if name == "unet":
        model.enable_gradient_checkpointing()
    else:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("shortcut", "num_previous"), SHORTCUTS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_reference(
    name: str, shortcut: str, num_previous: int | None, pattern, checkpointing: bool
) -> None:
    model = adapted(name, shortcut, num_previous)
    base, blocks = reference_of(name, model, shortcut, num_previous)
    for seed in PATTERNS[pattern]:
        loss_of(output(name, base, inputs(name, seed=seed))).backward()
    if checkpointing:
        enable_checkpointing(name, model)
    pattern(name, model)
    assert_same_gradients(model, blocks)


@pytest.mark.parametrize("shortcut", ["input", "middle", "block"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_with_dropout_changes_nothing(name: str, shortcut: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(name, shortcut, 1, lora_dropout=0.1).train()
        if checkpointing:
            enable_checkpointing(name, model)
        torch.manual_seed(3)
        two_forwards_one_backward(name, model)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, wanted in gradients[0].items():
        assert (gradients[1][key] - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_checkpointed_segments_hold_nothing_after_backward() -> None:
    import gc

    model = adapted("llama", "input", 1)
    enable_checkpointing("llama", model)
    forward_backward("llama", model)
    gc.collect()
    shape = (2, 9, 16)
    alive = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.shape == shape and o.grad_fn is not None]
    assert alive == []


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_reentrant_checkpointing_is_refused_by_name(shortcut: str) -> None:
    model = adapted("llama", shortcut, 1)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.train()
    with pytest.raises(RuntimeError, match='reentrant activation checkpointing .*"use_reentrant": False'):
        forward_backward("llama", model)
    unet = adapted("unet", shortcut, 1).train()
    unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
    with pytest.raises(RuntimeError, match="reentrant activation checkpointing"):
        forward_backward("unet", unet)


def test_block_works_with_reentrant_checkpointing() -> None:
    model = adapted("llama", "block", 2)
    base, blocks = reference_of("llama", model, "block", 2)
    loss_of(output("llama", base, inputs("llama"))).backward()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.train()
    forward_backward("llama", model)
    assert_same_gradients(model, blocks)


def test_checkpointing_by_hand_needs_context_fn_and_says_so() -> None:
    class Halves(nn.Module):
        def __init__(self, context_fn) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)).double()
            self.context_fn = context_fn

        def half(self, first: int, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers[first : first + 2]:
                x = layer(x).tanh()
            return x

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for first in (0, 2):
                options = {"context_fn": self.context_fn(self)} if self.context_fn else {}
                x = checkpoint(self.half, first, x, use_reentrant=False, **options)
            return x

    def run(context_fn) -> nn.Module:
        torch.manual_seed(0)
        model = Halves(context_fn)
        attach(model, ResLoraConfig(r=2, target_modules=r"layers\.\d", shortcut="input"))
        model.double()
        randomise(model)
        model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
        return model

    with pytest.raises(RuntimeError, match="context_fn=get_adapter"):
        run(None)
    right = run(lambda model: get_adapter(model).context_fn)
    assert all(p.grad is not None for p in right.parameters() if p.requires_grad)


def test_nested_checkpointing() -> None:
    class Nest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
            self.depth = 0

        def run(self, depth: int, first: int, count: int, x: torch.Tensor) -> torch.Tensor:
            if count == 1:
                return self.layers[first](x).tanh()
            for start in (first, first + count // 2):
                if depth:
                    context_fn = get_adapter(self).context_fn
                    part = partial(self.run, depth - 1, start, count // 2)
                    x = checkpoint(part, x, use_reentrant=False, context_fn=context_fn)
                else:
                    x = self.run(0, start, count // 2, x)
            return x

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.run(self.depth, 0, 8, x)

    gradients = []
    for depth in (0, 1, 2, 3):
        torch.manual_seed(0)
        model = Nest().double()
        attach(model, ResLoraConfig(r=2, target_modules=r"layers\.\d", shortcut="middle", num_previous=None))
        model.double()
        randomise(model)
        model.depth = depth
        model(torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in gradients[1:]:
        for got, wanted in zip(other, gradients[0], strict=True):
            assert (got - wanted).abs().max() < 1e-14


@pytest.mark.parametrize(("shortcut", "num_previous"), SHORTCUTS)
def test_bf16_base_with_fp32_adapters(shortcut: str, num_previous: int | None) -> None:
    """No autocast: the factors are cast, x is not; gradients arrive in float32."""
    model = adapted("llama", shortcut, num_previous)
    base, blocks = reference_of("llama", model, shortcut, num_previous)
    loss_of(output("llama", base, inputs("llama"))).backward()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    out = output("llama", model, inputs("llama"))
    assert out.dtype is torch.bfloat16
    loss_of(out.double()).backward()
    got, wanted = [], []
    for name, layer in get_adapter(model).layers.items():
        for side in ("lora_A", "lora_B"):
            got.append(getattr(layer, side)["default"].weight.grad)
            wanted.append(getattr(blocks[name], side).grad)
            assert got[-1].dtype is torch.float32
    flat = [torch.cat([gradient.double().flatten() for gradient in side]) for side in (got, wanted)]
    assert nn.functional.cosine_similarity(*flat, dim=0) > 0.99


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_a_layer_called_by_itself_is_refused(shortcut: str) -> None:
    model = adapted("llama", shortcut, 1)
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.q_proj with shortcut .* ran outside a forward"):
        get_adapter(model).layers["model.layers.1.self_attn.q_proj"](torch.zeros(1, 2, 16, dtype=torch.float64))


@pytest.mark.parametrize("shortcut", ["none", "middle"])
def test_data_parallel_is_refused(shortcut: str) -> None:
    model = adapted("clip", shortcut, 1)
    model._is_replica = True  # what torch.nn.parallel.replicate writes on its copies
    get_adapter(model).root._is_replica = True
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        output("clip", model, inputs("clip"))


@pytest.mark.parametrize(("shortcut", "num_previous"), SHORTCUTS)
def test_threads_do_not_read_each_others_values(shortcut: str, num_previous: int | None) -> None:
    """A second thread begins in the middle of a forward, and the first goes on in the middle of that one."""
    model = adapted("llama", shortcut, num_previous)
    wanted = [output("llama", model, inputs("llama", seed=seed)).detach() for seed in (0, 1)]
    layers = list(get_adapter(model).layers.values())
    middle, waits = layers[len(layers) // 2], [threading.Event(), threading.Event()]
    got: list[object] = [None, None]

    def pause(module: nn.Module, args: tuple) -> None:
        first = threading.current_thread().name == "0"
        waits[0 if first else 1].set()
        waits[1 if first else 0].wait(20)

    def run(seed: int) -> None:
        try:
            got[seed] = output("llama", model, inputs("llama", seed=seed)).detach()
        except RuntimeError as error:
            got[seed] = error
        waits[seed].set()

    hook = middle.register_forward_pre_hook(pause)
    threads = [threading.Thread(target=run, args=(seed,), name=str(seed)) for seed in (0, 1)]
    threads[0].start()
    assert waits[0].wait(20)
    threads[1].start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert torch.equal(got[0], wanted[0])
    if get_adapter(model).path.crosses_layers:
        assert "two threads" in str(got[1])
    else:
        assert torch.equal(got[1], wanted[1])
    assert torch.equal(output("llama", model, inputs("llama", seed=1)), wanted[1])


class Overtaken(Packer):
    """Lets another thread's forward, with gradients, pack its factors before this one's are in their place."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def pack(self, *args: Any) -> dict[str, Packed]:
        found = super().pack(*args)
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                self.adapter.pack()
        return found


def test_factors_that_a_thread_packed_without_gradients_are_not_trained() -> None:
    model = adapted("llama", "block", 1)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    adapter = get_adapter(model)
    adapter.packer = Overtaken(adapter)
    with torch.no_grad():
        adapter.pack()
    assert adapter.packed
    layer, x = next(iter(adapter.adapted.values())), torch.zeros(1, 16, dtype=torch.bfloat16)
    assert layer.packed(x) is None
    assert all(factor.requires_grad for factors in layer.factors(x)[:2] for factor in factors)


@pytest.mark.parametrize(("shortcut", "num_previous"), SHORTCUTS)
def test_nothing_outlives_a_forward_that_ctrl_c_ends(shortcut: str, num_previous: int | None) -> None:
    """Torch calls no hooks then. Factors are packed over a base of bfloat16, and those of before must not be used."""
    model = adapted("llama", shortcut, num_previous)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    untouched, adapter = copy.deepcopy(model), get_adapter(model)
    before = output("llama", model, inputs("llama"))

    def interrupt(module: nn.Module, args: tuple) -> None:
        raise KeyboardInterrupt

    hook = list(adapter.layers.values())[-1].register_forward_pre_hook(interrupt)
    for seed in (1, 2):
        with contextlib.suppress(KeyboardInterrupt):
            output("llama", model, inputs("llama", seed=seed))
    hook.remove()
    for each in (model, untouched):  # factors with gates are not packed
        get_adapter(each).set_gates(dict.fromkeys(list(adapter.sites)[::2], 0.0))
    got, wanted = (output("llama", each, inputs("llama")) for each in (model, untouched))
    assert torch.equal(got, wanted)
    assert not torch.equal(got, before)
    assert (adapter.context.scope, adapter.context.outer) == (None, [])


@pytest.mark.slow
@pytest.mark.parametrize(("shortcut", "num_previous"), SHORTCUTS)
@pytest.mark.parametrize("name", ["unet", "llama"])
def test_compiles_whole_without_breaks(name: str, shortcut: str, num_previous: int | None) -> None:
    import torch._dynamo as dynamo

    dynamo.reset()
    model = adapted(name, shortcut, num_previous)
    args = inputs(name)
    wanted = output(name, model, args)
    compiled = torch.compile(lambda *args: output(name, model, args), backend="aot_eager", fullgraph=True)
    got = compiled(*args)
    assert (got - wanted).abs().max() < 1e-12
    loss_of(got).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss_of(output(name, model, args)).backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (gradients[key] - parameter.grad).abs().max() < 1e-11 * parameter.grad.abs().max().clamp_min(1)
    dynamo.reset()


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_cached_generation_equals_uncached(shortcut: str) -> None:
    model = adapted("llama", shortcut, 1)
    prompt = inputs("llama")[0]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(prompt, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, build("llama").generate(prompt, **settings))
