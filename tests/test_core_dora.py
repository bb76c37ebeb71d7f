"""DoRA on the core: against a float64 reference written from the paper, and against PEFT's own."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dora_reference import decompose_naively, decomposed
from llm_tiny import batch
from llm_tiny import build as build_llm
from models import TARGETS, build, inputs, output, randomise
from reslora_diffusion import (
    ResLoraConfig,
    attach,
    explain,
    get_adapter,
    merged_factors,
    merged_forward,
    merged_state_dict,
)
from reslora_diffusion.core.attach import AdaptedModel
from reslora_diffusion.core.dora import decomposed_weight, row_norms
from reslora_diffusion.core.merging.fold import handover
from reslora_diffusion.methods.schedules import Coto, Restart

CASES = [("none", 1), ("block", 1), ("block", None)]


def config(name: str, shortcut: str = "none", num_previous: int | None = 1, **options: object) -> ResLoraConfig:
    options = {"target_modules": TARGETS[name]} | options
    return ResLoraConfig(r=3, lora_alpha=6, use_dora=True, shortcut=shortcut, num_previous=num_previous, **options)


def with_dora(name: str, shortcut: str = "none", num_previous: int | None = 1, **options: object) -> nn.Module:
    model = build(name)
    attach(model, config(name, shortcut, num_previous, **options))
    model.double()
    randomise(model)
    stretch(model)
    return model


@torch.no_grad()
def stretch(model: nn.Module, adapter_name: str = "default", seed: int = 3) -> None:
    """Magnitudes near those of a fresh adapter: what `randomise` has put there is no length."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if adapter_name in getattr(module, "lora_magnitude_vector", {}):
            m = module.lora_magnitude_vector[adapter_name].weight
            base = module.get_base_layer().weight
            fresh = base.flatten(1).norm(dim=1).reshape(m.shape)
            m.copy_(fresh * (1 + 0.2 * torch.randn(m.shape, generator=generator)))


def given(model: nn.Module) -> dict[str, tuple]:
    controller = get_adapter(model)
    return {
        name: (
            *controller.factors(name),
            layer.scaling["default"],
            layer.lora_magnitude_vector["default"].weight,
        )
        for name, layer in controller.layers.items()
    }


def loss_of(y: Tensor) -> Tensor:
    return y.square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def reference(name: str, model: nn.Module) -> tuple[nn.Module, dict]:
    base = build(name)
    return base, decompose_naively(base, given(model), get_adapter(model).windows)


@pytest.mark.parametrize(("shortcut", "num_previous"), CASES)
@pytest.mark.parametrize("name", ["llama", "unet", "clip"])
def test_three_steps_are_those_of_the_paper(name: str, shortcut: str, num_previous: int | None) -> None:
    model = with_dora(name, shortcut, num_previous)
    naive, layers = reference(name, model)
    assert (output(name, model, inputs(name)) - output(name, build(name), inputs(name))).abs().max() > 1e-3
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    theirs = torch.optim.AdamW([p for p in naive.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for step in range(3):
        got, wanted = (output(name, m, inputs(name, seed=step)) for m in (model, naive))
        assert torch.allclose(got, wanted, atol=1e-10), step
        for y, optimizer in ((got, ours), (wanted, theirs)):
            optimizer.zero_grad()
            loss_of(y).backward()
        for path, layer in get_adapter(model).layers.items():
            for side, grad in (
                (layer.lora_A, layers[path].lora_A.grad),
                (layer.lora_B, layers[path].lora_B.grad),
                (layer.lora_magnitude_vector, layers[path].magnitude.grad),
            ):
                error = (side["default"].weight.grad - grad).norm()
                assert error <= 1e-9 * grad.norm() + 1e-12, (path, step)
        ours.step()
        theirs.step()


def peft_twin(name: str, model: nn.Module, **options: object) -> nn.Module:
    """The same DoRA by PEFT alone."""
    twin = build(name)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, use_dora=True, **options), twin)
    twin.double()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    return twin


UNET_CONVOLUTIONS = ["to_q", "to_v", "conv1", "conv_shortcut", "proj_in"]


