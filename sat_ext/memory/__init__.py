"""What a run takes of a GPU's and a host's memory, predicted from its YAML before anything of it is built.

| file | says |
|---|---|
| `run.py` | what the YAML says that memory follows from |
| `options.py` | the same of DeepSpeed's section |
| `counts.py` | parameters, counted on the real classes without making them |
| `weights.py` | bytes of what does not train, as it is kept |
| `states.py` | what DeepSpeed allocates for what trains, on one rank |
| `meter.py` | counts what modules take on tensors without memory |
| `measured.py` | what a micro-batch takes by that count: transformer, first stage, text encoder |
| `results.py` | measurements that were made before, by fingerprint |
| `activations.py` | what the transformer takes under the YAML's checkpointing |
| `host.py`, `plan.py` | all of it by part, and the peak |
| `cache.py` | the same of `sat-ext cache` |
| `advice.py` | which configuration to use, and which lever to pull |
| `table.py` | plans as a table |
"""
