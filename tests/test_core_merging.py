"""Merges against their formulas written out in float64, and what they lose; handover in the middle of training."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from models import LLAMA_TARGETS, UNET_TARGETS, build, inputs, output, randomise
from reslora_diffusion import (
    ResLoraConfig,
    attach,
    calibrate,
    distill,
    explain,
    get_adapter,
    handover,
    merge_report,
    merged_factors,
    merged_forward,
    relative_output_errors,
)
from reslora_diffusion.core.merging import calibrate as calibration
from reslora_diffusion.core.merging.corrections import RIDGE, least_squares_correction
from reslora_diffusion.core.merging.statistics import Moments
from schedule_free import AveragedSGD

BATCHES = [inputs("llama", batch=4, seed=n) for n in range(6)]
HELD_OUT = [inputs("llama", batch=4, seed=n) for n in range(100, 103)]


def forward(model: nn.Module, batch: tuple) -> torch.Tensor:
    return model(*batch)[0]


def adapted(shortcut: str, method: str = "least_squares", num_previous: int | None = 1, **options: object) -> nn.Module:
    model = build("llama")
    attach(
        model,
        ResLoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=LLAMA_TARGETS,
            shortcut=shortcut,
            num_previous=num_previous,
            merge_method=method,
            **options,
        ),
    )
    model.double().eval()
    randomise(model, size=0.15)
    return model


def recorded(model: nn.Module, batches: list) -> dict[str, list[torch.Tensor]]:
    """Inputs of every adapted layer, [T, in] per batch."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in get_adapter(model).layers}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].flatten(0, 1)))
        for name, layer in get_adapter(model).layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)
    for hook in hooks:
        hook.remove()
    return seen


def neighbour(name: str, back: int = 1) -> str:
    layer = int(name.split(".")[2])
    return name.replace(f"layers.{layer}.", f"layers.{layer - back}.")


@pytest.mark.parametrize(("shortcut", "num_previous"), [("input", 1), ("middle", 1), ("middle", 2), ("middle", None)])
def test_least_squares_is_the_regression_it_says(shortcut: str, num_previous: int | None) -> None:
    model = adapted(shortcut, num_previous=num_previous)
    controller, x = get_adapter(model), recorded(model, BATCHES)
    calibrate(model, BATCHES, forward)
    merged = merged_factors(model)
    for name in controller.layers:
        A, _ = controller.factors(name)
        now = torch.cat(x[name])
        depth = int(name.split(".")[2])
        if depth == 0:
            assert torch.allclose(merged[name].lora_A, 2 * A if shortcut == "input" else A)
            continue
        reach = min(depth, num_previous or depth)
        before = [torch.cat(x[neighbour(name, back)]) for back in range(1, reach + 1)]
        down = [A if shortcut == "input" else controller.factors(neighbour(name, b))[0] for b in range(1, reach + 1)]
        target = sum(b @ a.T for b, a in zip(before, down, strict=True))
        guess = sum((b * now).sum() / (now * now).sum() * a for b, a in zip(before, down, strict=True))
        ridge = RIDGE * now.square().sum() / now.shape[1]
        # ridge regression of what is left of the target, as an ordinary least-squares problem with extra rows
        rows = torch.cat([now, ridge.sqrt() * torch.eye(now.shape[1], dtype=now.dtype)])
        rest = torch.cat([target - now @ guess.T, torch.zeros(now.shape[1], len(A), dtype=now.dtype)])
        wanted = A + guess + torch.linalg.lstsq(rows, rest).solution.T
        assert torch.allclose(merged[name].lora_A, wanted, rtol=1e-6, atol=1e-8), name
        assert torch.equal(merged[name].lora_B, controller.factors(name)[1])


