"""The averaged weights: of each optimizer of DeepSpeed against plain loops, and of whole runs on their way through
evaluations, checkpoints and other ranks."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sat_ext.checkpoint.layout import AVERAGE_NAME
from sat_ext.checkpoint.reading import read_file, read_weights
from sat_ext.cli.main import app
from sat_ext.errors import ConfigError
from sat_ext.models.generate import load_engine
from sat_ext.sat.checkpoint.optimizer_state import SHARD_TYPES
from sat_ext.sat.ema import EmaAdamW
from sat_ext.sat.run import run_of
from sat_ext.sat.settings import NAMES
from tests.sat.ema_ranks import CASES, WORLD
from tests.sat.ranks import Running, Server, finish, folder_of, found_by
from tests.sat.repairs import repair
from tests.sat.runs import MODEL, QUICK

Launch = Callable[..., Running]
LORA = {**MODEL, "train": {"mode": "lora", "rank": 4, "alpha": 4}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    return found_by("tests.sat.ema_ranks", tmp_path_factory.mktemp("ema"), WORLD)


@pytest.mark.parametrize("case", ["-".join(map(str, case)) for case in CASES])
def test_the_average_is_that_of_a_plain_loop_and_leaves_the_training_alone(
    ranks: list[dict[str, Any]], case: str
) -> None:
    for found in (rank[case] for rank in ranks):
        assert "error" not in found, found["error"]
        assert found["off"] < 1e-6  # updates are of 1e-2


@pytest.fixture(scope="module")
def launch(server: Server, configure: Callable[..., list[str]]) -> Launch:
    def run(
        folder: Path, *, world: int = 2, stage: int = 1, optimizer: str = "sat_ext.EmaAdamW", model: Any = MODEL,
        bf16: bool = False, **args: Any,
    ) -> Running:  # fmt: skip
        files = configure(folder, stage=stage, **{**QUICK, **args})
        more = folder / "more.yaml"
        section = {"optimizer": {"type": optimizer}, "bf16": {"enabled": bf16}}
        more.write_text(json.dumps({"model": model, "deepspeed": section}))
        running = server.start([*files, str(more)], world=world, folder=folder)
        finish(running, (0,) * world)
        return running

    return run


@pytest.fixture(scope="module", params=[MODEL, LORA], ids=["full", "lora"])
def whole(request: pytest.FixtureRequest, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder and the model of a run of two ranks under ZeRO-2, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("whole")
    launch(folder, stage=2, model=request.param)
    return folder_of(folder / "save"), request.param


def average(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    return dict(read_file(run / str(iteration) / AVERAGE_NAME)["module"])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.multiprocess
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("stage", "model"), [(0, MODEL), (2, LORA), (3, MODEL)])
def test_a_resumed_run_continues_the_average_bit_for_bit(
    launch: Launch, demo: Path, tmp_path: Path, stage: int, model: Any, bf16: bool
) -> None:
    evaluated = {"eval_interval": 2, "eval_iters": 1, "valid_data": [str(demo / "heldout")], "evaluate_ema": True}
    options = {"stage": stage, "model": model, "bf16": bf16, **evaluated}
    launch(tmp_path / "whole", **options)
    run = folder_of(tmp_path / "whole" / "save")
    shutil.copytree(run, tmp_path / run.name)
    (tmp_path / run.name / "latest").write_text("2")
    launch(tmp_path / "on", load=str(tmp_path / run.name), **options)
    assert same(average(folder_of(tmp_path / "on" / "save"), 4), average(run, 4))
    assert not same(average(run, 2), average(run, 4))


@pytest.mark.multiprocess
@pytest.mark.parametrize(("world", "stage"), [(1, 3), (3, 1)])
def test_another_number_of_ranks_and_another_stage_have_the_same_average(
    launch: Launch, whole: Any, tmp_path: Path, world: int, stage: int
) -> None:
    """The run is at its end, so it loads, and saves again what it has."""
    run, model = whole
    resumed = launch(tmp_path, world=world, stage=stage, model=model, load=str(run))
    assert resumed.records() == []
    assert same(average(folder_of(tmp_path / "save"), 4), average(run, 4))


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_evaluations_see_the_average_and_change_no_number_of_the_training(
    launch: Launch, demo: Path, tmp_path: Path, stage: int
) -> None:
    options = {
        "stage": stage, "checkpoint": "full" if stage else "weights", "train_iters": 3, "eval_interval": 1,
        "eval_iters": 2, "valid_data": [str(demo / "heldout")],
    }  # fmt: skip
    runs = [launch(tmp_path / str(e), evaluate_ema=e, **options) for e in (True, False)]
    for rank in range(2):
        assert runs[0].records(rank) == runs[1].records(rank)
    saved = [folder_of(tmp_path / str(e) / "save") for e in (True, False)]
    assert same(read_weights(saved[0])[0], read_weights(saved[1])[0])
    assert same(average(saved[0], 3), average(saved[1], 3))
    lines = [(folder / "heldout.jsonl").read_text().splitlines() for folder in saved]
    assert lines[0][0] == lines[1][0]  # before the first step
    assert [a == b for a, b in zip(*lines, strict=True)] == [True, False, False, False]


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 2])
def test_the_moments_stay_when_the_average_comes_and_goes(launch: Launch, tmp_path: Path, stage: int) -> None:
    first = {"optimizer": "torch.optim.AdamW", "train_iters": 2}
    launch(tmp_path / "0", stage=stage, world=1, **first)
    began = "resume: the checkpoint holds no averaged weights; the average starts at its weights."
    for number, optimizer in ((1, "sat_ext.EmaAdamW"), (2, "torch.optim.AdamW")):
        load = str(folder_of(tmp_path / str(number - 1) / "save"))
        folder = tmp_path / str(number)
        run = launch(
            folder, stage=stage, world=1, optimizer=optimizer, load=load, save_interval=1, train_iters=2 + number
        )
        assert "starts from zero" not in run.log()
        assert (began in run.log()) == (number == 1)
        saved = folder_of(folder / "save") / str(2 + number)
        assert (saved / AVERAGE_NAME).exists() == (number == 1)
        keys = {
            key
            for file in [*saved.glob("*optim_states.pt"), *saved.glob("optimizer.pt")]
            for state in states_of(read_file(file, types=SHARD_TYPES))
            for key in state
        }
        assert ("ema" in keys) == (number == 1) and "exp_avg" in keys


def states_of(saved: Any) -> list[dict[str, Any]]:
    saved = saved.get("optimizer_state_dict", saved)
    return list(saved.get("base_optimizer_state", saved)["state"].values())


@pytest.mark.multiprocess
def test_sampling_and_export_take_the_average(whole: Any, tmp_path: Path) -> None:
    run, model = whole
    engine, iteration = load_engine(run, ema=True)
    weights, expected = dict(engine.named_parameters()), average(run, 4)
    assert iteration == 4
    assert expected.keys() == {n for n, p in weights.items() if p.requires_grad}
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    plain = read_weights(run)[0]
    assert not same(plain, read_weights(run, ema=True)[0])
    lora = model is LORA
    for options, values in ((["--ema"], expected), ([], plain)):
        out = tmp_path / "-".join(["out", *options])
        done = CliRunner().invoke(app, ["export", str(run), "-o", str(out), *options])
        assert done.exit_code == 0, done.output
        (file,) = out.glob("*.safetensors" if lora else "transformer/*.safetensors")
        exported = {n.removeprefix("transformer."): value for n, value in load_file(file).items()}
        names = {n: n.removeprefix("network.").replace(".default.", ".") for n in expected}
        assert same(exported, {names[n]: values[n] for n in expected})


def test_a_checkpoint_without_averages_is_told(saved: Path, tmp_path: Path) -> None:
    message = rf"--ema: {saved}/4 holds no averaged weights \(ema.pt\), which a run saves with "
    with pytest.raises(ConfigError, match=message):
        load_engine(saved, ema=True)
    for command in (["export"], ["convert", "--to", "diffusers"]):
        done = CliRunner().invoke(
            app, [command[0], str(saved), "-o", str(tmp_path / "out"), "--ema", *command[1:]]
        )
        with pytest.raises(ConfigError, match=message):
            raise done.exception
    done = CliRunner().invoke(app, ["sample", str(saved), "--ema"])
    with pytest.raises(ConfigError, match=message):
        raise done.exception


def test_what_averages_nothing_is_refused(tmp_path: Path) -> None:
    def args(kind: str, **values: Any) -> Namespace:
        config = {"optimizer": {"type": kind}, **values.pop("deepspeed", {})}
        return Namespace(**{**dict.fromkeys(NAMES), "mode": "pretrain", "deepspeed_config": config, **values})

    run_of(args("sat_ext.EmaAdamW", evaluate_ema=True))
    with pytest.raises(
        ConfigError, match=r"args.evaluate_ema: true, but deepspeed.optimizer.type 'AdamW' averages no weights; w"
    ):
        run_of(args("AdamW", evaluate_ema=True))
    nvme = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    for values in ({"deepspeed": nvme}, {"model_parallel_size": 2}):
        with pytest.raises(ConfigError, match=r"optimizer.type: 'sat_ext.EmaAdamW' does not average on a disk"):
            repair("optimizer_path", args("sat_ext.EmaAdamW", **values))
    with pytest.raises(ConfigError, match=r"deepspeed.optimizer.params.ema_decay: 1.0; use 0 or more, and less t"):
        EmaAdamW([torch.zeros(1, requires_grad=True)], ema_decay=1.0)
