"""Makes a schedule from the settings of `--schedule`."""

from collections.abc import Callable

from .base import Schedule
from .coto import Coto
from .fold import Fold
from .prune import Prune
from .ranks import Ranks
from .restart import Restart
from .settings import CotoSettings, FoldSettings, PruneSettings, RanksSettings, RestartSettings, Settings


def make_schedule(
    settings: Settings | None,
    *,
    seed: int,
    calibrate: Callable[[], object] = lambda: None,
    on_device: bool = False,
    gradient_scale: Callable[[], float] = lambda: 1.0,
) -> Schedule:
    """The schedule of these settings; without any, one that changes nothing, and takes up what was folded.

    Args:
        seed: of what is drawn.
        calibrate: of a `Fold`.
        on_device: whether gates shall be scalars on the device: for what is compiled, and for DDP, which waits for a
            gradient of every parameter.
        gradient_scale: of a `Prune` and of `Ranks`.

    Raises:
        NotImplementedError: settings of a kind that is not entered here.
    """
    if settings is None:
        return Fold(None, calibrate)
    if isinstance(settings, FoldSettings):
        return Fold(settings.at, calibrate)
    if isinstance(settings, CotoSettings):
        return Coto(seed, settings.initial_p, settings.ratio, on_device)
    if isinstance(settings, RestartSettings):
        return Restart(settings.stages, settings.momentum, settings.warmup, settings.ranks, seed, settings.merge)
    if isinstance(settings, PruneSettings):
        return Prune(**vars(settings), gradient_scale=gradient_scale)
    if isinstance(settings, RanksSettings):
        return Ranks(**vars(settings), gradient_scale=gradient_scale)
    raise NotImplementedError(f"make_schedule makes nothing of {type(settings).__name__}")
