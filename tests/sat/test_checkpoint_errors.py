"""What is said of bad checkpoints and settings, before the first step."""

from __future__ import annotations

import json
import random
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_ext.checkpoint.reading import read_file, read_weights
from sat_ext.errors import ConfigError
from sat_ext.models.generate import load_engine
from sat_ext.sat.checkpoint.optimizer_state import SHARD_TYPES
from sat_ext.sat.run import run_of
from sat_ext.sat.settings import NAMES, settings_of
from tests.sat.ranks import Server, finish, folder_of
from tests.sat.runs import QUICK

Configure = Callable[..., list[str]]


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "copy" / saved.name))


def resume(load: Path, **changes: Any) -> Any:
    """What is found out of a checkpoint before the model is built."""
    return run_of(Namespace(**{"load": str(load), "mode": "pretrain", "deepspeed_config": {}, **changes}))


def break_latest(run: Path) -> None:
    (run / "latest").write_text("5")


def remove_latest(run: Path) -> None:
    (run / "latest").unlink()


def spoil_latest(run: Path) -> None:
    (run / "latest").write_text("4.partial")


def truncate(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        file = run / "4" / name
        file.write_bytes(file.read_bytes()[:300])

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: (run / "4" / name).unlink()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            remove_latest,
            r"args.load: .*: no checkpoint here \(.*'latest'\); name CogVideo's transformer folder, or a run's f",
        ),
        (break_latest, r"'latest' names 5, but there is no mp_rank_00_model_states.pt in it, .*another \(2, 4\)"),
        (spoil_latest, r"'4.partial' is not the number of a checkpoint; write another \(2, 4\) there"),
        (
            truncate("mp_rank_00_model_states.pt"),
            r"mp_rank_00.*truncated or changed, 300 bytes where .* write 2 into",
        ),
        (truncate("zero_pp_rank_1_mp_rank_00_optim_states.pt"), "zero_pp_rank_1.*truncated or changed, 300 bytes"),
        (truncate("sat_ext.json"), r"sat_ext.json: truncated or changed .* write 2 into .*latest"),
        (remove("rng_1.pt"), r"4: rng_1.pt is missing, so the checkpoint is not whole; write 2 into"),
    ],
)
def test_a_broken_checkpoint_is_told_before_the_model_is_built(run: Path, change: Any, message: str) -> None:
    change(run)
    with pytest.raises(ConfigError, match=message):
        resume(run)


def loaded(run: Path) -> dict[str, Any]:
    """All that a resumed run reads of its checkpoint 4, by file."""
    found: dict[str, Any] = {"run": resume(run).resumed}
    for file in sorted((run / "4").glob("*.pt")):
        found[file.name] = read_file(file, types=SHARD_TYPES)
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or same(vars(one), vars(other)))


@pytest.mark.multiprocess
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_refused_or_changes_nothing(run: Path) -> None:
    rng, expected, refused = random.Random(0), loaded(run), 0
    for file in [*sorted((run / "4").iterdir()), run / "latest"]:
        content = bytearray(file.read_bytes())
        tail = range(max(0, len(content) - 3000), len(content))  # the list of a zip's records
        places = [*rng.choices(range(len(content)), k=40), *rng.choices(tail, k=40)]
        for place in places if file.name != "latest" else [0] * 8:
            flipped = bytearray(content)
            flipped[place] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            try:
                assert same(loaded(run), expected), (file.name, place)
            except ConfigError as error:
                assert str(run) in str(error)
                refused += 1
        file.write_bytes(content)
    assert refused > 300


@pytest.mark.multiprocess
def test_a_damaged_shard_ends_the_run_on_every_rank_with_the_remedy(
    server: Server, configure: Configure, run: Path, tmp_path: Path
) -> None:
    file = run / "4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    arguments = configure(tmp_path, stage=2, load=str(run), **{**QUICK, "train_iters": 6})
    started = server.start(arguments, world=2, folder=tmp_path)
    finish(started, (1, 1))
    message = rf"{file}: damaged: '.*/data/\d+' is not what was written \(.*; write another \(2\) into {run}"
    assert re.search(message, error_of(started.log())) and re.search(message, error_of(started.log(1)))
    assert not started.records()


