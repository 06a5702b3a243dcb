"""The one reader of CogVideo's `model` section: its network, and the whole as a `ModelConfig` of ours.

CogVideo has two generations, which the network's `patch_size` tells apart: a number in CogVideoX 1.0 (tag v1.0 of
the repository), three numbers in 1.5 (its main branch)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

from sat_ext.config import load
from sat_ext.errors import ConfigError
from sat_ext.models.config import FirstStageConfig, ModelConfig, TextConfig, TrainConfig, TransformerConfig

OURS = "sat_ext.cogvideo."  # what the names of our targets begin with
LOSS = OURS + "JointDiffusionLoss"
SAMPLER = OURS + "PaddedSampler"
ROTARY, SINUSOIDAL = OURS + "InterpolatedRotaryPositionEmbedding", OURS + "SinusoidalPositionEmbedding"
CACHED_FIRST_STAGE, CHUNKED_FIRST_STAGE = OURS + "CachedFirstStage", OURS + "ChunkedFirstStage"
CACHED_TEXT, OFFLOADED_TEXT = OURS + "CachedTextEmbedder", OURS + "OffloadedTextEmbedder"
PRETRAINED = "CogVideo"  # in `pretrained`: its own checkpoints, whose sizes are the published models'


class Component(NamedTuple):
    """A part of the `model` section, which `instantiate_from_config` builds; empty where the YAML has none."""

    target: str
    params: Mapping[str, Any]


def component_of(parts: Mapping[str, Any], name: str) -> Component:
    """The part of this name."""
    return _component(parts.get(name))


def text_embedder(model: Mapping[str, Any]) -> Component:
    """The entry of `emb_models` that embeds captions."""
    models: Sequence[Any] = component_of(model, "conditioner_config").params.get("emb_models") or []
    return _component(next((m for m in models if m.get("input_key", "txt") == "txt"), None))


def _component(config: Any) -> Component:
    config = config or {}
    return Component(str(config.get("target", "")), config.get("params") or {})


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network of CogVideo's `model` section; None where the YAML leaves a value out.

    `patch` is (frames, rows, columns) in latents. `num_frames` (of pixels), `latent_height` and `latent_width` are
    the size that the network is built for. `lora_rank` is 0 where `lora_config` leaves it out."""

    target: str
    generation: str | None
    patch: tuple[int, int, int]
    num_layers: int | None = None  # those with a default have the same names in `params` of the YAML
    num_attention_heads: int | None = None
    hidden_size: int | None = None
    in_channels: int | None = None
    out_channels: int | None = None
    time_embed_dim: int | None = None
    ofs_embed_dim: int | None = None
    num_frames: int | None = None
    latent_height: int | None = None
    latent_width: int | None = None
    text_hidden_size: int | None
    text_length: int | None
    position: str
    height_interpolation: float
    is_rotary: bool
    is_learned: bool
    makes_condition: bool
    final_layer: str
    lora_rank: int | None
    lora_alpha: float
    model_parallel_size: int
    recomputes: bool

    @property
    def is_conditioned(self) -> bool:
        """Whether the model is image-to-video. From a cache, its engine makes no condition for its network."""
        twice = self.out_channels is not None and self.in_channels == 2 * self.out_channels
        return self.makes_condition or twice


