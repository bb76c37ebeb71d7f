"""TRL's trainers of preferences and of rewards, with the checkpoints of an `AdapterTrainer`.

They report each training to the hub as they start. A run on local files has no reason to speak to the hub, so ours
report nothing.
"""

from trl import DPOTrainer, GRPOTrainer

from .adapter_trainer import AdapterTrainer


class Unreported:
    """A trainer of TRL's that sends no telemetry."""

    def _send_telemetry(self) -> None:
        """Override TRL's, which asks the hub's servers."""


class PreferenceTrainer(Unreported, AdapterTrainer, DPOTrainer):
    """`trl.DPOTrainer`."""


class RewardTrainer(Unreported, AdapterTrainer, GRPOTrainer):
    """`trl.GRPOTrainer`."""
