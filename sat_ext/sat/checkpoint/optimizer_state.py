"""Restores the optimizer, DeepSpeed's counters and the learning rate, as far as they suit the running ones."""

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from sat.helpers import print_rank0
from torch import Tensor

from sat_ext.checkpoint.layout import OPTIMIZER_NAME
from sat_ext.checkpoint.manifest import Manifest
from sat_ext.checkpoint.reading import read_file
from sat_ext.errors import ConfigError
from sat_ext.ranks import on_every_rank
from sat_ext.sat.checkpoint import rng
from sat_ext.sat.checkpoint.reshard import cut, own_pieces, saved_shards, shard_keys
from sat_ext.sat.ema import EMA
from sat_ext.sat.run import RunState

# The objects in DeepSpeed's shards; nothing else in one can run code.
SHARD_TYPES = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
OTHER_PRECISION = "saved under another precision, in which DeepSpeed keeps its optimizer in another form"


def load_optimizer(run: RunState, scheduler: Any) -> None:
    """Restore them all. The optimizer's options (weight decay, betas) stay as the YAML has them now. Raises
    `ConfigError`."""
    engine, saved = run.engine, run.resumed
    assert saved is not None
    optimizer = engine.optimizer
    # DeepSpeed loads the saved options over the running ones, which are put back below
    options = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in optimizer.param_groups]
    # read on all ranks before DeepSpeed has them wait for each other
    state, reason = on_every_rank(lambda: _read_own(run))
    if reason is not None:
        print_rank0(f"warning: {run.folder}: {reason}; the optimizer's state starts from zero.", level="WARNING")
    if state is not None:
        _hand_over(optimizer, state, moments=reason is None)
        _unmap(optimizer)
    for group, values in zip(optimizer.param_groups, options, strict=True):
        group.update(values)
    place_steps(engine.basic_optimizer)
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, getattr(saved, name))
    for name in ("init_step", "auto_warmup_steps", "auto_warmup_rate"):
        setattr(scheduler, name, getattr(saved.rate, name))
    scheduler.step(saved.rate.num_iters)


def place_steps(optimizer: Any) -> None:
    """Move step counts beside the weights if a fused kernel needs them there; other Adams keep them on the CPU."""
    if any(group.get("fused") for group in optimizer.param_groups):
        for weight, state in optimizer.state.items():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(weight.device)


def round_robin(engine: Any) -> bool:
    """Whether the running optimizer deals weights out to the ranks in an order that DeepSpeed does not save."""
    return bool(getattr(engine.optimizer, "round_robin_gradients", False))


def _read_own(run: RunState) -> tuple[dict[str, Any] | None, str | None]:
    """This rank's optimizer state, or None if none of it can be used, and why the moments in it cannot, if so."""
    engine, saved, folder = run.engine, run.resumed, run.folder
    assert saved is not None and folder is not None
    if saved.world == dist.get_world_size():  # read with the rest, so that all ranks end if one cannot; used later
        file = folder / f"rng_{dist.get_rank()}.pt"
        run.random = read_file(file)
        if not isinstance(run.random, dict) or not rng.capture().keys() <= run.random.keys():
            raise ConfigError(f"{file}: holds no random number generators; name another checkpoint.")
    if reason := _cannot_load(engine, saved, folder):
        return None, reason
    file = folder / OPTIMIZER_NAME
    if engine.zero_optimization_stage() > 0 or not file.is_file():
        state = _shard(engine, folder, saved)
        return state, _other_moments(engine.optimizer, state)
    state = read_file(file, types=SHARD_TYPES)
    if not isinstance(state, dict) or state.keys() != engine.optimizer.state_dict().keys():
        return None, OTHER_PRECISION
    if reason := _other_moments(engine.optimizer, state):
        return None, reason
    check_same_weights(engine.optimizer, state, file)
    return state, None


def _cannot_load(engine: Any, saved: Manifest, folder: Path) -> str | None:
    """Why the running optimizer cannot take the saved one's state, if it cannot."""
    stage, robin = engine.zero_optimization_stage(), round_robin(engine)
    if (saved.zero_stage == 0) != (stage == 0):
        return f"saved under ZeRO-{saved.zero_stage}, and ZeRO-{stage} keeps its optimizer in another form"
    # in bf16 DeepSpeed keeps ZeRO-0's optimizer in shards too
    if stage == 0 and (folder / OPTIMIZER_NAME).is_file() == hasattr(engine.optimizer, "_param_slice_mappings"):
        return OTHER_PRECISION
    moved = saved.world != dist.get_world_size() or saved.zero_stage != stage
    if saved.round_robin != robin or (robin and moved):
        return (
            "DeepSpeed does not say where its shards hold a weight under zero_optimization.round_robin_gradients"
        )
    return None


def _hand_over(optimizer: Any, state: dict[str, Any], *, moments: bool) -> None:
    """Load through DeepSpeed's own optimizer, as its `load_checkpoint` does."""
    if not hasattr(optimizer, "dp_process_group"):  # without ZeRO
        optimizer.load_state_dict(state)
        return
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    shards: list[Any] = [None] * dist.get_world_size(optimizer.dp_process_group)
    shards[dist.get_rank(optimizer.dp_process_group)] = state
    # always from fp32, because the model's weights are rounded to the training dtype
    optimizer.load_state_dict(shards, load_optimizer_states=moments, load_from_fp32_weights=True)
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()


