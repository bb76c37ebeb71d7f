"""Ranks that go: scores against the gradient of the dense weights, what is left against the file that is written."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from models import build, inputs, output
from reslora_diffusion import ResLoraConfig, attach, factor_pairs, get_adapter, merged_factors
from reslora_diffusion.core.attach import AdaptedModel
from reslora_diffusion.core.functional import LoraFactors
from reslora_diffusion.export import export_lora, export_peft
from reslora_diffusion.methods.optimizers import LoraRite
from reslora_diffusion.methods.schedules import Ranks
from reslora_diffusion.methods.schedules.ranks import without_zeros
from reslora_diffusion.utils.problems import BadInput
from schedule_free import AveragedSGD
from test_core_shortcuts import adapted, loss_of

STEPS = 6


class Training:
    def __init__(self, shortcut: str = "none", kind: str = "adamw", name: str = "llama", **settings: object) -> None:
        self.name, self.model = name, adapted(name, shortcut, 1)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if kind == "rite":
            self.optimizer: torch.optim.Optimizer = LoraRite(trained, factor_pairs(self.model), lr=1e-2)
        elif kind == "schedule-free":
            self.optimizer = AveragedSGD(trained, lr=1.0)
            self.optimizer.train()
        else:
            self.optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
        self.schedule = Ranks(**{"every": 1, **settings})
        self.schedule.start([AdaptedModel(self.model)], STEPS, self.optimizer)

    def run(self, first: int = 0, last: int = STEPS) -> list[int]:
        """How many ranks are gone after each step."""
        counts = []
        for step in range(first, last):
            self.schedule.before_step(step)
            loss_of(output(self.name, self.model, inputs(self.name, seed=step))).backward()
            self.schedule.after_backward(step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.after_step(step + 1)
            counts.append(sum(int(gone.sum()) for gone in self.schedule.gone.values()))
        return counts


def dense_gradients(factors: dict[str, LoraFactors], step: int) -> dict[str, Tensor]:
    """dL/dW at W + s B A of every layer."""
    plain = build("llama")
    for name, (A, B, scaling) in factors.items():
        layer = plain.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach() + scaling * B @ A)
    loss_of(output("llama", plain, inputs("llama", seed=step))).backward()
    return {name: plain.get_submodule(name).weight.grad for name in factors}


def test_scores_are_those_of_the_gradient_of_the_weights() -> None:
    training, wanted = Training(warmup=0.5, every=100), {}
    for step in range(3):
        factors = {
            name: LoraFactors(*map(Tensor.clone, f[:2]), f[2]) for name, f in merged_factors(training.model).items()
        }
        for name, G in dense_gradients(factors, step).items():
            A, B, s = factors[name]
            new = (B * (s * G @ A.T)).square().sum(0) + (A * (s * B.T @ G)).square().sum(1)
            wanted[name] = 0.9 * wanted.get(name, torch.zeros(3)) + 0.1 * new
        training.run(step, step + 1)
    for name, value in wanted.items():
        assert torch.allclose(training.schedule.scores[f"0.{name}"], value, rtol=1e-9, atol=0), name


@pytest.mark.parametrize("kind", ["adamw", "rite"])
@pytest.mark.parametrize("shortcut", ["none", "input", "block"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_ratio_is_reached_exactly_and_what_is_gone_stays_zero(shortcut: str, kind: str, whole: bool) -> None:
    """28 layers of rank 3: two ranks of each go, or 21 layers with all of theirs."""
    training = Training(shortcut, kind, ratio=0.75 if whole else 0.67, warmup=1 / 6, cooldown=1 / 6, whole=whole)
    assert training.run() == ([0, 36, 54, 60, 63, 63] if whole else [0, 28, 28, 28, 56, 56])
    adapter = get_adapter(training.model)
    for name in adapter.sites:
        A, B = adapter.factors(name)
        gone = training.schedule.gone[f"0.{name}"]
        assert not A[gone].any()
        assert not B[:, gone].any()
        assert A[~gone].any(1).all()
        assert int(gone.sum()) in ((0, 3) if whole else (2,))


def test_what_is_gone_is_gone_too_from_the_weights_that_a_schedule_free_optimizer_means() -> None:
    training = Training(kind="schedule-free", ratio=0.67, warmup=1 / 6, cooldown=1 / 6)
    training.run()
    training.optimizer.eval()
    assert all(len(found.lora_A) == 1 for found in without_zeros(merged_factors(training.model)).values())


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_gone_never_comes_back(whole: bool) -> None:
    training, before = Training(whole=whole), {}
    for step in range(STEPS):
        training.run(step, step + 1)
        now = training.schedule.gone
        assert all((gone & ~now[key]).sum() == 0 for key, gone in before.items())
        before = dict(now)


@pytest.mark.parametrize("shortcut", ["none", "block"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_written_lora_is_smaller_and_computes_the_same(tmp_path, shortcut: str, whole: bool) -> None:
    training = Training(shortcut, ratio=0.67, whole=whole)
    training.run()
    everything = merged_factors(training.model)
    factors = training.schedule.exported(everything)
    full = export_peft(tmp_path / "full", everything, dtype=torch.float32)
    small = export_peft(tmp_path / "small", factors, dtype=torch.float32)
    sizes = [report.files["peft"].stat().st_size for report in (full, small)]
    assert sizes[1] < 0.75 * sizes[0]
    if whole:
        assert len(factors) < len(everything)
    else:
        assert small.rank == (1 if shortcut == "none" else 2)
        assert full.rank == (3 if shortcut == "none" else 6)
    loaded = PeftModel.from_pretrained(build("llama").float(), tmp_path / "small").double()
    args = inputs("llama")
    assert torch.allclose(output("llama", loaded, args), output("llama", training.model, args), atol=1e-4)
    assert (output("llama", loaded, args) - output("llama", build("llama"), args)).abs().max() > 1e-2


def test_kohya_and_diffusers_files_are_smaller_too(tmp_path) -> None:
    training = Training(name="unet", ratio=0.67)
    training.run()
    factors = training.schedule.exported(merged_factors(training.model))
    report = export_lora(tmp_path, {"unet": factors}, name="x", dtype=torch.float32)
    assert report.files.keys() == {"diffusers", "kohya"}
    assert report.rank == 1


@pytest.mark.parametrize("at", [2, 5])
def test_a_resumed_run_continues_bit_for_bit(at: int) -> None:
    training = Training("block")
    training.run(0, at)
    values, moments = (copy.deepcopy(part.state_dict()) for part in (training.model, training.optimizer))
    state = training.schedule.state_dict()
    tensors = {name: tensor.clone() for name, tensor in training.schedule.tensors().items()}
    training.run(at)
    again = Training("block")
    again.schedule.load_state_dict(state)
    again.schedule.load_tensors(tensors)
    again.model.load_state_dict(values)
    again.optimizer.load_state_dict(moments)
    again.run(at)
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name
    for name, tensor in training.schedule.tensors().items():
        assert torch.equal(tensor, again.schedule.tensors()[name]), name


def test_ranks_of_convolutions_and_a_lora_that_is_all_zero() -> None:
    A, B = torch.randn(3, 4, 3, 3), torch.randn(5, 3, 1, 1)
    B[:, 1] = 0
    found = without_zeros({"conv": LoraFactors(A, B, 2.0)})["conv"]
    assert found.lora_A.shape == (2, 4, 3, 3)
    assert torch.equal(found.lora_B, B[:, [0, 2]])
    nothing = {"conv": LoraFactors(A, torch.zeros_like(B), 2.0)}
    assert without_zeros(nothing).keys() == {"conv"}


def test_what_does_not_go_with_it() -> None:
    with pytest.raises(BadInput, match="would go in all of them"):
        Training("middle")
    model = build("unet")
    attach(model, ResLoraConfig(r=2, target_modules=["to_q", "conv1"], shortcut="block"))
    with pytest.raises(BadInput, match="wanted linear layers alone"):
        Ranks().start([AdaptedModel(model)], STEPS)
    with pytest.raises(BadInput, match="ratio"):
        Ranks(ratio=1.0)
    with pytest.raises(BadInput, match="ratio=0.9 would take 3 of 3 ranks"):
        Training(ratio=0.9)
    with pytest.raises(BadInput, match="ratio=0.01 would take 0 of 28 adapters"):
        Training(ratio=0.01, whole=True)
    with pytest.raises(ValueError, match=r"ratio=0.25.*wanted the same"):
        Ranks(ratio=0.25).load_state_dict(Ranks().state_dict())