@pytest.mark.parametrize(("name", "targets"), [("llama", TARGETS["llama"]), ("unet", UNET_CONVOLUTIONS)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_same_numbers_as_peft(name: str, targets: list[str], dropout: float) -> None:
    options = {"target_modules": targets, "lora_dropout": dropout}
    model = with_dora(name, **options)
    twin = peft_twin(name, model, **options)
    model.train(), twin.train()
    found = []
    for one in (model, twin):
        torch.manual_seed(5)
        y = output(name, one, inputs(name))
        loss_of(y).backward()
        found.append(y)
    assert torch.allclose(*found, atol=1e-10)
    grads, wanted = gradients(model), gradients(twin)
    assert grads.keys() == wanted.keys()
    assert any("magnitude" in key for key in grads)
    for key, grad in grads.items():
        assert torch.allclose(grad, wanted[key], atol=1e-10), key


def test_adapters_that_are_switched_and_stacked_are_peft_s_too() -> None:
    """Two adapters, one after the other and both at once; disabled; merged and unmerged, in either order."""
    models = []
    for kind in (ResLoraConfig, LoraConfig):
        more = {"shortcut": "none"} if kind is ResLoraConfig else {}
        settings = kind(r=3, lora_alpha=6, use_dora=True, target_modules=TARGETS["llama"], **more)
        model = get_peft_model(build("llama"), settings)
        model.add_adapter("other", settings)
        models.append(model.double())
    ours, theirs = models
    randomise(ours)
    stretch(ours)
    stretch(ours, "other", seed=4)
    theirs.load_state_dict(ours.state_dict())
    args = inputs("llama")
    base = output("llama", build("llama"), args)
    seen = {}
    for active in (["default"], ["other"], ["default", "other"]):
        for model in models:
            model.base_model.set_adapter(active)
        got, wanted = output("llama", ours, args), output("llama", theirs, args)
        assert torch.allclose(got, wanted, atol=1e-10), active
        assert (got - base).abs().max() > 1e-3
        seen[tuple(active)] = got
        for safe in (False, True):
            ours.merge_adapter(safe_merge=safe)
            assert torch.allclose(output("llama", ours, args), got, atol=1e-9), active
            ours.unmerge_adapter()
            assert torch.allclose(output("llama", ours, args), got, atol=1e-9), active
    assert (seen["default",] - seen["other",]).abs().max() > 1e-3
    with ours.disable_adapter():
        assert torch.equal(output("llama", ours, args), base)
    ours.base_model.set_adapter(["default"])
    merged = ours.merge_and_unload()
    assert torch.allclose(output("llama", merged, args), seen["default",], atol=1e-9)


@pytest.mark.parametrize(("shortcut", "num_previous"), CASES)
def test_merged_factors_are_a_dora_of_the_whole_window(shortcut: str, num_previous: int | None) -> None:
    model = with_dora("llama", shortcut, num_previous)
    args = inputs("llama")
    trained = output("llama", model, args)
    with merged_forward(model):
        assert torch.allclose(output("llama", model, args), trained, atol=1e-10)
    plain, loaded = build("llama"), build("llama")
    factors = merged_factors(model)
    for name, f in factors.items():
        weight = plain.get_submodule(name).weight
        W = decomposed(weight, f.lora_A, f.lora_B, f.scaling, f.magnitude.values)
        assert torch.allclose(decomposed_weight(weight, f), W, atol=1e-12)
        weight.data.copy_(W)
    assert torch.allclose(output("llama", plain, args), trained, atol=1e-10)
    rank = max(len(f.lora_A) for f in factors.values())
    assert rank == {"none": 3, "block": 6 if num_previous else 12}[shortcut]
    settings = LoraConfig(r=rank, lora_alpha=rank, use_dora=True, target_modules=TARGETS["llama"])
    inject_adapter_in_model(settings, loaded, state_dict=None)
    state = {
        k.replace("lora_magnitude_vector", "lora_magnitude_vector.default"): v
        for k, v in merged_state_dict(model).items()
    }
    state = {
        k.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): v for k, v in state.items()
    }
    state = {k + (".weight" if k.endswith("vector.default") else ""): v for k, v in state.items()}
    _, unexpected = loaded.double().load_state_dict(state, strict=False)
    assert not unexpected
    assert torch.allclose(output("llama", loaded, args), trained, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_training_starts_at_the_base(shortcut: str, dtype: torch.dtype) -> None:
    """PEFT takes the magnitudes in the base's precision, which moves a bfloat16 model at once."""
    for name, targets in (("llama", TARGETS["llama"]), ("unet", UNET_CONVOLUTIONS)):
        model = build(name).to(dtype)
        args = [a.to(dtype) if a.is_floating_point() else a for a in inputs(name)]
        base = output(name, model, args)
        attach(model, config(name, shortcut, target_modules=targets))
        for key, parameter in model.named_parameters():
            assert "magnitude" not in key or parameter.dtype == torch.float32
        layers = [m for m in model.modules() if "default" in getattr(m, "lora_magnitude_vector", {})]
        assert layers
        for layer in layers:
            m = layer.lora_magnitude_vector["default"].weight.flatten()
            norms = layer.get_base_layer().weight.double().flatten(1).norm(dim=1)
            assert torch.allclose(m.double(), norms, rtol=1e-6)
        if name == "llama":
            assert torch.equal(output(name, model, args), base)


def test_bfloat16_keeps_what_a_magnitude_of_float32_says() -> None:
    """1.001 and 0.999 are 1 in bfloat16: the product is taken in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    attach(model, ResLoraConfig(r=2, target_modules=["0"], shortcut="none", use_dora=True))
    x, base = torch.randn(512, 64).bfloat16(), model[0].get_base_layer()
    with torch.no_grad():
        model[0].lora_magnitude_vector["default"].weight.mul_(1.003)
    got = (model(x).double() / base(x).double()).median()
    assert 1.001 < got < 1.005
    for dtype in (torch.float32, torch.bfloat16):
        whole = nn.Sequential(nn.Linear(64, 64))
        attach(whole, ResLoraConfig(r=2, target_modules=["0"], shortcut="none", use_dora=True))
        with torch.autocast("cpu", torch.bfloat16):
            y = whole.to(dtype)(x.to(dtype))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert whole[0].lora_magnitude_vector["default"].weight.grad.any()


@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_checkpointing_changes_no_gradient(shortcut: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = with_dora("llama", shortcut, lora_dropout=0.2).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(9)
        loss_of(output("llama", model, inputs("llama"))).backward()
        found.append(gradients(model))
    for key, grad in found[0].items():
        assert torch.allclose(grad, found[1][key], atol=1e-12), key


def test_what_was_saved_is_loaded(tmp_path) -> None:
    model = get_peft_model(build("llama"), config("llama", "block")).double()
    randomise(model)
    stretch(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).double()
    assert get_adapter(loaded).dora
    args = inputs("llama")
    assert torch.allclose(output("llama", loaded, args), output("llama", model, args), atol=1e-5)
    copied = copy.deepcopy(model)
    assert torch.equal(output("llama", copied, args), output("llama", model, args))


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else [found]:
            if isinstance(value, Tensor) and not any(
                value.data_ptr() == a.data_ptr() for a in args if torch.is_tensor(a)
            ):
                self.size = max(self.size, value.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_make_no_matrix_as_large_as_the_weight(dtype: torch.dtype) -> None:
    out, width = 2048, 1024
    torch.manual_seed(0)
    W, A, B = torch.randn(out, width).to(dtype), torch.randn(4, width), torch.randn(out, 4)
    with Largest() as seen:
        got = row_norms(W, [A, A], [B, -0.5 * B], [2.0, torch.tensor(1.0)])
    assert seen.size < out * width
    V = W.double() + 2.0 * B.double() @ A.double() - 0.5 * B.double() @ A.double()
    assert torch.allclose(got.double(), V.norm(dim=1), rtol=1e-5)


def test_a_row_of_zeros_is_finite() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1] = 0
    attach(model, ResLoraConfig(r=2, target_modules=["0"], shortcut="none", use_dora=True))
    for _ in range(2):
        y = model(torch.ones(2, 4))
        y.square().sum().backward()
        assert y.isfinite().all()
        for p in model.parameters():
            assert p.grad is None or p.grad.isfinite().all()
        with torch.no_grad():
            model[0].lora_B["default"].weight.add_(0.1)


def test_a_closed_block_leaves_rows_as_long_as_they_are() -> None:
    """A gate of a number and one on the device: nothing of the block, and no gradient for its magnitude."""
    args = inputs("llama")
    base = output("llama", build("llama"), args)
    for gate in (0.0, torch.zeros(())):
        model = with_dora("llama")
        get_adapter(model).set_gates(dict.fromkeys(get_adapter(model).sites, gate))
        assert torch.allclose(output("llama", model, args), base, atol=1e-12)


@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_links_of_a_chain_are_part_of_the_direction(shortcut: str) -> None:
    """A knot keeps the function; the merge is one DoRA of the sum of the ranks."""
    model = with_dora("llama", shortcut)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = Restart(stages=2, momentum=0.5)
    schedule.start([AdaptedModel(model)], 3, optimizer)
    args = inputs("llama")
    loss_of(output("llama", model, args)).backward()
    optimizer.step()
    before = output("llama", model, args)
    schedule.after_step(2)
    after = output("llama", model, args)
    assert torch.allclose(before, after, atol=1e-10)
    assert not any("magnitude" in name and optimizer.state.get(p) for name, p in model.named_parameters())
    plain = build("llama")
    for name, f in merged_factors(model).items():
        weight = plain.get_submodule(name).weight
        weight.data.copy_(decomposed(weight, f.lora_A, f.lora_B, f.scaling, f.magnitude.values))
    assert torch.allclose(output("llama", plain, args), after, atol=1e-10)


def test_dropped_blocks_keep_their_magnitudes() -> None:
    """CoTo: no gradient, no decay, for what was closed."""
    for on_device in (False, True):
        model = with_dora("llama")
        schedule = Coto(seed=3, on_device=on_device)
        schedule.start([AdaptedModel(model)], 10)
        schedule.before_step(0)
        loss_of(output("llama", model, inputs("llama"))).backward()
        schedule.after_backward(0)
        closed = [name for number, block in schedule.closed for name in schedule.groups[number, block]]
        assert closed
        for name, layer in get_adapter(model).layers.items():
            m = layer.lora_magnitude_vector["default"].weight
            assert (m.grad is None) == (name in closed), name


def test_a_handover_of_block_is_the_same_dora_at_the_rank_of_the_window() -> None:
    model, args = with_dora("llama", "block"), inputs("llama")
    before = output("llama", model, args)
    handover(model)
    assert torch.allclose(output("llama", model, args), before, atol=1e-12)
    assert {len(f.lora_A) for f in merged_factors(model).values()} == {3, 6}


def test_weights_that_lie_on_their_side() -> None:
    """GPT-2's Conv1D, [in, out]: starts at the base, merges and unmerges."""
    base = build_llm("gpt2")
    args = batch("gpt2")
    plain = base(**args).logits
    settings = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "shortcut": "block"}
    model = get_peft_model(base, ResLoraConfig(r=3, use_dora=True, **settings)).eval()
    assert torch.equal(model(**args).logits, plain)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * noise)
            elif "lora_" in name:
                parameter.copy_(0.2 * noise)
    trained = model(**args).logits
    assert (trained - plain).abs().max() > 1e-2
    model.merge_adapter()
    assert torch.allclose(model(**args).logits, trained, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(model(**args).logits, trained, atol=1e-5)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_what_crosses_layers_is_refused(shortcut: str) -> None:
    with pytest.raises(ValueError, match="use_dora: DoRA takes norms of W \\+ B A"):
        config("llama", shortcut)
    assert config("llama", shortcut, 0).use_dora


def test_magnitudes_have_no_weighted_sum() -> None:
    model = get_peft_model(build("llama"), config("llama"))
    model.add_adapter("other", config("llama"))
    with pytest.raises(ValueError, match="DoRA, whose magnitudes have no weighted sum"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")


def test_compiled() -> None:
    model = with_dora("llama", "block")
    args = inputs("llama")
    wanted = output("llama", model, args)
    compiled = torch.compile(model, backend="eager")
    got = output("llama", compiled, args)
    assert torch.allclose(got, wanted, atol=1e-10)
    assert explain(model).shortcut == "block"
