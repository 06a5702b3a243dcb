from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sat_ext.cli.main import main
from sat_ext.preview.charts import length_chart, log_chart
from tests.media import pattern, write_clip

EVIL = "<script>alert(1)</script> \" onload='x' & </style> {{ 7 * 7 }}"


def write_data(folder: Path) -> None:
    """Clips of two shapes, two of them too short, stills, a broken file, and a caption full of HTML."""
    for i in range(6):
        size = (96, 128) if i % 2 else (160, 96)
        frames = 4 if i >= 4 else 20
        clip = write_clip(folder / "clips" / f"c{i}.mp4", frames, 8, size=size)
        clip.with_suffix(".txt").write_text(EVIL if i == 0 else f"Clip {i}.")
    (folder / "clips" / "broken.mp4").write_bytes(b"no clip")
    (folder / "clips" / "broken.txt").write_text("Broken.")
    for i in range(24):
        still = folder / "stills" / f"s{i}.png"
        still.parent.mkdir(exist_ok=True)
        Image.fromarray(pattern(i, 40 if i == 0 else 100, 300 if i == 1 else 100)).save(still)
        still.with_suffix(".txt").write_text("The same caption.")


def write_base(folder: Path, *, model: str = "", params: str = "") -> Path:
    base = folder / "run.yaml"
    base.write_text(
        f"""
args: {{train_iters: 500}}
{model}
data:
  params:
    video_size: [64, 64]
    max_num_frames: 9
    {params}
    sources:
      - {{name: clips, path: {folder}/clips, share: 0.5}}
      - {{name: stills, path: {folder}/stills, share: 0.3}}
      - {{name: first, path: {folder}/clips, sampler: first_frame, share: 0.2}}
deepspeed: {{train_micro_batch_size_per_gpu: 2}}
"""
    )
    return base


I2V = """
model:
  conditioning: i2v
  condition_dropout: 0.25
  first_stage: {kind: cosine}
  text: {kind: byt5}
  transformer: {num_layers: 2, num_attention_heads: 4, attention_head_dim: 32, in_channels: 32, patch_size: 1}
"""


def write_page(base: Path, *options: str) -> Path:
    output = base.parent / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sat-ext", "preview", "--base", str(base), "-o", str(output), *options])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return output


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    write_data(folder)
    return write_page(write_base(folder, model=I2V))


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.words.append(data)


