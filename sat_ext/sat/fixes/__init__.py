"""Repairs of SAT and DeepSpeed, a file for each symptom. `sat_ext.sat.hooks` makes them.

The function that a repair is named after returns whether this machine and run need it; its docstring begins with
the symptom. What the repair puts around a function of theirs is another function of its file, in the table of
hooks; a repair that puts nothing there is made by the first function itself.
"""
