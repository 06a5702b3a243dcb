"""CogVideoX weights from SAT's layout to diffusers' and back, bit for bit.

| file | job |
|---|---|
| `convert.py` | the two conversions, and what they write |
| `read.py` | folders and files -> parts |
| `parts.py` | what a part is, whether its tensors fit its config.json, and what only SAT keeps |
| `names.py` | which tensor of SAT's is which of diffusers' |
| `architecture.py` | shapes and CogVideo's YAML -> config.json |
| `lora.py` | LoRA in either layout |
| `files.py` | tensors from the disk and to it, without a model in memory |
"""
