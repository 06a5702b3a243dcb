"""`sat-ext prior`: clips that the base makes, and a run that trains on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from typer.testing import CliRunner

from sat_ext.cli.main import app
from sat_ext.cli.prior import Prompt, missing_in, read_prompts
from sat_ext.errors import ConfigError, DataError
from sat_ext.latents.store import LatentStore
from sat_ext.models.generate import build_engine
from tests.sat.ranks import Server, finish
from tests.sat.runs import MODEL, write_config

pytestmark = pytest.mark.usefixtures("one_rank")
LORA = {"mode": "lora", "rank": 4, "alpha": 4}
PROMPTS = ("a red circle moving left on black", "", "a blue square", "a dog")


@pytest.fixture
def stills(tmp_path: Path) -> Path:
    """Two captioned stills."""
    folder = tmp_path / "stills"
    folder.mkdir()
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (48, 40), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} picture")
    return folder


@pytest.fixture(autouse=True)
def own_group() -> Iterator[None]:
    """What a command that failed leaves in a process that lives on, but no group of other tests."""
    others = dist.is_initialized()
    yield
    if not others:
        leave()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random weights of every command are the same."""

    def build(config: Any) -> Any:
        torch.manual_seed(0)
        return build_engine(config)

    monkeypatch.setattr("sat_ext.models.generate.build_engine", build)


def write_run(folder: Path, *, conditioning: str = "none", **params: Any) -> list[str]:
    """The YAML of a run on stills, and on what the base makes in `folder / "prior"`."""
    files = write_config(
        folder / "none", folder, train_data=None, valid_data=None, eval_interval=None, train_iters=2
    )
    channels = 32 if conditioning == "i2v" else 16
    transformer = {**MODEL["transformer"], "in_channels": channels}  # type: ignore[dict-item]
    sampling = {"steps": 2, "guidance_scale": 2.0}
    model = {
        **MODEL,
        "conditioning": conditioning,
        "transformer": transformer,
        "train": LORA,
        "sampling": sampling,
    }
    sources = [
        {"path": str(folder / "stills"), "share": 1},
        {"path": str(folder / "prior"), "share": 1, "target": "base"},
    ]
    config = yaml.safe_load(Path(files[1]).read_text())
    config |= {"model": model}
    config["data"]["params"] |= {"sources": sources, **params}
    Path(files[1]).write_text(yaml.safe_dump(config))
    return files


def run(*options: object) -> tuple[int, str]:
    leave()
    done = CliRunner().invoke(app, [*map(str, options)])
    return done.exit_code, done.output + str(done.exception or "")


def encoded(said: str) -> tuple[int, int]:
    """How many samples a cache has, and how many of them `sat-ext cache` had to encode."""
    facts = json.loads(said[said.index('{"') :])
    return facts["samples"], facts["encoded"]


def frames_of(file: Path) -> list[Any]:
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_clip_of_each_prompt_once(tmp_path: Path, stills: Path) -> None:
    files, output = write_run(tmp_path), tmp_path / "prior"
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ("prior", *files, "--prompts", tmp_path / "prompts.txt", "-o", output)
    status, said = run(*command)
    assert status == 0, said
    assert "3 of 3 clips of 5x32x32 to make on this rank, about 0:00:0" in said
    assert f"{output}: 3 clips, which the YAML names as a source." in said
    clips = sorted(output.glob("*.mp4"))
    assert [clip.with_suffix(".txt").read_text().strip() for clip in clips] == [p for p in PROMPTS if p]
    assert [len(frames_of(clip)) for clip in clips] == [5, 5, 5]
    made = [clip.read_bytes() for clip in clips]
    assert len(set(made)) == 3
    clips[1].unlink()
    (output / "000002.mp4.partial").write_bytes(b"of a killed one")
    status, said = run(*command)
    assert status == 0 and "1 of 3 clips" in said, said
    assert [clip.read_bytes() for clip in clips] == made
    (tmp_path / "prompts.txt").write_text("something else")
    status, said = run(*command)
    assert status == 1 and "is of another prompt ('a red circle moving left on black'); name a new folder." in said


