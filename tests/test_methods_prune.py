"""LoRAPrune: scores against dense algebra in float64, masks against zeroed weights, the smaller model against both."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import llm_tiny
from forks import run_forked
from models import TARGETS, build, inputs, output, randomise
from reslora_diffusion import ResLoraConfig, attach, get_adapter, merged_factors
from reslora_diffusion.core.attach import AdaptedModel
from reslora_diffusion.methods.pruning import find_structures, load_pruned, save_pruned
from reslora_diffusion.methods.schedules import Prune
from reslora_diffusion.utils.problems import BadInput

STEPS, LR = 6, 1e-2
FEED_FORWARD = {"unet": ["net.0.proj", "net.2"], "flux": ["proj_out"]}


def wide_unet() -> UNet2DConditionModel:
    """Four blocks with four heads each: two are left when the first and the last are spared."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=24,
        norm_num_groups=4,
    )


def sd3() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        num_layers=4,
        attention_head_dim=4,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


DIFFUSERS = {"unet": wide_unet, "sd3": sd3, "flux": lambda: build("flux")}
CLASSES = {"unet": UNet2DConditionModel, "sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel}
LLMS = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "t5"]
OF_UNET = [*TARGETS["unet"], "net.0.proj", "net.2"]
TARGETS_OF = {
    "unet": OF_UNET,
    "sd3": [*OF_UNET, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
    "flux": [*TARGETS["flux"], "proj_out"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}


class Case:
    """A model with an adapter whose factors matter, and what it says of some batches."""

    def __init__(self, name: str, shortcut: str = "none", **config: object) -> None:
        self.name, self.shortcut, self.config = name, shortcut, config
        base = self.base()
        targets = TARGETS_OF.get(name, [*llm_tiny.DECODER_TARGETS, "up_proj"])
        own = ResLoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": targets, "shortcut": shortcut, **config})
        if name in DIFFUSERS:
            attach(base, own)
            self.model: nn.Module = base.double().eval()
        else:
            self.model = get_peft_model(base, own).double().eval()
        randomise(self.model)

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return (DIFFUSERS[self.name]() if self.name in DIFFUSERS else llm_tiny.build(self.name)).double().eval()

    def __call__(self, model: nn.Module, seed: int = 0) -> Tensor:
        if self.name in ("unet", "flux"):
            return output(self.name, model, inputs(self.name, seed=seed))
        if self.name == "sd3":
            generator = torch.Generator().manual_seed(seed)
            shapes = ((2, 4, 4, 4), (2, 5, 16), (2, 8))
            noisy, prompt, pooled = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
            return model(noisy, prompt, pooled, torch.tensor([3.0, 700.0]).double(), return_dict=False)[0]
        return model(**llm_tiny.batch(self.name, seed=seed)).logits


class Training:
    """A case while it trains and is pruned."""

    def __init__(self, case: Case, **settings: object) -> None:
        self.case, self.model = case, case.model
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=LR)
        self.schedule = Prune(**{"every": 1, "warmup": 0.2, **settings})
        self.schedule.start([AdaptedModel(self.model)], STEPS, self.optimizer)

    def run(self, first: int = 0, last: int = STEPS) -> list[dict[str, int]]:
        counts = []
        for step in range(first, last):
            self.schedule.before_step(step)
            self.case(self.model, seed=step).square().mean().backward()
            self.schedule.after_backward(step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.after_step(step + 1)
            counts.append({name: int(gone.sum()) for name, gone in self.schedule.gone.items()})
        return counts


def dense_scores(case: Case, model: nn.Module, size: int = 1) -> dict[str, Tensor]:
    """(G V)^2 by layer, with G as the change of s B A in one step of descent, all of it as dense matrices."""
    adapter, found = get_adapter(model), {}
    for name in adapter.sites:
        layer = adapter.layers[name]
        V = layer.base_layer.weight.detach().clone()
        G = torch.zeros_like(V)
        for block in (name, *adapter.windows[name]):
            A, B = (side["default"].weight for side in (adapter.layers[block].lora_A, adapter.layers[block].lora_B))
            V += 2 * (B @ A).detach()
            G += 2 * (B @ A - (B - B.grad / size) @ (A - A.grad / size)).detach()
        found[name] = (G * V).square()
    return found


@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_scores_of_heads_and_channels_over_several_steps(shortcut: str) -> None:
    """Two key and value heads with two query heads each; four numbers to a head."""
    case = Case("llama", shortcut)
    training = Training(case, warmup=0.9, cooldown=0.0, every=100)
    wanted: dict[str, Tensor] = {}
    for step in range(3):
        case(case.model, seed=step).square().mean().backward()
        dense = dense_scores(case, case.model)
        training.schedule.after_backward(step)
        for layer in range(llm_tiny.LAYERS):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            heads = []
            for head in range(2):
                queries, keys = slice(16 * head, 16 * head + 16), slice(8 * head, 8 * head + 8)
                heads.append(
                    dense[f"{attention}.q_proj"][queries].sum()
                    + dense[f"{attention}.k_proj"][keys].sum()
                    + dense[f"{attention}.v_proj"][keys].sum()
                    + dense[f"{attention}.o_proj"][:, queries].sum()
                )
            channels = (
                dense[f"{mlp}.gate_proj"].sum(1) + dense[f"{mlp}.up_proj"].sum(1) + dense[f"{mlp}.down_proj"].sum(0)
            )
            for name, new in ((attention, torch.stack(heads)), (mlp, channels)):
                wanted[name] = 0.9 * wanted.get(name, torch.zeros(())) + 0.1 * new
        training.optimizer.step()
        training.optimizer.zero_grad()
    assert training.schedule.scores.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(training.schedule.scores[name], value, rtol=1e-12, atol=0), name
        assert len(set(value.tolist())) > 1


def test_a_gated_channel_of_a_unet_has_a_row_in_each_half() -> None:
    case = Case("unet")
    training = Training(case, gradient_scale=lambda: 4.0)
    (4 * case(case.model).square().mean()).backward()
    dense = dense_scores(case, case.model, 4)
    training.schedule.after_backward(0)
    scores = {name: value for name, value in training.schedule.scores.items() if name.endswith(".ff")}
    assert scores
    for name, value in scores.items():
        rows, inner = dense[f"{name}.net.0.proj"].sum(1), len(value)
        want = 0.1 * (rows[:inner] + rows[inner:] + dense[f"{name}.net.2"].sum(0))
        assert torch.allclose(value, want, rtol=1e-12, atol=0), name


def test_scores_are_made_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("llama", "block")
    case(case.model).square().mean().backward()
    structures = find_structures(case.model)
    from reslora_diffusion.methods.pruning import scores

    whole = scores.score(get_adapter(case.model), structures)
    monkeypatch.setattr(scores, "ELEMENTS", 100)
    parts = scores.score(get_adapter(case.model), structures)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(whole, parts, strict=True))


def test_the_cubic_schedule_reaches_the_ratio_exactly_and_only_then_stays() -> None:
    counts = Training(Case("llama"), every=1, warmup=1 / 6, cooldown=1 / 6).run()
    assert [step["model.layers.1.mlp"] for step in counts] == [0, 13, 21, 23, 24, 24]  # 24 (1 - (1 - u)^3), u = n / 4
    assert [step["model.layers.1.self_attn"] for step in counts] == [0, 0, 0, 0, 1, 1]
    late = Training(Case("llama"), every=100, warmup=0.0, cooldown=0.0).run()
    assert [step["model.layers.1.mlp"] for step in late] == [0, 0, 0, 0, 0, 24]
    third = Training(Case("llama"), ratio=0.3, parts="channels").run()
    assert third[-1] == {f"model.layers.{n}.mlp": 14 for n in range(3)}  # of 48: 14.4


def test_a_masked_model_is_one_with_zeroed_columns() -> None:
    case = Case("llama", "block")
    training = Training(case)
    training.run(0, 4)
    zeroed = case.base()
    for name, (A, B, scaling) in merged_factors(case.model).items():
        zeroed.get_submodule(name).weight.data += scaling * B @ A
    for name, gone in training.schedule.gone.items():
        for group in gone.nonzero().flatten().tolist():
            if name.endswith("mlp"):
                zeroed.get_submodule(f"{name}.down_proj").weight.data[:, group] = 0
            else:
                zeroed.get_submodule(f"{name}.o_proj").weight.data[:, 16 * group : 16 * group + 16] = 0
    masked = case(case.model)
    assert torch.allclose(masked, case(zeroed), atol=1e-10)
    training.schedule.lift()
    assert (case(case.model) - masked).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*LLMS, *DIFFUSERS])
