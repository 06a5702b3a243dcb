"""Checkpoints on the disk, without SAT: what lies where, whether it is whole, and what is in it."""
