"""DoRA written naively from the paper (arXiv 2402.09353, equations 5 and 6, section 4.3), in float64, importing nothing
of ours: V = W + s B A is formed, its rows are normalised by a norm that is a constant to the gradient, and stretched to
the trained magnitude. With `block`, V has the products of earlier blocks too."""

from torch import Tensor, nn


class NaiveDora(nn.Module):
    """A frozen linear layer, its factors and its magnitude; `previous` are the blocks that it borrows from."""

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.lora_A = nn.Parameter(lora_A.detach().double().clone())
        self.lora_B = nn.Parameter(lora_B.detach().double().clone())
        self.magnitude = nn.Parameter(magnitude.detach().double().flatten().clone())
        self.previous: tuple[NaiveDora, ...] = ()

    def merged(self) -> Tensor:
        """W' [out, in]."""
        V = self.base.weight
        for block in (self, *self.previous):
            V = V + self.scaling * block.lora_B @ block.lora_A
        norms = V.detach().square().sum(1, keepdim=True).sqrt()
        return self.magnitude[:, None] * V / norms

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.merged().T
        return y if self.base.bias is None else y + self.base.bias


def decompose_naively(model: nn.Module, given: dict[str, tuple], reached: dict[str, tuple[str, ...]]) -> dict:
    """Replace the layers of a float64 model by naive ones.

    Args:
        given: name -> (lora_A, lora_B, scaling, magnitude).
        reached: name -> the blocks before it that it borrows from.
    """
    model.requires_grad_(False)
    layers = {name: NaiveDora(model.get_submodule(name), *values) for name, values in given.items()}
    for name, layer in layers.items():
        layer.__dict__["previous"] = tuple(layers[other] for other in reached.get(name, ()))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return layers


def decomposed(weight: Tensor, A: Tensor, B: Tensor, scaling: float, magnitude: Tensor, axis: str = "rows") -> Tensor:
    """W' of a linear layer or convolution [out, in, ...], in float64. `axis`: "rows" of V as in the paper and PEFT,
    "columns" of V as LyCORIS has them without wd_on_out, "base rows" as ComfyUI has rows."""
    W = weight.double()
    V = W + scaling * (B.double().flatten(1) @ A.double().flatten(1)).reshape(W.shape)
    over = W if axis == "base rows" else V
    if axis == "columns":
        swapped = over.transpose(0, 1).reshape(over.shape[1], -1)
        norms = swapped.square().sum(1).sqrt().reshape(1, -1, *[1] * (W.ndim - 2))
    else:
        norms = over.reshape(len(over), -1).square().sum(1).sqrt().reshape(-1, *[1] * (W.ndim - 1))
    return magnitude.double().reshape(norms.shape) / norms * V
