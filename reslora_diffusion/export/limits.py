"""Thresholds that several modules state."""

LOSSY_ERROR = 0.05  # of a module's norm: a cut that loses more must be asked for
LARGEST_EXPORT = 8 * 2**30  # bytes of one file; the largest LoRAs in use have one
EXIT_CHECK_FAILED, EXIT_BAD_INPUT = 1, 2


class CheckFailed(ValueError):
    """The input was sound, but what came of it did not pass: a failed proof, or a loss that nobody allowed."""
