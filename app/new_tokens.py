"""New tokens of adapters on one pipeline: those that were trained with an adapter are read in its columns alone.

Two runs call their tokens <s0>, so here each has a name with the adapter's. A prompt is rewritten for the column that
it is generated in: TOK and <s0><s1> become that adapter's own tokens, and stay the words they are for the base.
"""

from pathlib import Path

from diffusers import DiffusionPipeline

from reslora_diffusion.export.embeddings import load_embeddings, misfits, places, read_embeddings
from reslora_diffusion.export.embeddings_inspection import embeddings_beside
from reslora_diffusion.utils.wording import worded


class NewTokens:
    """The new tokens that a pipeline has been taught."""

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self.words: dict[str, dict[str, list[str]]] = {}  # by adapter: the tokens that a word of a prompt stands for

    def problems(self, lora: Path) -> list[str]:
        """Return what keeps the tokens beside a LoRA file from the pipeline; nothing if there are no tokens.

        Raises:
            ValueError: they cannot be read.
        """
        path = embeddings_beside(lora)
        return [f"{path.name}: {problem}" for problem in misfits(self.pipe, read_embeddings(path))] if path else []

    def load(self, name: str, lora: Path) -> None:
        """Teach the pipeline the tokens beside a LoRA file, which is loaded as `name`. They stay when it goes: they are
        a few rows, which no other prompt reads.

        Raises:
            ValueError: they cannot be read, or do not go with the pipeline.
        """
        path = embeddings_beside(lora)
        if path is None or name in self.words:
            return
        embeddings = read_embeddings(path)
        own = {token: f"<{name}_{number}>" for number, token in enumerate(embeddings.names)}
        known = next(iter(places(self.pipe).values()))[1].get_vocab()
        if not known.keys() >= set(own.values()):
            load_embeddings(self.pipe, embeddings, [*own.values()])
        words = {word: [own[token] for token in tokens] for word, tokens in embeddings.tokens.items()}
        self.words[name] = words | {token: [name_here] for token, name_here in own.items()}

    def worded(self, name: str | None, prompt: str) -> str:
        """A prompt as the column of an adapter, or of the base, reads it."""
        return worded(prompt, self.words.get(name, {}) if name else {})
