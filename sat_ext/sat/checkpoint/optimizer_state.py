"""What an optimizer keeps of each weight: whether the saved state suits the running optimizer."""

import inspect
from pathlib import Path
from typing import Any

import torch
from sat.helpers import print_rank0
from torch import Tensor

from sat_ext.errors import ConfigError


def _inner(optimizer: Any) -> Any:
    """PyTorch's optimizer below DeepSpeed's."""
    return getattr(optimizer, "optimizer", optimizer)


def _inner_state(state: dict[str, Any]) -> Any:
    """The state of PyTorch's optimizer in any of DeepSpeed's; a list under its `elastic_checkpoint`."""
    return state.get("base_optimizer_state", state.get("optimizer_state_dict", state))


def other_moments(optimizer: Any, state: dict[str, Any]) -> str | None:
    """Why the moments in `state` are not for the running optimizer, if it is known to keep others per weight."""
    inner, running = _inner_state(state), _keys(_inner(optimizer))
    if running is None or not isinstance(inner, dict) or not inner["state"]:
        return None
    saved = {str(key) for values in inner["state"].values() for key in values}
    if saved == running:
        return None
    kept = [", ".join(sorted(keys)) or "nothing" for keys in (saved, running)]
    return (
        f"saved by an optimizer that keeps {kept[0]} of each weight, and the YAML's "
        f"{type(_inner(optimizer)).__name__} keeps {kept[1]}"
    )


def _keys(inner: Any) -> set[str] | None:
    """What an optimizer of PyTorch keeps of a weight, seen from a step of its twin; None for any other."""
    if not type(inner).__module__.startswith("torch.optim"):
        return None
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    weight.grad = torch.zeros(1, 1)
    options = inspect.signature(type(inner)).parameters
    group = {k: v for k, v in inner.param_groups[0].items() if k in inner.defaults and k in options}
    plain = {"fused": None, "capturable": False}  # the twin's weight is on the CPU
    twin = type(inner)([weight], **{**group, **{k: v for k, v in plain.items() if k in group}})
    with torch.no_grad():
        twin.step()
    return {str(key) for key in twin.state[weight]}


def check_same_weights(optimizer: Any, state: dict[str, Any], file: Path) -> None:
    """Raise `ConfigError` if a state without ZeRO, which has no names, is not of the weights that train now."""
    inner, groups = _inner_state(state), _inner(optimizer).param_groups
    same = [len(g["params"]) for g in inner["param_groups"]] == [len(g["params"]) for g in groups]
    if same:
        numbers = [number for g in inner["param_groups"] for number in g["params"]]
        shapes = dict(zip(numbers, (p.shape for g in groups for p in g["params"]), strict=True))
        same = all(
            value.shape == shapes[number]
            for number, values in inner["state"].items()
            for key, value in values.items()
            if isinstance(value, Tensor) and key.startswith("exp_avg")
        )
    if not same:
        raise ConfigError(
            f"{file}: holds the state of other weights than train now; train what was trained, or start over with "
            "'mode: finetune'."
        )


def with_own_scaler(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """`state` with the running loss scaler, if the YAML asks for another kind than the saved one.

    A static scale is an option of the YAML; a dynamic one has found its value during the run, and keeps it.
    """
    saved, running = state.get("loss_scaler"), getattr(optimizer, "loss_scaler", None)
    if saved is None or running is None:
        return state
    dynamic = bool(optimizer.dynamic_loss_scale)
    same = type(saved) is type(running) and bool(state["dynamic_loss_scale"]) == dynamic
    if same and (dynamic or saved.cur_scale == running.cur_scale):
        return state
    print_rank0(
        f"resume: the loss scale starts at {running.cur_scale:g}, as the YAML says; it was "
        f"{saved.cur_scale:g}{'' if same else ' of another kind'}"
    )
    own = {"loss_scaler": running, "dynamic_loss_scale": optimizer.dynamic_loss_scale, "overflow": False}
    return {**state, **own}


def unmap(optimizer: Any) -> None:
    """Copy the optimizer's tensors on the CPU: a removed file keeps its space on the disk as long as any of them,
    even a single number, maps it."""
    for values in _inner(optimizer).state.values():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                values[key] = value.clone()
