"""Speed and memory, measured: `counting` (exact, no clock), `step` (one training step), `run` (a whole run)."""
