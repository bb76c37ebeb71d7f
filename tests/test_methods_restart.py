"""Chains of links: training against a reference in float64 that merges each link into W, and what is saved of them."""

import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from models import LLAMA_TARGETS, build, inputs, output, randomise
from reference import adapt_naively
from reslora_diffusion import (
    ResLoraConfig,
    attach,
    factor_pairs,
    get_adapter,
    merged_factors,
    merged_forward,
    merged_state_dict,
)
from reslora_diffusion.core.attach import AdaptedModel
from reslora_diffusion.methods.optimizers import LoraPro, LoraRite
from reslora_diffusion.methods.schedules import Change, Restart
from reslora_diffusion.methods.schedules.base import follow_learning_rate
from test_core_shortcuts import adapted, factors_of, loss_of

STEPS, SEED, LR = 9, 5, 1e-2
BATCHES = [inputs("llama", seed=n) for n in range(STEPS)]
TIED = Change.PARAMETERS | Change.OPTIMIZER_STATE | Change.LEARNING_RATE
OPTIMIZERS = {"rite": LoraRite, "pro": LoraPro}


def decay(step: int) -> float:
    return 1 - step / STEPS


class Training:
    """A model with its optimizer, learning rate and schedule."""

    def __init__(self, shortcut: str = "none", m: int = 1, kind: str = "adamw", **settings: object) -> None:
        self.model = adapted("llama", shortcut, m)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if kind in OPTIMIZERS:
            self.optimizer = OPTIMIZERS[kind](parameters, factor_pairs(self.model), lr=LR)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=LR)
        self.schedule = Restart(**{"stages": 3, "warmup": 1, "seed": SEED, **settings})
        self.schedule.start([AdaptedModel(self.model)], STEPS, self.optimizer)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, decay)
        follow_learning_rate(self.schedule, self.rates)

    def run(self, first: int = 0, last: int = STEPS) -> list[Change]:
        changes = []
        for step in range(first, last):
            self.schedule.before_step(step)
            loss_of(output("llama", self.model, BATCHES[step])).backward()
            self.schedule.after_backward(step)
            self.optimizer.step()
            self.rates.step()
            self.optimizer.zero_grad()
            changes.append(self.schedule.after_step(step + 1))
        return changes


def fresh_A(link: int, place: int, A: Tensor) -> Tensor:
    """The documented start of a link: uniform in +-1/sqrt(in), from (seed, link, adapter, layer)."""
    seed = np.random.SeedSequence([SEED, link, 0, place]).generate_state(1, np.uint64)[0] >> 1
    bound = 1 / math.sqrt(A.shape[1])
    return torch.empty(A.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(int(seed)))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.25])
