"""What `sat-ext cache` takes: the text encoder, then the first stage, one sample at a time. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sat_ext.cogvideo.network import PRETRAINED
from sat_ext.memory.counts import count
from sat_ext.memory.host import PROCESS, workers_bytes
from sat_ext.memory.measured import embedding, encoding
from sat_ext.memory.plan import CONTEXT, FRAGMENTATION
from sat_ext.memory.run import Run, with_levers
from sat_ext.memory.weights import text_bytes

CAPTIONS = 16  # that `write_text_embeddings` hands to the encoder at a time

Change = Callable[[Run], Run]


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Bytes of a GPU while captions are embedded (`text`) and while samples are encoded (`first_stage`), and of a
    host with its GPUs. `levers` are lines of YAML with which that is so, beside those of the run."""

    text: int
    first_stage: int
    host: int
    levers: tuple[str, ...] = ()

    @property
    def gpu(self) -> int:
        """The larger of the two: one is let go of before the other is loaded."""
        return max(self.text, self.first_stage)


def plan_cache(run: Run, per_node: int) -> CachePlan:
    """What making the cache of `run` takes, which may train from it, with `per_node` GPUs in each host."""
    run = replace(run, cached=False, cached_text=False, batches=dict.fromkeys(run.batches, 1))
    counts = count(run)
    weights = text_bytes(run, counts)
    together = CAPTIONS if run.model.pretrained == PRETRAINED or run.model.text.device == "gpu" else 1
    captions = max(embedding(replace(run, batches={b: together}), b) for b in run.batches)
    autoencoder = sum(p.numel for p in counts.first_stage) * run.itemsize
    pixels = max(encoding(run, bucket) for bucket in run.batches)
    on_gpu = run.model.text.device != "cpu"
    rank = PROCESS + max(weights, autoencoder + workers_bytes(run))
    return CachePlan(
        text=on_gpu * (CONTEXT + weights + int((1 + FRAGMENTATION) * captions)),
        first_stage=CONTEXT + autoencoder + int((1 + FRAGMENTATION) * pixels),
        host=per_node * rank,
    )


def cache_that_fits(run: Run, per_node: int, gpu_memory: int) -> CachePlan:
    """The plan with the first lever of each encoder with which that fits; without any where nothing does."""
    if run.model.pretrained == PRETRAINED:
        text: Sequence[tuple[str, Change]] = [("configs/cogvideo/offload-text.yaml", _text(device="cpu"))]
        first: Sequence[tuple[str, Change]] = [
            ("configs/cogvideo/joint.yaml (ChunkedFirstStage)", _chunks),
            (
                "configs/cogvideo/joint.yaml, model.first_stage_config.params: {frames: 4, recompute: level}",
                lambda r: replace(_first_stage(frames=4)(_chunks(r)), recompute="level"),
            ),
        ]
    else:
        text = [
            ("model.text.quantization: nf4", _text(device="gpu", quantization="nf4")),
            ("model.text.device: cpu", _text(device="cpu", quantization="none")),
        ]
        first = [
            ("model.first_stage.frames: 4", _first_stage(frames=4)),
            ("model.first_stage.tiling: true", _first_stage(tiling=True)),
        ]
    levers: list[str] = []
    for part, choices in (("text", text), ("first_stage", first)):
        if getattr(plan_cache(run, per_node), part) <= gpu_memory:
            continue
        for name, pull in choices:
            if getattr(plan_cache(pull(run), per_node), part) <= gpu_memory:
                levers.append(name)
                run = pull(run)
                break
    return replace(plan_cache(run, per_node), levers=tuple(levers))


def _text(**values: str) -> Change:
    return lambda run: with_levers(run, text=replace(run.model.text, **values))  # type: ignore[arg-type]


def _first_stage(**values: int) -> Change:
    return lambda run: with_levers(run, first_stage=replace(run.model.first_stage, **values))  # type: ignore[arg-type]


def _chunks(run: Run) -> Run:
    return replace(run, whole_clips=False)
