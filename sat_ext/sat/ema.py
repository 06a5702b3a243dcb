"""An exponential moving average of the trained weights. The optimizer keeps it beside Adam's moments, so ZeRO
shards it, offload moves it to the CPU, and full checkpoints restore it, as they do the moments."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sat_ext.checkpoint.layout import AVERAGE_NAME
from sat_ext.errors import ConfigError
from sat_ext.sat.checkpoint.matching import is_trained
from sat_ext.sat.checkpoint.partitions import gather_weights
from sat_ext.sat.run import run_of

EMA = "ema"  # the average's key in the optimizer's state of a weight


class EmaAdamW(torch.optim.AdamW):
    """AdamW that averages each weight in `state[weight]["ema"]`. With ZeRO or in half precision, DeepSpeed passes
    its fp32 masters as the weights.

    The average starts as the weight before its first update. Update t moves it towards the new weight by
    1 - min(ema_decay, (1 + t) / (10 + t)). The rule, its warm-up and the default decay are those of SAT's
    FusedEmaAdam (`sat/ops/fused_ema_adam.py`)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ema_decay: float = 0.9999,
        fused: bool | None = True,  # on the CPU too: an offloaded optimizer is bound by passes over memory
    ) -> None:
        if not 0.0 <= ema_decay < 1.0:
            raise ConfigError(
                f"deepspeed.optimizer.params.ema_decay: {ema_decay}; use 0 or more, and less than 1 (0.9999)."
            )
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights that have a gradient, and their averages."""
        weights = [w for group in self.param_groups for w in group["params"] if w.grad is not None]
        # not in `state` yet: AdamW makes its moments only where a weight has no state at all
        firsts = {w: w.detach().clone() for w in weights if EMA not in self.state[w]}
        loss = super().step(closure)
        for weight in weights:
            state = self.state[weight]
            if weight in firsts:
                state[EMA] = firsts.pop(weight)
            step = float(state["step"])  # in every checkpoint, so a resumed run does not warm up again
            state[EMA].lerp_(weight, 1 - min(self.ema_decay, (1 + step) / (10 + step)))
        return loss


@contextmanager
def averaged(engine: Any) -> Iterator[None]:
    """Inside, the model of DeepSpeed's `engine` has the averaged weights, in the training dtype; afterwards it has
    its own again, bit for bit. Takes no memory. Every rank must call it."""
    _exchange(engine)
    yield
    _exchange(engine)  # not in a `finally`: after an error this rank would wait for others that do not come


@torch.no_grad()
def _exchange(engine: Any) -> None:
    """Swap weights and averages in the optimizer, and copy its weights to the model, as DeepSpeed does after an
    update. The model's are always the optimizer's, rounded, so the second call restores them."""
    for weight, state in engine.basic_optimizer.state.items():
        if EMA in state:  # there is none before the first update
            weight.data, state[EMA] = state[EMA], weight.data
    optimizer = engine.optimizer
    if engine.zero_optimization_partition_weights():
        optimizer.checkpoint_event_prologue()  # drops gathered weights, which would hide the new shards
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # gathers the small ones that stay on every rank
    elif hasattr(optimizer, "update_lp_params"):  # ZeRO-1 and 2
        optimizer.update_lp_params()
    else:  # without ZeRO; in fp32 the optimizer has the model's own
        groups = zip(getattr(optimizer, "fp32_groups", ()), getattr(optimizer, "fp16_groups", ()), strict=True)
        for master, weight in (pair for group in groups for pair in zip(*group, strict=True)):
            weight.copy_(master)


def on_average(
    evaluate: Callable[..., Any], data: Any, model: Any, eval_iters: int, args: argparse.Namespace, *rest: Any,
    **options: Any,
) -> Any:  # fmt: skip
    """An evaluation of the averaged weights, with `args.evaluate_ema`."""
    if not run_of(args).settings.evaluate_ema:
        return evaluate(data, model, eval_iters, args, *rest, **options)
    with averaged(model):
        return evaluate(data, model, eval_iters, args, *rest, **options)


def save_average(model: Any, folder: Path, write: Callable[[Any, Path], None] = torch.save) -> None:
    """Write the averaged weights, if the optimizer keeps them, into a checkpoint's folder, whole and by name: the
    shards need DeepSpeed to be read. Every rank must call it."""
    if not isinstance(model.basic_optimizer, EmaAdamW):
        return
    trained = {name for name, parameter in model.module.named_parameters() if is_trained(parameter)}
    with averaged(model):
        weights = gather_weights(model.module, trained.__contains__)
    if dist.get_rank() == 0:
        write({"module": weights}, folder / AVERAGE_NAME)
