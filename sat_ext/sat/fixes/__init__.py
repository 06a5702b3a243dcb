"""Repairs of SAT and DeepSpeed, made by `sat_ext.sat.hooks`.

The function that a repair is named after returns whether this run needs it; its docstring begins with the symptom.
Functions of the same file are put around SAT's as the table of hooks says."""
