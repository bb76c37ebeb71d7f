"""Optimizers that see the two factors of one LoRA together, and so the matrix that they make up.

Each is an `AdamW` for every parameter that is no LoRA factor, takes the same groups, and keeps its state in
`state_dict()`:

>>> pairs = factor_pairs(model)
>>> optimizer = LoraRite(model.parameters(), pairs, lr=1e-3)
"""

from .pairs import FactorPair, PairOptimizer, factor_pairs
from .preconditioned import RefLora, ScaledAdamW
from .pro import LoraPro
from .rite import LoraRite

__all__ = ["OPTIMIZERS", "FactorPair", "LoraPro", "LoraRite", "PairOptimizer", "RefLora", "ScaledAdamW", "factor_pairs"]

OPTIMIZERS: dict[str, type[PairOptimizer]] = {
    "rite": LoraRite,
    "pro": LoraPro,
    "scaled_adamw": ScaledAdamW,
    "reflora": RefLora,
}
