"""What the transformer holds of a micro-batch while it trains, with the checkpointing of the YAML. Pure but for
measuring one block, as all are alike."""

from dataclasses import dataclass

from sat_ext.memory.measured import training_step
from sat_ext.memory.run import Run
from sat_ext.types import Bucket


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of a micro-batch.

    `on_gpu` is the most that the backward pass holds beside weights and the gradients of weights, when none of
    these is there yet. `at_end` and all gradients are the most in the last block that it comes to. `on_host`:
    inputs of blocks that wait in CPU memory, an entry each.
    """

    on_gpu: int
    at_end: int
    on_host: tuple[int, ...] = ()


def activations(run: Run, bucket: Bucket) -> Activations:
    """The transformer's part of a training step of `bucket`.

    Recomputed blocks hold their inputs until their turn; the first in the backward pass is recomputed while all
    others still wait.
    """
    step, layers, checkpointing = (
        training_step(run, bucket),
        run.model.transformer.num_layers,
        run.checkpointing,
    )
    if checkpointing is None:
        return Activations(on_gpu=step.peak + (layers - 1) * step.saved, at_end=step.at_end)
    recomputed = -(-layers // checkpointing.every)
    # the block that the backward pass comes to first is in `step.peak`, recomputed or kept
    is_kept = (layers - 1) % checkpointing.every > 0
    kept, waiting = layers - recomputed - is_kept, recomputed - (not is_kept)
    if checkpointing.offload:  # of those that wait, the inputs of one block are on their way back
        waiting = min(waiting, 1)
    return Activations(
        on_gpu=step.peak + waiting * sum(step.inputs) + kept * step.saved,
        at_end=step.at_end,
        on_host=step.inputs * recomputed if checkpointing.offload else (),
    )
