"""Checkpoints of the full state of a run: weights, optimizer, learning rate, random numbers, place in the data.

With `args.checkpoint: full`. What is saved can be gone on with by `mode: pretrain` and `load: <the run's folder>`,
under the same number of ranks bit for bit, under another with each sample of the epoch once.
"""
