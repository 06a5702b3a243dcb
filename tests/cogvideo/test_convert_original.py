"""Converted weights against CogVideo's own modules: the same input gives the same output in the built-in engine.

Random weights of every model that the checkout's code can build, narrow; the tensors' names, positions and LoRA
are those of the real modules.
"""

from __future__ import annotations

import tempfile
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import in_checkout
import tiny

EXACT = 2e-5  # float32: the last norm's epsilon is 1e-6 in CogVideo's network and 1e-5 in diffusers'
EQUAL = 1e-6  # float32, when it is not
ROUNDED = 8e-3  # bfloat16: 2 ** -9 each for the sums of some ten layers
SCALE = 0.7


@lru_cache(maxsize=1)
def started(sat: Path) -> Path:
    """A folder for this process, after SAT's groups of one rank are made."""
    from sat import mpu
    from sgm.util import initialize_context_parallel
    from torch import distributed

    distributed.init_process_group("gloo")
    mpu.initialize_model_parallel(1)
    initialize_context_parallel(1)
    return Path(tempfile.mkdtemp())


def shaken(module: Any, deviation: float) -> Any:
    """The module with every weight moved, also those that begin as zeros; positions that never train stay."""
    import torch

    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or "pos_embedding" not in name:
            parameter.data += deviation * torch.randn_like(parameter)
    return module.eval()


@cache
def network(sat: Path, name: str) -> Any:
    """CogVideo's network of a configuration, and its folder in SAT's layout with the YAML beside."""
    import torch
    from omegaconf import OmegaConf
    from sgm.util import instantiate_from_config

    folder = started(sat) / name
    tree = tiny.model(sat, name, folder)
    config = OmegaConf.create(tree["model"]["network_config"])
    config.params.dtype = "fp32"
    torch.manual_seed(0)
    made = shaken(instantiate_from_config(config), 0.15)
    (folder / "sat" / "transformer" / "1").mkdir(parents=True)
    (folder / "sat" / "transformer" / "latest").write_text("1")
    weights = {f"model.diffusion_model.{n}": t for n, t in made.state_dict().items()}
    torch.save({"module": weights}, folder / "sat" / "transformer" / "1" / "mp_rank_00_model_states.pt")
    tiny.write_yaml(folder / "model.yaml", tree)
    return made, folder


@lru_cache(maxsize=1)
def autoencoder(sat: Path) -> Any:
    """CogVideo's autoencoder, and its file."""
    import torch
    from omegaconf import OmegaConf
    from sgm.util import instantiate_from_config

    folder = started(sat)
    config = OmegaConf.create(tiny.model(sat, tiny.model_names(sat)[0], folder)["model"]["first_stage_config"])
    config.params.ckpt_path = None
    torch.manual_seed(0)
    made = shaken(instantiate_from_config(config), 0.02)
    torch.save({"state_dict": made.state_dict()}, folder / "3d-vae.pt")
    return made, folder / "3d-vae.pt"


@cache
def converted(sat: Path, name: str) -> Path:
    """diffusers' folder of a model, both parts."""
    from sat_ext.config import read_yaml
    from sat_ext.convert.convert import convert
    from sat_ext.convert.parts import ConvertOptions as Options

    _, folder = network(sat, name)
    _, file = autoencoder(sat)
    options = Options(base=read_yaml([str(folder / "model.yaml")]), scale_factor=SCALE)
    for source, part in ((folder / "sat", "transformer"), (file, "vae")):
        convert(source, folder / "out", "diffusers", (part,), options)
    return folder / "out"


def inputs(made: Any, frames: int, height: int, width: int, dtype: Any) -> dict[str, Any]:
    """What CogVideo's loss gives the network: latents, timesteps, text, and the condition and `ofs` where it has
    them."""
    import torch

    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(dtype)

    given = {
        "x": noise(2, frames, 16, height, width),
        "timesteps": torch.tensor([17, 901]),
        "context": noise(2, tiny.TEXT_LENGTH, tiny.TEXT_HIDDEN),
    }
    if made.in_channels == 32:
        given["concat_images"] = noise(2, frames, 16, height, width)
    if getattr(made, "ofs_embed_dim", None) is not None:
        given["ofs"] = torch.full((1,), 2.0, dtype=dtype)
    return given


