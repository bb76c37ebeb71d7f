"""`--push_to_hub`: the exported LoRA is uploaded once, at the end.

`transformers.Trainer` would upload every checkpoint instead, which holds the unmerged ResLoRA that nobody can load
without this package, and would pickle the token into each checkpoint (`training_args.bin`). So both are taken from its
arguments before it is made.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from ..utils.hub import create_repository, upload


@dataclass(frozen=True)
class Destination:
    """A repository that exists and can be written to."""

    name: str
    token: str | None

    def send(self, output: Path) -> str:
        """Upload an output folder; return the address of the commit."""
        return upload(self.name, output, self.token)


def take_destination(training: TrainingArguments) -> Destination | None:
    """Where the result goes, None if it stays here; afterwards the arguments neither push nor hold a token.

    Raises:
        BadInput: the repository cannot be written to.
    """
    token, wanted = training.hub_token, training.push_to_hub
    training.hub_token, training.push_to_hub = None, False
    if not wanted or training.process_index:
        return None
    assert training.output_dir is not None, "transformers fills it in"
    name = create_repository(training.hub_model_id, training.output_dir, token, training.hub_private_repo)
    return Destination(name, token)
