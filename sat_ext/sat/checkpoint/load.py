"""Resumes a run: its weights before DeepSpeed starts, then optimizer, learning rate and random numbers."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from sat.helpers import print_rank0
from torch import Tensor, nn

from sat_ext.checkpoint.layout import OPTIMIZER_NAME, find_weights
from sat_ext.checkpoint.manifest import Manifest
from sat_ext.checkpoint.reading import read_file, read_weights, require_sound, under_adapters, weight_files
from sat_ext.errors import ConfigError
from sat_ext.ranks import on_every_rank, rank_and_world
from sat_ext.sat.checkpoint import rng
from sat_ext.sat.checkpoint.matching import check_fit, check_whole
from sat_ext.sat.checkpoint.optimizer_state import check_same_weights, other_moments, unmap, with_own_scaler
from sat_ext.sat.checkpoint.partitions import gathered_loading
from sat_ext.sat.checkpoint.reshard import cut, own_pieces, saved_shards, shard_keys
from sat_ext.sat.run import RunState, run_of

# The objects in DeepSpeed's shards; nothing else in one can run code.
SHARD_TYPES = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
OTHER_PRECISION = "saved under another precision, in which DeepSpeed keeps its optimizer otherwise"


def load_weights(model: nn.Module, args: argparse.Namespace) -> int:
    """Fill the model from the full checkpoint in `args.load`, and its base; the iteration to continue from.

    Raises `ConfigError` where the checkpoint is of another model.
    """
    run, path = run_of(args), Path(args.load)
    file = find_weights(path)
    names = {name for name, _ in model.named_parameters()}

    def read() -> tuple[dict[str, Tensor], int]:
        weights, iteration = read_weights(path)
        weights = under_adapters(weights, names)
        check_fit(model, weights, under_adapters(read_file(file)["module"], names), file)
        check_whole(model, weights, args, file)
        return weights, iteration

    on_every_rank(lambda: _require_sound(run, path))
    weights, iteration = on_every_rank(read)  # all ranks must come to the gathering, or none
    with gathered_loading(model):
        model.load_state_dict(weights, strict=False)
    print_rank0(f"loaded the weights of {file.parent}")
    if run.resumed is None:
        return 0
    run.micro_steps = run.resumed.micro_steps
    return iteration


def _require_sound(run: RunState, path: Path) -> None:
    """Raise `ConfigError` where a record of the checkpoint or of its base is damaged. Each rank checks a part of
    every file, whichever of them it needs."""
    files = list(weight_files(path))
    if run.resumed is not None:
        files += [file for name in run.resumed.files if (file := files[0].with_name(name)) != files[0]]
    for file in files:
        with suppress(OSError):  # `read_file` says why
            require_sound(file, *rank_and_world())


def load_optimizer(run: RunState, scheduler: Any) -> None:
    """Restore the optimizer, DeepSpeed's counters and the learning rate's place.

    The optimizer's options (weight decay, betas) stay as the YAML has them now. Raises `ConfigError`.
    """
    engine, saved, folder = run.engine, run.resumed, run.folder
    assert saved is not None and folder is not None
    optimizer = engine.optimizer
    options = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in optimizer.param_groups]
    state, reason = on_every_rank(lambda: _read_own(run))  # before DeepSpeed has the ranks wait for each other
    if reason is not None:
        print_rank0(f"warning: {folder}: {reason}; the optimizer's state starts from zero.", level="WARNING")
    if state is not None:
        _hand_over(engine, state, moments=reason is None)
        unmap(optimizer)
    for group, values in zip(optimizer.param_groups, options, strict=True):
        group.update(values)
    place_steps(engine.basic_optimizer)
    engine.global_steps, engine.global_samples = saved.global_steps, saved.global_samples
    engine.skipped_steps = saved.skipped_steps
    for name in ("init_step", "auto_warmup_steps", "auto_warmup_rate"):
        setattr(scheduler, name, getattr(saved.rate, name))
    scheduler.step(saved.rate.num_iters)


def place_steps(optimizer: Any) -> None:
    """Move step counts beside the weights, where a fused kernel needs them; other Adams keep them on the CPU."""
    if any(group.get("fused") for group in optimizer.param_groups):
        for weight, state in optimizer.state.items():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(weight.device)


def _read_own(run: RunState) -> tuple[dict[str, Any] | None, str | None]:
    """This rank's optimizer state, or None if none of it can be used; and the reason if the moments in it cannot.
    The random numbers are read too, and kept for the first step."""
    engine, saved, folder = run.engine, run.resumed, run.folder
    assert saved is not None and folder is not None
    if saved.world == dist.get_world_size():
        file = folder / f"rng_{dist.get_rank()}.pt"
        run.random = read_file(file)
        if not rng.is_state(run.random):
            raise ConfigError(f"{file}: holds no random number generators; name another checkpoint.")
    if reason := _cannot_load(engine, saved, folder):
        return None, reason
    if engine.zero_optimization_stage() > 0 or not (folder / OPTIMIZER_NAME).is_file():
        state = _shard(engine, folder, saved, dist.get_rank(engine.optimizer.dp_process_group))
        return state, other_moments(engine.optimizer, state)
    state = read_file(folder / OPTIMIZER_NAME, types=SHARD_TYPES)
    if not isinstance(state, dict) or state.keys() != engine.optimizer.state_dict().keys():
        return None, OTHER_PRECISION
    reason = other_moments(engine.optimizer, state)
    if reason is None:
        check_same_weights(engine.optimizer, state, folder / OPTIMIZER_NAME)
    return (state if reason is None else None), reason


def _cannot_load(engine: Any, saved: Manifest, folder: Path) -> str | None:
    """Why the running optimizer cannot take the saved one's state, if it cannot."""
    stage, robin = engine.zero_optimization_stage(), round_robin(engine)
    if (saved.zero_stage == 0) != (stage == 0):
        return f"saved under ZeRO-{saved.zero_stage}, and ZeRO-{stage} keeps its optimizer otherwise"
    if stage == 0 and (folder / OPTIMIZER_NAME).is_file() == hasattr(engine.optimizer, "_param_slice_mappings"):
        return OTHER_PRECISION
    moved = saved.world != dist.get_world_size() or saved.zero_stage != stage
    if saved.round_robin != robin or (robin and moved):
        return (
            "DeepSpeed does not say where its shards hold a weight under zero_optimization.round_robin_gradients"
        )
    return None


