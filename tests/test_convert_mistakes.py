"""What can be wrong with weights to be converted: one sentence each, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from sat_ext.convert.convert import convert, export
from sat_ext.convert.parts import ConvertOptions as Options
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket
from tests.sat_layout import FAMILIES, sat_autoencoder, sat_transformer, write_sat
from tests.test_convert import BASE, to_diffusers, to_sat


class Foreign:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def broken(folder: Path, kind: str) -> None:
    """A SAT folder with one thing wrong."""
    weights = sat_transformer("5b")
    own = "model.diffusion_model."
    if kind == "another model":
        weights = {f"unet.{i}": torch.zeros(2) for i in range(3)}
    elif kind == "missing":
        weights = {n: t for n, t in weights.items() if ".layers.1.mlp." not in n}
    elif kind == "unknown":
        weights[f"{own}mixins.swiglu.w2.0.weight"] = torch.zeros(2, 2)
    elif kind == "shape":
        weights[f"{own}transformer.layers.1.mlp.dense_4h_to_h.weight"] = torch.zeros(32, 64)
    elif kind == "blocks":
        weights[f"{own}transformer.layers.1.attention.query_key_value.weight"] = torch.zeros(95, 32)
    elif kind == "generation":
        weights[f"{own}mixins.patch_embed.proj.weight"] = torch.zeros(32, 16, 1, 2, 2)
    elif kind == "no time embedding":
        del weights[f"{own}time_embed.0.weight"]
    elif kind == "no dimension":
        weights[f"{own}time_embed.0.weight"] = torch.tensor(0.0)
    elif kind == "no rows":
        weights[f"{own}mixins.adaln_layer.query_layernorm_list.0.weight"] = torch.zeros(0)
    elif kind == "a vector":
        weights[f"{own}mixins.patch_embed.text_proj.weight"] = torch.zeros(32)
    file = write_sat(folder, weights)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100_000])
    elif kind == "foreign":
        torch.save({"module": weights, "extra": Foreign()}, file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps({"module": Foreign()}, protocol=2))
    elif kind == "list":
        torch.save([torch.zeros(2)], file)
    elif kind == "parallel":
        file.with_name("mp_rank_01_model_states.pt").write_bytes(b"")
    elif kind == "cut short":
        file.unlink()


MISTAKES = {
    "another model": "no tensor of CogVideoX under model.diffusion_model. (first: unet.0); these are weights of",
    "missing": "4 of 52 tensors are missing (first: transformer.layers.1.mlp.dense_4h_to_h.bias); these are weig",
    "unknown": "1 tensors have no place in a CogVideoX model (first: mixins.swiglu.w2.0.weight); these are wei",
    "shape": "transformer_blocks.1.ff.net.2.weight is [32, 64], but [32, 128] in the model that config.json or",
    "blocks": "query_key_value.weight: [95, 32] does not divide into 3 blocks; this is another model.",
    "generation": "proj.weight is [32, 16, 1, 2, 2], of no known generation; only CogVideoX 1.0 and 1.5",
    "no time embedding": "there is no time_embed.0.weight; this is no CogVideoX transformer, or not a whole one.",
    "no dimension": "time_embed.0.weight is [], which no CogVideoX transformer has; these are weights of",
    "no rows": "query_layernorm_list.0.weight is [0], which no CogVideoX transformer has; these are weights of",
    "a vector": "text_proj.weight is [32], which no CogVideoX transformer has; these are weights of another",
    "truncated": "truncated one",
    "foreign": "it holds code to be run (posix.system)",
    "pickle": "it holds code to be run (posix.system)",
    "list": "holds no weights by name; name a checkpoint of SAT's or of a run.",
    "parallel": "the weights are split over several model-parallel ranks; merge them with model_parallel_size 1",
    "cut short": "'latest' names 1, but there is no mp_rank_00_model_states.pt in it",
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_is_wrong_with_a_checkpoint_is_one_sentence(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken(tmp_path / "sat", kind)
    with pytest.raises(ConfigError, match=re.escape(MISTAKES[kind])) as error:
        to_diffusers(tmp_path / "sat", tmp_path / "out")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value) or kind == "blocks"
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


def with_network(**changes: Any) -> dict[str, Any]:
    """CogVideo's YAML with other values in its network_config."""
    base = deepcopy(BASE)
    base["model"]["network_config"]["params"] |= changes
    return base


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("5b", Options(), "freqs_cos [48, 16] is not the one for videos of 49x480x720; give the YAML of these"),
        ("2b", Options(size=Bucket(frames=9, height=32, width=128)), "is not the one for videos of 9x32x128;"),
        ("1.5-5b", Options(base=BASE), "in_channels is 16, but 32 in the YAML (of --base, or training_config"),
        ("1.5-5b", Options(base={"model": {}}), "the checkpoint): model.network_config: missing; use"),
        ("1.5-5b", Options(base={"model": None}), "the checkpoint): model.network_config: missing; use"),
        ("1.5-5b", Options(base=with_network(num_layers="two")), "num_layers: expected int, got 'two'."),
        ("1.5-5b", Options(base=with_network(num_attention_heads=0)), "attention_heads: 0; use a number above 0."),
        ("1.5-5b", Options(base=with_network(patch_size=[0, 2, 2])), "patch_size: [0, 2, 2] is neither a number"),
    ],
)  # fmt: skip
def test_a_size_or_yaml_of_another_model_is_refused(
    family: str, options: Options, message: str, tmp_path: Path
) -> None:
    write_sat(tmp_path / "sat", sat_transformer(family))
    with pytest.raises(ConfigError, match=re.escape(message)):
        to_diffusers(tmp_path / "sat", tmp_path / "out", options)