def test_the_page_needs_nothing_but_itself(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    reader = Reader(page)
    assert reader.open == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in reader.tags}
    sources = [a["src"] for tag, a in reader.tags if tag == "img"]
    assert sources and all(s is not None and s.startswith("data:image/webp;base64,") for s in sources)
    assert not re.findall(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text
    assert len(text) < 1_000_000


def test_text_from_files_is_escaped(page: Path) -> None:
    assert "alert(1)" not in {tag for tag, _ in Reader(page).tags}
    assert EVIL in Reader(page).text  # as it is written, 7 * 7 and all
    assert "<script" not in page.read_text(encoding="utf-8")


def test_every_picture_has_a_text(page: Path) -> None:
    tags = Reader(page).tags
    assert all(a.get("alt") for tag, a in tags if tag == "img")
    assert all(a.get("aria-label") for tag, a in tags if tag == "svg")


def test_it_shows_stills_strips_and_conditions_of_an_i2v_model(page: Path) -> None:
    reader = Reader(page)
    alts = [a["alt"] or "" for tag, a in reader.tags if tag == "img"]
    assert "Still: The same caption." in alts
    assert alts.count("Condition: the first frame") == 3
    assert {"Frame at 0.0 s", "Frame at 1.0 s"} <= set(alts)
    assert "condition dropped" in reader.text
    assert "dropped for every still: it would be the target itself" in reader.text
    assert "25 % of the visits train without it" in reader.text
    assert "from 128×96, 8 fps, 2.5 s; 25 % cut at the sides; shrunk to 67 %" in reader.text


def test_a_text_to_video_model_has_no_conditions(tmp_path: Path) -> None:
    write_data(tmp_path)
    text = Reader(write_page(write_base(tmp_path))).text
    assert "ondition" not in text


def test_files_beyond_the_budget_are_shown_and_not_stumbled_over(tmp_path: Path) -> None:
    write_data(tmp_path)
    text = Reader(write_page(write_base(tmp_path, params="on_bad_sample: {skip: 0}"))).text
    assert "Training will not start: data.params.on_bad_sample.skip allows 0." in text


def test_a_strip_says_how_many_of_its_frames_it_shows(page: Path) -> None:
    assert "8 of the 9 frames are shown." in Reader(page).text


def test_it_says_that_cogvideos_own_loss_does_not_weigh(tmp_path: Path) -> None:
    write_data(tmp_path)
    model = "model: {network_config: {params: {hidden_size: 64}}}"
    claim = "but not under CogVideo's own loss, which takes the mean of each batch"
    assert claim in Reader(write_page(write_base(tmp_path, model=model))).text
    ours = f"{model[:-1]}, loss_fn_config: {{target: sat_ext.cogvideo.JointDiffusionLoss}}}}"
    assert claim not in Reader(write_page(write_base(tmp_path, model=ours))).text
    assert claim not in Reader(write_page(write_base(tmp_path))).text


def test_it_warns_in_plain_words(page: Path) -> None:
    text = Reader(page).text
    assert "1 problem to fix first, and" in text
    assert "1 file cannot be read." in text
    assert (
        "33 % of your clips (2) are shorter than the frame bucket that they need (9 frames, 1 s at 8 fps): "
        in text
    )
    assert "they are trained on as stills." in text
    assert "lose more than a quarter of the picture" in text
    assert "smaller than their bucket and enlarged" in text
    assert "'stills': 95.8 % of the captions repeat another" in text
    assert "not a readable video" in text


def test_what_becomes_of_short_clips_follows_the_policy(tmp_path: Path) -> None:
    write_data(tmp_path)
    text = Reader(write_page(write_base(tmp_path, params="short_clips: pad_last"))).text
    assert "their last frame is repeated to fill it" in text
    assert "repeated" in text
    text = Reader(write_page(write_base(tmp_path, params="buckets: {frames: [1, 9]}\n    short_clips: drop"))).text
    assert "they are left out" in text
    assert "too short for the longest bucket" in text


def test_it_warns_of_buckets_that_are_sized_for_and_never_filled(tmp_path: Path) -> None:
    write_data(tmp_path)
    text = Reader(write_page(write_base(tmp_path, params="buckets: {frames: [1, 5, 9, 49]}"))).text
    assert (
        "None of the 6 clips is long enough for the longest bucket (49 frames, 6 s at 8 fps), so the model never "
        "trains at that length; the others are shorter: 4 at 9 frames, 2 at 5 frames." in text
    )
    assert "Add clips of 6 s or more, or take the lengths above 9 out of data.params.buckets.frames." in text
    assert "No file falls into the bucket 49x64x64, larger than any that is filled: " in text
    assert "cost nothing" not in text
    (tmp_path / "stills" / "new.JXL").write_bytes(b"x")
    text = Reader(write_page(write_base(tmp_path, params="buckets: {frames: [1, 5, 9, 13, 17]}"))).text
    assert "Left out because their endings are not read: 1 .jxl." in text
    assert "No file falls into" not in text  # smaller buckets that stay empty cost nothing
    assert "long enough for the longest bucket" not in text


def test_shares_and_epochs_are_the_schedules(page: Path) -> None:
    text = Reader(page).text
    assert re.search(r"50\.00 % (49|50)\.\d\d %", text)
    assert re.search(r"30\.00 % (29|30)\.\d\d %", text)
    assert "A run of 500 steps sees them" in text


def test_pages_are_equal_byte_for_byte(page: Path) -> None:
    first = page.read_bytes()
    assert write_page(page.parent / "run.yaml").read_bytes() == first


def test_more_gpus_make_an_epoch_shorter(page: Path, tmp_path: Path) -> None:
    write_data(tmp_path)
    steps = [
        float(re.search(r"once within ([\d.]+) steps", Reader(write_page(write_base(tmp_path), *o)).text)[1])  # type: ignore[index]
        for o in ((), ("--gpus", "2"))
    ]
    assert steps[1] < steps[0]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("no/r.html", r"there is no folder .*/no; make it.*"),
        (".", r"\. is not a file; name one, such as report\.html\."),
        ("pipe", r"pipe is not a file; name one, such as report\.html\."),
    ],
)
def test_a_page_that_cannot_be_written_there_is_a_wrong_call(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    monkeypatch.setattr("sys.argv", ["sat-ext", "preview", "--base", str(page.parent / "run.yaml"), "-o", output])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert re.fullmatch(rf"error: -o: {message}\n", capsys.readouterr().err)
    assert Path("pipe").is_fifo()


def test_a_histogram_counts_every_record() -> None:
    seconds = {"kept": np.array([0.5, 1.0, 1.1, 2.0, 500.0]), "left out": np.array([0.1])}
    chart = length_chart("Length", "", seconds, [(2.125, "17")])
    assert {name: sum(n) for name, n in chart.counts.items()} == {"kept": 5, "left out": 1}
    assert chart.labels[-1].endswith("and longer")
    assert all(0 <= top <= 100 for tops in chart.tops.values() for top in tops)


def test_equal_shapes_make_a_chart() -> None:
    ratios = {"used": np.array([1.5, 1.5]), "left out": np.array([])}
    chart = log_chart("Shape", "", ratios, [(1.5, "720x480")], [], form=".2f", shown=(0.5, 2.0))
    assert {name: sum(n) for name, n in chart.counts.items()} == {"used": 2, "left out": 0}
    assert chart.marks[0][0] == pytest.approx(100 * (np.log(1.5 / 0.5) + 0.15) / (np.log(4) + 0.3))


# --- in a browser ---

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# The page in a frame of a phone's width (a window cannot be narrower than 500 pixels), and what is seen there.
FRAME = """<!doctype html><title>waiting</title><style>body {{ margin: 0 }}</style>
<iframe id="f" style="width: {width}px; height: 800px; border: 0" srcdoc="{page}"></iframe>
<script>
onload = async () => {{
  const inside = document.getElementById("f").contentDocument, root = inside.documentElement
  const images = [...inside.images]
  images.forEach(i => i.loading = "eager")
  while (!images.every(i => i.complete)) await new Promise(then => setTimeout(then, 20))
  document.title = JSON.stringify({{
    width: root.scrollWidth, images: images.length, shown: images.filter(i => i.naturalWidth > 0).length,
    wide: [...inside.querySelectorAll("body *")].filter(
      e => e.getBoundingClientRect().right > {width} + 1 && !e.closest(".scroll, nav")
    ).map(e => e.outerHTML.slice(0, 80)),
    small: [...inside.querySelectorAll("p, td, th, li, small, span, dt")].filter(
      e => e.innerText && parseFloat(getComputedStyle(e).fontSize) < 12).length,
    paper: getComputedStyle(inside.body).backgroundColor, ink: getComputedStyle(inside.body).color,
  }})
}}
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_chromium_shows_it(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    assert CHROMIUM is not None
    frame = tmp_path / "frame.html"
    frame.write_text(
        FRAME.format(width=width, page=html.escape(page.read_text(encoding="utf-8"))), encoding="utf-8"
    )
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path}/profile", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={max(width, 500)},800", "--virtual-time-budget=10000", "--dump-dom", str(frame),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None and title[1] != "waiting", done.stderr
    seen = json.loads(html.unescape(title[1]))
    assert seen["width"] == width, "it scrolls sideways"
    assert seen["wide"] == []
    assert seen["images"] == seen["shown"] > 20
    assert seen["small"] == 0
    light, ink = (sum(map(int, re.findall(r"\d+", seen[k])[:3])) for k in ("paper", "ink"))
    assert (light < ink) == dark


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_a_screenshot_is_not_blank(page: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    shot = tmp_path / "shot.png"
    subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
            "--window-size=1000,3000", f"--screenshot={shot}", page.as_uri(),
        ],
        capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    colours = Image.open(shot).convert("RGB").quantize(64).getcolors()
    assert colours is not None and len(colours) > 32
    with Image.open(shot) as image:
        assert image.size == (1000, 3000)
