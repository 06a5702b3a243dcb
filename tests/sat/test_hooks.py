"""The table of what is put around SAT's functions."""

from __future__ import annotations

import sys
from argparse import Namespace
from itertools import groupby
from types import ModuleType

import pytest

from sat_ext.sat import hooks
from sat_ext.sat.hooks import FIXES, HOOKS


def test_each_function_is_wrapped_in_one_place_of_the_table() -> None:
    """The hooks of a function stand together, in their order, and it is replaced once."""
    targets = [target for target, _ in groupby(HOOKS, lambda hook: hook.target)]
    assert len(targets) == len(set(targets))


def test_a_hook_is_of_a_repair_that_there_is_and_says_why() -> None:
    assert {hook.fix for hook in HOOKS} - {None} <= FIXES.keys()
    assert all(hook.why and hook.wrap.__doc__ for hook in HOOKS)
    assert all((fix.__doc__ or "").startswith("Symptom: ") for fix in FIXES.values())


def test_the_later_hook_is_around_the_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ModuleType("theirs")
    theirs.step = lambda: ["theirs"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    around = [hooks.Hook("theirs:step", lambda step, name=name: [name, *step()], "a test") for name in ("a", "b")]
    hooks.put(around)
    assert theirs.step() == ["b", "a", "theirs"]


def test_reading_the_data_classs_function_puts_the_entry_alone_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from sat.training import deepspeed_training

    import sat_ext

    loaders, saves = deepspeed_training.make_loaders, deepspeed_training.save_checkpoint
    monkeypatch.setattr(deepspeed_training, "make_loaders", loaders)  # put back afterwards
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(hooks, "_done", set())
    for _ in range(2):
        assert sat_ext.FirstFrameDataset.create_dataset_function
    wrapped = deepspeed_training.make_loaders
    assert wrapped is not loaders and deepspeed_training.save_checkpoint is saves
    begun: list[Namespace] = []
    monkeypatch.setattr(hooks, "install", begun.append)
    monkeypatch.setattr(hooks, "report_of", lambda args: None)
    monkeypatch.setattr(hooks, "fill_in_lists", lambda args: None)
    wrapped_args = Namespace(train_data=None, valid_data=None, test_data=None)
    with pytest.raises(Exception, match="batch|attribute"):
        wrapped(wrapped_args, None)  # SAT's own, which needs more arguments than these
    assert begun[0] is wrapped_args


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    hooks.show()
    shown = capsys.readouterr().out
    names = [hook.target.rpartition(":")[2].rpartition(".")[2] for hook in HOOKS]
    assert all(name[:30] in shown for name in names)
    assert all(name in shown for name in FIXES)