def round_robin(engine: Any) -> bool:
    """Whether the running optimizer deals weights out to the ranks in an order that DeepSpeed does not save."""
    return bool(getattr(engine.optimizer, "round_robin_gradients", False))


def _hand_over(engine: Any, state: dict[str, Any], *, moments: bool) -> None:
    """Load through DeepSpeed's own optimizer, as its `load_checkpoint` does; always from fp32, because the model's
    weights are rounded to the training dtype."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "dp_process_group"):  # without ZeRO
        optimizer.load_state_dict(state)
        return
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    shards: list[Any] = [None] * dist.get_world_size(optimizer.dp_process_group)
    shards[dist.get_rank(optimizer.dp_process_group)] = state
    optimizer.load_state_dict(shards, load_optimizer_states=moments, load_from_fp32_weights=True)
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()


def _shard(engine: Any, folder: Path, saved: Manifest, rank: int) -> dict[str, Any]:
    """DeepSpeed's optimizer state of this rank: as it was saved, or cut out of the shards of all ranks."""
    stage = engine.zero_optimization_stage()
    names = []
    for number in range(saved.world):
        name = f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt"  # some of its optimizers put bf16_ before it
        names.append(next(iter(folder.glob(f"*{name}")), folder / name))
    shapes = None
    if saved.zero_stage == 3:
        shapes = _section(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", "param_shapes")
    world = dist.get_world_size(engine.optimizer.dp_process_group)
    if world == saved.world and (stage == 3) == (saved.zero_stage == 3):
        own: dict[str, Any] = _section(names[rank], "optimizer_state_dict")
        if stage == 3 and shapes == engine._get_zero_param_shapes():
            return with_own_scaler(engine.optimizer, own)
        if stage < 3 and own["param_slice_mappings"] == engine.optimizer._param_slice_mappings:
            return with_own_scaler(engine.optimizer, own)
    print_rank0(
        f"resume: the optimizer of {saved.world} ranks under ZeRO-{saved.zero_stage} is split "
        f"again for {world} under ZeRO-{stage}"
    )
    saved_states = [_section(name, "optimizer_state_dict") for name in names]
    weights, states = cut(saved_shards(saved_states, saved, shapes), *own_pieces(engine), folder)
    scaler = ("loss_scaler", "dynamic_loss_scale", "overflow")
    common = {k: saved_states[0][k] for k in scaler if k in saved_states[0]}
    return with_own_scaler(engine.optimizer, _as_deepspeeds(engine, weights, states, common))


def _section(file: Path, name: str) -> Any:
    content = read_file(file, types=SHARD_TYPES)
    if not isinstance(content, dict) or name not in content:
        raise ConfigError(f"{file}: holds no '{name}', and is not DeepSpeed's; name another checkpoint.")
    return content[name]


def _as_deepspeeds(engine: Any, weights: list[Tensor], states: dict[int, Any], common: dict[str, Any]) -> Any:
    """A shard as the running optimizer's own `state_dict` would give it."""
    state = {**engine.optimizer.state_dict(), **common}
    inner, flat = shard_keys(engine.zero_optimization_stage())
    groups = state[inner]["param_groups"]
    return {**state, inner: {"state": states, "param_groups": groups}, flat: weights}


def restore_rng(run: RunState, args: argparse.Namespace) -> None:
    """Restore this rank's random numbers; on another number of ranks, seed others."""
    saved = run.resumed
    assert saved is not None
    if saved.world == dist.get_world_size():
        assert run.random is not None
        rng.restore(run.random)
        run.random = None  # and with it the mapped file
        return
    ranks = f"{dist.get_world_size()} ranks continue a run of {saved.world}"
    print_rank0(f"resume: {ranks}: the same data, other random numbers")
    rng.seed(abs(int(args.seed)), saved.micro_steps, dist.get_rank())
