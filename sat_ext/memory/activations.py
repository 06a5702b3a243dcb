"""What the transformer holds of a micro-batch while it trains. Pure.

Counted on diffusers' `CogVideoXBlock` and `CogVideoXAttnProcessor2_0` (0.42), operation by operation, in units of
one hidden state of all tokens; `tests/test_memory_activations.py` runs the real blocks of the published sizes on
tensors without memory and compares. With w the width, a block saves for the backward pass, of each token:

| saved | widths | where |
|---|---|---|
| inputs of the two modulated norms | 2 | always |
| q and k before their norms; q, k, v and the output, of attention | 6 | always |
| input of the GELU | 4 | always |
| input of q, k, v (one tensor), output of attention as to_out takes it | 1 + 1 | where these layers train |
| input of the first, of the second linear layer of the feed-forward | 1 + 4 | where these layers train |
| outputs of the norms; what the two gates multiply | 2 + 2 | where the modulation trains (`full`) |

and fp32 statistics: two numbers of each norm's row, one log-sum-exp of each head and token. A LoRA adds its rank
for each layer. So a block saves 14 widths with a LoRA on the attention, and 23 where everything trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sat_ext.memory.run import Run, Sizes
from sat_ext.models.config import transformer_of

STATISTIC = 4  # bytes: CUDA's layer norm and attention keep them in fp32 whatever the dtype
ALWAYS = 12
ATTENTION_INPUTS = ("to_q", "to_k", "to_v")
FEED_FORWARD = 4  # widths of its inner layer


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of a micro-batch.

    `on_gpu` is the most that the backward pass holds beside weights and the gradients of weights, when none of
    these is there yet; `at_end` the most in the last block that it comes to. `on_host`: block inputs that wait in
    CPU memory.
    """

    on_gpu: int
    at_end: int
    on_host: int


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block: bytes of its input, of what it saves, and of what its backward pass holds on top at its peak."""

    input: int
    saved: int
    backward: int


def activations(run: Run, size: Sizes, statistic: int = STATISTIC) -> Activations:
    """The transformer's part of a training step on `size`.

    Recomputed blocks hold their inputs until their turn; the first in the backward pass is recomputed while all
    others still wait. `statistic` is the bytes of a norm's statistic.
    """
    one, layers = block(run, size, statistic), transformer_of(run.model).num_layers
    around = _around(run, size)
    checkpointing = run.checkpointing
    if checkpointing is None:
        on_gpu = layers * one.saved + one.backward
        return Activations(on_gpu=around + on_gpu, at_end=around + one.saved + one.backward, on_host=0)
    recomputed = -(-layers // checkpointing.every)
    whole = (layers - recomputed) * one.saved
    waiting, on_host = (recomputed - 1) * one.input, 0
    if checkpointing.offload:  # one that is recomputed, one on its way
        waiting, on_host = min(recomputed - 1, 1) * one.input, recomputed * one.input
    peak = around + one.saved + one.backward
    return Activations(on_gpu=peak + waiting + whole, at_end=peak, on_host=on_host)


def block(run: Run, size: Sizes, statistic: int = STATISTIC) -> Block:
    """One block of the transformer on `size`."""
    transformer, train = transformer_of(run.model), run.model.train
    heads = transformer.num_attention_heads
    width = heads * transformer.attention_head_dim
    targets: Sequence[str] = train.target_modules if run.lora else ("to_q", "to_out.0", "net.0.proj", "net.2")
    modulated = not run.lora
    second = any(t.endswith("net.2") for t in targets)
    widths = ALWAYS
    widths += any(t.endswith(ATTENTION_INPUTS) for t in targets)
    widths += any(t.endswith("to_out.0") for t in targets)
    widths += any(t.endswith(("net.0.proj", "proj")) for t in targets)
    widths += FEED_FORWARD * second + 4 * modulated
    numbers = size.tokens * (widths * width + (train.rank * len(targets) if run.lora else 0))
    statistics = size.tokens * (2 * 2 + 2 * 2 * heads) * statistic + 4 * size.tokens * heads
    state = size.tokens * width * run.itemsize
    # at the peak: gradients of the block's output, and either of the feed-forward's output and of its inner layer,
    # or of the inner layer before and after the GELU; the gates' and the second layer's inputs are gone by then
    backward = max(6 - modulated, 9 - modulated - FEED_FORWARD * second) * state
    return Block(input=state, saved=numbers * run.itemsize + statistics, backward=backward)


def _around(run: Run, size: Sizes) -> int:
    """Beside the blocks: latents, noise, target and prediction in fp32, inputs, captions, rotary tables."""
    transformer = transformer_of(run.model)
    video = size.samples * size.latents
    captions = size.samples * size.text * transformer.text_embed_dim * run.itemsize
    rotary = 2 * size.video * transformer.attention_head_dim * 4
    return (
        6 * 4 * video + 3 * run.itemsize * video + captions + rotary * transformer.use_rotary_positional_embeddings
    )