def _shard(engine: Any, folder: Path, saved: Manifest) -> dict[str, Any]:
    """DeepSpeed's optimizer state of this rank: as it was saved, or cut out of the shards of all ranks."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    rank, world = (f(optimizer.dp_process_group) for f in (dist.get_rank, dist.get_world_size))
    files = []
    for number in range(saved.world):
        name = f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt"  # some of its optimizers put bf16_ before it
        files.append(next(iter(folder.glob(f"*{name}")), folder / name))
    shapes = None
    if saved.zero_stage == 3:
        shapes = _section(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", "param_shapes")
    if world == saved.world and (stage == 3) == (saved.zero_stage == 3):
        own: dict[str, Any] = _section(files[rank], "optimizer_state_dict")
        if stage == 3:
            saved_places, places = shapes, engine._get_zero_param_shapes()
        else:
            saved_places, places = own["param_slice_mappings"], optimizer._param_slice_mappings
        if saved_places == places:
            return with_own_scaler(optimizer, own)
    print_rank0(
        f"resume: the optimizer of {saved.world} ranks under ZeRO-{saved.zero_stage} is split "
        f"again for {world} under ZeRO-{stage}"
    )
    states = [_section(file, "optimizer_state_dict") for file in files]
    weights, moments = cut(saved_shards(states, saved, shapes), *own_pieces(engine), folder)
    scaler = {k: states[0][k] for k in ("loss_scaler", "dynamic_loss_scale", "overflow") if k in states[0]}
    state = {**optimizer.state_dict(), **scaler}
    inner, flat = shard_keys(stage)
    inner_state = {"state": moments, "param_groups": state[inner]["param_groups"]}
    return with_own_scaler(optimizer, {**state, inner: inner_state, flat: weights})


def _section(file: Path, name: str) -> Any:
    content = read_file(file, types=SHARD_TYPES)
    if not isinstance(content, dict) or name not in content:
        raise ConfigError(f"{file}: holds no '{name}', and is not DeepSpeed's; name another checkpoint.")
    return content[name]


def _inner(optimizer: Any) -> Any:
    """PyTorch's optimizer below DeepSpeed's."""
    return getattr(optimizer, "optimizer", optimizer)


def _inner_state(state: dict[str, Any]) -> Any:
    """The state of PyTorch's optimizer in any of DeepSpeed's; a list under its `elastic_checkpoint`."""
    return state.get("base_optimizer_state", state.get("optimizer_state_dict", state))


def _other_moments(optimizer: Any, state: dict[str, Any]) -> str | None:
    """Why the moments in `state` are not for the running optimizer, if it is known to keep others per weight."""
    inner, running = _inner_state(state), _kept_of_a_weight(_inner(optimizer))
    if running is None or not isinstance(inner, dict) or not inner["state"]:
        return None
    saved = {str(key) for values in inner["state"].values() for key in values}
    if saved - {EMA} == running - {EMA}:  # AdamW's moments fit, with an average or without
        if EMA in running - saved:
            print_rank0("resume: the checkpoint holds no averaged weights; the average starts at its weights.")
        if EMA in saved - running:  # would take memory, and stop moving
            for values in inner["state"].values():
                values.pop(EMA, None)
        return None
    kept = [", ".join(sorted(keys)) or "nothing" for keys in (saved, running)]
    return (
        f"saved by an optimizer that keeps {kept[0]} of each weight, and the YAML's "
        f"{type(_inner(optimizer)).__name__} keeps {kept[1]}"
    )


def _kept_of_a_weight(inner: Any) -> set[str] | None:
    """What PyTorch's or our optimizer keeps of a weight, seen from a step of its twin; None for any other."""
    if not type(inner).__module__.startswith(("torch.optim", "sat_ext.")):
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
    saved, groups = _inner_state(state), _inner(optimizer).param_groups
    sizes = [[len(g["params"]) for g in some] for some in (saved["param_groups"], groups)]
    numbers = [number for g in saved["param_groups"] for number in g["params"]]
    weights = [weight for g in groups for weight in g["params"]]
    moments = [saved["state"].get(n, {}).get("exp_avg", w) for n, w in zip(numbers, weights)]
    if sizes[0] != sizes[1] or any(m.shape != w.shape for m, w in zip(moments, weights)):
        raise ConfigError(
            f"{file}: holds the state of other weights than train now; train what was trained, or start over with "
            "'mode: finetune'."
        )


def with_own_scaler(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """`state` with the running loss scaler, if the YAML asks for another kind than the saved one."""
    saved, running = state.get("loss_scaler"), getattr(optimizer, "loss_scaler", None)
    if saved is None or running is None:
        return state
    dynamic = bool(optimizer.dynamic_loss_scale)
    same = type(saved) is type(running) and bool(state["dynamic_loss_scale"]) == dynamic
    # a static scale is an option of the YAML; a dynamic one has found its value during the run, and keeps it
    if same and (dynamic or saved.cur_scale == running.cur_scale):
        return state
    print_rank0(
        f"resume: the loss scale starts at {running.cur_scale:g}, as the YAML says; it was "
        f"{saved.cur_scale:g}{'' if same else ' of another kind'}"
    )
    own = {"loss_scaler": running, "dynamic_loss_scale": optimizer.dynamic_loss_scale, "overflow": False}
    return {**state, **own}


def _unmap(optimizer: Any) -> None:
    # a removed file keeps its space on the disk as long as a tensor, even a single number, maps it
    for values in _inner(optimizer).state.values():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                values[key] = value.clone()
