"""A run: its session, checkpoints, validation, races, and what is written of it."""
