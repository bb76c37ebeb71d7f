"""Cross-entropy without the logits of a whole batch: `--chunked_loss true`.

The loss of T learned tokens over a vocabulary of V needs logits [T, V] three times over: in the model's precision, in
float32, and as gradients. Here the output layer is applied to a few hundred tokens at a time, and each part leaves only
its sum of losses and the gradient of its hidden states [T, D]:

    logits = h W^T + b        loss = sum -log softmax(logits)[label]        dloss/dh = (softmax(logits) - onehot) W

The output layer is frozen, so its weight needs no gradient. Tokens without a label are left out before the layer, where
the plain loss computes their logits too. Models that change the logits after the output layer (Gemma 2 caps them,
Granite scales them) are refused by `ChunkedLossProbe`, which compares logits and both losses before the first step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..utils.problems import refuse
from .encoder import IGNORED

TOKENS = 256  # whose logits are held at a time
APART = 1e-2  # relative; above the rounding of bfloat16


class FrozenLinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of `hidden` [T, D] with `labels` [T] through a frozen `weight` [V, D]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, size: int) -> Tensor:
        """Sum the losses, and keep their gradient by `hidden`.

        Args:
            bias: [V].
            size: tokens whose logits are held at a time.
        """
        gradient = torch.empty_like(hidden)
        precision = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=precision, device=hidden.device)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            wanted = labels[part, None]
            likelihoods = F.linear(hidden[part], weight, bias).to(precision).log_softmax(-1)
            total -= likelihoods.gather(-1, wanted).sum()
            errors = likelihoods.exp_().scatter_add_(-1, wanted, -torch.ones_like(wanted, dtype=precision))
            gradient[part] = errors.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outputs[0]).to(gradient.dtype), None, None, None, None


class ChunkedLoss:
    """Replaces a model's `loss_function`, and is given hidden states [B, T, D] where that one is given logits."""

    def __init__(self, head: nn.Module, size: int = TOKENS) -> None:
        self.head: Any = head  # with a weight and a bias
        self.size = size

    def __call__(
        self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | int | None = None, **_: Any
    ) -> Tensor:
        """Mean over the tokens that have a label, or their sum over `num_items_in_batch`; token t predicts t + 1."""
        labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].to(logits.device)
        learned = labels != IGNORED
        hidden, labels = logits[learned].to(self.head.weight.dtype), labels[learned]  # Mamba made float32 of it
        total = FrozenLinearCrossEntropy.apply(hidden, self.head.weight, self.head.bias, labels, self.size)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model below wrappers of distributed training and PEFT's."""
    model = getattr(model, "module", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


@contextmanager
def chunked(model: nn.Module, size: int = TOKENS) -> Iterator[None]:
    """Inside, a model that is given labels computes its loss in parts; its output has no logits."""
    base = plain_model(model)
    head, before = base.get_output_embeddings(), vars(base).get("_loss_function")
    head.forward = lambda hidden: hidden  # the loss applies the layer
    base.loss_function = ChunkedLoss(head, size)
    try:
        yield
    finally:
        del head.forward
        if before is None:
            del base._loss_function
        else:
            base.loss_function = before


def head_problems(model: nn.Module) -> Iterator[str]:
    """Output layers that the loss cannot be computed through."""
    head = plain_model(model).get_output_embeddings()
    if type(head) is not nn.Linear:
        kind = type(head).__name__
        yield f"--chunked_loss: the output layer is a {kind}, wanted a frozen linear layer without an adapter"
    elif any(parameter.requires_grad for parameter in head.parameters()):
        yield "--chunked_loss: the output layer is trained; wanted --chunked_loss false"


def loss_problem(model: nn.Module, batch: Mapping[str, Any]) -> str | None:
    """Say how the model's loss is not that of its output layer's logits, if so.

    A cap of 30 changes a loss by less than rounding while logits are small, so the logits themselves are compared too.
    """
    was_training, base = model.training, plain_model(model)
    made: list[Tensor] = []
    hook = base.get_output_embeddings().register_forward_hook(lambda head, args, logits: made.append(logits))
    model.eval()
    try:
        with torch.no_grad():
            plain = model(**batch)
            hook.remove()
            with chunked(model):
                found = model(**batch).loss.item()
    finally:
        hook.remove()
        model.train(was_training)
    loss = plain.loss.item()
    if abs(found - loss) <= APART * abs(loss) and torch.equal(plain.logits, made[-1].to(plain.logits)):
        return None
    return (
        f"--chunked_loss: {type(base).__name__} changes logits after its output layer (its loss is {loss:.4g}, in "
        f"parts {found:.4g}); wanted --chunked_loss false"
    )


class ChunkedLossProbe(TrainerCallback):
    """Compares both losses once the model is where it is trained.

    Raises:
        BadInput: they differ, or the output layer is adapted or trained.
    """

    def __init__(self, batch: Mapping[str, Any], accelerator: Accelerator) -> None:
        self.batch, self.accelerator = batch, accelerator

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        refuse(head_problems(model))
        device = self.accelerator.device
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in self.batch.items()}
        with self.accelerator.autocast():
            problem = loss_problem(model, batch)
        refuse([problem] if problem else [])