def engine(folder: Path, dtype: Any) -> Any:
    """The built-in engine's transformer of that folder, with the LoRA that lies there, and what calls it."""
    import json

    from diffusers import CogVideoXPipeline

    from sat_ext.models.engine import VideoDiffusionEngine
    from sat_ext.models.folder import load_model_config
    from sat_ext.models.transformer import build_transformer

    channels = json.loads((folder / "transformer" / "config.json").read_text())["in_channels"]
    kind = "i2v" if channels == 32 else "none"
    config = load_model_config({"pretrained": str(folder), "conditioning": kind})
    transformer = build_transformer(config, dtype).eval()
    if (folder / "pytorch_lora_weights.safetensors").exists():
        parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
        CogVideoXPipeline(**parts, transformer=transformer).load_lora_weights(str(folder))

    def predict(x: Any, timesteps: Any, context: Any, concat_images: Any = None, ofs: Any = None) -> Any:
        own = SimpleNamespace(network=transformer, config=config)
        return VideoDiffusionEngine.predict(own, x, context, timesteps, concat_images)

    return transformer, predict


def apart(found: Any, expected: Any) -> float:
    """How far, relative to what is expected."""
    assert found.shape == expected.shape
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def sizes(sat: Path) -> list[tuple[int, int, int]]:
    """Latent frames, rows and columns: the native ones, and what else CogVideo's network has positions for."""
    rows, columns = tiny.SIZE[0] // 8, tiny.SIZE[1] // 8
    if "1.5" in tiny.model_names(sat)[0]:
        return [(4, rows, columns), (2, rows, columns), (4, rows - 2, columns - 4)]
    return [(5, rows, columns), (3, rows, columns), (1, rows, columns)]


def check_round_trips_of_real_checkpoints_are_bit_equal(sat: Path) -> None:
    import torch

    from sat_ext.convert.convert import convert
    from sat_ext.convert.parts import ConvertOptions as Options

    for name in tiny.model_names(sat):
        folder = converted(sat, name)
        options, back = Options(), folder.parent / "back"
        convert(folder, back, "sat", ("transformer", "vae"), options)
        pairs = [
            (folder.parent / "sat" / "transformer" / "1" / "mp_rank_00_model_states.pt", "module"),
            (autoencoder(sat)[1], "state_dict"),
        ]
        files = [back / "transformer" / "1" / "mp_rank_00_model_states.pt", back / "vae" / "3d-vae.pt"]
        for (own, section), file in zip(pairs, files, strict=True):
            expected = torch.load(own, weights_only=True)[section]
            found = torch.load(file, weights_only=True)[section]
            assert found.keys() == expected.keys(), (name, found.keys() ^ expected.keys())
            assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items()), name


def check_positions_are_computed_as_cogvideo_does_bit_for_bit(sat: Path) -> None:
    """So that SAT's files can be made of any folder of diffusers'; only SAT's unread embedding differs."""
    from safetensors.torch import load_file

    for name in tiny.model_names(sat):
        kept = converted(sat, name) / "transformer" / "sat_only.safetensors"
        unread = "2b" not in name
        assert kept.exists() == unread
        assert not unread or load_file(kept).keys() == {"transformer.position_embeddings.weight"}


def check_the_engine_predicts_what_the_network_does(sat: Path) -> None:
    import torch

    for name in tiny.model_names(sat):
        made, _ = network(sat, name)
        transformer, predict = engine(converted(sat, name), torch.float32)
        for epsilon, limit in ((1e-5, EXACT), (1e-6, EQUAL)):
            assert (epsilon == 1e-6) or transformer.norm_out.norm.eps == epsilon
            transformer.norm_out.norm.eps = epsilon
            for size in sizes(sat):
                given = inputs(made, *size, torch.float32)
                with torch.no_grad():
                    far = apart(predict(**given), made(**given))
                assert far < limit, (name, size, epsilon, far)


def check_the_engine_predicts_what_the_network_does_in_bfloat16(sat: Path) -> None:
    import copy

    import torch

    for name in tiny.model_names(sat):
        made = copy.deepcopy(network(sat, name)[0]).bfloat16()
        made.dtype = torch.bfloat16
        _, predict = engine(converted(sat, name), torch.bfloat16)
        for size in sizes(sat):
            given = inputs(made, *size, torch.bfloat16)
            with torch.no_grad():
                far = apart(predict(**given), made(**given))
            assert far < ROUNDED, (name, size, far)


