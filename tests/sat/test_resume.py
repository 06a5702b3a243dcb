"""A run that is killed and resumed has the losses, to the last bit, of one that never was. The kills are real."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from sat_ext.errors import ConfigError
from sat_ext.sat.checkpoint.optimizer_state import check_same_weights, with_own_scaler
from sat_ext.sat.checkpoint.reshard import Piece, Shard, cut
from sat_ext.sat.fixes.optimizer import check_sizes
from tests.sat.ranks import Running, Server, finish, folder_of
from tests.sat.runs import QUICK, SAVE, STEPS

SEED = int(os.environ.get("RESUME_SEED", time.time_ns() % 10**6))


@pytest.fixture(scope="module")
def unbroken(
    server: Server, configure: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[list[dict[str, Any]]]]:
    """What each rank of a run records that is not killed. Data workers change nothing of it."""
    known: dict[tuple[int, int], list[list[dict[str, Any]]]] = {}

    def get(stage: int, accumulate: int) -> list[list[dict[str, Any]]]:
        if (stage, accumulate) not in known:
            folder = tmp_path_factory.mktemp("unbroken")
            run = server.start(
                configure(folder, stage=stage, accumulate=accumulate), world=2, folder=folder, draws=True
            )
            finish(run)
            known[stage, accumulate] = [run.records(0), run.records(1)]
            assert [len(r) for r in known[stage, accumulate]] == [STEPS * accumulate] * 2
        return known[stage, accumulate]

    return get


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def assert_goes_on(resumed: Running, reference: list[list[dict[str, Any]]], *, first: int) -> None:
    """The micro-steps from `first` on are those of the run that was never killed: losses, rates and samples."""
    for rank in range(2):
        assert resumed.records(rank) == reference[rank][first:]


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_killed_run_goes_on_bit_for_bit(
    server: Server, configure: Any, unbroken: Any, tmp_path: Path, stage: int, accumulate: int, workers: int
) -> None:
    chance = random.Random(f"{SEED} {stage} {accumulate} {workers}")
    print(f"RESUME_SEED={SEED}")
    reference = unbroken(stage, accumulate)
    options = {"stage": stage, "accumulate": accumulate, "num_workers": workers, "keep_last": 1}
    if workers:
        options["prefetch_factor"] = 2
    writing = (stage + accumulate + bool(workers)) % 2 == 0
    run = server.start(
        configure(tmp_path, **options), world=2, folder=tmp_path / "killed", draws=True,
        slow_writes=0.1 if writing else 0,
    )  # fmt: skip
    if writing:  # the second checkpoint, some of whose files are there
        until(lambda: any(tmp_path.glob("save/*/6.partial/*")))
        time.sleep(chance.uniform(0, 0.1))
    else:
        step = chance.randrange(SAVE, STEPS) * accumulate + 1
        until(lambda: len(run.records()) >= step)
    run.kill()
    assert run.wait() == [-signal.SIGKILL] * 2, run.log()
    for rank in range(2):
        done = run.records(rank)
        assert done == reference[rank][: len(done)]

    save = tmp_path / "save"
    saved = int((folder_of(save) / "latest").read_text())
    assert saved == SAVE if writing else saved in (SAVE, 2 * SAVE)
    resumed = server.start(
        configure(tmp_path, load=str(folder_of(save)), **options), world=2, folder=tmp_path / "on", draws=True
    )
    finish(resumed)
    assert_goes_on(resumed, reference, first=saved * accumulate)
    assert sorted(p.name for p in folder_of(save).iterdir() if p.is_dir()) == [str(STEPS)]


@pytest.mark.multiprocess
def test_batches_that_a_loss_of_nan_skipped_are_not_seen_again(
    server: Server, configure: Any, tmp_path: Path
) -> None:
    whole = server.start(configure(tmp_path / "a"), world=2, folder=tmp_path / "whole", nan=[1, 4])
    finish(whole)
    first = server.start(configure(tmp_path / "b", train_iters=6), world=2, folder=tmp_path / "first", nan=[1, 4])
    finish(first)
    folder = folder_of(tmp_path / "b" / "save")
    resumed = server.start(
        configure(tmp_path / "b", load=str(folder)), world=2, folder=tmp_path / "on", nan=[1, 4]
    )
    finish(resumed)
    for rank in range(2):
        keys = [r["keys"] for r in whole.records(rank)]
        assert [r["keys"] for r in first.records(rank) + resumed.records(rank)] == keys


@pytest.mark.multiprocess
@pytest.mark.parametrize("whole_group", [True, False])
def test_sigterm_saves_and_ends_with_143(
    server: Server, configure: Any, unbroken: Any, tmp_path: Path, whole_group: bool
) -> None:
    """As Slurm sends it, to the data workers and their readers too, and again; or to one rank alone."""
    options = {"num_workers": 2, "save_interval": 100}
    run = server.start(configure(tmp_path, **options), world=2, folder=tmp_path / "on", draws=True, slow=0.3)
    until(lambda: len(run.records()) >= 3)
    if whole_group:
        run.kill(signal.SIGTERM)
        run.kill(signal.SIGTERM)
    else:
        os.kill(run.pids[1], signal.SIGTERM)
    finish(run, (143, 143))
    folder = folder_of(tmp_path / "save")
    saved = int((folder / "latest").read_text())
    assert saved == len(run.records()) < STEPS
    resumed = server.start(
        configure(tmp_path, load=str(folder), **options), world=2, folder=tmp_path / "again", draws=True
    )
    finish(resumed)
    assert_goes_on(resumed, unbroken(1, 1), first=saved)


@pytest.mark.multiprocess
def test_each_sample_of_an_epoch_is_seen_once_however_many_ranks_go_on(
    server: Server, configure: Any, tmp_path: Path
) -> None:
    """2 ranks, then 4, then 1, then 2: of each source and bucket no sample is a visit behind another."""
    seen: Counter[tuple[str, ...]] = Counter()
    visits, load = 0, dict[str, str]()
    for world, steps, stage in ((2, 5, 1), (4, 8, 2), (1, 16, 3), (2, 19, 1)):
        run = server.start(
            configure(tmp_path, train_iters=steps, stage=stage, valid_data=None, eval_interval=None, **load),
            world=world, folder=tmp_path / f"{steps}",
        )  # fmt: skip
        finish(run, (0,) * world)
        assert "starts from zero" not in run.log()
        for rank in range(world):
            for record in run.records(rank):
                seen.update(zip(record["sources"], record["shapes"], record["keys"], strict=True))
        load = {"load": str(folder_of(tmp_path / "save"))}
        by_cell: dict[tuple[str, str], list[int]] = {}
        for (source, shape, _), number in seen.items():
            by_cell.setdefault((source, shape), []).append(number)
        state = json.loads((folder_of(tmp_path / "save") / str(steps) / "sat_ext.json").read_text())
        cells = {c["bucket"]: c for c in state["cells"]}
        assert sum(c["used"] for c in cells.values()) == seen.total() > visits
        visits = seen.total()
        for (_, shape), numbers in by_cell.items():
            cell = cells[shape]
            assert sum(numbers) == cell["used"]
            assert len(numbers) == min(cell["records"], cell["used"])  # all before any twice
            assert max(numbers) == -(-cell["used"] // cell["records"])
    assert visits > sum(c["records"] for c in cells.values())


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_nothing_of_a_checkpoint_stays_mapped_once_it_is_resumed(
    server: Server, configure: Any, tmp_path: Path, stage: int
) -> None:
    """Its room on the disk would not be free when it is pruned."""
    options = {"stage": stage, **QUICK}
    finish(server.start(configure(tmp_path, **options), world=1, folder=tmp_path / "first"), (0,))
    load = str(folder_of(tmp_path / "save"))
    resumed = server.start(
        configure(tmp_path, load=load, **{**options, "train_iters": 6}), world=1, folder=tmp_path / "on", maps=True
    )
    finish(resumed, (0,))
    assert [r["maps"] for r in resumed.records()] == [[], []]


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 2])
def test_another_optimizer_begins_its_averages_anew(
    server: Server, configure: Any, tmp_path: Path, stage: int
) -> None:
    finish(server.start(configure(tmp_path, stage=stage, **QUICK), world=1, folder=tmp_path / "first"), (0,))
    options = {"load": str(folder_of(tmp_path / "save")), "stage": stage, **QUICK, "train_iters": 5}
    more = tmp_path / "more.yaml"
    more.write_text(json.dumps({"deepspeed": {"optimizer": {"params": {"amsgrad": True}}}}))
    resumed = server.start([*configure(tmp_path, **options), str(more)], world=1, folder=tmp_path / "on")
    finish(resumed, (0,))
    assert (
        "saved by an optimizer that keeps exp_avg, exp_avg_sq, step of each weight, and the YAML's AdamW keeps "
        "exp_avg, exp_avg_sq, max_exp_avg_sq, step; the optimizer's state starts from zero."
    ) in resumed.log()
    assert [r["iteration"] for r in resumed.records()] == [4]


def test_an_optimizer_of_other_weights_is_refused() -> None:
    def stepped(*shapes: tuple[int, ...]) -> torch.optim.Optimizer:
        weights = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = torch.optim.AdamW(weights)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        return optimizer

    saved = stepped((2,), (3,)).state_dict()
    check_same_weights(stepped((2,), (3,)), saved, Path("optimizer.pt"))
    for others in (stepped((2,)), stepped((3,), (2,))):
        with pytest.raises(ConfigError, match="optimizer.pt: holds the state of other weights than train now; "):
            check_same_weights(others, saved, Path("optimizer.pt"))
    one = Shard([torch.ones(2)], {0: {"exp_avg": torch.ones(2)}}, [Piece("a", 0, 0, 0, 2)])
    with pytest.raises(ConfigError, match=r"4: the optimizer has no state of 1 weights .* \(first: b\); train"):
        cut([one], [Piece("a", 0, 0, 0, 2), Piece("b", 0, 2, 0, 1)], [3], Path("4"))


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdamW"])
def test_averages_that_are_not_one_value_a_weight_are_not_cut(name: str) -> None:
    """The states are bitsandbytes' own, of a step on the CPU; it saves them as a dictionary in each state."""
    weight = torch.nn.Parameter(torch.ones(8192))
    weight.grad = torch.ones(8192)
    optimizer = getattr(pytest.importorskip("bitsandbytes").optim, name)([weight])
    optimizer.step()
    for state in (optimizer.state_dict()["state"], {0: optimizer.state[weight]}):  # and without the dictionary
        if name == "AdamW" and state[0].keys() == {"step", "state1", "state2"}:
            continue
        one = Shard([torch.ones(8192)], state, [Piece("a", 0, 0, 0, 8192)])
        with pytest.raises(
            ConfigError, match=r"4: the optimizer's '\w+' is not one value per weight, as with 8-b"
        ):
            cut([one], [Piece("a", 0, 0, 0, 4096)], [4096], Path("4"))