def test_paper_input_is_a_ratio_of_norms() -> None:
    for shortcut in ("input", "middle"):
        model = adapted(shortcut, "paper_input", 1)
        controller, x = get_adapter(model), recorded(model, BATCHES)
        calibrate(model, BATCHES, forward)
        name = "model.layers.2.mlp.up_proj"
        A, before = controller.factors(name)[0], neighbour(name)

        def size(name: str, shortcut: str = shortcut, x: dict = x, controller=controller) -> torch.Tensor:
            lora_A = controller.factors(name)[0]
            values = [v if shortcut == "input" else v @ lora_A.T for v in x[name]]
            return torch.stack([v.norm() for v in values]).mean()

        ratio = size(before) / size(name)
        assert torch.allclose(merged_factors(model)[name].lora_A, (1 + ratio) * A, rtol=1e-6)


def test_paper_weight_uses_merged_weights_in_order() -> None:
    model = adapted("input", "paper_weight")
    controller = get_adapter(model)
    merged = merged_factors(model)
    norms = []
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn.v_proj"
        A, B = controller.factors(name)
        ratio = norms[layer - 2] / norms[layer - 1] if layer >= 2 else 1.0
        assert torch.allclose(merged[name].lora_A, (1 + ratio) * A)
        W = build("llama").get_submodule(name).weight
        norms.append((W + 2.0 * (1 + ratio) * B @ A).norm())


def test_drop_is_the_plain_factors() -> None:
    model = adapted("middle", "drop")
    for name, factors in merged_factors(model).items():
        assert torch.equal(factors.lora_A, get_adapter(model).factors(name)[0])


@pytest.mark.parametrize("num_previous", [1, 2, None])
def test_block_is_concatenated_exactly(num_previous: int | None) -> None:
    model = adapted("block", num_previous=num_previous)
    factors = merged_factors(model)
    ranks = [len(factors[f"model.layers.{n}.self_attn.q_proj"].lora_A) for n in range(4)]
    assert ranks == [3 * (1 + min(n, num_previous if num_previous is not None else n)) for n in range(4)]
    args = HELD_OUT[0]
    trained = forward(model, args)
    with merged_forward(model):
        assert torch.allclose(forward(model, args), trained, rtol=0, atol=1e-12)
    assert relative_output_errors(model, HELD_OUT, forward) == dict.fromkeys(factors, 0.0)
    layers = {name: model.get_submodule(name) for name in factors}
    for layer in layers.values():
        layer.enable_adapters(False)
    assert (forward(model, args) - trained).abs().max() > 1e-3
    for name, (lora_A, lora_B, scaling) in factors.items():  # into the weights of the base, by hand
        layers[name].base_layer.weight.data += scaling * lora_B @ lora_A
    assert torch.allclose(forward(model, args), trained, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_least_squares_loses_less_than_the_paper(shortcut: str) -> None:
    errors = {}
    for method in ("least_squares", "paper_input", "paper_weight", "drop"):
        model = adapted(shortcut, method)
        calibrate(model, BATCHES, forward)
        each = relative_output_errors(model, HELD_OUT, forward)
        errors[method] = sum(each.values()) / len(each)
    assert errors["least_squares"] < 0.8 * min(errors["paper_input"], errors["paper_weight"], errors["drop"])


def test_output_error_is_that_of_the_layers_outputs() -> None:
    model = adapted("input")
    calibrate(model, BATCHES, forward)
    name = "model.layers.3.mlp.down_proj"
    controller, x = get_adapter(model), recorded(model, HELD_OUT)
    A, B = controller.factors(name)
    merged = merged_factors(model)[name]
    now, before = torch.cat(x[name]), torch.cat(x[neighbour(name)])
    trained = (now + before) @ A.T @ B.T
    exported = now @ merged.lora_A.T @ merged.lora_B.T
    wanted = ((trained - exported).norm() / trained.norm()).item()
    assert relative_output_errors(model, HELD_OUT, forward)[name] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("shortcut", "num_previous"), [("input", 1), ("middle", 1), ("middle", None)])
