"""Weights that ZeRO-3 has partitioned: gathered to be saved, and to be filled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn


@torch.no_grad()
def gather_weights(module: nn.Module, kept: Callable[[str], bool]) -> dict[str, Tensor]:
    """The parameters and persistent buffers of `module` whose names are `kept`, in CPU memory. Every rank must
    call it; the first gets them, the others an empty dict."""
    weights: dict[str, Tensor] = {}
    first = torch.distributed.get_rank() == 0
    # module by module, so that no GPU holds more than one submodule's own parameters whole
    for prefix, part in module.named_modules(remove_duplicate=False):
        names = {name: f"{prefix}.{name}" if prefix else name for name in (*part._parameters, *part._buffers)}
        parameters = {k: p for k, p in part._parameters.items() if p is not None and kept(names[k])}
        with GatheredParameters(list(parameters.values()), enabled=bool(parameters)):
            if first:
                weights |= {names[k]: p.detach().to("cpu", copy=True) for k, p in parameters.items()}
        if first:
            buffers = {k: b for k, b in part._buffers.items() if b is not None and kept(names[k])}
            saved = buffers.keys() - part._non_persistent_buffers_set
            weights |= {names[k]: buffers[k].detach().to("cpu", copy=True) for k in buffers if k in saved}
    return weights


@contextmanager
def gathered_loading(module: nn.Module) -> Iterator[None]:
    """Inside, `module.load_state_dict` fills parameters that ZeRO-3 has partitioned, from the first rank's state.
    Every rank must call it with the same names."""
    if not any(hasattr(p, "ds_id") for p in module.parameters()):
        yield
        return
    # `load_state_dict` recurses through `_load_from_state_dict`: around it, one submodule is gathered at a time
    parts = list(module.modules())
    for part in parts:
        part.__dict__["_load_from_state_dict"] = _gathered(part, part._load_from_state_dict)
    try:
        yield
    finally:
        for part in parts:
            del part.__dict__["_load_from_state_dict"]


def _gathered(part: nn.Module, fill: Callable[..., None]) -> Callable[..., None]:
    def load_from_state_dict(state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # by the prefix it is called with: SAT's LoRA layer fills its child `original` under its own
        parameters = [p for n, p in part._parameters.items() if p is not None and prefix + n in state_dict]
        with GatheredParameters(parameters, modifier_rank=0, enabled=bool(parameters)):
            fill(state_dict, prefix, *rest)

    return load_from_state_dict
