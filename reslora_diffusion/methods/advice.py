"""Advice before the first step on settings that a method works with, but not well. No torch."""


def clipping_note(optimizer: str | None, max_grad_norm: float | None) -> str | None:
    """A trainer's own clipping in front of LoRA-RITE, which clips what it makes of the gradients itself."""
    if optimizer != "rite" or not max_grad_norm or max_grad_norm > 1:
        return None
    return (
        f"rite clips by itself, gradients in the basis of the other factor (clip_unmagnified). --max_grad_norm "
        f"{max_grad_norm:g} comes before that; give a high one, as 1000, if the logged grad_norm is often above it"
    )
