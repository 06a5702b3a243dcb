"""Checkpoints of the full state of a run: weights, optimizer, learning rate, random numbers, place in the data.

With `args.checkpoint: full`. `mode: pretrain` and `load: <the run's folder>` resume the run: bit for bit on as
many ranks, and on any other number with each sample of the epoch once."""
