"""Full checkpoints: what is in them, what becomes of them when things go wrong, and what is said of bad ones."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sat_ext.checkpoint.layout import full_checkpoints
from sat_ext.checkpoint.manifest import read_manifest
from sat_ext.checkpoint.reading import read_file, read_weights
from sat_ext.errors import ConfigError
from sat_ext.models.generate import load_engine
from sat_ext.sat import steps
from sat_ext.sat.checkpoint.optimizer_state import SHARD_TYPES
from sat_ext.sat.checkpoint.reshard import Piece, cut, saved_shards
from sat_ext.sat.checkpoint.save import prune
from tests.sat.ranks import Server, finish, folder_of
from tests.sat.runs import QUICK
from tests.sat_layout import write_base

Configure = Callable[..., list[str]]


@pytest.mark.multiprocess
def test_a_checkpoint_holds_the_state_of_every_rank_and_no_code(saved: Path) -> None:
    manifest = read_manifest(saved / "4")
    assert manifest is not None
    assert (manifest.iteration, manifest.micro_steps, manifest.world, manifest.zero_stage) == (4, 4, 2, 2)
    assert sum(c.used for c in manifest.cells) >= 8
    assert {p.name for p in (saved / "4").iterdir()} == {*manifest.files, "sat_ext.json"} == {
        "sat_ext.json", "mp_rank_00_model_states.pt", "rng_0.pt", "rng_1.pt", "data.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    }  # fmt: skip
    assert (saved / "latest").read_text() == "4"
    state = torch.load(saved / "4" / "mp_rank_00_model_states.pt", weights_only=True)  # as SAT does
    assert state["iteration"] == 4
    engine, iteration = load_engine(saved)
    assert iteration == 4
    assert state["module"].keys() == engine.state_dict().keys()


def whole_optimizer(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By parameter: its fp32 values and the optimizer's moments, from the shards of all ranks."""
    manifest = read_manifest(folder)
    assert manifest is not None
    inner = "optimizer_state_dict"
    states = [
        read_file(folder / f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt", types=SHARD_TYPES)[inner]
        for r in range(manifest.world)
    ]
    shapes = None
    if manifest.zero_stage == 3:
        shapes = read_file(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", types=SHARD_TYPES)["param_shapes"]
    shards = saved_shards(states, manifest, shapes)
    sizes: dict[str, int] = {}
    for shard in shards:
        for piece in shard.pieces:
            sizes[piece.name] = sizes.get(piece.name, 0) + piece.numel
    names = sorted(sizes)
    pieces = [Piece(name, group, 0, 0, sizes[name]) for group, name in enumerate(names)]
    weights, moments = cut(shards, pieces, [sizes[name] for name in names], folder)
    return {name: {"fp32": weights[i], **moments[i]} for i, name in enumerate(names)}


@pytest.mark.multiprocess
def test_the_optimizer_is_cut_anew_for_other_ranks_and_stages_without_a_bit_lost(
    server: Server, configure: Configure, saved: Path, tmp_path: Path
) -> None:
    expected, load = whole_optimizer(saved / "4"), saved
    assert set(next(iter(expected.values()))) == {"fp32", "exp_avg", "exp_avg_sq", "step"}
    weights = read_weights(saved)[0]
    for number, (world, stage) in enumerate([(4, 3), (1, 1), (3, 3), (2, 2)]):
        folder = tmp_path / str(number)
        arguments = configure(folder, stage=stage, load=str(load), **QUICK)  # no step is left to do
        run = server.start(arguments, world=world, folder=folder)
        finish(run, (0,) * world)
        load = folder_of(folder / "save")
        found = whole_optimizer(load / "4")
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert all(torch.equal(found[name][key], values[key]) for key in values), name
        assert all(torch.equal(value, weights[name]) for name, value in read_weights(load)[0].items())


@pytest.mark.parametrize("small_disk", ["900k"], indirect=True)  # room for one checkpoint and not for two
@pytest.mark.multiprocess
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(
    server: Server, configure: Configure, small_disk: Path, tmp_path: Path
) -> None:
    arguments = configure(tmp_path, save=str(small_disk / "save"), stage=2, **{**QUICK, "train_iters": 5})
    run = server.start(arguments, world=2, folder=tmp_path)
    finish(run, (1, 1))
    folder = folder_of(small_disk / "save")
    log = run.log()
    assert "the checkpoint of iteration 4 was not saved: rank " in log
    assert f"No space left on device); make room for it; the last good checkpoint is {folder / '2'}." in log
    assert "the checkpoint of iteration 5 was not saved" in log  # training went on; the last save ends it
    assert "Traceback" not in log
    assert (folder / "latest").read_text() == "2"
    assert full_checkpoints(folder) == [folder / "2"]
    assert read_manifest(folder / "2") is not None
    assert not list(folder.glob("*.partial"))


@pytest.mark.multiprocess
def test_one_rank_that_cannot_write_does_not_hang_the_others(
    server: Server, configure: Configure, tmp_path: Path
) -> None:
    run = server.start(configure(tmp_path, **QUICK), world=2, folder=tmp_path, full_disk=[1, 100_000])
    finish(run, (1, 1))
    assert (
        "the checkpoint of iteration 4 was not saved: rank 1 could not write "
        "zero_pp_rank_1_mp_rank_00_optim_states.pt (File too large); make room for it; there is no earlier one"
    ) in run.log()
    assert not list(folder_of(tmp_path / "save").glob("*.partial"))


@pytest.mark.multiprocess
def test_finetuning_from_a_full_checkpoint_begins_at_0(
    server: Server, configure: Configure, saved: Path, tmp_path: Path
) -> None:
    arguments = configure(tmp_path, mode="finetune", load=str(saved), **{**QUICK, "train_iters": 2})
    run = server.start(arguments, world=1, folder=tmp_path)
    finish(run, (0,))
    assert [r["iteration"] for r in run.records()] == [0, 1]
    manifest = read_manifest(folder_of(tmp_path / "save") / "2")
    assert manifest is not None and manifest.base is None  # all of it is trained, and saved again


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for name in ("100", "200", "300", "900", "50.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sat_ext.json").write_text("{}")
    (tmp_path / "samples").mkdir()
    prune(tmp_path, 300, 2)  # 900 is of a time before the run was resumed at 200
    assert sorted(p.name for p in tmp_path.iterdir()) == ["200", "300", "samples"]
    prune(tmp_path, 200, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["200", "samples"]
    prune(tmp_path, 200, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["200", "samples"]


def test_weights_of_a_lora_come_with_those_of_its_base(tmp_path: Path) -> None:
    lora = {"a.matrix_A.0": torch.zeros(1), "b": torch.zeros(2)}
    for name, weights in (("base", {"a": torch.ones(2), "b": torch.ones(2)}), ("lora", lora)):
        folder = tmp_path / name / "7"
        folder.mkdir(parents=True)
        (tmp_path / name / "latest").write_text("7")
        torch.save({"module": weights, "iteration": 7}, folder / "mp_rank_00_model_states.pt")
    write_base(tmp_path / "lora" / "7", tmp_path / "base", 7)
    weights, iteration = read_weights(tmp_path / "lora")
    assert iteration == 7
    assert {k: v.tolist() for k, v in weights.items()} == {"a": [1, 1], "a.matrix_A.0": [0], "b": [0, 0]}
    shutil.rmtree(tmp_path / "base" / "7")
    with pytest.raises(ConfigError, match="base weights: 7, but there is no mp_rank_00_model_states.pt in it"):
        read_weights(tmp_path / "lora")


def test_losses_by_kind_of_a_cogvideo_engine_are_added_and_averaged() -> None:
    """Its loss says what it knows, by `metrics()`; -100 is SAT's mark for a kind that a batch has none of."""
    loss_fn = SimpleNamespace(
        metrics=lambda: {"loss_image": torch.tensor(-100.0), "loss_video": torch.tensor(2.0)}
    )
    engine = SimpleNamespace(module=SimpleNamespace(loss_fn=loss_fn))
    forward = steps._with_losses_by_kind(lambda data, model, *rest: (torch.ones(()), {"loss": torch.ones(())}))
    _, metrics = forward(iter([]), engine, Namespace(), None)
    assert {k: float(v) for k, v in metrics.items()} == {"loss": 1, "loss_image": -100, "loss_video": 2}
    plain = steps._with_losses_by_kind(lambda data, model: torch.ones(()))
    assert isinstance(plain(iter([]), SimpleNamespace(loss_fn=None)), torch.Tensor)
    gathered = {"loss_image": torch.tensor([-100.0, -100.0]), "loss_video": torch.tensor([1.0, -100.0, 3.0])}
    assert {k: v.item() for k, v in steps.mean_metrics(gathered).items()} == {"loss_video": 2}