def test_mistakes_with_folders(tmp_path: Path) -> None:
    write_sat(tmp_path / "sat", sat_transformer("5b"))
    to_diffusers(tmp_path / "sat", tmp_path / "out")
    with pytest.raises(
        ConfigError, match="out/transformer: already exists; name another folder with -o, or remove"
    ):
        to_diffusers(tmp_path / "sat", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--to: .*out/transformer is in the layout of diffusers already"):
        to_diffusers(tmp_path / "out", tmp_path / "again")
    with pytest.raises(
        ConfigError, match="nowhere: there is no such file or folder; name a checkpoint or a model's"
    ):
        to_diffusers(tmp_path / "nowhere", tmp_path / "again")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match="empty: holds no transformer of CogVideoX; SAT's layout has transformer/lat"
    ):
        to_diffusers(tmp_path / "empty", tmp_path / "again")
    torch.save({"state_dict": sat_autoencoder()}, tmp_path / "empty" / "3d-vae.pt")
    with pytest.raises(
        ConfigError, match=r"the scale of its latents is not in the weights; .* \(1.15258426 for 2B"
    ):
        convert(tmp_path / "empty", tmp_path / "again", "diffusers", ("vae",), Options())


def test_a_broken_folder_of_diffusers_is_one_sentence(tmp_path: Path) -> None:
    model = CogVideoXTransformer3DModel(**FAMILIES["2b"])
    model.save_pretrained(tmp_path / "own" / "transformer")
    file = tmp_path / "own" / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ConfigError, match="not a safetensors file, or cut short; copy or download it again"):
        to_sat(tmp_path / "own", tmp_path / "out")
    file.unlink()
    with pytest.raises(
        ConfigError, match="there is no such file; the folder is incomplete, or its weights have another"
    ):
        to_sat(tmp_path / "own", tmp_path / "out")


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A disk that is full while the weights are written."""
    write_sat(tmp_path / "sat", sat_transformer("2b"))
    (tmp_path / "out" / "transformer.partial").mkdir(parents=True)  # of a conversion that was killed
    to_diffusers(tmp_path / "sat", tmp_path / "out")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for convert_back in (to_diffusers, to_sat):
        source = tmp_path / ("sat" if convert_back is to_diffusers else "out")
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # fails as a full disk does, in the same calls
        try:
            with pytest.raises(ConfigError, match="again/transformer: cannot be written .*File too large"):
                convert_back(source, tmp_path / "again")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list((tmp_path / "again").iterdir()) == []


def test_an_output_under_a_file_is_one_sentence(tmp_path: Path) -> None:
    write_sat(tmp_path / "sat", sat_transformer("5b"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"file/transformer: cannot be written \((File exists|Not a directory)\)\.$"
    ):
        to_diffusers(tmp_path / "sat", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "index", ["[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": 3, "b": "c"}}', "{", "{}"]
)
def test_an_index_of_shards_that_is_none_is_one_sentence(index: str, tmp_path: Path) -> None:
    CogVideoXTransformer3DModel(**FAMILIES["2b"]).save_pretrained(tmp_path / "own" / "transformer")
    name = "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / "own" / "transformer" / name).write_text(index)
    with pytest.raises(ConfigError, match=f"{name}: not an index of shards; copy or download it again.$"):
        to_sat(tmp_path / "own", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": "two"}, "num_layers is 'two', which no model can have; fix that value."),
        ({"num_layers": 2.5}, "num_layers is 2.5, which no model can have; fix that value."),
        ({"attention_head_dim": 0}, "attention_head_dim is 0, which no model can have; fix that value."),
        ({"sample_frames": None}, "sample_frames is None, which no model can have; fix that value."),
        ({"patch_size_t": "a"}, "patch_size_t is 'a', which no model can have; fix that value."),
        ({"timestep_activation_fn": None}, "no model can be made from its values ("),
        ({"_class_name": "UNet2DModel"}, "sat: holds no transformer of CogVideoX;"),
    ],
)
def test_a_config_json_with_wrong_values_is_one_sentence(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    CogVideoXTransformer3DModel(**FAMILIES["5b"]).save_pretrained(tmp_path / "sat" / "transformer")
    file = tmp_path / "sat" / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        to_sat(tmp_path / "sat", tmp_path / "out")
    assert str(file) in str(error.value) or "_class_name" in changes


def test_the_layout_that_weights_have_is_refused_before_their_shapes(tmp_path: Path) -> None:
    write_sat(tmp_path / "sat" / "transformer", sat_transformer("5b"))  # whose positions are of no known size
    with pytest.raises(
        ConfigError, match="^--to: .*model_states.pt is in the layout of sat already; name the oth"
    ):
        to_sat(tmp_path / "sat", tmp_path / "out")
    (tmp_path / "sat" / "vae").mkdir()
    torch.save({"state_dict": sat_autoencoder()}, tmp_path / "sat" / "vae" / "3d-vae.pt")
    with pytest.raises(
        ConfigError, match="^--to: .*3d-vae.pt is in the layout of sat already; name the other one."
    ):
        convert(tmp_path / "sat", tmp_path / "out", "sat", ("vae",), Options())


def test_an_output_inside_a_part_of_the_source_is_refused(tmp_path: Path) -> None:
    file = write_sat(tmp_path / "sat" / "transformer", sat_transformer("1.5-5b"))
    folder = tmp_path / "sat" / "transformer"
    before = sorted(folder.rglob("*"))
    sources = [
        (tmp_path / "sat", folder),
        (tmp_path / "sat", folder / "1" / "a"),
        (folder, folder),
        (file, folder),
    ]
    message = r"is a part of the source, or lies in one \(.*sat/transformer\); name another folder.$"
    for source, target in sources:
        with pytest.raises(ConfigError, match=message):
            to_diffusers(source, target)
        with pytest.raises(ConfigError, match=message):
            export(source, target, Options())
    assert sorted(folder.rglob("*")) == before
    to_diffusers(tmp_path / "sat", tmp_path / "sat" / "out")  # beside the parts


@pytest.mark.parametrize("scale", ["much", [1]])
def test_a_scale_of_the_yaml_that_is_no_number_is_one_sentence(scale: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": sat_autoencoder()}, tmp_path / "3d-vae.pt")
    options = Options(base={"model": {"scale_factor": scale}})
    with pytest.raises(ConfigError, match=r"model.scale_factor: expected float, got "):
        convert(tmp_path, tmp_path / "out", "diffusers", ("vae",), options)
