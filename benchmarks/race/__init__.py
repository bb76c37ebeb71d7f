"""The race: methods of the LoRA family, each tuned with the same number of trials, judged by what they export.

    tune       per method, the same number of trials over learning rate x alpha x its own options, on tuning seeds
    final      the best setting of each on fresh seeds, and at a third and three times its learning rate
    controls   what the plan adds, such as LoRA at alpha x 2

Every run ends in the plain LoRA that it would export, cut to one rank for all, on the untouched base: its loss and its
metric on held-out data are the result. A run is one JSON file named by what it is a function of, so a race can be
interrupted, resumed and spread over processes.
"""
