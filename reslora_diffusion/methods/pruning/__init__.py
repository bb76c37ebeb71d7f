"""LoRAPrune (arXiv 2305.18403): heads and channels are scored by the gradients of LoRA, masked, and cut out at the end.

    structures   which rows and columns of which layers make up a head or a channel
    scores       how much the loss would change without them, from the gradients of A and B
    slicing      the smaller model: the adapter merged, rows and columns cut out, the configuration changed
    files        saving it, and loading what no configuration of transformers or diffusers can describe

`methods.schedules.prune.Prune` drives them while a run trains (`--schedule prune:ratio=0.5`).
"""

from .files import load_pruned, save_pruned
from .slicing import Slimmed, slim
from .structures import Structure, find_structures

__all__ = ["Slimmed", "Structure", "find_structures", "load_pruned", "save_pruned", "slim"]
