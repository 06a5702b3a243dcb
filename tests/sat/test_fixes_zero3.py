"""ZeRO-3 on two ranks, without our repairs and with them; what was seen is in `zero3_ranks.py`."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).parents[2]
NETWORK = 28  # weights of two of SAT's layers, embeddings and the last norm


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("zero3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port,
            str(Path(__file__).with_name("zero3_ranks.py")), str(folder),
        ],
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:]
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_sats_parallel_layers_can_be_built_in_zero_init(seen: dict[str, Any]) -> None:
    assert "multiple values for argument 'module'" in seen["layer_without"]
    assert seen["layer_with"] == "[6, 4] 24.0"


def test_a_network_is_split_up_layer_by_layer_and_an_encoder_reads_its_file_before(seen: dict[str, Any]) -> None:
    assert "size mismatch" in seen["build_without"]
    build = seen["build"]
    assert not [name for name in build["whole_after_build"] if ".layers." in name]
    assert build["whole"] == []
    assert build["dtypes"] == ["torch.bfloat16"]
    assert build["deviation"] > 0  # SAT's initial values are still there


def test_lora_changes_layers_that_are_split_up_already(seen: dict[str, Any]) -> None:
    shapes = seen["build"]["shapes"]
    attention = "model.transformer.layers.1.attention."
    assert shapes[f"{attention}query_key_value.original.weight"] == [48, 16]
    assert shapes[f"{attention}query_key_value.matrix_A.2"] == [2, 16]
    assert shapes[f"{attention}dense.matrix_B.0"] == [16, 2]


def test_each_rank_holds_its_half(seen: dict[str, Any]) -> None:
    sizes = [math.prod(shape) for shape in seen["build"]["shapes"].values()]
    assert seen["build"]["numbers"] == sum((size + 1) // 2 for size in sizes)


def test_whole_weights_are_loaded_into_the_partitions(seen: dict[str, Any]) -> None:
    assert "size of tensor a (0)" in seen["load_without"]
    of_base, of_all = seen["load_wrong"]
    assert all(".matrix_" in name for name in of_base)  # which a base model does not have
    assert of_all == []


def test_a_given_model_is_saved_whole_and_goes_on_from_there(seen: dict[str, Any]) -> None:
    assert len(seen["saved"]) == NETWORK  # and nothing of the frozen encoder
    assert seen["saved"]["model.transformer.layers.1.attention.dense.weight"] == [16, 16]
    assert seen["trained"] == seen["unbroken"][:3]
    assert seen["continued"] == [seen["unbroken"][3]]
    assert seen["unbroken"][3] != seen["unbroken"][0]