@pytest.mark.parametrize("spare", [None, 1])
def test_the_smaller_model_computes_what_the_masked_one_does(name: str, spare: int | None, tmp_path: Path) -> None:
    if name == "t5" and spare:
        pytest.skip("its self-attentions share one position bias, so none of them is pruned alone: below")
    case = Case(name, "block" if name in ("llama", "unet", "t5") else "none")
    training = Training(case, spare=spare)
    training.run()
    wanted, untouched = case(case.model), case(case.base())
    assert (wanted - untouched).abs().max() > 1e-3
    structures = {s.name: s for s in training.schedule.all}
    slim, facts = training.schedule.slim()
    assert torch.allclose(case(slim), wanted, atol=1e-10)
    before, after = facts.parameters
    assert before == sum(p.numel() for p in case.base().parameters())
    assert after == sum(p.numel() for p in slim.parameters()) < before
    for structure, (left, count) in facts.kept.items():
        whole = structure not in training.schedule.gone
        assert left == (count if whole else count - int(0.5 * count + 0.5)), structure
    blocks = [min(s.blocks) for s in structures.values()]
    outer = {blocks[0], blocks[-1]} if spare or name in DIFFUSERS else set()
    assert {min(structures[s].blocks) for s, (left, count) in facts.kept.items() if left == count} == outer
    assert facts.uniform == (not outer)

    folder = save_pruned(slim, facts, tmp_path / "pruned")
    kind = CLASSES.get(name, type(case.base()))
    again = load_pruned(folder, kind)
    rounding = 1e-6 if name == "gemma3" else 1e-10  # its scale of embeddings is a buffer in float32
    assert torch.allclose(case(again), wanted, atol=rounding)
    if facts.uniform:
        assert torch.allclose(case(kind.from_pretrained(folder)), wanted, atol=rounding)
    else:
        with pytest.raises((RuntimeError, ValueError), match=r"(?i)mismatch|shape"):
            kind.from_pretrained(folder)


