"""What a run takes of a GPU's and a host's memory, predicted from its YAML before any of it is built.

| file | says |
|---|---|
| `run.py` | what memory follows from in a recipe |
| `counts.py` | parameters, counted on the real classes, and bytes of those that do not train |
| `states.py` | what DeepSpeed allocates on one rank for those that train |
| `meter.py` | counts what modules allocate, on tensors without memory |
| `measured.py` | what a micro-batch takes by that count: transformer, first stage, text encoder |
| `results.py` | earlier measurements, by fingerprint |
| `plan.py` | all of it by part, and the peak, for a run and for `sat-ext cache` |
| `levers.py` | each lever as YAML, and as a change to a run |
| `advice.py` | which configuration to use, and which levers to pull |
| `table.py` | plans as tables, and as JSON |
"""