def test_layers_that_read_the_same_tensor_merge_exactly(shortcut: str, num_previous: int | None) -> None:
    """Cross-attention k and v of all depths read the prompt: exact on prompts that calibration never saw, too."""
    model = build("unet")
    config = ResLoraConfig(r=3, target_modules=UNET_TARGETS, shortcut=shortcut, num_previous=num_previous)
    attach(model, config)
    model.double()
    randomise(model)

    def run(model: nn.Module, batch: tuple) -> torch.Tensor:
        return output("unet", model, batch)

    calibrate(model, [inputs("unet", batch=1)], run)
    errors = relative_output_errors(model, [inputs("unet", seed=9)], run)
    prompt = [name for name in errors if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert len(prompt) == 14
    assert max(errors[name] for name in prompt) < 1e-6
    assert max(errors.values()) > 1e-3
    report = merge_report(model, [inputs("unet", seed=9)], run, lambda m, b: run(m, b).square().mean())
    assert set(prompt) <= set(report.exact)
    assert report.to_dict()["gap"] == report.loss_merged - report.loss_trained
    assert "layers merge exactly" in str(report)


def test_statistics_in_several_passes_are_the_same() -> None:
    whole, bounded = adapted("middle"), adapted("middle")
    calibrate(whole, BATCHES, forward)
    calibrate(bounded, BATCHES, forward, statistics_bytes=4 * 16**2 * 3)
    for name, factors in merged_factors(whole).items():
        assert torch.allclose(factors.lora_A, merged_factors(bounded)[name].lora_A)
    with pytest.raises(ValueError, match=r"passes over the batches .*got generator.*wanted a list"):
        calibrate(bounded, (batch for batch in BATCHES), forward, statistics_bytes=1)


@pytest.mark.parametrize("method", ["least_squares", "paper_input"])
def test_a_calibration_that_was_cut_off_goes_on(method: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "RESUME_EVERY", 2)
    whole, cut = adapted("input", method), adapted("input", method)
    calibrate(whole, BATCHES, forward)
    ran: list[int] = []

    def dying(model: nn.Module, batch: tuple) -> None:
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(1)
        forward(model, batch)

    with pytest.raises(KeyboardInterrupt):
        calibrate(cut, BATCHES, dying, resume_file=tmp_path / "sums.safetensors")
    ran = []
    calibrate(cut, BATCHES, dying, resume_file=tmp_path / "sums.safetensors")
    assert len(ran) == 2
    for name, factors in merged_factors(whole).items():
        assert torch.allclose(factors.lora_A, merged_factors(cut)[name].lora_A, atol=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["sums-0-0.safetensors"]


def test_sums_of_an_earlier_version_are_refused(tmp_path) -> None:
    file = tmp_path / "sums-0-0.safetensors"
    save_file({"second/a": torch.zeros(2, 2)}, file, metadata={"facts": '{"batches": 2, "leader": {"a": "a"}}'})
    with pytest.raises(ValueError, match="sums-0-0.safetensors was written by an earlier version; remove it and"):
        calibrate(adapted("input"), BATCHES, forward, resume_file=tmp_path / "sums.safetensors")


def test_projections_of_one_tensor_share_their_moments() -> None:
    model = adapted("input")
    controller = get_adapter(model)
    moments = Moments(controller, set(controller.sites))
    calibration.observe(controller, moments, model, BATCHES[:2], forward)
    q, k, v = (f"model.layers.2.self_attn.{p}_proj" for p in "qkv")
    assert "\n".join((q, k, v)) in moments.second
    assert len(moments.second) == 4 * 4  # per layer: qkv, o, gate and up, down


@pytest.mark.parametrize(
    "batches",
    [
        ["q k", "q,k", "k,q"],  # one tensor, then two
        ["q,k", "q k"],  # two, then one
        ["q k", "q", "q k"],  # a layer that does not run in every batch
        ["q", "q k"],
        ["a,q k", "a q k", "a q,k"],
    ],
)
def test_moments_are_of_what_each_layer_has_read(batches: list[str]) -> None:
    """Layers that share a sum at first may read other tensors later, or none."""
    adapter = get_adapter(adapted("input"))
    layers = {letter: layer for letter, layer in zip("aqk", adapter.adapted.values(), strict=False)}
    moments = Moments(adapter, {layer.name for layer in layers.values()})
    wanted: dict[str, torch.Tensor] = {}
    for batch in batches:
        moments.start_batch()
        for letters in batch.split(","):
            x = torch.randn(5, layers["a"].site.in_features, dtype=torch.float64)
            for layer in (layers[letter] for letter in letters.split()):
                moments.see(layer, x, [(layer.name, x)])
                wanted[layer.name] = wanted.get(layer.name, 0) + x.T @ x
    moments.start_batch()
    for name, second in wanted.items():
        assert torch.allclose(moments.second_of(name), second), name
    x.add_(1)
    moments.see(layers["a"], x, [("a", x)])
    x.add_(1)
    with pytest.raises(RuntimeError, match="was changed in place after it"):
        moments.start_batch()


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = adapted("input").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    calibrate(model, BATCHES[:1], forward)
    assert [module.training for module in model.modules()] == modes
    assert get_adapter(model).observer is None
    with pytest.raises(ValueError, match="got no batches"):
        calibrate(model, [], forward)


def test_batches_with_names_need_no_function() -> None:
    """`model(**batch)` runs them, and gives the loss and the output that are compared."""
    named = [{"input_ids": ids, "labels": ids} for ids, *_ in BATCHES]
    plain, model = adapted("middle"), adapted("middle")
    calibrate(plain, BATCHES, forward)
    calibrate(model, named)
    for name, factors in merged_factors(plain).items():
        assert torch.allclose(merged_factors(model)[name].lora_A, factors.lora_A, atol=1e-12)
    report = merge_report(model, named)
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in named]
    assert report.loss_trained == pytest.approx(sum(losses) / len(losses))
    assert report.gap != 0
    assert distill(model, named, steps=2).before > 0
    for call in (calibrate, merge_report):
        with pytest.raises(TypeError, match=r"got a batch of type tuple, wanted a dict for model\(\*\*batch\)"):
            call(model, BATCHES)
    with pytest.raises(ValueError, match="returns no loss; give batches with labels"):
        merge_report(model, [{"input_ids": BATCHES[0][0]}])


def test_a_layer_that_reads_only_zeros() -> None:
    guess = torch.ones(2, 4)
    assert torch.equal(least_squares_correction(guess, torch.zeros(4, 4), torch.zeros(2, 4)), guess.double())


@pytest.mark.parametrize("shortcut", ["input", "middle", "block", "none"])
def test_handover_computes_what_was_exported_and_trains_on(shortcut: str) -> None:
    model = adapted(shortcut, num_previous=1)
    calibrate(model, BATCHES, forward)
    args = HELD_OUT[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    forward(model, args).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    calibrate(model, BATCHES, forward)
    with merged_forward(model):
        exported = forward(model, args)
    moments = {id(p): copy.deepcopy(state) for p, state in optimizer.state.items()}
    controller = get_adapter(model)
    names, windows = list(controller.layers), dict(controller.windows)
    old = {name: [moments[id(factor)]["exp_avg"] for factor in controller.factors(name)] for name in names}
    handover(model, optimizer=optimizer)
    if shortcut == "block":  # a block's moments go with its factors into every block that reaches it
        for name in names:
            for side, factor in enumerate(controller.factors(name)):
                wanted = torch.cat([old[n][side] for n in (name, *windows[name])], dim=side)
                assert torch.equal(optimizer.state[factor]["exp_avg"], wanted), name
    assert torch.allclose(forward(model, args), exported, atol=1e-12)
    assert get_adapter(model).explain().links == 0
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in trained}
    for parameter in trained:
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        if shortcut != "block":
            assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[id(parameter)]["exp_avg"])
    before = [p.detach().clone() for p in trained]
    for _ in range(2):
        forward(model, args).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((p - b).abs().max() > 0 for p, b in zip(trained, before, strict=True))
    after = forward(model, args)
    with merged_forward(model):
        assert torch.allclose(forward(model, args), after, atol=1e-12)
    report = merge_report(model, HELD_OUT, forward, lambda m, b: forward(m, b).square().mean())
    assert report.gap == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shortcut", ["input", "middle", "block"])
