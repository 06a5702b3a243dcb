from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from sat_ext.errors import ConfigError
from sat_ext.models import text_offload
from sat_ext.models.config import TextConfig
from sat_ext.models.folder import load_model_config
from sat_ext.models.t5 import T5Text, build_text, small_byt5
from sat_ext.models.text_offload import EmbeddingCache, own_cores
from tests.models.conftest import make_batch, make_engine, small_config

CPU = torch.device("cpu")


def test_text_length_and_width_follow_the_transformer() -> None:
    text = build_text(load_model_config(small_config("5b")), torch.float32)
    assert text.encode(["a"], CPU, torch.bfloat16).shape == (1, 8, 32)
    short = load_model_config(small_config("5b", text={"kind": "byt5", "max_length": 3}))
    assert build_text(short, torch.bfloat16).encode(["a"], CPU, torch.bfloat16).dtype == torch.bfloat16


def test_the_small_encoder_tells_the_last_letters_and_is_the_same_everywhere() -> None:
    torch.manual_seed(0)
    one = T5Text(small_byt5(64), ByT5Tokenizer(), 24, TextConfig())
    torch.manual_seed(1)
    other = T5Text(small_byt5(64), ByT5Tokenizer(), 24, TextConfig())
    captions = ["a red circle on black", "a blue circle on black", "a red square on white"]
    red, blue, square = one.encode(captions, CPU, torch.float32)
    assert torch.equal(red, other.encode(captions, CPU, torch.float32)[0])
    torch.testing.assert_close(
        red[4:6], square[4:6], atol=1e-3, rtol=1e-2
    )  # the end of "red ", whatever comes after
    assert (red[4] - blue[4]).norm() > 0.5 * red[4].norm()
    assert not any(p.requires_grad for p in one.parameters())


def test_t5_pads_and_cuts_to_the_length(pretrained: Callable[..., Path]) -> None:
    config = load_model_config({"pretrained": str(pretrained()), "conditioning": "i2v"})
    text = build_text(config, torch.float32)
    assert isinstance(text, T5Text)
    embeddings = text.encode(["ab", "a caption of more than eight bytes"], CPU, torch.float32)
    assert embeddings.shape == (2, 8, 32)
    expected = text.encoder(
        text.tokenizer("ab", padding="max_length", max_length=8, return_tensors="pt").input_ids
    )
    torch.testing.assert_close(embeddings[:1], expected[0])