def test_numbers_that_differ_between_shards_and_padding_are_told_from_averages() -> None:
    def shard(first: int, **state: Any) -> Shard:
        return Shard([torch.ones(2)], {0: state}, [Piece("a", 0, 0, first, 2)], [2])

    average = torch.tensor([1.0, 2.0, 0.0, 0.0])  # with DeepSpeed's padding
    shards = [shard(first, step=3, exp_avg=average + first) for first in (0, 2)]
    weights, states = cut(shards, [Piece("a", 0, 0, 0, 4)], [4], Path("4"))
    assert states == {0: {"step": 3, "exp_avg": states[0]["exp_avg"]}}
    assert states[0]["exp_avg"].tolist() == [1, 2, 3, 4]
    for wrong in ({"scale": 1.0}, {"exp_avg": torch.ones(3)}, {"exp_avg": torch.ones(2, 1)}):
        with pytest.raises(
            ConfigError, match=f"the optimizer's '{next(iter(wrong))}' is not one value per weight"
        ):
            cut([shard(0, **wrong), shard(2, scale=2.0)], [Piece("a", 0, 0, 0, 4)], [4], Path("4"))


def test_more_numbers_than_bitsandbytes_counts_are_refused() -> None:
    def with_numbers(count: int) -> Any:
        group = torch.nn.Parameter(torch.empty(count, device="meta"))
        return SimpleNamespace(optimizer=torch.optim.SGD([group], lr=1.0))

    check_sizes("bitsandbytes.optim.AdamW8bit", with_numbers(2**31 - 1))
    check_sizes("torch.optim.AdamW", with_numbers(2**31))
    with pytest.raises(
        ConfigError, match=r"AdamW8bit' would get 2,147,483,648 numbers in one group, but counts t"
    ):
        check_sizes("bitsandbytes.optim.AdamW8bit", with_numbers(2**31))
    stage_3 = SimpleNamespace(
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0),
        fp32_partitioned_groups_flat=[torch.empty(2**31, device="meta")],
    )
    with pytest.raises(ConfigError, match="use more GPUs, ZeRO-3"):
        check_sizes("bitsandbytes.optim.Lion8bit", stage_3)


def dynamic(scale: float) -> DynamicLossScaler:
    return DynamicLossScaler(scale, 2.0, 1000, 1.0, 1, False)


@pytest.mark.parametrize(
    ("saved", "running", "taken"),
    [
        (LossScaler(1.0), dynamic(2.0**16), False),  # fp32 -> fp16
        (dynamic(2.0**16), LossScaler(1.0), False),
        (LossScaler(1.0), LossScaler(128.0), False),
        (LossScaler(128.0), LossScaler(128.0), True),
        (dynamic(2.0**9), dynamic(2.0**16), True),
    ],
)
def test_a_change_of_precision_takes_the_yamls_loss_scaler(saved: Any, running: Any, taken: bool) -> None:
    optimizer = SimpleNamespace(loss_scaler=running, dynamic_loss_scale=running.dynamic)
    state = {"loss_scaler": saved, "dynamic_loss_scale": saved.dynamic, "overflow": True}
    expected = state if taken else {**vars(optimizer), "overflow": False}
    assert with_own_scaler(optimizer, state) == expected