def check_cogvideos_network_loads_what_is_written(sat: Path) -> None:
    """The way back, and a LoRA put beside its base, into a network of other random weights."""
    import torch
    from omegaconf import OmegaConf
    from sgm.util import instantiate_from_config

    from sat_ext.convert.convert import convert
    from sat_ext.convert.parts import ConvertOptions as Options

    for name in tiny.model_names(sat):
        folder = converted(sat, name)
        made, where = network(sat, name)
        sources = [(folder, Options())]
        if "lora" in name:
            own = torch.load(where / "sat" / "transformer" / "1" / "mp_rank_00_model_states.pt", weights_only=True)
            trained = {n: t for n, t in own["module"].items() if "matrix_" in n}
            torch.save({"module": trained}, where / "trained.pt")
            sources.append((where / "trained.pt", Options(alpha=1, base_weights=folder)))
        for k, (source, options) in enumerate(sources):
            target = where / f"loaded{k}"
            convert(source, target, "sat", ("transformer",), options)
            file = target / "transformer" / "1" / "mp_rank_00_model_states.pt"
            weights = torch.load(file, weights_only=True)["module"]
            config = OmegaConf.create(tiny.model(sat, name, where)["model"]["network_config"])
            config.params.dtype = "fp32"
            fresh = shaken(instantiate_from_config(config), 0.3)
            plain = {n.removeprefix("model.diffusion_model."): t for n, t in weights.items()}
            missing, unexpected = fresh.load_state_dict(plain, strict=False)
            assert not missing and not unexpected, (name, missing, unexpected)
            given = inputs(made, *sizes(sat)[0], torch.float32)
            with torch.no_grad():
                assert torch.equal(fresh(**given), made(**given)), name


def check_a_wrong_mapping_would_be_seen(sat: Path) -> None:
    """One layer's k and v exchanged is far outside what the checks allow."""
    import torch

    name = tiny.model_names(sat)[0]
    made, _ = network(sat, name)
    given = inputs(made, *sizes(sat)[0], torch.float32)
    with torch.no_grad():
        expected = made(**given)
        attention = made.transformer.layers[1].attention.query_key_value
        attention = getattr(attention, "original", attention)
        q, k, v = attention.weight.data.chunk(3)
        own, attention.weight.data = attention.weight.data, torch.cat([q, v, k])
        assert apart(made(**given), expected) > 5 * ROUNDED
        attention.weight.data = own


def check_the_autoencoder_does_the_same(sat: Path) -> None:
    """Whole clips; the first stage of the built-in engine takes more than 9 frames in pieces of 8, as diffusers'
    pipelines do, and its group norms then see a piece at a time."""
    import torch

    from sat_ext.models.first_stage import build_first_stage
    from sat_ext.models.folder import load_model_config

    made, _ = autoencoder(sat)
    folder = converted(sat, tiny.model_names(sat)[0])
    channels = 16 * (1 + ("i2v" in folder.parent.name))
    kind = "i2v" if channels == 32 else "none"
    config = load_model_config({"pretrained": str(folder), "conditioning": kind})
    stage = build_first_stage(config, torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for frames in (1, 9, 17):
            clip = torch.rand(1, 3, frames, 32, 48, generator=generator) * 2 - 1
            moments = made.encode(clip, unregularized=True)[0]
            assert apart(stage.vae.encoder(clip)[0], moments) < EXACT
            if frames <= 9:
                latents = stage.encode(clip.transpose(1, 2)).transpose(1, 2)
                assert apart(latents, moments[:, :16] * SCALE) < EXACT
            latents = moments[:, :16]
            assert apart(stage.vae.decoder(latents)[0], made.decoder(latents)) < EXACT


def check_the_autoencoder_does_the_same_in_bfloat16(sat: Path) -> None:
    import copy

    import torch
    from diffusers import AutoencoderKLCogVideoX

    made = copy.deepcopy(autoencoder(sat)[0]).bfloat16()
    folder = converted(sat, tiny.model_names(sat)[0]) / "vae"
    vae = AutoencoderKLCogVideoX.from_pretrained(folder, torch_dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    clip = (torch.rand(1, 3, 9, 32, 48, generator=generator) * 2 - 1).bfloat16()
    with torch.no_grad():
        moments = made.encode(clip, unregularized=True)[0]
        assert apart(vae.encoder(clip)[0], moments) < 3 * ROUNDED  # many more layers, each normed
        assert apart(vae.decoder(moments[:, :16])[0], made.decoder(moments[:, :16])) < 3 * ROUNDED


def check_a_video_is_decoded_as_cogvideos_sampler_does(sat: Path) -> None:
    """Two latent frames at a time, three at first, what is before each kept by the convolutions."""
    import torch

    from sat_ext.models.first_stage import build_first_stage
    from sat_ext.models.folder import load_model_config

    name = tiny.model_names(sat)[0]
    if "1.5" in name:
        raise in_checkout.Skip("1.5's sampler decodes another number of frames at a time")
    made, _ = autoencoder(sat)
    stage = build_first_stage(load_model_config({"pretrained": str(converted(sat, name))}), torch.float32)
    latents = torch.randn(1, 16, 5, 4, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        pieces = [made.decode(latents[:, :, :3], clear_fake_cp_cache=False), made.decode(latents[:, :, 3:])]
        found = stage.decode(latents.transpose(1, 2) * SCALE).transpose(1, 2)
    assert apart(found, torch.cat(pieces, dim=2).clamp(-1, 1)) < EXACT


test_original = in_checkout.test_of(__file__)
if __name__ == "__main__":
    in_checkout.main(globals())
