"""A made-up training for tests of `reslora tune`. Without a trainer's imports, processes start soon."""

import math

import numpy as np

from reslora_diffusion.tuning.settings import Settings
from reslora_diffusion.tuning.study import Spent, open_study

START = {"learning_rate": 1e-3, "lora_alpha": 1.0, "rank": 4, "method": "lora", "lr_scheduler": "constant"}


class Valley:
    """A training whose loss falls with the steps to a height that is least at learning rate 4e-3, alpha / r 4."""

    steps, start, identity, given = 1000, START, {"data": "valley"}, {"rank": 4, "output_dir": "out"}
    keeping_best, names = {"keep_best": True}, {}
    seconds = 1.0  # of a step

    def __init__(self):
        self.seen = []

    def train(self, options, steps, evaluate_at, report):
        self.seen.append(options)
        rate = math.log(options.get("learning_rate", 1e-3) / 4e-3)
        alpha = math.log(options.get("lora_alpha", 4.0) / 16)
        height = rate**2 + alpha**2 + (math.nan if options.get("learning_rate", 0) > 1e-2 else 0)
        for step in evaluate_at:
            draws = 1 + height + 1 / step + np.arange(16) / 100
            if report(step, draws):
                break
        return Spent(self.seconds, self.seconds * step)


def study_of(tmp_path, trainee, **settings):
    chosen = Settings(**settings)
    return chosen, open_study(chosen, tmp_path, trainee.identity)
