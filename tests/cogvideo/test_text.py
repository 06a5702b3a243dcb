"""The text embedders against small doubles of CogVideo's embedders and their conditioner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sat_ext.cogvideo.cached import CachedTextEmbedder
from sat_ext.cogvideo.text_embedders import OffloadedTextEmbedder
from sat_ext.errors import ConfigError, DataError
from sat_ext.latents import checksummed
from sat_ext.latents.text import encoder_fingerprint, write_text_embeddings
from sat_ext.models.text_offload import on_device

LENGTH, WIDTH = 4, 6


class Embedder(nn.Module):
    """As `AbstractEmbModel` is seen from outside."""

    def __init__(self) -> None:
        super().__init__()
        self._trainable: bool | None = None

    @property
    def is_trainable(self) -> bool | None:
        return self._trainable

    @is_trainable.setter
    def is_trainable(self, value: bool) -> None:
        self._trainable = value


class Encoder(Embedder):
    """As `FrozenT5Embedder` is seen from outside: one token a letter, sent to `self.device`."""

    def __init__(self, model_dir: str = "t5", device: str = "cuda", max_length: int = LENGTH) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.transformer = nn.Embedding(128, WIDTH)
        self.device = device
        self.max_length = max_length

    def forward(self, text: list[str]) -> Tensor:
        tokens = torch.tensor([[ord(c) for c in t.ljust(self.max_length)[: self.max_length]] for t in text])
        return self.transformer(tokens.to(self.device))


class Conditioner(nn.Module):
    """What `GeneralConditioner` does with a frozen embedder, and with its unconditional embeddings."""

    def __init__(self, embedder: Any, input_key: str = "txt") -> None:
        super().__init__()
        assert isinstance(embedder, Embedder)
        embedder.is_trainable = False
        embedder.ucg_rate = 0.1
        embedder.train = lambda mode=True: embedder
        assert sum(p.numel() for p in embedder.parameters()) == 0
        embedder.eval()
        embedder.input_key = input_key
        self.embedders = nn.ModuleList([embedder])

    def forward(self, batch: dict[str, Any], zeroed: tuple[str, ...] = ()) -> Tensor:
        (embedder,) = self.embedders
        with torch.no_grad():
            embedded = embedder(batch[embedder.input_key])
        return torch.zeros_like(embedded) if embedder.input_key in zeroed else embedded


def offloaded(**options: Any) -> Any:
    return OffloadedTextEmbedder(parent=f"{__name__}.Encoder", **options)


def cached(**options: Any) -> Any:
    return CachedTextEmbedder(parent=f"{__name__}.Embedder", **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Embeddings of "a cat", "a dog" and the empty caption."""
    embed = Encoder(device="cpu")
    assert (
        write_text_embeddings(tmp_path / "text", ["a cat", "a dog"], embed, encoder_fingerprint("t5", LENGTH)) == 3
    )
    return tmp_path / "text"