def test_they_are_the_bases_whatever_the_lora(
    tmp_path: Path, stills: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_run(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle")
    made = []
    for trained in (False, True):

        def build(config: Any, trained: bool = trained) -> Any:
            torch.manual_seed(0)  # of the random weights
            engine = build_engine(config)
            for name, weight in engine.named_parameters():
                if trained and "lora_B" in name:
                    weight.data.normal_()
            return engine

        monkeypatch.setattr("sat_ext.models.generate.build_engine", build)
        output = tmp_path / f"prior{trained}"
        status, said = run("prior", *files, "--prompts", tmp_path / "prompts.txt", "-o", output)
        assert status == 0, said
        made.append((output / "000000.mp4").read_bytes())
    assert made[0] == made[1]


@pytest.mark.multiprocess
def test_stills_are_animated_and_the_latents_go_into_the_cache(
    tmp_path: Path, stills: Path, server: Server
) -> None:
    """`sat-ext cache` has nothing of the clips left to encode, and a run trains from it."""
    cache = tmp_path / "cache"
    files = write_run(tmp_path, conditioning="i2v", cache={"folder": str(cache), "conditions": 2})
    output = tmp_path / "prior"
    status, said = run("prior", *files, "--prompts", stills, "-o", output)
    assert status == 0, said
    first = frames_of(output / "000000.mp4")[0].reshape(-1, 3).mean(0)
    assert first.argmax() == 0  # as red as its picture
    store = LatentStore(cache)
    parts = store.read(store.table.keys[0].hex())
    assert parts["mean"].shape == (2, 16, 4, 4) and "std" not in parts
    assert parts["first"].shape == (1, 16, 4, 4) and parts["noisy"].shape[0] == 2
    status, said = run("cache", *files, "--json")
    assert status == 0, said
    assert encoded(said) == (4, 2)  # the stills
    finish(server.start(files, world=1, folder=tmp_path / "run"), (0,))


@pytest.mark.parametrize(
    ("prompts", "animates", "message"),
    [
        ("absent.txt", False, "--prompts: absent.txt cannot be read"),
        ("absent.txt", True, "--prompts: absent.txt is a list, and an image-to-video model animates pictures"),
        ("absent", True, "absent: no such file or folder"),
    ],
)
def test_prompts_that_cannot_be_used(prompts: str, animates: bool, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=f"^{message}"):
        read_prompts(prompts, animates=animates)


@pytest.mark.multiprocess
@pytest.mark.parametrize("params", [{"mix": {"image": 0.5, "video": 0.5}}, {"held_out": 3}], ids=str)
def test_the_latents_of_every_clip_are_cached_whatever_the_run_does_with_it(
    tmp_path: Path, stills: Path, params: dict[str, Any]
) -> None:
    files = write_run(tmp_path, cache={"folder": str(tmp_path / "new" / "cache"), "clips": 3}, **params)
    (tmp_path / "prompts.txt").write_text("a dog\na cat\na cow")
    status, said = run("prior", *files, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "prior")
    assert status == 0, said
    status, said = run("cache", *files, "--json")
    assert status == 0 and encoded(said) == (5, 2), said


def test_a_still_is_animated_in_its_own_shape(tmp_path: Path, stills: Path) -> None:
    buckets = {"frames": [1, 5], "sizes": [[32, 32], [64, 32], [32, 64]]}
    files = write_run(tmp_path, conditioning="i2v", buckets=buckets)
    rows = [{"path": f"stills/{n}.png", "caption": "a picture"} for n in range(2)]
    rows[1] |= {"crop": [0, 0, 48, 24]}  # type: ignore[dict-item]
    Image.new("RGB", (24, 48), "red").save(stills / "0.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    status, said = run("prior", *files, "--prompts", tmp_path / "rows.jsonl", "-o", tmp_path / "prior")
    assert status == 0, said
    shapes = [frames_of(tmp_path / "prior" / f"{n:06d}.mp4")[0].shape for n in range(2)]
    assert shapes == [(64, 32, 3), (32, 64, 3)]


def test_a_line_of_a_list_is_one_prompt_whatever_is_in_it(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa dog\u2028runs\r\n\r\n猫\x85 🎉\n猫\x85 🎉".encode())
    prompts = read_prompts(str(file), animates=False)
    assert [p.caption for p in prompts] == ["a dog\u2028runs", "猫\x85 🎉", "猫\x85 🎉"]


def test_a_folder_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, stills: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, output = write_run(tmp_path), tmp_path / "prior"
    (tmp_path / "prompts.txt").write_text("a dog")
    command = ("prior", *files, "--prompts", tmp_path / "prompts.txt", "-o")
    _, said = run(*command, stills / "prior")
    assert said == (
        f"-o: {stills / 'prior'} is inside the source {stills}, which would train on the clips as its own; name a "
        "folder outside of it."
    )
    assert not (stills / "prior").exists()
    output.write_text("")
    assert run(*command, output)[1] == f"{output}: cannot be used (File exists); name another folder."
    output.unlink()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("sat_ext.cli.prior.write_video", full)
        said = run(*command, output)[1]
    clip = output / "000000.mp4"
    assert said.endswith(
        f"{clip}: cannot be written (No space left on device); make room, and run the command again."
    )
    clip.write_bytes(b"a clip whose caption is lost")
    (output / "000000.txt").unlink()
    assert run(*command, output)[1].endswith(f"-o: {clip} is of another prompt (''); name a new folder.")


def test_captions_of_the_users_own_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "000000.txt").write_text("my picture")
    with pytest.raises(ConfigError, match="000000.mp4 is of another prompt"):
        missing_in(tmp_path, [Prompt("a dog")])


def test_captions_of_stills_are_prompts_of_a_text_model(stills: Path, tmp_path: Path) -> None:
    assert [p.image for p in read_prompts(str(stills), animates=False)] == [None, None]
    found = read_prompts(str(stills), animates=True)
    assert [p.image for p in found] == [str(stills / f"{n}.png") for n in range(2)]
    assert missing_in(tmp_path, found) == [0, 1]


def test_a_run_of_cogvideos_or_of_stills_is_refused(tmp_path: Path, stills: Path) -> None:
    file = tmp_path / "cogvideo.yaml"
    file.write_text("model: {network_config: {}}\ndata: {params: {sources: [{path: stills}]}}\n")
    status, said = run("prior", "--base", file, "--prompts", stills, "-o", tmp_path / "prior")
    assert status == 1 and "--base: needs a 'model' section of the built-in engine" in said
    files = write_run(tmp_path, max_num_frames=1)
    (tmp_path / "prompts.txt").write_text("a dog")
    status, said = run("prior", *files, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "prior")
    assert status == 1 and "only stills; the base makes clips, so add a longer bucket." in said