def test_t5_never_drops_units(pretrained: Callable[..., Path]) -> None:
    config = load_model_config({"pretrained": str(pretrained()), "conditioning": "i2v"})
    text = build_text(config, torch.float32).train()
    assert torch.equal(text.encode(["ab"], CPU, torch.float32), text.encode(["ab"], CPU, torch.float32))


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_missing_text_parts_are_named(pretrained: Callable[..., Path], tmp_path: Path, part: str) -> None:
    shutil.copytree(pretrained(), tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    config = load_model_config({"pretrained": str(tmp_path / "model"), "conditioning": "i2v"})
    with pytest.raises(ConfigError, match=rf"model\.pretrained: .*model has no {part}/"):
        build_text(config, torch.float32)


@pytest.mark.parametrize("device", ["cpu", "on_off"])
def test_an_encoder_off_the_gpu_is_no_part_of_the_engine(pretrained: Callable[..., Path], device: str) -> None:
    base = {"pretrained": str(pretrained()), "conditioning": "i2v"}
    plain, engine = make_engine(base), make_engine({**base, "text": {"device": device}})
    assert not any(name.startswith("text.") for name, _ in engine.named_parameters())
    engine.bfloat16()
    assert {p.dtype for p in engine.text.encoder.parameters()} == {torch.float32}  # its own, as it was built
    found = engine.text.encode(["ab"], CPU, torch.float32)
    assert torch.equal(found, plain.text.encode(["ab"], CPU, torch.float32))
    loss, _ = engine(make_batch(5))
    assert loss.isfinite()


def test_an_encoder_off_the_gpu_sees_each_caption_once_and_alone(pretrained: Callable[..., Path]) -> None:
    """So embeddings are the same to the last bit in a resumed run, which remembers nothing."""
    config = load_model_config({"pretrained": str(pretrained()), "conditioning": "i2v", "text": {"device": "cpu"}})
    text, again = build_text(config, torch.float32), build_text(config, torch.float32)
    sizes: list[int] = []
    text.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    stills = text.encode(["ab", "ab", "", "cd", "ab"], CPU, torch.bfloat16)
    assert sizes == [1, 1, 1] and stills.dtype == torch.bfloat16
    assert torch.equal(stills[[0, 3]], text.encode(["ab", "cd"], CPU, torch.bfloat16)) and len(sizes) == 3
    assert torch.equal(again.encode(["cd", "ab"], CPU, torch.bfloat16), stills[[3, 0]])


def test_embeddings_are_remembered_up_to_a_size_and_the_empty_caption_for_good() -> None:
    asked: list[str] = []

    def encode(captions: list[str]) -> torch.Tensor:
        asked.extend(captions)
        return torch.full((len(captions), 2, 3), float(len(captions[0])))

    cache = EmbeddingCache(limit=2 * 24)  # of "" and one more

    def get(captions: list[str]) -> torch.Tensor:
        return cache.get(captions, torch.float32, encode, nullcontext())

    assert get(["", "a", "bb", ""])[:, 0, 0].tolist() == [0, 1, 2, 0]
    assert asked == ["", "a", "bb"]
    get(["bb", ""])
    assert len(asked) == 3
    get(["a", "", "bb"])
    assert asked[3:] == ["a"]  # bb was remembered until a came
    assert sum(t.untyped_storage().nbytes() for t in cache._found.values()) == 48


def test_an_encoder_that_zero_3_may_split_is_called_once_a_batch(pretrained: Callable[..., Path]) -> None:
    """Its weights are gathered from all ranks, so that every rank must call it as often."""
    text = build_text(load_model_config({"pretrained": str(pretrained()), "conditioning": "i2v"}), torch.float32)
    sizes: list[int] = []
    text.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for _ in range(2):
        text.encode(["ab", "ab", ""], CPU, torch.float32)
    assert sizes == [3, 3]


def test_text_on_the_cpu_has_this_ranks_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    try:
        torch.set_num_threads(1)  # as torchrun has it
        for variable, ranks in (("LOCAL_WORLD_SIZE", 1), ("LOCAL_SIZE", cores), ("LOCAL_SIZE", 4 * cores)):
            monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
            monkeypatch.setenv(variable, str(ranks))
            with own_cores():
                assert torch.get_num_threads() == max(1, cores // ranks)
            assert torch.get_num_threads() == 1
        torch.set_num_threads(3)  # somebody's choice
        with own_cores():
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_bf16_on_a_cpu_only_where_it_computes_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN is asked for real, by a process of its own that it gives AVX2 alone; a file stands in for a CPU with
    AVX512 and without bf16, of which it says yes."""
    code = (
        "import torch; from sat_ext.models.text_offload import encoder_dtype; print(encoder_dtype(torch.bfloat16))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "torch.float32\n"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(text_offload.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(text_offload, "CPU_INFO", tmp_path / "cpuinfo")
    for flags, expected in (("avx2 avx512f", torch.float32), ("avx512f avx512_bf16", torch.bfloat16)):
        (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags}\n")
        assert text_offload.encoder_dtype(torch.bfloat16) == expected
        assert (
            text_offload.encoder_dtype(torch.float16) == text_offload.encoder_dtype(torch.float32) == torch.float32
        )


def test_an_encoder_on_the_cpu_is_not_in_half_precision(pretrained: Callable[..., Path]) -> None:
    config = load_model_config({"pretrained": str(pretrained("2b")), "text": {"device": "cpu"}})
    text = build_text(config, torch.float16)
    assert {p.dtype for p in text.encoder.parameters()} == {torch.float32}
    assert text.encode(["ab"], CPU, torch.float16).dtype == torch.float16


def test_on_off_has_the_encoder_on_the_device_for_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    text = build_text(
        load_model_config(small_config("5b", text={"kind": "byt5", "device": "on_off"})), torch.float32
    )
    events: list[str] = []

    @contextmanager
    def watched(modules: list[torch.nn.Module], device: torch.device) -> Iterator[None]:
        assert modules == [text.encoder]
        events.append(f"to {device}")
        yield
        events.append("back")

    monkeypatch.setattr("sat_ext.models.t5.on_device", watched)
    text.encoder.register_forward_pre_hook(lambda *_: events.append("encode"))
    text.encode(["a"], CPU, torch.float32)
    assert events == ["to cpu", "encode", "back"]


@pytest.mark.parametrize(("quantization", "layer"), [("int8", "Linear8bitLt"), ("nf4", "Linear4bit")])
def test_a_folders_encoder_is_quantized_and_stays_so(
    pretrained: Callable[..., Path], tmp_path: Path, quantization: str, layer: str
) -> None:
    for part in pretrained("2b").iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "text_encoder").unlink()
    shape = T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, vocab_size=384)
    T5EncoderModel(shape).save_pretrained(tmp_path / "text_encoder")  # whole blocks of 64 weights a row
    plain = build_text(load_model_config({"pretrained": str(tmp_path)}), torch.float32)
    exact = plain.encode(["a red circle"], CPU, torch.float32)
    chosen = load_model_config({"pretrained": str(tmp_path), "text": {"quantization": quantization}})
    text = build_text(chosen, torch.float32)
    for cast in (text.float, text.bfloat16, text.half):
        cast()
        assert layer in {type(m).__name__ for m in text.encoder.modules()}
        error = (text.encode(["a red circle"], CPU, torch.float32) - exact).norm() / exact.norm()
        assert 1e-4 < error < 0.2
    assert not text.state_dict() and not list(text.parameters())
