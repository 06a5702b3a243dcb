"""Saving where it could do harm: folders that are not shared, that others use, that hold something already."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sat_ext.checkpoint.manifest import Manifest, read_manifest
from sat_ext.checkpoint.reading import read_weights
from sat_ext.errors import ConfigError
from sat_ext.sat.checkpoint.save import publish
from sat_ext.sat.checkpoint.writer import Writer
from tests.sat.ranks import Server, finish
from tests.sat.runs import QUICK

Configure = Callable[..., list[str]]


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "copy" / saved.name))


@pytest.mark.multiprocess
def test_a_folder_that_not_all_ranks_share_is_refused_before_the_first_step(
    server: Server, configure: Configure, tmp_path: Path
) -> None:
    arguments = configure(tmp_path, **{**QUICK, "save": "save"})
    run = server.start(arguments, world=2, folder=tmp_path, own_disks=True)
    finish(run, (1, 1))
    for rank in range(2):
        assert "error: args.save: rank 1 on " in run.log(rank)
        assert " does not see what rank 0 wrote into save; name a folder that all ranks share.\n" in run.log(rank)
        assert "Traceback" not in run.log(rank)
    assert not run.records()
    assert [p.name for p in tmp_path.glob("rank*/save/*")] == ["runs"]  # TensorBoard's


def test_a_rank_that_does_not_see_the_checkpoints_folder_fails(tmp_path: Path, process_group: None) -> None:
    """As when a mount was lost: on a disk of its own, its files would be missing from the checkpoint."""
    writer = Writer(lambda name: True)
    writer.makedirs(str(tmp_path / "4.partial"), exist_ok=True)  # as DeepSpeed does on every rank
    writer.write({}, tmp_path / "4.partial" / "rng_0.pt")
    assert writer.error == "rank 0 could not write rng_0.pt (No such file or directory)"
    assert not list(tmp_path.iterdir())


@pytest.mark.multiprocess
def test_two_runs_do_not_save_into_one_folder(
    server: Server, configure: Configure, run: Path, tmp_path: Path
) -> None:
    arguments = configure(
        tmp_path, stage=2, load=str(run), **{**QUICK, "train_iters": 5, "save": str(run.parent), "keep_last": 1}
    )
    with open(run / ".lock", "w") as held:  # as the other run does
        fcntl.lockf(held, fcntl.LOCK_EX)
        second = server.start(arguments, world=2, folder=tmp_path / "second")
        finish(second, (1, 1))
        for rank in range(2):
            assert (
                f"error: args.save: another run is saving into {run}; wait for its end, or change "
                "args.experiment_name.\n"
            ) in second.log(rank)
        assert not second.records()
        assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["2", "4"]
    finish(server.start(arguments, world=2, folder=tmp_path / "third"))
    assert [p.name for p in run.iterdir() if p.is_dir()] == ["5"]


@pytest.mark.multiprocess
def test_weights_alone_take_the_place_of_a_full_checkpoint(
    server: Server, configure: Configure, run: Path, tmp_path: Path
) -> None:
    options = {**QUICK, "save": str(run.parent), "checkpoint": "weights"}  # no step is left to do
    finish(server.start(configure(tmp_path, load=str(run), **options), world=1, folder=tmp_path), (0,))
    assert [p.name for p in (run / "4").iterdir()] == ["mp_rank_00_model_states.pt"]
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["2", "4"]
    assert read_manifest(run / "4") is None and read_weights(run)[1] == 4


@pytest.mark.multiprocess
def test_only_a_whole_checkpoint_is_recommended_for_a_broken_one(run: Path) -> None:
    (run / "4" / "rng_0.pt").write_text("")
    with pytest.raises(ConfigError, match=r"truncated or changed, 0 bytes .*; write 2 into .*latest"):
        read_manifest(run / "4")
    shutil.copytree(run / "2", run / "4.old.partial")  # as a kill leaves it, between the renames
    (run / "2" / "rng_1.pt").unlink()
    with pytest.raises(ConfigError, match=r"; remove 4, and rename 4.old.partial to 4\.$"):
        read_manifest(run / "4")
    (run / "4.old.partial" / "rng_1.pt").unlink()
    with pytest.raises(ConfigError, match=r"; start from another checkpoint\.$"):
        read_manifest(run / "4")


@pytest.fixture
def publishing(saved: Path, run: Path, process_group: None) -> tuple[Path, Callable[..., Writer]]:
    """`run` with its checkpoint 4, and another one that is about to be."""
    manifest = read_manifest(run / "4")
    assert isinstance(manifest, Manifest)
    shutil.copytree(run / "4", run / "4.partial")
    (run / "4" / "old").touch()

    def call(**changes: Any) -> Writer:
        writer = Writer(lambda name: True)
        publish(run / "4.partial", manifest, {"model_class": "new"}, changes.get("keep_last"), writer)
        return writer

    return run, call


@pytest.mark.multiprocess
def test_a_checkpoint_takes_the_place_of_another_of_its_iteration(publishing: Any) -> None:
    run, publish_it = publishing
    (run / "latest").write_text("2")
    assert publish_it(keep_last=1).error is None
    assert (run / "latest").read_text() == "4"
    assert json.loads((run / "model_config.json").read_text()) == {"model_class": "new"}
    assert not (run / "4" / "old").exists()
    assert [p.name for p in run.iterdir() if p.is_dir()] == ["4"]
    assert not list(run.glob("*.new"))


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["latest", "model_config.json"])
def test_what_cannot_be_written_before_the_rename_leaves_the_old_checkpoint(publishing: Any, name: str) -> None:
    run, publish_it = publishing
    (run / "model_config.json").unlink()
    (run / {"latest": "latest.new"}.get(name, name)).mkdir()
    writer = publish_it(keep_last=1)
    assert writer.error == f"rank 0 could not write {name} (Is a directory)" and not writer.placed
    assert (run / "4" / "old").exists() and (run / "2").exists()


@pytest.mark.multiprocess
def test_a_saved_checkpoint_that_latest_does_not_name_is_told_as_saved(publishing: Any) -> None:
    run, publish_it = publishing
    (run / "latest").unlink()
    (run / "latest").mkdir()
    writer = publish_it()
    assert writer.placed and writer.error == (
        f"saved as {run / '4'}, but 'latest' could not be written (Is a directory): write 4 there"
    )
    assert not (run / "4" / "old").exists()
    assert not list(run.glob("*.new"))


@pytest.mark.multiprocess
def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(
    publishing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run, publish_it = publishing
    (run / "9.partial").touch()  # no folder
    assert publish_it(keep_last=1).error is None
    assert "an old checkpoint could not be removed (Not a directory: " in caplog.text
    assert (run / "latest").read_text() == "4"
