"""The text embedders in CogVideo's own conditioner, with a small T5."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import in_checkout

CAPTIONS = ["a red ball rolls", "", "two dogs"]
LENGTH = 16


@contextmanager
def encoder() -> Iterator[str]:
    """The folder of a small T5."""
    import tiny

    with tempfile.TemporaryDirectory() as folder:
        tiny.write_t5(Path(folder))
        yield folder


def conditioner(target: str | None, params: dict[str, Any], dtype: Any, input_key: str = "txt") -> Any:
    """A `GeneralConditioner` in `dtype` with one entry of `emb_models`, as the engine makes it of its YAML."""
    from omegaconf import OmegaConf
    from sgm.util import instantiate_from_config

    entry = {
        "is_trainable": False,
        "input_key": input_key,
        "ucg_rate": 0.1,
        "target": target or "sgm.modules.encoders.modules.FrozenT5Embedder",
        "params": params,
    }
    config = {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [entry]}}
    return instantiate_from_config(OmegaConf.create(config)).to(dtype)


def embed(conditioner: Any, batch: dict[str, Any]) -> Any:
    """What the loss asks for in training: the embeddings, with the empty caption's place drawn."""
    import torch

    torch.manual_seed(3)
    return conditioner(batch)["crossattn"]


def check_offloaded_embeddings_are_the_original_s(sat: Path) -> None:
    import torch

    batch = {"txt": CAPTIONS}
    with encoder() as folder:
        params = {"model_dir": folder, "max_length": LENGTH}
        for dtype in (torch.float32, torch.bfloat16):
            expected = embed(conditioner(None, params, dtype), batch)
            for device in ("cpu", "on_off"):
                ours = conditioner("sat_ext.cogvideo.OffloadedTextEmbedder", params | {"device": device}, dtype)
                embedding = embed(ours, batch)
                assert embedding.dtype == expected.dtype and embedding.shape == (3, LENGTH, 16)
                assert torch.equal(embedding, expected)
                assert not ours.state_dict() and not list(ours.parameters())


def check_cached_embeddings_are_the_original_s(sat: Path) -> None:
    import torch

    from sat_ext.latents.text import encoder_fingerprint, write_text_embeddings

    batch = {"txt": CAPTIONS}
    with encoder() as folder, tempfile.TemporaryDirectory() as text:
        params = {"model_dir": folder, "max_length": LENGTH}
        original = conditioner(None, params, torch.bfloat16)
        expected = embed(original, batch)
        fingerprint = encoder_fingerprint(folder, LENGTH, torch.bfloat16)
        write_text_embeddings(Path(text), CAPTIONS, original.embedders[0], fingerprint)
        ours = conditioner("sat_ext.cogvideo.CachedTextEmbedder", params | {"folder": text}, torch.bfloat16)
        assert torch.equal(embed(ours, batch), expected)
        for zeroed in ([], ["txt"]):
            theirs = original.get_unconditional_conditioning(batch, {"txt": [""] * 3}, zeroed)
            found = ours.get_unconditional_conditioning(batch, {"txt": [""] * 3}, zeroed)
            for mine, other in zip(found, theirs):
                assert torch.equal(mine["crossattn"], other["crossattn"])
            assert zeroed == [] or not found[1]["crossattn"].any()


def check_embeddings_in_the_batch_are_used_as_they_are(sat: Path) -> None:
    import torch

    ours = conditioner("sat_ext.cogvideo.CachedTextEmbedder", {}, torch.bfloat16, input_key="text_embeddings")
    given = torch.randn(2, LENGTH, 16)
    c, uc = ours.get_unconditional_conditioning({"text_embeddings": given}, None, ["text_embeddings"])
    assert torch.equal(c["crossattn"], given.bfloat16())
    assert not uc["crossattn"].any()


test_original = in_checkout.test_of(__file__)
if __name__ == "__main__":
    in_checkout.main(globals())
