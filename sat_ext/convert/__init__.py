"""CogVideoX weights from SAT's layout to diffusers' and back, bit for bit.

| file | job |
|---|---|
| `convert.py` | the two conversions: what to read, what to write |
| `read.py` | folders and files -> parts |
| `write.py` | parts -> folders |
| `parts.py` | what a part is, and whether its tensors fit its config.json |
| `names.py` | which tensor of SAT's is which of diffusers' |
| `architecture.py` | shapes and CogVideo's YAML -> config.json |
| `positions.py` | the position embeddings that SAT keeps and diffusers computes |
| `lora.py` | LoRA in either layout |
| `files.py` | tensors from the disk and to it, without a model in memory |
"""