def test_plain_transformers_loads_it_without_us(tmp_path: Path) -> None:
    case = Case("llama", "block")
    training = Training(case, ratio=0.3)
    training.run()
    slim, facts = training.schedule.slim()
    save_pruned(slim, facts, tmp_path / "pruned")
    torch.save({**llm_tiny.batch("llama", seed=0), "wanted": case(slim)}, tmp_path / "case.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
case = torch.load({str(tmp_path / "case.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "pruned")!r}, dtype=torch.float64).eval()
wanted = case.pop("wanted")
with torch.no_grad():
    assert torch.allclose(model(**case).logits, wanted, atol=1e-12)
assert model.generate(case["input_ids"], attention_mask=case["attention_mask"], max_new_tokens=4, use_cache=True).shape
config = model.config
print(config.intermediate_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
assert not [name for name in sys.modules if name.startswith("reslora")]
"""
    done = run_forked(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["34", "2", "1", "8"]  # of 48 channels, 4 heads in 2 groups
    assert facts.to_dict()["loaded_by"] == "from_pretrained"


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    """The tiny Llama's output layer is its embedding, which the file holds once."""
    case = Case("llama")
    training = Training(case, spare=1)
    training.run()
    slim, facts = training.schedule.slim()
    again = load_pruned(save_pruned(slim, facts, tmp_path / "pruned"), LlamaForCausalLM, torch.float32)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.lm_head.weight.dtype == torch.float32


def test_self_attentions_of_t5_lose_the_same_heads() -> None:
    training = Training(Case("t5"))
    names = [name for name in training.schedule.gone if "SelfAttention" in name]
    assert names == ["encoder.block.*.layer.0.SelfAttention", "decoder.block.*.layer.0.SelfAttention"]
    spared = Training(Case("t5"), spare=1, parts="channels")
    assert list(spared.schedule.gone) == [
        *(f"encoder.block.{n}.layer.1.DenseReluDense" for n in (1, 2)),
        *(f"decoder.block.{n}.layer.2.DenseReluDense" for n in (0, 1)),
    ]


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_resumed_run_continues_bit_for_bit(at: int) -> None:
    training = Training(Case("llama", "block"))
    training.run(0, at)
    schedule = training.schedule
    values, moments = (copy.deepcopy(part.state_dict()) for part in (training.model, training.optimizer))
    state, tensors = (
        json.loads(json.dumps(schedule.state_dict())),
        {n: t.clone() for n, t in schedule.tensors().items()},
    )
    training.run(at)

    again = Training(Case("llama", "block"))
    again.schedule.load_state_dict(state)
    again.model.load_state_dict(values)
    again.schedule.load_tensors(tensors)
    again.optimizer.load_state_dict(moments)
    again.run(at)
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name
    for name, tensor in schedule.tensors().items():
        assert torch.equal(tensor, again.schedule.tensors()[name]), name
    assert torch.equal(training.case(training.model), again.case(again.model))


@pytest.mark.parametrize(
    ("name", "config", "settings", "wanted"),
    [
        ("llama", {}, {"ratio": 0.9}, "ratio=0.9 would leave model.layers.0.self_attn without heads: it has 2"),
        ("llama", {}, {"ratio": 0.01}, "ratio=0.01 would take no heads, of which a layer has 2"),
        (
            "llama",
            {},
            {"ratio": 0.25},
            "ratio=0.25 would take no heads, of which a layer has 2 at most; wanted more, or",
        ),
        ("llama", {}, {"spare": 2}, "spare=2 leaves no heads to prune"),
        ("llama", {"target_modules": ["q_proj"]}, {}, "channels of model.layers.0.mlp"),
        (
            "llama",
            {"shortcut": "middle"},
            {"spare": 3},
            r"`middle` depends on activations.*\n.*spare=3 leaves no heads",
        ),
        ("gpt2", {"target_modules": ["c_attn"]}, {}, r"no heads were found.*\n.*no channels were found"),
    ],
)
def test_what_cannot_be_pruned_is_refused(name: str, config: dict, settings: dict, wanted: str) -> None:
    with pytest.raises(BadInput, match=wanted):
        Training(Case(name, **config), **settings)


@pytest.mark.parametrize("settings", [{"ratio": 1.0}, {"ratio": 0}, {"parts": "mlp"}, {"every": 0}, {"warmup": 0.95}])
def test_settings_that_are_out_of_bounds(settings: dict) -> None:
    with pytest.raises(BadInput, match=next(iter(settings))):
        Prune(**settings)


def test_a_weight_that_the_embedding_uses_too_is_not_merged_into() -> None:
    model = get_peft_model(build("llama"), ResLoraConfig(r=2, shortcut="none", target_modules=["q_proj", "lm_head"]))
    base = model.get_base_model()
    base.lm_head.base_layer.weight = base.model.embed_tokens.weight
    with pytest.raises(BadInput, match=r"shares its weight with .*lm_head"):
        Prune().start([AdaptedModel(model)], 9)


def test_another_schedule_is_not_continued_and_nothing_is_cut_too_early() -> None:
    training = Training(Case("llama"))
    with pytest.raises(ValueError, match=r"ratio=0.5.*got.*ratio=0.25.*wanted the same"):
        Prune(ratio=0.25).load_state_dict(training.schedule.state_dict())
    with pytest.raises(ValueError, match="has not come to the ratio"):
        training.schedule.slim()


def test_a_step_whose_gradients_are_not_finite_is_left_out_of_the_scores() -> None:
    case = Case("llama")
    training = Training(case)
    training.run(0, 1)
    before = {name: value.clone() for name, value in training.schedule.scores.items()}
    case(case.model).square().mean().backward()
    for parameter in training.optimizer.param_groups[0]["params"]:
        parameter.grad.fill_(float("nan"))
    training.schedule.after_backward(1)
    assert all(torch.equal(value, before[name]) for name, value in training.schedule.scores.items())


def test_heads_with_weights_of_their_own_besides_the_projections_are_left_whole():
    """OLMo 2 normalises across heads, GPT-OSS has a sink for each: cut heads would leave these too long."""
    for name in ("Olmo2", "GptOss"):
        config = getattr(transformers, f"{name}Config")(**llm_tiny.GROUPED)
        with torch.device("meta"):
            model = getattr(transformers, f"{name}ForCausalLM")(config)
        assert not [one for one in find_structures(model) if one.kind == "heads"], name
