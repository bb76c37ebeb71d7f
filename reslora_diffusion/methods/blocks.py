"""Names of layers say which transformer block each is in; schedules drop and prune the layers of a block together."""

OUTER = ("down_blocks", "mid_block", "up_blocks", "attentions", "motion_modules")  # hold the blocks of a UNet


def block_of(name: str) -> str:
    """The transformer block of a layer: "model.layers.3" of "model.layers.3.self_attn.q_proj".

    That is the path up to the first number, where those of a UNet's stages do not count unless there is no other. A
    layer outside all stacks is a block of its own.
    """
    parts = name.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdecimal() and place < len(parts) - 1]
    inner = [place for place in numbered if place and parts[place - 1] not in OUTER]
    found = inner[:1] or numbered[-1:]
    return ".".join(parts[: found[0] + 1]) if found else name