def test_a_handover_moves_the_points_of_a_schedule_free_optimizer_too(shortcut: str) -> None:
    """Without gradients such an optimizer goes nowhere: the model stays the folded one, as it is trained and used."""
    model = adapted(shortcut, num_previous=1)
    optimizer = AveragedSGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    optimizer.train()
    forward(model, HELD_OUT[0]).square().mean().backward()
    optimizer.step()
    calibrate(model, BATCHES, forward)
    with merged_forward(model):
        exported = forward(model, HELD_OUT[0])
    before = forward(model, HELD_OUT[0])
    handover(model, optimizer=optimizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert shortcut == "block" or (exported - before).abs().max() > 1e-3
    for _ in range(2):
        assert torch.allclose(forward(model, HELD_OUT[0]), exported, atol=1e-4)
        optimizer.eval()


def test_handover_of_block_is_saved_and_loaded(tmp_path) -> None:
    from peft import PeftModel, get_peft_model

    model = get_peft_model(build("llama"), ResLoraConfig(r=3, target_modules=LLAMA_TARGETS, shortcut="block"))
    model.double().eval()
    randomise(model)
    before = forward(model, HELD_OUT[0])
    handover(model)
    assert torch.allclose(forward(model, HELD_OUT[0]), before, atol=1e-12)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).double()
    assert torch.allclose(forward(loaded, HELD_OUT[0]), before, atol=1e-12)


