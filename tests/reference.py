"""ResLoRA written naively from the paper (arXiv 2402.18039, section 3.2), in float64, importing nothing of ours.

Every block keeps its last input on itself and looks at its predecessors' attributes, as the paper's figures suggest.
That is right for one forward followed by one backward without checkpointing, and slow: an oracle, not a method.

    input    h_n = W_n x_n + s B_n A_n (x_n + x_{n-1})          x_{n-1} := x_n in a first block of several
    block    h_n = W_n x_n + s sum_{k=0..m} B_{n-k} A_{n-k} x_n
    middle   h_n = W_n x_n + s B_n sum_{k=0..m} A_{n-k} x_{n-k}

Which blocks are neighbours is found by running the model once and looking: order of calls, and shapes of what came in.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

ATTENTION = (
    r"attn\d?\.to_(?:q|k|v|out)(?:\.0)?$|self_attn\.\w+_proj$|mlp\.\w+_proj$|mlp\.fc\d$"
    r"|attn\.(?:add_[qkv]_proj|to_add_out)$|ff(?:_context)?\.net\.(?:0\.proj|2)$|proj_mlp$"
)


class NaiveBlock(nn.Module):
    """A frozen linear layer with its LoRA block, and references to the blocks before it, nearest first."""

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float, shortcut: str) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(lora_A.detach().double().clone())
        self.lora_B = nn.Parameter(lora_B.detach().double().clone())
        self.scaling, self.shortcut = scaling, shortcut
        self.gate = 1.0  # multiplies B A wherever it is used
        self.previous: tuple[NaiveBlock, ...] = ()
        self.alone = False  # joined to no other block: plain LoRA
        self.x: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        frozen = self.base(x)
        if self.shortcut == "input" and not self.alone:
            before = self.previous[0].x if self.previous else x
            added = self.gate * (x + before) @ self.lora_A.T @ self.lora_B.T
        elif self.shortcut == "block":
            added = sum(block.gate * x @ block.lora_A.T @ block.lora_B.T for block in (self, *self.previous))
        elif self.shortcut == "middle":
            bottleneck = sum(block.gate * block.x @ block.lora_A.T for block in (self, *self.previous))
            added = self.gate * bottleneck @ self.lora_B.T
        else:
            added = self.gate * x @ self.lora_A.T @ self.lora_B.T
        return frozen + self.scaling * added


def calls_in_order(model: nn.Module, names: list[str], run: Callable[[nn.Module], object]) -> list[tuple[str, tuple]]:
    """`(name, shape of its input)` of each layer, in the order in which they are called."""
    seen: list[tuple[str, tuple]] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.append((name, tuple(args[0].shape)))
        )
        for name in names
    ]
    with torch.no_grad():
        run(model)
    for hook in hooks:
        hook.remove()
    return seen


def predecessors(
    model: nn.Module, calls: list[tuple[str, tuple]], shortcut: str, num_previous: int | None
) -> dict[str, tuple[str, ...]]:
    """Names of the blocks that each block reaches, nearest first."""
    last: dict[str, tuple[str, tuple]] = {}
    chain: dict[str, tuple[str, ...]] = {}
    for name, shape in calls:
        match = re.search(ATTENTION, name)
        assert match, f"{name} has no role that this oracle knows"
        role = match[0]
        chain[name] = ()
        if role in last:
            before, shape_before = last[role]
            one, other = model.get_submodule(before), model.get_submodule(name)
            equal_in, equal_out = one.in_features == other.in_features, one.out_features == other.out_features
            equal_tokens = shape[:-1] == shape_before[:-1]
            admitted = {"input": equal_in and equal_tokens, "middle": equal_tokens, "block": equal_in and equal_out}
            if admitted[shortcut]:
                chain[name] = (before, *chain[before])
        last[role] = (name, shape)
    return {name: reached[:num_previous] for name, reached in chain.items()}


def adapt_naively(
    model: nn.Module,
    factors: dict[str, tuple[Tensor, Tensor, float]],
    shortcut: str,
    num_previous: int | None,
    run: Callable[[nn.Module], object],
) -> dict[str, NaiveBlock]:
    """Replace the layers named in `factors` (name -> lora_A, lora_B, scaling) of a float64 model by naive blocks."""
    model.requires_grad_(False)
    reached = {name: () for name in factors}
    if shortcut != "none" and num_previous != 0:
        reached = predecessors(model, calls_in_order(model, list(factors), run), shortcut, num_previous)
    shortcut = "none" if num_previous == 0 else shortcut
    blocks = {
        name: NaiveBlock(model.get_submodule(name), A, B, scaling, shortcut)
        for name, (A, B, scaling) in factors.items()
    }
    for name, block in blocks.items():
        block.previous = tuple(blocks[other] for other in reached[name])
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, block)
        block.__dict__["previous"] = block.previous
        block.alone = not reached[name] and not any(name in others for others in reached.values())
    return blocks
