"""Held-out losses: of the same samples on any number of ranks, and the mean of all wherever they are shown."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from sat import mpu
from torch import Tensor

from sat_ext.models.config import ABSENT
from sat_ext.models.diffusion import sample_seeds
from sat_ext.sat.checkpoint import rng
from sat_ext.sat.run import run_of
from sat_ext.sat.standin import replaced

LISTS = {"val": "valid_data", "test": "test_data"}


def evaluation(_args: argparse.Namespace) -> bool:
    """Symptom: SAT's validation loss, and with it TensorBoard's valid_loss and PPL, is the first rank's alone, and
    CogVideo's is drawn at random, with captions and conditions dropped as in training."""
    return True


def of_all_samples(
    _evaluate: Callable[..., Any], data_iterator: Iterator[Any], model: Any, eval_iters: int,
    args: argparse.Namespace, timers: Any, split: str, *_: Any, hooks: dict[str, Any], **__: Any,
) -> tuple[float, dict[str, Tensor] | None]:  # fmt: skip
    """In place of SAT's: the mean loss over all samples, and on the first rank those of the metrics, each (1,).

    Our stream says how many steps it takes; other data take `eval_iters`."""
    run = run_of(args)
    run.evaluated = split  # for the script's `handle_metrics`, which SAT does not pass it
    listed = run.streams.get(LISTS[split])
    batches = _Counting(data_iterator)
    totals: Tensor | None = None
    model.eval()
    with torch.no_grad(), _sample_by_sample(getattr(model, "module", model)):
        for _step in range(len(listed[0].steps) if listed else eval_iters):
            loss, metrics = hooks["forward_step_eval"](batches, model, args, timers)
            if args.deepspeed and args.deepspeed_activation_checkpointing:
                deepspeed.checkpointing.reset()  # as SAT does: else the backward pass empties its buffers
            named = {**metrics, "": loss}
            step = torch.stack([_counted(named[name], batches.counted) for name in sorted(named)])
            dist.all_reduce(step)  # in each step, so that no rank waits while the first one samples all batches
            totals = step if totals is None else totals + step
    model.train()
    assert totals is not None
    means = {name: (total / n).float() for name, (total, n) in zip(sorted(named), totals) if n}
    loss = float(means.pop(""))
    if dist.get_rank(group=mpu.get_data_parallel_group()) != 0:
        return loss, None
    gathered = {name: mean.reshape(1) for name, mean in means.items()}
    handle: Callable[..., dict[str, Tensor]] | None = hooks["handle_metrics"]
    return loss, gathered if handle is None else handle(gathered)


def _counted(value: Tensor, samples: int) -> Tensor:
    """The sum over `samples` samples, whose mean is `value`, and their number; zeros if nothing was measured."""
    value = value.detach().double().mean()
    if not samples or value == ABSENT:
        return value.new_zeros(2)
    return torch.stack([value, torch.ones_like(value)]) * samples


class _Counting(Iterator[dict[str, Any]]):
    """The batches of an evaluation. `counted` is how many samples of the last one count; it stays 0 on a rank that
    gets its batches from another one of its model."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self.batches, self.counted = batches, 0

    def __next__(self) -> dict[str, Any]:
        batch = dict(next(self.batches))
        # taken out: whatever cuts a batch down, as for samples, expects one value for each sample
        self.counted = batch.pop("counted", len(batch["txt"]))
        return batch


@contextmanager
def _sample_by_sample(engine: Any) -> Iterator[None]:
    """Inside, `shared_step` of a CogVideo engine depends on its samples and the weights alone: each is a batch of
    its own, and its source and key seed what is drawn for it (timestep, noise, posterior, condition)."""
    if not hasattr(engine, "shared_step"):
        yield
        return
    step = engine.shared_step

    def shared_step(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = [], []
        for i, seed in enumerate(_agreed_seeds(batch)):
            rng.seed(seed)
            loss, found = step({name: _only(value, i, len(batch["txt"])) for name, value in batch.items()})
            own = engine.loss_fn.metrics() if hasattr(engine.loss_fn, "metrics") else {}
            losses.append(loss.float())
            metrics.append({**own, **found})
        return torch.stack(losses).mean(), {k: _mean([m[k].float() for m in metrics]) for k in metrics[0]}

    changes: list[tuple[Any, str, Any]] = [
        (engine, "noised_image_dropout", 0.0),
        (engine.conditioner, "cor_embs", []),
        (getattr(engine.loss_fn, "sigma_sampler", None), "uniform_sampling", False),  # a part of the range a rank
    ]
    for embedder in engine.conditioner.embedders:
        changes += [(embedder, "ucg_rate", 0.0), (embedder, "legacy_ucg_val", None)]
    with ExitStack() as stack:
        for owner, name, value in changes:
            if hasattr(owner, name):
                stack.enter_context(replaced(owner, name, value))
        engine.shared_step = shared_step
        stack.callback(delattr, engine, "shared_step")  # the class's own again
        yield


def _agreed_seeds(batch: dict[str, Any]) -> list[int]:
    """A seed for each sample. CogVideo's script gives the keys to the first of the ranks that share a model."""
    if mpu.get_model_parallel_world_size() == 1:
        return sample_seeds(batch)
    own = sample_seeds(batch) if "key" in batch else [0] * len(batch["txt"])
    seeds = torch.tensor(own, device=batch["mp4"].device)
    dist.broadcast(seeds, src=mpu.get_model_parallel_src_rank(), group=mpu.get_model_parallel_group())
    return [int(seed) for seed in seeds]


def _only(value: Any, index: int, count: int) -> Any:
    """One sample's part of a value that has `count` parts; any other value as it is."""
    one_each = isinstance(value, Tensor | list) and len(value) == count
    return value[index : index + 1] if one_each else value


def _mean(values: list[Tensor]) -> Tensor:
    given = [value for value in values if value != ABSENT]
    return torch.stack(given or values).mean()