def test_convolutions_are_part_of_the_merged_adapter() -> None:
    model = build("unet")
    attach(model, ResLoraConfig(r=2, lora_alpha=4, target_modules=[*UNET_TARGETS, "conv1"], shortcut="block"))
    model.double()
    randomise(model)
    args = inputs("unet")
    trained, factors = output("unet", model, args), merged_factors(model)
    convolutions = [name for name in factors if name.endswith("conv1")]
    assert convolutions
    by_hand = build("unet")
    for name, f in factors.items():
        delta = (
            torch.einsum("or...,rikl->oikl", f.lora_B[..., 0, 0], f.lora_A)
            if f.lora_A.ndim == 4
            else f.lora_B @ f.lora_A
        )
        by_hand.get_submodule(name).weight.data += f.scaling * delta
    assert torch.allclose(output("unet", by_hand, args), trained, atol=1e-11)


def test_adapters_without_a_linear_layer_are_plain_lora(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(build("unet"), ResLoraConfig(r=2, target_modules=["conv1"], shortcut="block"))
    assert "this is plain LoRA" in caplog.text
    with pytest.raises(ValueError, match="no ResLoRA adapter"):
        merged_factors(model)


def test_torchs_own_attention_stays_plain_lora() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.attention(x, x, x)[0]
            return self.layers[1](self.layers[0](x))

    torch.manual_seed(0)
    model = Model().eval()
    untouched = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 8)
    base = model(x)
    attach(model, ResLoraConfig(r=2, target_modules=r"attention|layers\.\d", shortcut="middle"))
    randomise(model)
    assert list(get_adapter(model).layers) == ["layers.0", "layers.1"]
    assert "plain LoRA, joined to nothing: 2 x torch.nn.MultiheadAttention" in str(explain(model))
    trained = model(x)
    assert (trained - base).abs().max() > 1e-3
    calibrate(model, [x, x + 1], lambda model, x: model(x))
    plain = Model().eval()
    plain.load_state_dict(untouched)
    load_as_plain_lora(plain, r"attention|layers\.\d", merged_factors(model))
    with merged_forward(model):
        assert torch.allclose(plain(x), model(x), atol=1e-6)


