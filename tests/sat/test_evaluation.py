"""Held-out losses of real runs: on any number of ranks, twice in a row, and beside the training they watch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from tests.sat.ranks import Running, Server, finish, folder_of

pytestmark = pytest.mark.multiprocess
FIVE = {"train_iters": 2, "save_interval": None, "eval_interval": 1, "eval_iters": 5, "checkpoint": "weights"}


@pytest.fixture(scope="module")
def launch(server: Server, configure: Callable[..., list[str]]) -> Callable[..., Running]:
    def run(
        folder: Path, *, world: int, stage: int = 1, still: bool = False, draws: bool = False, **args: Any
    ) -> Running:
        arguments = configure(folder, stage=stage, **{**FIVE, **args})
        arguments += ["--lr", "0"] if still else []
        running = server.start(arguments, world=world, folder=folder, draws=draws)
        finish(running, (0,) * world)
        return running

    return run


def evaluations(folder: Path) -> list[dict[str, float]]:
    lines = (folder_of(folder / "save") / "heldout.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_number_of_ranks_changes_no_held_out_loss(launch: Any, tmp_path: Path) -> None:
    """Five samples on two ranks and three: a rank repeats what does not count, and ZeRO-3 does not wait for it."""
    found = {}
    for world, stage in ((1, 1), (2, 1), (3, 3)):
        folder = tmp_path / str(world)
        # deterministic: PyTorch fills new memory with NaN then, and at the save none may be taken for a weight
        run = launch(folder, world=world, stage=stage, still=True, deterministic=world == 3)
        assert "valid_data: an evaluation is of 5 samples" in run.log()
        found[world] = evaluations(folder)
        for rank in range(world):
            shown = [float(x) for x in re.findall(r"validation loss at .* loss: (\S+)", run.log(rank))]
            assert rank > 0 or len(shown) == 3
        numbers = [{k: v for k, v in e.items() if k != "iteration"} for e in found[world]]
        assert numbers[0] == numbers[1] == numbers[2]  # with a learning rate of 0
        assert set(numbers[0]) == {"loss_image", "loss_video"}
        # 5 samples: 3 of the first bucket, which is of stills, and 2 clips
        mean = (3 * numbers[0]["loss_image"] + 2 * numbers[0]["loss_video"]) / 5
        assert shown_loss(run) == pytest.approx(mean, rel=1e-5)
        assert tensorboard(folder, "Train/valid_loss") == pytest.approx([mean, mean], rel=1e-5)
    assert found[2][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[3][0] == pytest.approx(found[1][0], rel=1e-5)


def shown_loss(run: Running) -> float:
    return float(re.findall(r"validation loss at .* loss: (\S+)", run.log())[-1])


def tensorboard(folder: Path, name: str) -> list[float]:
    """The values of a scalar. A record of an events file: its length, 4 bytes of CRC, the event, 4 of CRC."""
    (file,) = (folder / "save" / "runs").rglob("events.*")
    data, values = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        values += [v.simple_value for v in Event.FromString(data[12 : 12 + length]).summary.value if v.tag == name]
        data = data[16 + length :]
    return values


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluations_change_no_number_of_the_training(launch: Any, tmp_path: Path, workers: int) -> None:
    """`draws`: the training takes random numbers from the global generators, as CogVideo's engine does."""
    options = {"world": 2, "draws": True, "train_iters": 4, "num_workers": workers}
    watched = launch(tmp_path / "with", eval_interval=1, **options)
    alone = launch(tmp_path / "without", eval_interval=None, valid_data=None, **options)
    for rank in range(2):
        losses = [r["loss"] for r in watched.records(rank)]
        assert len(losses) == 4
        assert losses == [r["loss"] for r in alone.records(rank)]
