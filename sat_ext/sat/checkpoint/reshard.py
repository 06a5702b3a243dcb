"""The optimizer's shards, split again for another number of ranks or another ZeRO stage.

Both layouts say which values of each flattened parameter lie in each shard, and where. So a new shard takes its
pieces by name, whatever the order and the groups. Files are mapped: a rank reads only what it needs.

- ZeRO 1 and 2 concatenate the parameters of a group and cut the result into as many parts as ranks;
  `param_slice_mappings` of a shard says what of each parameter is in it.
- ZeRO 3 cuts each parameter of n values into pieces of ceil(n / ranks); the last ones are shorter or empty."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sat_ext.checkpoint.manifest import Manifest
from sat_ext.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Piece:
    """Values `start` to `start + numel` of a shard's group: `first` to `first + numel` of a parameter."""

    name: str
    group: int
    start: int
    first: int
    numel: int


@dataclass
class Shard:
    """Of one rank, by group: its flat fp32 weights and optimizer state, and where each parameter lies in them.
    `paddings`: how much longer the state may be than the weights, whose padding DeepSpeed does not save."""

    weights: list[Tensor]
    states: dict[int, dict[str, Any]]
    pieces: list[Piece]
    paddings: list[int] | None = None


def shard_keys(stage: int) -> tuple[str, str]:
    """Under which keys DeepSpeed saves the state of PyTorch's optimizer, and the flat fp32 weights."""
    if stage == 3:
        return "optimizer_state_dict", "fp32_flat_groups"
    return "base_optimizer_state", "single_partition_of_fp32_groups"


def saved_shards(states: list[Any], saved: Manifest, shapes: list[dict[str, torch.Size]] | None) -> list[Shard]:
    """The shards in the `*_optim_states.pt` of all ranks; `shapes`: DeepSpeed's `param_shapes`, under ZeRO-3."""
    shards = []
    inner, flat = shard_keys(saved.zero_stage)
    ends: dict[str, int] = {}  # how far into each parameter the shards so far reach: DeepSpeed does not say
    for rank, state in enumerate(states):
        pieces: list[Piece] = []
        if shapes is not None:
            pieces += _rows([{n: s.numel() for n, s in group.items()} for group in shapes], rank, len(states))
        else:
            for group, mapping in enumerate(state["param_slice_mappings"]):
                for name, part in mapping.items():
                    pieces.append(Piece(name, group, part.start, ends.get(name, 0), part.numel))
                    ends[name] = ends.get(name, 0) + part.numel
        shards.append(Shard(list(state[flat]), state[inner]["state"], pieces, state.get("group_paddings")))
    return shards


def _rows(groups: list[dict[str, int]], rank: int, world: int) -> Iterator[Piece]:
    for group, sizes in enumerate(groups):
        start = 0
        for name, numel in sizes.items():
            length = -(-numel // world)
            yield Piece(name, group, start, rank * length, max(0, min(length, numel - rank * length)))
            start += length


def own_pieces(engine: Any) -> tuple[list[Piece], list[int]]:
    """Where each parameter lies in this rank's shard of the running optimizer, and how long each group is."""
    optimizer, names = engine.optimizer, engine.param_names
    if engine.zero_optimization_stage() == 3:
        groups = [{names[p]: p.ds_numel for p in group} for group in optimizer.fp16_groups]
        rank, world = dist.get_rank(optimizer.dp_process_group), dist.get_world_size(optimizer.dp_process_group)
        return list(_rows(groups, rank, world)), [g.numel() for g in optimizer.fp32_partitioned_groups_flat]
    if hasattr(optimizer, "bf16_groups"):  # DeepSpeed's BF16_Optimizer, of ZeRO-1 with gradients in fp32
        parameters, flat = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    else:
        parameters, flat = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    pieces = []
    for number, group in enumerate(parameters):
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                pieces.append(Piece(names[parameter], number, here.start, there.start, here.numel))
    return pieces, [g.numel() for g in flat]


def cut(
    shards: list[Shard], pieces: list[Piece], sizes: list[int], where: Path
) -> tuple[list[Tensor], dict[int, Any]]:
    """The fp32 weights and the optimizer's state of a new shard, which consists of `pieces` in groups of `sizes`.
    Raises `ConfigError` if the optimizer's state cannot be cut, or is not of a weight that trains now."""
    found: dict[str, list[tuple[Shard, Piece]]] = {}
    for shard in shards:
        for piece in shard.pieces:
            found.setdefault(piece.name, []).append((shard, piece))
    if new := [p.name for p in pieces if p.name not in found]:
        raise ConfigError(
            f"{where}: the optimizer has no state of {len(new)} weights that train now and did not when it was "
            f"saved (first: {new[0]}); train what was trained, or start over with 'mode: finetune'."
        )
    weights = [torch.zeros(size) for size in sizes]
    states: dict[int, dict[str, Any]] = {group: {} for group in range(len(sizes))}
    for piece in pieces:
        sources = found[piece.name]
        overlaps = list(_overlaps(sources, piece))
        for shard, group, here, there in overlaps:
            weights[piece.group][here] = shard.weights[group][there]
        first, saved = sources[0]
        state = states[piece.group]
        for key, value in first.states.get(saved.group, {}).items():
            # a number that differs between shards belongs to weights, and cannot be cut
            others = [shard.states.get(part.group, {}).get(key) for shard, part in sources]
            is_number = value is None or isinstance(value, int | float | str) or getattr(value, "ndim", 1) == 0
            if is_number and all(type(o) is type(value) and bool(o == value) for o in others):
                # cloned: a single number would keep its whole file mapped, and on the disk after its removal
                state.setdefault(key, value.clone() if isinstance(value, Tensor) else value)
                continue
            if not _is_one_per_weight(first, saved.group, value):
                raise ConfigError(
                    f"{where}: the optimizer's '{key}' is not one value per weight, as with 8-bit optimizers, so "
                    "it cannot be split for another number of ranks or ZeRO stage; resume with those it was saved "
                    "with, or reset the optimizer with 'mode: finetune'."
                )
            target = state.setdefault(key, torch.zeros(sizes[piece.group], dtype=value.dtype))
            for shard, group, here, there in overlaps:
                target[here] = shard.states[group][key][there]
    return weights, states


def _is_one_per_weight(shard: Shard, group: int, value: Any) -> bool:
    size = shard.weights[group].numel()
    padded = size + (shard.paddings[group] if shard.paddings else 0)
    return isinstance(value, Tensor) and value.ndim == 1 and value.numel() in (size, padded)


def _overlaps(sources: list[tuple[Shard, Piece]], piece: Piece) -> Iterator[tuple[Shard, int, slice, slice]]:
    """Those of `sources` that overlap `piece`: their shard and group, and the places in the new and old group."""
    for shard, source in sources:
        low = max(piece.first, source.first)
        high = min(piece.first + piece.numel, source.first + source.numel)
        if low < high:
            here, there = piece.start + low - piece.first, source.start + low - source.first
            yield shard, source.group, slice(here, here + high - low), slice(there, there + high - low)
