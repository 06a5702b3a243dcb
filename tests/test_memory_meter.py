"""What is measured on tensors without memory, against real tensors of small modules, and against whole modules at
the published sizes.

What is published of peaks, for orientation (GB on one GPU): LoRA of CogVideoX-5B-I2V 78 with SAT, 24 with
diffusers' `finetune/`. The weights alone are 11.1 (5.57e9 parameters).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from sat_ext.config import read_yaml
from sat_ext.memory import results
from sat_ext.memory.counts import T5_XXL
from sat_ext.memory.measured import activations, decoding, embedding, encoding, training_step
from sat_ext.memory.meter import metering
from sat_ext.memory.results import remembered
from sat_ext.memory.run import Run, run_from
from sat_ext.models.config import GradientCheckpointing, TextConfig
from sat_ext.models.packs import Group
from sat_ext.models.transformer import build_transformer, rotary_embedding
from sat_ext.recipe import recipe_of
from sat_ext.types import Bucket

CONFIGS = Path(__file__).parent.parent / "configs"
LAYERS = 4
CLIP, STILLS = Bucket(frames=49, height=480, width=720), Bucket(frames=1, height=480, width=720)
NORMS = (nn.LayerNorm, nn.GroupNorm)


def run_of(name: str, mode: str, bucket: Bucket, samples: int = 1, layers: int = LAYERS, **model: Any) -> Run:
    config = read_yaml([str(CONFIGS / "model" / f"{name}.yaml")])
    config["model"]["transformer"]["num_layers"] = layers
    config["model"] |= {"train": {"mode": mode, "rank": 128}, **model}
    config["data"] = {"params": {"video_size": [bucket.height, bucket.width], "max_num_frames": bucket.frames}}
    config["deepspeed"] = {"bf16": {"enabled": True}}
    return replace(run_from(recipe_of(config)), steps={bucket: {bucket: samples}})


@contextmanager
def saved_bytes(module: nn.Module, seen: Callable[[int], None]) -> Iterator[None]:
    """Calls `seen` with the bytes that autograd saved inside, each storage once, without parameters."""
    own = {id(p.untyped_storage()) for p in module.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            saved[id(storage)] = storage  # kept, so that the id is its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    seen(sum(s.nbytes() for s in saved.values()))


def network_of(run: Run, layers: int | None = None) -> Any:
    transformer = run.model.transformer
    model = replace(
        run.model,
        pretrained=None,
        text=TextConfig(kind="byt5"),
        transformer=replace(transformer, num_layers=layers or transformer.num_layers),
    )
    network = build_transformer(model, torch.float32)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not run.lora or "lora_" in name)
    return nn.Module.to(network, torch.bfloat16 if run.itemsize == 2 else torch.float32).train()


def inputs_of(run: Run) -> dict[str, Any]:
    transformer, ((bucket, step),) = run.model.transformer, run.steps.items()
    samples = step[bucket]
    patch = transformer.patch_size_t or 1
    frames = -(-((bucket.frames - 1) // 4 + 1) // patch) * patch
    shape = (frames, transformer.in_channels, bucket.height // 8, bucket.width // 8)
    dtype = torch.bfloat16 if run.itemsize == 2 else torch.float32
    hidden = torch.zeros(samples, *shape, dtype=dtype)
    text = torch.zeros(samples, transformer.max_text_seq_length, transformer.text_embed_dim, dtype=dtype)
    group = Group(
        latents=hidden,
        text=text,
        timesteps=torch.zeros(samples, dtype=torch.long),
        rotary=rotary_embedding(run.model, frames, *shape[2:], hidden.device),
    )
    return {"groups": [group], "ofs": None if transformer.ofs_embed_dim is None else 2.0}


@dataclass
class Whole:
    """A training step of all blocks, with the levers of the run: the peak of its backward pass, and the gradients
    of weights at its end."""

    peak: int
    gradients: int

    @classmethod
    def of(cls, run: Run) -> Whole:
        with torch.device("meta"):
            network = network_of(run)
        with metering(network) as meter:
            before = meter.mark()
            loss = network(**inputs_of(run))[0].float().square().mean()
            meter.mark()
            loss.backward()
            gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
            return cls(meter.peak - before, gradients)


PUBLISHED = ("cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox-1.5-5b-i2v")


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("bucket", "samples"), [(CLIP, 1), (STILLS, 3)])
def test_each_block_saves_as_much_as_the_one_that_is_measured(
    name: str, mode: str, bucket: Bucket, samples: int
) -> None:
    run = run_of(name, mode, bucket, samples, gradient_checkpointing=False)
    found: list[int] = []
    for layers in (2, 5):
        with torch.device("meta"):
            network = network_of(run, layers)
        with metering(network), saved_bytes(network, found.append):
            network(**inputs_of(run))
    assert training_step(run, bucket).saved == pytest.approx((found[1] - found[0]) / 3, rel=0.001)


@pytest.mark.parametrize(
    ("mode", "checkpointing"),
    [("lora", False), ("lora", True), ("lora", {"every": 2}), ("full", False), ("full", True)],
)
@pytest.mark.parametrize("name", PUBLISHED[1:])
def test_the_peak_of_the_backward_pass(name: str, mode: str, checkpointing: Any) -> None:
    run = run_of(name, mode, CLIP, gradient_checkpointing=checkpointing)
    found, measured = activations(run, CLIP), Whole.of(run)
    assert max(found.on_gpu, found.at_end + measured.gradients) == pytest.approx(measured.peak, rel=0.05)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize(("samples", "frames", "size"), [(1, 9, 64), (3, 1, 96), (2, 5, 64)])
def test_small_blocks_for_real(mode: str, item: int, samples: int, frames: int, size: int) -> None:
    """What autograd saves on this machine. Attention on a CPU saves what flash attention on a GPU does."""
    bucket = Bucket(frames=frames, height=size, width=size)
    found: list[int] = []
    run = replace(run_of("tiny", mode, bucket, samples), itemsize=item)
    halved = 0  # bytes of the norms' statistics, which on a CPU are in the dtype of their input
    for layers in (2, 3):
        network = network_of(run, layers)
        if layers == 3 and item == 2:
            halved = statistics_of(network.transformer_blocks[-1], partial(network, **inputs_of(run)))
        with saved_bytes(network, found.append):
            network(**inputs_of(run))
    assert training_step(run, bucket).saved - halved == pytest.approx(found[1] - found[0], rel=0.02)


def statistics_of(block: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of the mean and deviation of each row that `block`'s norms normalize, in 16 bits."""
    rows: list[int] = []
    hooks = [
        norm.register_forward_hook(lambda norm, inputs, _: rows.append(inputs[0].numel() // inputs[0].shape[-1]))
        for norm in block.modules()
        if isinstance(norm, NORMS)
    ]
    forward()
    for hook in hooks:
        hook.remove()
    return sum(rows) * 2 * 2


def test_quantized_weights_are_measured_as_they_compute() -> None:
    run = run_of("cogvideox-5b-i2v", "lora", CLIP)
    quantized = replace(run, model=replace(run.model, train=replace(run.model.train, quantization="nf4")))
    assert training_step(quantized, CLIP).saved == training_step(run, CLIP).saved


def test_offloaded_checkpoints_wait_on_the_host() -> None:
    run = run_of("cogvideox-5b-i2v", "lora", CLIP, layers=42)
    offloading = replace(run, model=replace(run.model, gradient_checkpointing=GradientCheckpointing(offload=True)))
    kept, offloaded = (activations(r, CLIP) for r in (run, offloading))
    inputs = sum(training_step(run, CLIP).inputs)
    assert inputs == 17_776 * 3072 * 2
    assert (sum(kept.on_host), sum(offloaded.on_host)) == (0, 42 * inputs)
    assert kept.on_gpu - offloaded.on_gpu == 40 * inputs  # 41 waited; one is on its way


def test_every_second_block_keeps_what_it_needs() -> None:
    run = run_of("cogvideox-5b-i2v", "lora", CLIP, layers=42)
    half = replace(run, model=replace(run.model, gradient_checkpointing=GradientCheckpointing(every=2)))
    one = training_step(run, CLIP)
    # the last block is kept; it is the first in the backward pass, where the other way it is recomputed
    assert activations(half, CLIP).on_gpu - activations(run, CLIP).on_gpu == 20 * (one.saved - sum(one.inputs))


def encoding_run(bucket: Bucket, samples: int = 1, **first_stage: Any) -> Run:
    model = {**read_yaml([str(CONFIGS / "model/cogvideox-5b.yaml")])["model"], "first_stage": first_stage}
    data = {"params": {"video_size": [bucket.height, bucket.width], "max_num_frames": bucket.frames}}
    run = run_from(recipe_of({"model": model, "data": data, "deepspeed": {"bf16": {"enabled": True}}}))
    return replace(run, steps={bucket: {bucket: samples}})


def autoencoder(run: Run) -> AutoencoderKLCogVideoX:
    kinds = {f"{k}_block_types": (f"CogVideoX{k.title()}Block3D",) * 4 for k in ("down", "up")}
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX(block_out_channels=(128, 256, 256, 512), latent_channels=16, **kinds)
    first = run.model.first_stage
    vae.use_tiling, vae.use_slicing, vae.num_sample_frames_batch_size = first.tiling, first.slicing, first.frames
    return nn.Module.to(vae.eval().requires_grad_(False), torch.bfloat16)


@pytest.mark.parametrize(
    ("frames", "height", "width", "samples", "levers"),
    [
        (49, 480, 720, 1, {}),
        (1, 480, 720, 1, {}),
        (17, 480, 720, 2, {}),
        (49, 480, 720, 1, {"frames": 4}),
        (49, 480, 720, 2, {"slicing": True}),
        (1, 480, 720, 11, {"slicing": True}),
        (17, 480, 720, 1, {"tiling": True}),
        (17, 768, 1360, 1, {}),  # its convolutions are done in parts
    ],
)
def test_encoding(frames: int, height: int, width: int, samples: int, levers: dict[str, Any]) -> None:
    bucket = Bucket(frames=frames, height=height, width=width)
    run = encoding_run(bucket, samples, **levers)
    vae = autoencoder(run)
    with metering(vae) as meter, torch.no_grad():
        before = meter.mark()
        pixels = torch.empty(samples, 3, frames, height, width, dtype=torch.bfloat16)
        vae.encode(pixels).latent_dist.sample()
        peak = meter.peak - before
    as_bytes = pixels.numel()  # uint8, as they came
    assert encoding(run, bucket) == pytest.approx(peak + as_bytes, rel=0.02)


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_decoding_in_tiles(frames: int) -> None:
    bucket = Bucket(frames=frames, height=304, width=432)  # two tiles each way
    run = encoding_run(bucket, tiling=True)
    run = replace(run, model=replace(run.model, sampling=replace(run.model.sampling, number=1)))
    vae = autoencoder(run)
    with metering(vae) as meter, torch.no_grad():
        before = meter.mark()
        vae.decode(torch.empty(1, 16, (frames - 1) // 4 + 1, 38, 54, dtype=torch.bfloat16))
        peak = meter.peak - before
    assert decoding(run, bucket) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("samples", [1, 11])
def test_captions(samples: int) -> None:
    bucket = Bucket(frames=1, height=480, width=720)
    run = encoding_run(bucket, samples)
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**{**T5_XXL, "num_layers": 4})).eval().requires_grad_(False)
    with metering(nn.Module.to(encoder, torch.bfloat16)) as meter, torch.no_grad():
        before = meter.mark()
        encoder(torch.zeros(samples, 226, dtype=torch.long))
        peak = meter.peak - before
    assert embedding(run, bucket) == pytest.approx(peak, rel=0.05)


def test_the_first_stage_of_tiny_models_is_measured_too() -> None:
    bucket = Bucket(frames=9, height=64, width=64)
    run = run_of("tiny", "full", bucket, samples=2)
    pixels = 2 * 9 * 3 * 64 * 64
    assert 2 * 4 * pixels < encoding(run, bucket) < 10 * 4 * pixels
    assert embedding(run, bucket) > 0


def test_what_is_cached_or_on_the_cpu_has_no_peak() -> None:
    bucket = Bucket(frames=49, height=480, width=720)
    cached = replace(encoding_run(bucket), cached=True, cached_text=True)
    assert encoding(cached, bucket) == embedding(cached, bucket) == 0
    run = encoding_run(bucket)
    on_cpu = replace(run, model=replace(run.model, text=replace(run.model.text, device="cpu")))
    assert embedding(on_cpu, bucket) == 0 < embedding(run, bucket)


@dataclass(frozen=True)
class Pair:
    """What `remembered` may keep."""

    low: int
    high: tuple[int, ...]


def test_what_was_measured_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAT_EXT_CACHE", str(tmp_path))
    measured: list[int] = []

    def measure(number: int) -> Pair:
        measured.append(number)
        return Pair(number, (number, 2 * number))

    assert [remembered(measure)(n) for n in (3, 4, 3)] == [Pair(3, (3, 6)), Pair(4, (4, 8)), Pair(3, (3, 6))]
    assert measured == [3, 4]  # each look-up is of another process, so to say
    (file,) = (f for f in (tmp_path / "memory").iterdir() if json.loads(f.read_text())["low"] == 3)
    for broken in ("", "[1]", '{"low": 3}', json.dumps({**asdict(Pair(3, ())), "other": 1})):
        file.write_text(broken)
        assert remembered(measure)(3) == Pair(3, (3, 6))
    assert measured == [3, 4, 3, 3, 3, 3]
    monkeypatch.setattr(results, "_fingerprint", lambda: "another version of a library")
    remembered(measure)(3)
    assert measured == [3, 4, 3, 3, 3, 3, 3]


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAT_EXT_CACHE", str(tmp_path / "file"))

    def measure(number: int) -> int:
        return 2 * number

    assert remembered(measure)(3) == 6