@pytest.mark.parametrize(("shortcut", "m"), [("none", 1), ("block", 2)])
def test_training_agrees_with_a_reference_that_merges_into_the_base(
    shortcut: str, m: int, momentum: float, merge: bool
) -> None:
    training, base = Training(shortcut, m, momentum=momentum, merge=merge), build("llama")
    blocks = adapt_naively(base, factors_of(training.model), shortcut, m, lambda m: output("llama", m, BATCHES[0]))
    untouched = output("llama", build("llama"), BATCHES[0])
    assert training.run() == [TIED if step in (3, 6) else Change.NOTHING for step in range(1, STEPS + 1)]

    for link in range(3):
        optimizer = torch.optim.AdamW([p for b in blocks.values() for p in (b.lora_A, b.lora_B)], lr=LR)
        for step in range(3):
            risen = (step + 1) / 2 if link and step == 0 else 1
            optimizer.param_groups[0]["lr"] = LR * risen * decay(3 * step)
            loss_of(output("llama", base, BATCHES[3 * link + step])).backward()
            optimizer.step()
            optimizer.zero_grad()
        if link == 2:
            break
        with torch.no_grad():
            shares = {name: (1 - momentum) * block.lora_B @ block.lora_A for name, block in blocks.items()}
            of = {block: name for name, block in blocks.items()}
            for place, block in enumerate(blocks.values()):
                for other in (block, *block.previous):
                    block.base.weight += block.scaling * shares[of[other]]
                block.lora_B *= momentum
                if not momentum:
                    block.lora_A.copy_(fresh_A(link + 1, place, block.lora_A))

    got, wanted = output("llama", training.model, BATCHES[0]), output("llama", base, BATCHES[0])
    assert (got - untouched).abs().max() > 1e-3
    assert (got - wanted).abs().max() < 1e-9
    for name, block in blocks.items():
        for own, reference in zip(get_adapter(training.model).factors(name), (block.lora_A, block.lora_B), strict=True):
            assert (own - reference).abs().max() < 1e-9, name
    with merged_forward(training.model):
        assert torch.allclose(output("llama", training.model, BATCHES[0]), got, atol=1e-10)
    plain = build("llama")
    for name, (A, B, scaling) in training.schedule.exported(merged_factors(training.model)).items():
        plain.get_submodule(name).weight.data += scaling * B @ A
    assert torch.allclose(output("llama", plain, BATCHES[0]), got, atol=1e-10)
    training.schedule.finish()
    assert torch.allclose(output("llama", training.model, BATCHES[0]), got, atol=1e-10)
    for name in get_adapter(training.model).sites:
        own = training.model.get_submodule(name).base_layer.weight
        assert torch.equal(own, build("llama").get_submodule(name).weight), name
    assert {len(links) for links in get_adapter(training.model).frozen.values()} == {2}


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_knot_leaves_the_function_as_it_is(momentum: float) -> None:
    training = Training("block", 1, momentum=momentum)
    training.run(0, 2)
    model = training.model
    before = output("llama", model, BATCHES[0])
    A = {name: pair[0].clone() for name, pair in factors_of(model).items()} if momentum else {}
    training.schedule.tie()
    assert (output("llama", model, BATCHES[0]) - before).abs().max() < 1e-11
    assert not training.optimizer.state
    assert all(torch.equal(get_adapter(model).factors(name)[0], own) for name, own in A.items())


@pytest.mark.parametrize("kind", ["adamw", "rite", "pro"])
@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_ranks_step_down_and_the_export_is_the_sum_of_the_links(shortcut: str, kind: str) -> None:
    training = Training(shortcut, 1, kind, stages=None, ranks=[3, 2, 1])
    training.run()
    model = training.model
    adapter = get_adapter(model)
    scalings = {layer.scaling["default"] for layer in adapter.layers.values()}
    assert scalings == {2.0}
    assert {len(adapter.factors(name)[0]) for name in adapter.sites} == {1}
    assert {len(group["params"]) for group in training.optimizer.param_groups} == {2 * len(adapter.sites)}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    factors = merged_factors(model)
    assert max(len(f.lora_A) for f in factors.values()) == (6 if shortcut == "none" else 12)
    plain = build("llama")
    for name, (A, B, scaling) in factors.items():
        plain.get_submodule(name).weight.data += scaling * B @ A
    out = output("llama", model, BATCHES[0])
    assert torch.allclose(output("llama", plain, BATCHES[0]), out, atol=1e-10)
    assert (out - output("llama", build("llama"), BATCHES[0])).abs().max() > 1e-3
    assert merged_state_dict(model)


@pytest.mark.parametrize("at", [2, 3, 4, 6])  # 3 and 6 are knots
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("adamw", {"momentum": 0.5}),
        ("adamw", {"stages": None, "ranks": [3, 2, 1]}),
        ("rite", {}),
        ("rite", {"merge": True, "momentum": 0.5}),
    ],
)
def test_a_resumed_run_continues_bit_for_bit(at: int, kind: str, settings: dict) -> None:
    training = Training("block", 1, kind, **settings)
    training.run(0, at)
    schedule = training.schedule
    values, moments, rates = (
        copy.deepcopy(part.state_dict()) for part in (training.model, training.optimizer, training.rates)
    )
    state, tensors = schedule.state_dict(), {name: t.clone() for name, t in schedule.tensors().items()}
    training.run(at)

    again = Training("block", 1, kind, **settings)
    again.schedule.load_state_dict(state)
    again.model.load_state_dict({name: value for name, value in values.items() if "lora_" in name}, strict=False)
    again.schedule.load_tensors(tensors)
    again.optimizer.load_state_dict(moments)
    again.rates.load_state_dict(rates)
    again.run(at)
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name
    for name, tensor in training.schedule.tensors().items():
        assert torch.equal(tensor, again.schedule.tensors()[name]), name


