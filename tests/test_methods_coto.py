"""CoTo: its draws, and training with it against the naive reference in float64, over several steps."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from models import build, inputs, output
from reference import adapt_naively
from reslora_diffusion import calibrate, explain_kernels, factor_pairs, get_adapter, merged_factors
from reslora_diffusion.core.attach import AdaptedModel
from reslora_diffusion.diffusion.models.attn_processor import set_attn_processors
from reslora_diffusion.methods.blocks import block_of
from reslora_diffusion.methods.optimizers import LoraPro, LoraRite
from reslora_diffusion.methods.schedules import Change, Coto
from test_core_shortcuts import adapted, factors_of, gradients, loss_of

CASES = [("none", 1), ("input", 1), ("block", 2), ("middle", 2), ("middle", None)]
STEPS, SEED = 8, 3
BATCHES = [inputs("llama", seed=n) for n in range(STEPS)]


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(
    model: nn.Module, schedule: Coto, optimizer: torch.optim.Optimizer, first: int = 0, last: int = STEPS
) -> None:
    for step in range(first, last):
        schedule.before_step(step)
        for part in BATCHES[step][0]:  # two micro-batches
            loss_of(output("llama", model, (part[None],))).backward()
        schedule.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
        assert schedule.after_step(step + 1) is Change.NOTHING


def by_hand(layers: list[str], step: int) -> dict[str, float]:
    """The gates of a step, from the documented draw: uniform numbers of (seed, step), one for each of 4 blocks."""
    p = 0.1 + 0.9 * min(1.0, step / (0.75 * STEPS))
    draw = np.random.default_rng([SEED, step])
    while not (is_open := draw.random(4) < p).any() and p < 1:
        pass
    return {name: float(is_open[int(name.split(".")[2])]) for name in layers}


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(("shortcut", "num_previous"), CASES)
def test_training_agrees_with_the_naive_reference(shortcut: str, num_previous: int | None, on_device: bool) -> None:
    model, base = adapted("llama", shortcut, num_previous), build("llama")
    blocks = adapt_naively(base, factors_of(model), shortcut, num_previous, lambda m: output("llama", m, BATCHES[0]))
    schedule = Coto(SEED, on_device=on_device)
    schedule.start([AdaptedModel(model)], STEPS)
    train(model, schedule, torch.optim.AdamW(parameters(model), lr=1e-2, weight_decay=0.1))

    optimizer = torch.optim.AdamW([p for b in blocks.values() for p in (b.lora_A, b.lora_B)], lr=1e-2, weight_decay=0.1)
    dropped = 0
    for step in range(STEPS):
        for name, gate in by_hand(list(blocks), step).items():
            blocks[name].gate = gate
        for part in BATCHES[step][0]:
            loss_of(output("llama", base, (part[None],))).backward()
        for block in blocks.values():
            if not block.gate:
                dropped += 1
                block.lora_A.grad = block.lora_B.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert dropped > len(blocks)
    for name, block in blocks.items():
        A, B = get_adapter(model).factors(name)
        assert (A - block.lora_A).abs().max() < 1e-9, name
        assert (B - block.lora_B).abs().max() < 1e-9, name


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16], ids=["carried wide", "carried at rank r"])
@pytest.mark.parametrize(("shortcut", "num_previous"), CASES)
def test_what_is_dropped_has_no_gradient_and_costs_no_product(
    shortcut: str, num_previous: int | None, precision: torch.dtype
) -> None:
    model = adapted("llama", shortcut, num_previous, lora_dropout=0.5 * (precision == torch.float64))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(precision if "lora_" not in name else torch.float64)
    model.train()
    schedule = Coto(SEED)
    schedule.start([AdaptedModel(model)], STEPS)
    schedule.before_step(1)
    loss_of(output("llama", model, BATCHES[1])).backward()
    closed = {name for name, gate in by_hand(list(get_adapter(model).sites), 1).items() if not gate}
    assert 0 < len(closed) < len(get_adapter(model).sites)
    for key, gradient in gradients(model).items():
        assert (gradient is None) == (key.rpartition(".")[0] in closed), key
    if shortcut != "block":  # where an open neighbour may be borrowed
        kernels = explain_kernels(model).layers
        assert {name for name, (kernel, _) in kernels.items() if kernel == "closed"} == closed
    assert not get_adapter(model).skipped


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_layers_that_are_computed_together_are_dropped_alike(shortcut: str) -> None:
    results = []
    for together in (False, True):
        model = adapted("unet", shortcut, 1).train()
        if together:
            set_attn_processors(model)
        model.enable_gradient_checkpointing()
        schedule = Coto(SEED, initial_p=0.5)
        schedule.start([AdaptedModel(model)], STEPS)
        schedule.before_step(0)
        loss_of(output("unet", model, inputs("unet"))).backward()
        results.append(gradients(model))
    assert any(gradient is None for gradient in results[0].values())
    for key, gradient in results[0].items():
        assert (gradient is None) == (results[1][key] is None), key
        if gradient is not None:
            assert (results[1][key] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), key


def test_probabilities_rise_and_draws_are_those_of_blocks() -> None:
    model = adapted("llama", "block", 1)
    schedule, total = Coto(seed=7), 400
    schedule.start([AdaptedModel(model)], total)
    assert [schedule.probability(step) for step in (0, 150, 300, 400)] == pytest.approx([0.1, 0.55, 1, 1])
    assert [len(layers) for layers in schedule.groups.values()] == [7] * 4
    draws = [schedule.draw(step) for step in range(total)]
    assert all(len(closed) < 4 for closed in draws)
    assert not any(draws[300:])
    assert draws == [schedule.draw(step) for step in range(total)]
    share = 1 - sum(map(len, draws[200:300])) / 400
    assert 0.75 < share < 0.95  # 0.85 on average
    other = Coto(seed=8)
    other.start([AdaptedModel(model)], total)
    assert other.draw(20) != schedule.draw(20) or other.draw(21) != schedule.draw(21)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("encoder.block.3.layer.0.SelfAttention.q", "encoder.block.3"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_out.0",
            "down_blocks.1.attentions.0.transformer_blocks.2",
        ),
        ("down_blocks.1.attentions.0.proj_in", "down_blocks.1.attentions.0"),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.2", "mid_block.attentions.0.transformer_blocks.0"),
        ("single_transformer_blocks.5.attn.to_q", "single_transformer_blocks.5"),
        ("model.layers.1.mlp.experts.7.up_proj", "model.layers.1"),
        ("lm_head", "lm_head"),
        ("0", "0"),
    ],
)
def test_the_block_of_a_layer(name: str, block: str) -> None:
    assert block_of(name) == block


def test_outside_of_steps_every_block_is_open() -> None:
    model = adapted("llama", "middle", 1)
    whole = output("llama", model, BATCHES[0])
    calibrate(model, BATCHES[:2], lambda m, batch: output("llama", m, batch))
    wanted = merged_factors(model)
    schedule = Coto(SEED)
    schedule.start([AdaptedModel(model)], STEPS)
    schedule.before_step(0)
    assert (output("llama", model, BATCHES[0]) - whole).abs().max() > 1e-3
    with schedule.evaluation():
        assert torch.equal(output("llama", model, BATCHES[0]), whole)
    assert (output("llama", model, BATCHES[0]) - whole).abs().max() > 1e-3
    calibrate(model, BATCHES[:2], lambda m, batch: output("llama", m, batch))  # in the middle of a step
    for name, factors in merged_factors(model).items():
        assert torch.equal(factors.lora_A, wanted[name].lora_A)
    assert (output("llama", model, BATCHES[0]) - whole).abs().max() > 1e-3
    schedule.after_step(1)
    assert torch.equal(output("llama", model, BATCHES[0]), whole)


@pytest.mark.parametrize("kind", ["adamw", "rite", "pro"])
def test_a_resumed_run_continues_bit_for_bit(kind: str) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, Coto]:
        model = adapted("llama", "block", 1)
        pairs = factor_pairs(model)
        make = {"rite": LoraRite, "pro": LoraPro}.get(kind)
        optimizer = make(parameters(model), pairs, lr=1e-2) if make else torch.optim.AdamW(parameters(model), lr=1e-2)
        schedule = Coto(SEED)
        schedule.start([AdaptedModel(model)], STEPS)
        return model, optimizer, schedule

    model, optimizer, schedule = fresh()
    train(model, schedule, optimizer, 0, 3)
    values, moments, state = (copy.deepcopy(part.state_dict()) for part in (model, optimizer, schedule))
    train(model, schedule, optimizer, 3)
    again, its_optimizer, its_schedule = fresh()
    its_schedule.load_state_dict(state)
    again.load_state_dict(values)
    its_optimizer.load_state_dict(moments)
    train(again, its_schedule, its_optimizer, 3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert parameter.isfinite().all()
    assert any((p != values[name]).any() for name, p in model.named_parameters())


def test_another_schedule_is_not_continued() -> None:
    with pytest.raises(ValueError, match="was trained with .*'folded': True.*wanted the same"):
        Coto(1).load_state_dict({"folded": True})
    with pytest.raises(ValueError, match="initial_p: got 1.5, wanted a number above 0 and below 1"):
        Coto(initial_p=1.5)


@pytest.mark.slow
def test_compiled_training_recompiles_nothing() -> None:
    import torch._dynamo as dynamo

    dynamo.reset()
    model = adapted("llama", "block", 1)
    schedule = Coto(SEED, on_device=True)
    schedule.start([AdaptedModel(model)], STEPS)
    frames: list[int] = []

    def backend(graph: nn.Module, examples: list) -> nn.Module:
        frames.append(1)
        return graph

    compiled = torch.compile(lambda *args: output("llama", model, args), backend=backend)
    seen = []
    for step in range(STEPS):
        schedule.before_step(step)
        seen.append(compiled(*BATCHES[0]))
        assert torch.allclose(seen[-1], output("llama", model, BATCHES[0]), atol=1e-12)
        schedule.after_step(step + 1)
    assert len(frames) == 1
    assert len({out.sum().item() for out in seen}) > 2
    dynamo.reset()
