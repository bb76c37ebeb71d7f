"""Merging turns a trained shortcut into a plain LoRA.

statistics     what flows through the shortcuts, summed over batches
corrections    C of each layer, by each merge method: A* = A + C
factors        the plain LoRA of each layer
calibrate      batches -> statistics -> C;  distill refines C;  report measures what was lost
merge          the public functions on a model
fold           the same in the middle of training, which goes on with the plain LoRA
"""