class Foreign:
    def __reduce__(self) -> Any:
        return print, ("this was run",)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    server: Server, configure: Configure, run: Path, tmp_path: Path, name: str
) -> None:
    torch.save({"module": {}, "code": Foreign()}, run / "4" / name)
    manifest = json.loads((run / "4" / "sat_ext.json").read_text())
    del manifest["checksum"]
    manifest["files"][name] = (run / "4" / name).stat().st_size
    (run / "4" / "sat_ext.json").write_text(json.dumps(manifest))
    arguments = configure(tmp_path, stage=2, load=str(run), **{**QUICK, "train_iters": 6})
    started = server.start(arguments, world=2, folder=tmp_path)
    finish(started, (1, 1))
    assert f"{name}: not a checkpoint of ours: it holds code to be run (print)" in started.log()
    assert "this was run" not in started.log() + started.log(1)
    assert not started.records()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_head_dim": 24}, r"a checkpoint of another model: network\.\S+ is \(\S+.*\) there, and \("),
        ({"num_layers": 2}, r"another model: it lacks \d+ of this one's \d+ weights \(first: network.transf"),
        ({"use_rotary_positional_embeddings": False, "ofs_embed_dim": 16}, "another model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    server: Server, configure: Configure, saved: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    more = tmp_path / "more.yaml"
    more.write_text(json.dumps({"model": {"transformer": change}}))
    arguments = configure(tmp_path, stage=2, load=str(saved), **{**QUICK, "train_iters": 6})
    started = server.start([*arguments, str(more)], world=1, folder=tmp_path)
    finish(started, (1,))
    (line,) = [line for line in started.log().splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert not started.records()


def error_of(log: str) -> str:
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["rng_1.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_what_one_rank_cannot_read_is_told_by_all(
    server: Server, configure: Configure, run: Path, tmp_path: Path, name: str
) -> None:
    file = run / "4" / name
    file.write_bytes(bytes(file.stat().st_size))  # as a disk that was lost leaves it: nothing but zeros
    arguments = configure(tmp_path, stage=2, load=str(run), **{**QUICK, "train_iters": 6})
    started = server.start(arguments, world=2, folder=tmp_path)
    finish(started, (1, 1))
    for rank in range(2):
        expected = f"error: {file}: not a checkpoint of ours, or a truncated one; name another checkpoint."
        assert error_of(started.log(rank)) == expected
        assert "Traceback" not in started.log(rank)


@pytest.mark.multiprocess
def test_finetuning_from_a_smaller_model_is_refused_unless_forced(
    server: Server, configure: Configure, saved: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.yaml"
    more.write_text(json.dumps({"model": {"transformer": {"num_layers": 2}}}))
    options = {"stage": 2, "load": str(saved), "mode": "finetune", **QUICK, "train_iters": 1}
    refused = server.start([*configure(tmp_path, **options), str(more)], world=1, folder=tmp_path / "refused")
    finish(refused, (1,))
    message = (
        r"lacks weights of the YAML's model \(\d+ of \d+, first: network.transformer_blocks.1.* 'force_train: tr"
    )
    assert re.search(message, error_of(refused.log()))
    forced = [*configure(tmp_path, force_train=True, **options), str(more)]
    begun = server.start(forced, world=1, folder=tmp_path / "forced")
    finish(begun, (0,))
    assert re.search(r"warning: \d+ of the network's \d+ weights are not in .* keep their initial", begun.log())


@pytest.mark.multiprocess
def test_a_lora_begins_from_a_full_run_and_its_resume_names_a_base_that_is_not_its(
    server: Server, configure: Configure, saved: Path, run: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.yaml"
    more.write_text(json.dumps({"model": {"train": {"mode": "lora", "rank": 2, "alpha": 2}}}))
    options = {"stage": 2, **QUICK, "train_iters": 2}
    begun = server.start(
        [*configure(tmp_path, load=str(saved), mode="finetune", **options), str(more)], world=1,
        folder=tmp_path / "begun",
    )  # fmt: skip
    finish(begun, (0,))
    lora = folder_of(tmp_path / "save")
    engine, _ = load_engine(lora)  # as `sat-ext sample` does
    base = read_weights(saved)[0]
    for name, weight in engine.named_parameters():
        if "network." in name and ".lora_" not in name:
            assert torch.equal(weight, base[name.replace(".base_layer.", ".")]), name

    weights = run / "4" / "mp_rank_00_model_states.pt"
    state = torch.load(weights, weights_only=True)
    del state["module"]["network.transformer_blocks.0.attn1.to_q.weight"]
    torch.save(state, weights)
    file = lora / "2" / "sat_ext.json"
    manifest = json.loads(file.read_text())
    (run / "4" / "sat_ext.json").unlink()
    file.write_text(json.dumps({**manifest, "base": {"path": str(run), "iteration": 4}}))
    resumed = server.start(
        [*configure(tmp_path, load=str(lora), **{**options, "train_iters": 3}), str(more)], world=1,
        folder=tmp_path / "resumed",
    )  # fmt: skip
    finish(resumed, (1,))
    message = (
        rf"sat_ext.json: neither the checkpoint nor its 'base', {run}, has 1 of this model's \d+ weights \(first: "
    )
    assert re.search(message, error_of(resumed.log()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpoint": "ful"}, r"args.checkpoint: 'ful' is not one of weights, full \(did you mean 'full'\?\)"),
        ({"checkpoint": "full", "keep_last": 0}, "args.keep_last: 0; use 1 or more, or leave it out to keep all"),
    ],
)
def test_settings_are_read_from_the_yaml_that_cogvideos_script_names(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    files = [tmp_path / "theirs.yaml", tmp_path / "ours.yaml"]
    files[0].write_text("args: {train_iters: 5}\nmodel: {}\n")
    files[1].write_text(json.dumps({"args": {"checkpoint": "full", "keep_last": 2, "without_fixes": ["save"]}}))
    settings = settings_of(Namespace(base=[str(f) for f in files]))
    assert (settings.checkpoint, settings.keep_last, settings.without_fixes) == ("full", 2, ("save",))
    files[1].write_text(json.dumps({"args": given}))
    with pytest.raises(ConfigError, match=message):
        settings_of(Namespace(base=[str(f) for f in files]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_parallel_size": 2}, "args.checkpoint: 'full' is for model_parallel_size 1, not 2; use 'weights'"),
        (
            {"deepspeed_config": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}},
            "args.checkpoint: 'full' cannot save an optimizer that is offloaded to NVMe",
        ),
    ],
)
def test_what_a_full_checkpoint_cannot_hold_is_refused(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {**dict.fromkeys(NAMES), "checkpoint": "full"}
    with pytest.raises(ConfigError, match=message):
        run_of(Namespace(load=None, mode="pretrain", **settings, **changes))