def test_the_learning_rate_begins_again() -> None:
    schedule = Restart(stages=2, warmup=2)
    schedule.start([AdaptedModel(adapted("llama", "none", 1))], 10)
    rate = schedule.learning_rate(lambda step: 1 - step / 10)
    assert [rate(step) for step in range(10)] == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2, 1 / 3, 2 / 3 * 0.8, 0.6, 0.4, 0.2]
    )
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1))
    with pytest.raises(ValueError, match="ReduceLROnPlateau cannot be restarted"):
        follow_learning_rate(schedule, plateau)


@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_links_are_saved_and_loaded_with_the_adapter(shortcut: str, tmp_path) -> None:
    config = ResLoraConfig(r=3, lora_alpha=6, target_modules=LLAMA_TARGETS, shortcut=shortcut)
    model = get_peft_model(build("llama"), config).double().eval()
    randomise(model)
    schedule = Restart(ranks=[3, 2], seed=SEED)
    schedule.start([AdaptedModel(model)], 3)
    schedule.after_step(2)
    randomise(model, seed=2)
    wanted = output("llama", model, BATCHES[0])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path).double().eval()
    assert (output("llama", again, BATCHES[0]) - wanted).abs().max() < 1e-5  # PEFT loads in float32
    assert {len(links) for links in get_adapter(again).frozen.values()} == {1}
    assert not get_adapter(again).is_plain
    other = get_peft_model(build("llama"), config)
    attach_problem = "have frozen factors beside those that are trained"
    model.add_adapter("other", config)
    with pytest.raises(ValueError, match=attach_problem):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="cat")
    assert not get_adapter(other).frozen


def test_what_does_not_go_with_a_restart_is_refused() -> None:
    for shortcut in ("input", "middle"):
        with pytest.raises(ValueError, match=f"what `{shortcut}` makes of it depends on activations"):
            Restart().start([AdaptedModel(adapted("llama", shortcut, 1))], 9)
    with pytest.raises(ValueError, match=r"ranks begin with 8, and the adapter has \[3\].*\n.* 2 stages in 1 steps"):
        Restart(ranks=[8, 4]).start([AdaptedModel(adapted("llama", "none", 1))], 1)
    with pytest.raises(ValueError, match="got 3 stages in 3 steps, wanted more steps than stages"):
        Restart().start([AdaptedModel(adapted("llama", "none", 1))], 3)
    model = build("unet")
    attach(model, ResLoraConfig(r=2, target_modules=["to_q", "conv1"], shortcut="block"))
    with pytest.raises(ValueError, match="wanted linear layers alone"):
        Restart().start([AdaptedModel(model)], 9)
    with pytest.raises(ValueError, match=r"got .*restart:stages=2.*wanted the same"):
        Restart(stages=2).load_state_dict(Restart(stages=3).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_16_bits_takes_no_links_in(dtype: torch.dtype) -> None:
    model = adapted("llama", "none", 1)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if "lora_" in name else parameter.data.to(dtype)
    with pytest.raises(ValueError, match="which would round them away"):
        Restart(merge=True).start([AdaptedModel(model)], 9)
    Restart().start([AdaptedModel(model)], 9)


def test_links_are_not_added_to_a_weight_that_the_embedding_uses_too() -> None:
    model = get_peft_model(build("llama"), ResLoraConfig(r=2, shortcut="none", target_modules=["q_proj", "lm_head"]))
    base = model.get_base_model()
    base.lm_head.base_layer.weight = base.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"shares its weight with .*lm_head"):
        Restart(merge=True).start([AdaptedModel(model)], 9)
    Restart().start([AdaptedModel(model)], 9)


def test_an_unlinked_lora_is_no_adapter_of_ours() -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=LLAMA_TARGETS))
    with pytest.raises(ValueError, match="has no ResLoRA adapter"):
        Restart().start([AdaptedModel(model)], 9)
