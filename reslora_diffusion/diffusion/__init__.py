"""DreamBooth training of diffusion models.

>>> from reslora_diffusion.diffusion import build, check, encode, finish, load, parse, start
>>> options = parse(["--config", "run.yaml"])
>>> plan = check(options)                       # raises BadInput with every problem
>>> begun = start(options, plan)
>>> loaded, concepts, facts = load(begun)
>>> run = build(begun, loaded, encode(begun, loaded, concepts, facts))
>>> ...                                         # the loop: train_scripts/train_dreambooth_reslora.py
>>> finish(run, run.step)                       # merges, exports, writes the reports

`optimize_for_training`, `save_memory` and `set_attn_processors` speed up a UNet or transformer in any training loop.
Names are resolved on first use, so that options can be checked without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
