"""Everything that changes while a run trains, as `Schedule`s: `fold` is the first.

A training loop knows only this much of them:

    schedule.start(adapters, total_steps)
    for step in range(total_steps):
        schedule.before_step(step)
        ...                                 forward, backward of every micro-batch
        schedule.after_backward(step)       gradients are complete, and averaged over processes
        ...                                 optimizer step
        change = schedule.after_step(step + 1)

and does what `change` says: it collects the parameters anew, forgets recorded graphs, restarts averages.
"""

from .base import Change, Schedule
from .fold import Fold

__all__ = ["Change", "Fold", "Schedule"]
