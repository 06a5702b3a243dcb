"""A LoRA and the weights that it belongs to, which lie elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from sat_ext.convert.convert import convert, export
from sat_ext.convert.parts import ConvertOptions as Options
from tests.sat_layout import SIZE, sat_transformer, write_base, write_sat
from tests.test_convert import assert_same, sat_file
from tests.test_convert_lora import LORA_FILE, PREFIX, as_upstream, sat_lora, write_run


def test_a_checkpoint_of_lora_alone_becomes_one_with_its_base(tmp_path: Path) -> None:
    """As CogVideo's sample_video.py reads its own: from the base that the checkpoint names, or the one given."""
    base, lora = sat_transformer("5b"), sat_lora()
    write_sat(tmp_path / "base" / "transformer", base)
    run = write_run(tmp_path / "run", lora)
    options = Options(base_weights=tmp_path / "base")  # its size stands in the run's YAML
    convert(run, tmp_path / "given", "sat", ("transformer",), options)
    assert_same(sat_file(tmp_path / "given" / "transformer"), as_upstream(base, lora))
    write_base(run / "1", tmp_path / "base" / "transformer", 1)
    convert(run, tmp_path / "named", "sat", ("transformer",), Options())
    assert_same(sat_file(tmp_path / "named" / "transformer"), as_upstream(base, lora))


def test_a_run_of_lora_alone_takes_its_bases_shapes_from_its_own_yaml(tmp_path: Path) -> None:
    base, lora = sat_transformer("5b"), sat_lora()
    write_sat(tmp_path / "base" / "transformer", base)
    run = write_run(tmp_path / "run", lora)
    write_base(run / "1", tmp_path / "base" / "transformer", 1)
    done = convert(run, tmp_path / "out", "diffusers", ("transformer",), Options())
    assert done.written == [tmp_path / "out" / "transformer", tmp_path / "out" / LORA_FILE]
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert [config[f"sample_{n}"] for n in ("frames", "height", "width")] == [SIZE.frames, 8, 8]


def test_what_a_run_trained_beside_its_lora_goes_over_its_base(tmp_path: Path) -> None:
    base, lora = sat_transformer("5b"), sat_lora()
    write_sat(tmp_path / "base", base)
    name = f"{PREFIX}mixins.final_layer.linear.bias"
    trained = {name: base[name] + 1}
    run = write_run(tmp_path / "run", lora | trained)
    options = Options(base_weights=tmp_path / "base")
    convert(run, tmp_path / "out", "sat", ("transformer",), options)
    assert_same(sat_file(tmp_path / "out" / "transformer"), as_upstream(base | trained, lora))


def test_a_lora_of_diffusers_beside_sats_weights_is_put_into_them(tmp_path: Path) -> None:
    base, lora = sat_transformer("5b"), sat_lora()
    export(write_run(tmp_path / "run", lora), tmp_path / "model", Options())
    write_sat(tmp_path / "model" / "transformer", base)
    convert(tmp_path / "model", tmp_path / "out", "sat", ("transformer",), Options(size=SIZE))
    assert_same(sat_file(tmp_path / "out" / "transformer"), as_upstream(base, lora))
