"""What `data.params` accepts, and what it says otherwise. Sources and folders are tested with the stream."""

from __future__ import annotations

from typing import Any

import pytest

from sat_ext.config import load
from sat_ext.data.clips import SAMPLERS, register_sampler
from sat_ext.data.params import DataConfig
from sat_ext.errors import ConfigError


def config(**params: Any) -> DataConfig:
    return load(DataConfig, {"video_size": [480, 720], "max_num_frames": 49, **params}, "data.params")


def refusal(**params: Any) -> str:
    with pytest.raises(ConfigError) as error:
        config(**params)
    return str(error.value)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_can_be_named_in_a_source(sampler):
    assert config(sources=[{"path": "clips", "sampler": sampler}]).sources[0].sampler == sampler


def test_a_sampler_of_ones_own_can_be_named_in_a_source():
    @register_sampler("ours")
    def ours(window, frames, fps, rng):
        return window.run(0.0, frames, fps)

    try:
        assert config(sources=[{"path": "clips", "sampler": "ours"}]).sources[0].sampler == "ours"
    finally:
        del SAMPLERS["ours"]


def test_an_unknown_sampler_is_named_before_anything_is_read_with_the_nearest_one():
    assert refusal(sources=[{"path": "clips", "sampler": "all_window"}]) == (
        "data.params.sources: sampler: 'all_window' is not one of random_start, start, first_frame, middle, "
        "uniform, random_frame, all_windows (did you mean 'all_windows'?)."
    )


@pytest.mark.parametrize(
    "batch",
    [
        {"cost": "equal"},
        {"cost": "auto", 1: 8},
        {"costs": "auto"},
        {"auto": True},
        {},
        {1: 0},
        {"still": 8},
        {1: "x"},
    ],
)
def test_a_batch_that_is_neither_auto_nor_samples_by_frames_is_refused(batch):
    assert refusal(batch=batch) == (
        f"data.params.batch: {batch!r}; write {{cost: auto}}, {{tokens: 20000}}, or samples per frame count as in "
        "{1: 8, 49: 1}."
    )


def test_the_batch_is_by_cost_where_nothing_is_said():
    assert config().batch == {"cost": "auto"}
    assert config(batch={"1": 8, "49": 1}).batch == {"1": 8, "49": 1}  # YAML merged by OmegaConf may quote keys


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"skip": -1}, "data.params.on_bad_sample.skip: -1 files; use 0 or more."),
        ({"consecutive": -1}, "data.params.on_bad_sample.consecutive: -1 files; use 0 or more."),
        (
            {"timeout": float("inf")},
            "data.params.on_bad_sample.timeout: inf seconds; use more than 0 (60 is the default) and at most "
            "86400, a day.",
        ),
    ],
)
def test_a_budget_of_faults_that_cannot_be_is_refused(budget, message):
    assert refusal(on_bad_sample=budget) == message


@pytest.mark.parametrize("frames", [-1.0, float("nan"), float("inf")])
def test_frames_to_skip_that_are_no_number_are_refused(frames):
    assert refusal(skip_frms_num=frames) == f"data.params.skip_frms_num: {frames} frames; use 0 or more."