def load_as_plain_lora(model: nn.Module, targets: str, factors: dict) -> None:
    """PEFT alone loads them by module path; every factor must find its place, and every place its factor."""
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=targets), model)
    modules = dict(model.named_modules())
    taken = {f"{name}.lora_{side}.default" for name in factors for side in "AB"}
    assert taken == {name for name in modules if name.endswith((".lora_A.default", ".lora_B.default"))}
    for name, f in factors.items():
        modules[f"{name}.lora_A.default"].weight.data = f.lora_A.clone()
        modules[f"{name}.lora_B.default"].weight.data = f.scaling * f.lora_B


def test_adapters_that_are_no_factors_of_a_layer_are_named_not_dropped() -> None:
    """Fused experts, by PEFT's target_parameters, and embeddings: trained, but no plain LoRA file can hold them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=3, **sizes)).eval()
    ids = torch.arange(8).reshape(2, 4)
    base = model(ids).logits
    config = ResLoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "embed_tokens"],
        target_parameters=["mlp.experts.gate_up_proj"],
        shortcut="block",
    )
    adapted_model = get_peft_model(model, config)
    randomise(adapted_model)
    trained = adapted_model(ids).logits
    assert (trained - base).abs().max() > 1e-3
    table = str(explain(adapted_model))
    assert "joined to nothing: 2 x parameter 'gate_up_proj' (target_parameters)" in table
    assert "joined to nothing: 1 x embedding" in table
    with pytest.raises(
        ValueError, match=r"merge_and_unload(?s:.*)embed_tokens: embedding(?s:.*)layers\.1\.mlp\.experts"
    ):
        merged_factors(adapted_model)
    assert torch.allclose(adapted_model.merge_and_unload()(ids).logits, trained, atol=1e-5)


def test_padding_does_not_count() -> None:
    """Calibrated on padded batches with a mask as on the bare tokens."""

    def padded(batch: tuple) -> tuple:
        ids = torch.nn.functional.pad(batch[0], (0, 3), value=1)
        return ids, (torch.arange(ids.shape[1]) < batch[0].shape[1]).expand_as(ids).long()

    def masked_forward(model: nn.Module, batch: tuple) -> torch.Tensor:
        return model(batch[0], attention_mask=batch[1])[0]

    for shortcut in ("input", "middle"):
        bare, masked, unmasked = (adapted(shortcut) for _ in range(3))
        calibrate(bare, BATCHES, forward)
        calibrate(masked, [padded(batch) for batch in BATCHES], masked_forward, mask=lambda batch: batch[1])
        calibrate(unmasked, [padded(batch) for batch in BATCHES], masked_forward)
        wanted, got, other = (merged_factors(model) for model in (bare, masked, unmasked))
        assert all(torch.allclose(got[name].lora_A, f.lora_A, atol=1e-10) for name, f in wanted.items())
        assert any((other[name].lora_A - f.lora_A).abs().max() > 1e-3 for name, f in wanted.items())
        held_out = [padded(batch) for batch in HELD_OUT]
        errors = relative_output_errors(masked, held_out, masked_forward, mask=lambda batch: batch[1])
        bare_errors = relative_output_errors(bare, HELD_OUT, forward)
        assert errors == pytest.approx(bare_errors, rel=1e-8)


def test_adapters_are_merged_one_after_the_other() -> None:
    config = ResLoraConfig(r=2, target_modules=LLAMA_TARGETS, shortcut="middle", merge_method="paper_weight")
    model = get_peft_model(build("llama"), config)
    model.add_adapter("second", copy.deepcopy(config))
    model.double().eval()
    randomise(model)
    before = [p.detach().clone() for p in model.parameters()]
    model.merge_adapter(["default"])
    once = forward(model, HELD_OUT[0])
    model.merge_adapter(["second"])
    assert (forward(model, HELD_OUT[0]) - once).abs().max() > 1e-4
    model.unmerge_adapter()
    assert all(torch.allclose(p, b, atol=1e-12) for p, b in zip(model.parameters(), before, strict=True))
