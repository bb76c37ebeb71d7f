"""`--chunked_loss`: the loss and the gradients of plain cross-entropy, without logits of a whole batch."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from llm_tiny import GROUPED, ROOT, adapted, load_script, randomise
from reslora_diffusion.llm.chunked_loss import FrozenLinearCrossEntropy, chunked, head_problems, loss_problem
from reslora_diffusion.utils.problems import BadInput

SCRIPT = load_script("train_llm_reslora")


def batch(rows: int = 2, length: int = 24) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 3] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_and_gradient_are_those_of_cross_entropy_in_float64(size, with_bias):
    torch.manual_seed(0)
    hidden = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(11, 6, dtype=torch.float64), torch.randint(11, (20,))
    bias = torch.randn(11, dtype=torch.float64) if with_bias else None
    wanted = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum") * 0.3
    (gradient,) = torch.autograd.grad(wanted, hidden)
    found = FrozenLinearCrossEntropy.apply(hidden, weight, bias, labels, size) * 0.3
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, hidden)[0], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [None, 50])
@pytest.mark.parametrize("shortcut", ["input", "block"])
def test_an_adapted_model_has_the_same_loss_and_gradients(shortcut, count):
    """`count`: tokens of all batches that are accumulated for one step. transformers' own loss is in float32, so the
    reference is taken from the logits."""
    model = adapted("llama", shortcut=shortcut).double().train()
    given = batch() | ({} if count is None else {"num_items_in_batch": torch.tensor(count)})
    labels = given["labels"][:, 1:].flatten()
    logits = model(input_ids=given["input_ids"]).logits[:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(logits, labels, reduction="sum") / (count or int((labels != -100).sum()))
    factors = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(wanted, factors)
    with chunked(model, size=5):
        found = model(**given).loss
    for value, expected in zip(torch.autograd.grad(found, factors), gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert model(**given).logits.shape[-1] == 64  # outside, the model is what it was
    torch.testing.assert_close(model(**given).loss.double(), wanted, rtol=1e-5, atol=0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(value.numel() for value in tree_leaves(out) if torch.is_tensor(value))])
        return out


def test_logits_of_a_whole_batch_are_never_held():
    config = LlamaForCausalLM.config_class(**GROUPED | {"vocab_size": 5000})
    model = LlamaForCausalLM(config).requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    given, sizes = batch(4, 48), []
    for context in (torch.enable_grad(), chunked(model, size=16)):
        with context, Largest() as largest:
            model(**given).loss.backward()
        sizes.append(largest.numel)
    assert sizes[0] >= 4 * 47 * 5000
    assert sizes[1] <= 5000 * 32  # the weight itself; 16 tokens have half as many logits


def test_a_model_that_makes_float32_of_its_logits_learns_in_parts_too():
    """Mamba in bfloat16 takes hidden states for logits, upcasts them, and the output layer is still in bfloat16."""
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)).bfloat16()
    model.requires_grad_(False)
    model.backbone.layers[0].mixer.in_proj.weight.requires_grad_()
    assert loss_problem(model, batch()) is None
    wanted = model(**batch()).loss
    (gradient,) = torch.autograd.grad(wanted, model.backbone.layers[0].mixer.in_proj.weight)
    with chunked(model, size=5):
        found = model(**batch()).loss
        (in_parts,) = torch.autograd.grad(found, model.backbone.layers[0].mixer.in_proj.weight)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=0)
    assert gradient.norm() > 0
    assert (in_parts - gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.parametrize(("cap", "size"), [(0.5, 50), (30.0, 1)], ids=["seen in the loss", "not seen in the loss yet"])
def test_a_model_that_caps_its_logits_is_refused(cap, size):
    torch.manual_seed(0)
    config = GROUPED | {"final_logit_softcapping": cap, "num_hidden_layers": 2, "sliding_window": 16}
    model = Gemma2ForCausalLM(Gemma2Config(**config)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(size)
    assert "--chunked_loss: Gemma2ForCausalLM changes logits after its output layer" in loss_problem(model, batch())
    plain = adapted("llama", shortcut="block")
    assert loss_problem(plain, batch()) is None
    assert not list(head_problems(plain))
    randomise(plain)
    plain.get_output_embeddings().requires_grad_()
    assert "the output layer is trained" in next(head_problems(plain))


def words(tmp_path, **options) -> list[str]:
    rows = [{"prompt": f"{a} + {b}", "response": str(a + b)} for a in range(4) for b in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = {
        "model_name_or_path": ROOT / "assets" / "tiny-llm",
        "dataset_name": tmp_path / "rows.jsonl",
        "max_steps": 3,
        "logging_steps": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "rank": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "calibration_examples": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
    }
    return [f"--{name}={value}" for name, value in (given | options).items()]


def test_the_script_learns_the_same_in_parts(tmp_path):
    losses = {}
    for packing in (False, True):
        for in_parts in (False, True):
            output = tmp_path / f"{packing}-{in_parts}"
            SCRIPT.main(words(tmp_path, output_dir=output, chunked_loss=in_parts, packing=packing))
            history = json.loads((output / "history.json").read_text())
            losses[packing, in_parts] = [row.get("loss", row.get("eval_loss")) for row in history]
        assert losses[packing, True] == pytest.approx(losses[packing, False], rel=1e-4)
        assert len(set(losses[packing, True])) == len(losses[packing, True]) > 3


def test_what_it_does_not_go_with_is_said_at_once(tmp_path):
    given = {"label_smoothing_factor": 0.1, "torch_compile": True, "target_modules": "lm_head"}
    with pytest.raises(BadInput) as caught:
        SCRIPT.main(words(tmp_path, output_dir=tmp_path / "out", chunked_loss=True, **given))
    message = str(caught.value)
    for part in ("with --label_smoothing_factor", "with --torch_compile", "adapter of lm_head"):
        assert part in message
