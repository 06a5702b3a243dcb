"""Lists of data that SAT would divide by the length of, or take a text's letters for."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

import sat_ext
from sat_ext.errors import ConfigError
from sat_ext.sat.arguments import fill_in_lists


def lists(**given: Any) -> Namespace:
    return Namespace(**{"train_data": ["a"], "valid_data": None, "test_data": None, "data_config": {}, **given})


def test_an_empty_list_is_none() -> None:
    args = lists(valid_data=[], test_data=[])
    fill_in_lists(args)
    assert (args.train_data, args.valid_data, args.test_data) == (["a"], None, None)


@pytest.mark.parametrize("train_data", [None, []])
def test_sources_stand_for_one_entry(train_data: Any) -> None:
    args = lists(train_data=train_data, data_config={"params": {"sources": [{"path": "b"}]}})
    fill_in_lists(args)
    assert args.train_data == ["data.params.sources"]
    with pytest.raises(ConfigError, match=r"args\.train_data: nothing to train on; name a folder or table"):
        fill_in_lists(lists(train_data=train_data))


def test_a_text_is_no_list() -> None:
    with pytest.raises(ConfigError, match=r"""args\.valid_data: 'b' is a string, not a list; write \["b"\]\."""):
        fill_in_lists(lists(valid_data="b"))


def test_sat_asks_for_them_before_it_builds_any() -> None:
    from sat.training import deepspeed_training

    assert sat_ext.JointImageVideoDataset.create_dataset_function  # as a script reads it

    with pytest.raises(ConfigError, match="nothing to train on"):
        deepspeed_training.make_loaders(lists(train_data=[]), None)
