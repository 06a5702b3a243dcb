from __future__ import annotations

import pytest

import sat_ext
from sat_ext.errors import ConfigError
from sat_ext.sat.training import get_target


def test_our_classes_are_importable_by_their_targets() -> None:
    for name in ("JointImageVideoDataset", "FirstFrameDataset"):
        assert get_target(f"sat_ext.{name}") is getattr(sat_ext, name)
        assert getattr(sat_ext, name).target == f"sat_ext.{name}"


def test_an_unknown_data_set_is_named() -> None:
    for name in ("sat_ext.Nobody", "Nobody", "no_such_package.Theirs"):
        with pytest.raises(ConfigError, match=rf"data\.target: '{name}' cannot be imported"):
            get_target(name)
    with pytest.raises(ConfigError, match="'os.path' has no create_dataset_function; name a data set class"):
        get_target("os.path")