@pytest.mark.parametrize("device", ["cpu", "on_off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_embeddings_are_the_parent_s(device: str, dtype: torch.dtype) -> None:
    conditioner = Conditioner(offloaded(device=device)).to(dtype)
    embedding = conditioner({"txt": ["a cat", ""]})
    assert embedding.dtype == dtype
    assert torch.equal(embedding, Encoder(device="cpu").to(dtype)(["a cat", ""]))


def test_the_offloaded_encoder_sees_each_caption_once_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    forward = Encoder.forward

    def watched(encoder: Encoder, text: list[str]) -> Tensor:
        seen.append(text)
        return forward(encoder, text)

    monkeypatch.setattr(Encoder, "forward", watched)
    conditioner = Conditioner(offloaded())
    embedding = conditioner({"txt": ["a cat", "", "a cat"]})
    assert torch.equal(conditioner({"txt": ["a cat", "a cat", "", "a dog"]})[:3], embedding[[0, 0, 1]])
    assert seen == [["a cat"], [""], ["a dog"]]


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_on_the_cpu_only_where_it_computes_in_it(
    fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sat_ext.models.text_offload.computes_in_bf16", lambda: fast)
    embedder = offloaded()
    embedding = Conditioner(embedder).bfloat16()({"txt": ["a cat"]})
    assert (embedding.dtype, embedder.transformer.weight.dtype) == (torch.bfloat16, dtype)


def test_the_offloaded_encoder_is_no_part_of_the_engine() -> None:
    embedder = offloaded()
    conditioner = Conditioner(embedder)
    conditioner.bfloat16()
    assert embedder.transformer.weight.dtype == torch.float32  # before the first call
    assert not conditioner.state_dict() and not list(conditioner.parameters())
    assert not embedder.transformer.weight.requires_grad
    assert isinstance(embedder, Encoder) and isinstance(embedder, OffloadedTextEmbedder)


def test_a_checkpoint_with_an_encoder_in_it_loads_with_a_note() -> None:
    checkpoint = {"embedders.0.transformer.weight": torch.zeros(128, WIDTH)}
    conditioner = Conditioner(offloaded())
    missing, unexpected = conditioner.load_state_dict(checkpoint, strict=False)
    assert not missing and unexpected == list(checkpoint)
    assert conditioner({"txt": ["a cat"]}).abs().sum() > 0


@pytest.mark.parametrize(
    ("training", "asked", "encoder"),
    [
        (torch.float16, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
    ],
)
def test_the_encoder_computes_in_the_dtype_asked_for(
    training: torch.dtype, asked: str | None, encoder: torch.dtype
) -> None:
    embedder = offloaded(dtype=asked).to(training)
    assert embedder(["a cat"]).dtype == training
    assert embedder.transformer.weight.dtype == encoder


def test_weights_are_what_they_were_after_a_visit_to_a_device() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.data_ptr()
    with pytest.raises(RuntimeError, match="out of memory"), on_device([module], torch.device("cpu")):
        module.weight.data = module.weight.data.clone()
        assert module.weight.data_ptr() != before
        raise RuntimeError("out of memory")
    assert module.weight.data_ptr() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_off_has_the_encoder_on_the_gpu_for_the_call_only() -> None:
    embedder = offloaded(device="on_off").cuda().bfloat16()
    embedding = embedder(["a cat"])
    assert embedding.device.type == "cuda" and embedder.transformer.weight.device.type == "cpu"
    assert torch.equal(embedding.cpu(), Encoder(device="cpu").bfloat16()(["a cat"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, r"emb_models\.params\.device: 'cuda' is not one of cpu, on_off\.$"),
        ({"device": "onoff"}, r"'onoff' is not one of cpu, on_off \(did you mean 'on_off'\?\)\.$"),
        ({"dtype": "fp16"}, r"emb_models\.params\.dtype: 'fp16' is not one of fp32, bf16"),
        ({"max_lenght": 8}, r"emb_models\.params: unknown key 'max_lenght'; did you mean 'max_length'\?$"),
    ],
)
def test_an_unknown_value_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        offloaded(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_embeddings_are_the_encoder_s(folder: Path, dtype: torch.dtype) -> None:
    conditioner = Conditioner(cached(folder=str(folder), model_dir="t5", max_length=LENGTH)).to(dtype)
    captions = ["a dog", "", "a dog", "a cat"]
    embedding = conditioner({"txt": captions})
    assert torch.equal(embedding, Encoder(device="cpu")(captions).to(dtype))
    assert not conditioner.state_dict()


def test_the_unconditional_embedding_is_zero_or_the_empty_caption_s(folder: Path) -> None:
    conditioner = Conditioner(cached(folder=str(folder)))
    assert not conditioner({"txt": ["a cat"]}, zeroed=("txt",)).any()
    assert torch.equal(conditioner({"txt": [""]}), Encoder(device="cpu")([""]))


def test_embeddings_in_the_batch_are_used_as_they_are() -> None:
    conditioner = Conditioner(cached(), input_key="text_embeddings").bfloat16()
    given = torch.randn(2, LENGTH, WIDTH)
    assert torch.equal(conditioner({"text_embeddings": given}), given.bfloat16())
    with pytest.raises(DataError, match=r"^text_embeddings: \(B, L, D\) is expected, got a tensor \(2, 4\)\.$"):
        conditioner({"text_embeddings": given[..., 0]})


def test_a_caption_without_an_embedding_is_named(folder: Path) -> None:
    embedder = cached(folder=str(folder))
    with pytest.raises(DataError) as error:
        embedder(["a cat", "a cow"])
    assert str(error.value) == (
        f"{folder}: there is no embedding of the caption 'a cow'; write it with sat-ext cache."
    )
    with pytest.raises(DataError, match=r"the caption 'm{80}\.\.\.'; write"):
        embedder(["m" * 500])


def test_captions_without_a_folder_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"params\.folder: 'folder' is missing, and the batch brings captions;"):
        cached()(["a cat"])


def test_a_folder_without_embeddings_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there are no text embeddings here; write them with sat-ext cache"):
        cached(folder=str(tmp_path))


def test_another_encoder_s_embeddings_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"of max_length 4, and 8 is asked for; name the folder of this"):
        cached(folder=str(folder), max_length=8)
    with pytest.raises(ConfigError, match=r"are of encoder t5, and t5-xl is asked for;"):
        cached(folder=str(folder), model_dir="t5-xl")
    with pytest.raises(ConfigError, match=r"of max_length 4, and 8 is asked for; write to another folder\.$"):
        write_text_embeddings(folder, ["x"], Encoder(device="cpu"), encoder_fingerprint("t5", 8))


def test_an_encoder_is_known_by_its_configuration_where_there_is_one(tmp_path: Path) -> None:
    for name, config in (("one", "{}"), ("moved", "{}"), ("other", '{"d_model": 6}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    text = tmp_path / "text"
    write_text_embeddings(text, [], Encoder(device="cpu"), encoder_fingerprint(str(tmp_path / "one"), LENGTH))
    cached(folder=str(text), model_dir=str(tmp_path / "moved"))
    cached(folder=str(text), model_dir="/elsewhere/one")
    with pytest.raises(ConfigError, match=r"are of config \w{32}, and \w{32} is asked for"):
        cached(folder=str(text), model_dir=str(tmp_path / "other"))


def test_only_missing_captions_are_embedded_in_small_batches(folder: Path) -> None:
    asked: list[list[str]] = []

    def embed(captions: list[str]) -> Tensor:
        asked.append(captions)
        return Encoder(device="cpu")(captions)

    captions = ["a cat", *(f"{n}" for n in range(5)), "0"]
    written = write_text_embeddings(
        folder, captions, embed, encoder_fingerprint("t5", LENGTH), batch=2, per_file=3
    )
    assert written == 5
    assert asked == [["0", "1"], ["2"], ["3", "4"]]
    assert len(list(folder.glob("text-*.safetensors"))) == 3
    assert torch.equal(cached(folder=str(folder))(captions), Encoder(device="cpu")(captions))


def test_files_hold_only_what_is_theirs(folder: Path) -> None:
    (file,) = folder.glob("text-*.safetensors")
    assert file.stat().st_size < 3 * LENGTH * WIDTH * 4 + 600


def test_a_run_cut_short_leaves_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksummed, "save_file", full)
    with pytest.raises(DataError, match=r"cannot be written \(.*No space left on device\); free space or name"):
        write_text_embeddings(tmp_path, ["a cat"], Encoder(device="cpu"), {})
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(folder: Path) -> None:
    (file,) = folder.glob("text-*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match=rf"{file.name}: cannot be read \(.*\); delete it, and run sat-ext cache"):
        cached(folder=str(folder))


def test_files_of_different_encoders_in_one_folder_are_refused(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "text-x.safetensors", {"fingerprint": "{}"})
    with pytest.raises(
        DataError, match=r"text-x\.safetensors and text-\w+\.safetensors are of different encoders"
    ):
        cached(folder=str(folder))
