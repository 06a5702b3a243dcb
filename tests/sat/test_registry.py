from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

import sat_ext
from sat_ext.errors import ConfigError
from sat_ext.sat import registry
from sat_ext.sat.training import get_target


def test_our_classes_are_registered_and_importable_by_their_targets() -> None:
    for name in ("JointImageVideoDataset", "FirstFrameDataset"):
        assert get_target(f"sat_ext.{name}") is get_target(name) is getattr(sat_ext, name)
        assert getattr(sat_ext, name).target == f"sat_ext.{name}"


def test_a_registered_name_is_found_in_a_fresh_process() -> None:
    code = "from sat_ext.sat.training import get_target; print(get_target('FirstFrameDataset').__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "FirstFrameDataset"


def test_another_package_adds_a_data_set_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("Theirs", "collections:OrderedDict", registry.ENTRY_POINT_GROUP)

    def points(group: str) -> list[Any]:
        return [point] if group == registry.ENTRY_POINT_GROUP else []

    monkeypatch.setattr(registry, "entry_points", points)
    monkeypatch.setattr(registry.dataset_registry, "member", dict(registry.dataset_registry.member))
    from collections import OrderedDict

    assert get_target("Theirs") is OrderedDict


def test_a_package_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("Theirs", "no_such_package:Theirs", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(ConfigError) as error:
        get_target("Theirs")
    assert str(error.value) == (
        "data.target: 'Theirs' cannot be loaded from 'no_such_package:Theirs' (ModuleNotFoundError: No module "
        "named 'no_such_package'); fix or remove that package."
    )


def test_an_unknown_data_set_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no data set is called 'Nobody'; registered: .*JointImageVideoDataset"):
        get_target("Nobody")
    for name in ("sat_ext.Nobody", "no_such_package.Theirs"):
        with pytest.raises(ConfigError, match=rf"data\.target: '{name}' cannot be imported"):
            get_target(name)
    with pytest.raises(ConfigError, match="'os.path' has no create_dataset_function; name a data set class"):
        get_target("os.path")
