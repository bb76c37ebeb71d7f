"""The public names and where they are defined; `__init__.py` imports each on first use."""

from .base import Change, Schedule
from .coto import Coto
from .fold import Fold
from .prune import Prune
from .ranks import Ranks
from .restart import Restart
from .settings import parse_schedule

__all__ = ["Change", "Coto", "Fold", "Prune", "Ranks", "Restart", "Schedule", "parse_schedule"]
