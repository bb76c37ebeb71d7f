"""Everything that changes while a run trains, as `Schedule`s.

    Coto      drops the adapters of whole blocks, fewer and fewer      --schedule coto
    Restart   freezes the adapter and starts another beside it         --schedule restart:stages=3
    Fold      folds the shortcut into plain LoRA, and trains on        --schedule fold:at=0.85
    Prune     masks heads and channels, and leaves a smaller model     --schedule prune:ratio=0.5
    Ranks     takes ranks away, and leaves a smaller LoRA              --schedule ranks:ratio=0.5

A training loop knows only this much of them:

    schedule.start(adapters, total_steps, optimizer)
    for step in range(total_steps):
        schedule.before_step(step)
        ...                                 forward, backward of every micro-batch
        schedule.after_backward(step)       gradients are complete, and averaged over processes
        ...                                 optimizer step
        change = schedule.after_step(step + 1)

and does what `change` says: it collects the parameters anew, forgets recorded graphs, restarts averages. Names are
resolved on first use, so that `settings` answers without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