def read_network(model: Mapping[str, Any], where: str = "model") -> Network:
    """The network of CogVideo's `model` section, which is at `where` in the YAML. Raises `ConfigError` where there
    is none, for a size that is not a whole number above 0, and for a `patch_size` of neither generation."""
    if "network_config" not in (model or {}):
        raise ConfigError(f"{where}.network_config: missing; use CogVideo's own YAML of the model.")
    where = f"{where}.network_config.params"
    target, params = component_of(model, "network_config")
    modules = params.get("modules") or {}
    position, lora = component_of(modules, "pos_embed_config"), component_of(modules, "lora_config").params
    transformer = params.get("transformer_args") or {}
    patch = params.get("patch_size", 2)
    three = list(patch) if isinstance(patch, Sequence) and not isinstance(patch, str) else [1, patch, patch]
    if len(three) != 3 or not all(isinstance(p, int) and p > 0 for p in three):
        raise ConfigError(
            f"{where}.patch_size: {patch!r} is neither a number (CogVideoX 1.0) nor three (1.5); use CogVideo's "
            "own YAML of the model."
        )
    sizes = {
        **{f.name: params[f.name] for f in fields(Network) if f.default is None and f.name in params},
        "text_hidden_size": component_of(modules, "patch_embed_config").params.get("text_hidden_size"),
        "text_length": position.params.get("text_length"),
    }
    values = {
        "target": target,
        "generation": None if "patch_size" not in params else "1.0" if isinstance(patch, int) else "1.5",
        "patch": three,
        "position": position.target,
        "height_interpolation": position.params.get("height_interpolation", 1.0),
        "is_rotary": "hidden_size_head" in position.params,
        "is_learned": bool(position.params.get("learnable_pos_embed")),
        "makes_condition": bool(model.get("noised_image_input")),
        "final_layer": component_of(modules, "final_layer_config").target,
        "lora_rank": lora.get("r", 0) if "lora_config" in modules else None,
        "lora_alpha": lora.get("lora_alpha", 1),
        "model_parallel_size": transformer.get("model_parallel_size", 1),
        "recomputes": bool(transformer.get("checkpoint_activations")),
    }
    network = load(Network, {**values, **sizes}, where)
    for name in sizes:
        size = getattr(network, name)
        if size is not None and size < 1:
            raise ConfigError(f"{where}.{name}: {size}; use a number above 0.")
    return network


def transformer_values(network: Network, where: str = "model") -> dict[str, Any]:
    """The transformer's architecture under the names of diffusers' config.json. Raises `ConfigError` where the
    `model` section at `where` is incomplete."""
    given = partial(given_in, network, where)
    given("generation")
    return {
        "num_layers": given("num_layers"),
        "num_attention_heads": given("num_attention_heads"),
        "attention_head_dim": given("hidden_size") // given("num_attention_heads"),
        "in_channels": given("in_channels"),
        "out_channels": given("out_channels"),
        "time_embed_dim": network.time_embed_dim or given("hidden_size"),
        "ofs_embed_dim": network.ofs_embed_dim,
        "text_embed_dim": given("text_hidden_size"),
        "max_text_seq_length": given("text_length"),
        "sample_height": given("latent_height"),
        "sample_width": given("latent_width"),
        "sample_frames": given("num_frames"),
        "patch_size": network.patch[1],
        "patch_size_t": None if network.generation == "1.0" else network.patch[0],
        "spatial_interpolation_scale": network.height_interpolation,
        "use_learned_positional_embeddings": network.is_learned,
    }


def given_in(network: Network, where: str, name: str) -> Any:
    """A value of the network. Raises `ConfigError` where the `model` section at `where` leaves it out."""
    value = getattr(network, name)
    if value is None:
        key = "patch_size" if name == "generation" else name
        raise ConfigError(
            f"{where}.network_config.params: '{key}' is missing; use CogVideo's YAML of the model, such as "
            "configs/cogvideox_5b.yaml."
        )
    return value


def model_config(model: Mapping[str, Any]) -> ModelConfig:
    """CogVideo's `model` section as ours: the same architecture, and the levers that are set."""
    network = read_network(model)
    stage, text = component_of(model, "first_stage_config"), text_embedder(model)
    chunked = stage.target == CHUNKED_FIRST_STAGE
    device = text.params.get("device", "on_off") if text.target == OFFLOADED_TEXT else "gpu"
    values = {**transformer_values(network), "use_rotary_positional_embeddings": network.is_rotary}
    together = stage.params.get("clips", 1) if chunked else model.get("en_and_decode_n_samples_a_time")
    return ModelConfig(
        pretrained=PRETRAINED,
        conditioning="i2v" if network.makes_condition else "none",
        transformer=load(TransformerConfig, values, "model.network_config"),
        first_stage=FirstStageConfig(slicing=together == 1, frames=int(stage.params.get("frames", 8))),
        text=load(TextConfig, {"device": device}, "model.conditioner_config"),
        train=TrainConfig(mode="full" if network.lora_rank is None else "lora", rank=int(network.lora_rank or 1)),
        gradient_checkpointing=network.recomputes,
    )
