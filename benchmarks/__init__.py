"""Measurements, each a program that writes a result file: `python -m benchmarks.NAME --help`.

counting, step, run, startup     operations and memory without a clock, one training step, a whole run, commands
methods, runlora, merge          costs of the family, forms of one layer, what merging loses
dreambooth                       how often the demo's trainings teach a subject, by a judge without a network
race, tuned, sweep               methods with equal tuning, `reslora tune` against the defaults, tables over seeds
gpu                              everything that needs a GPU
report                           docs/performance.md from the result files
"""
