"""TRL's trainers of preferences and of rewards, with the checkpoints of an `AdapterTrainer`."""

from trl import DPOTrainer, GRPOTrainer

from .adapter_trainer import AdapterTrainer


class PreferenceTrainer(AdapterTrainer, DPOTrainer):
    """`trl.DPOTrainer`."""


class RewardTrainer(AdapterTrainer, GRPOTrainer):
    """`trl.GRPOTrainer`."""
