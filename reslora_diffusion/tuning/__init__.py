"""Find learning rate and alpha for one's own data before training with them: `reslora tune`.

    settings.py    what may be searched, within which share of the training's time, and where the study is stored
    space.py       dimensions: the values that are tried, the first points, and the options that a point stands for
    study.py       the search: Optuna's sampler, pruner and storage around short trainings, until the time is spent
    diffusion.py   the short trainings of the DreamBooth trainer, on images and prompts that are encoded once
    llm.py         the same of the language-model trainer
    outcome.py     what was found: expected gain, run.yaml, plot

A trial is a training of a few steps from the same seed, so all trials see the same draws. It is judged by the loss of
the LoRA that it would export on held-out images with fixed noise, or on held-out text.
"""
