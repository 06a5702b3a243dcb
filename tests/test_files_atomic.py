from __future__ import annotations

from pathlib import Path

import pytest

from sat_ext.files.atomic import written_aside


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all(shared: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), written_aside(path, shared=shared) as draft:
        draft.write_text("ne")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"
    with written_aside(path, shared=shared) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "new"


def test_the_draft_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "old").touch()
    with written_aside(tmp_path / "a") as draft:
        draft.mkdir()
        (draft / "new").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]


def test_processes_that_share_a_path_do_not_share_a_draft(tmp_path: Path) -> None:
    with written_aside(tmp_path / "a", shared=True) as one, written_aside(tmp_path / "a", shared=True) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a").read_text() == "one"
