"""Frames that are not wanted are left out of decoding, with no change to those that are."""

from __future__ import annotations

from pathlib import Path

import av
import av.filter
import numpy as np
import pytest

from sat_ext.data.decode.pick import Needed
from tests.media import indices_of, read_frames, real_clip, remux, write_clip

FRAMES, FPS = 60, 25

SETTINGS = [
    ("libx264", 0, 12, ""),
    ("libx264", 1, 250, "ref=1"),
    ("libx264", 3, 250, "b-pyramid=normal:ref=4:weightp=2"),
    ("libx264", 16, 250, "b-adapt=0:b-pyramid=strict:ref=16"),
    ("libx264", 3, 12, "open-gop=1:scenecut=0"),
    ("libx264", 2, 250, "interlaced=1"),
    ("libx264", 2, 25, "intra-refresh=1"),
    ("libx265", None, 250, "bframes=0"),
    ("libx265", None, 250, "bframes=4:b-pyramid=1:ref=4"),
    ("libx265", None, 12, "bframes=3:open-gop=1:scenecut=0"),
    ("libx265", None, 12, "bframes=3:open-gop=0:temporal-layers=2"),
]


def make(path: Path, codec: str, b_frames: int | None, gop: int, params: str) -> Path:
    key = "x264-params" if codec == "libx264" else "x265-params"
    extra = ":log-level=none" if codec == "libx265" else ""
    options = {key: params + extra} if params + extra else {}
    return write_clip(path, FRAMES, FPS, codec=codec, gop=gop, b_frames=b_frames or 0, options=options)


def straight(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        return np.stack([deinterlaced(f).to_ndarray(format="rgb24") for f in container.decode(video=0)])


def deinterlaced(frame: av.VideoFrame) -> av.VideoFrame:
    if not frame.interlaced_frame:
        return frame
    graph = av.filter.Graph()
    size = {"width": frame.width, "height": frame.height}
    source = graph.add_buffer(**size, format=frame.format, time_base=frame.time_base)
    scale = graph.add("scale", f"{frame.width}:{frame.height}:flags=bicubic+accurate_rnd")
    graph.link_nodes(source, graph.add("field", "top"), scale, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s)))
def test_wanted_frames_are_those_of_a_whole_decode(tmp_path, setting, suffix):
    path = make(tmp_path / f"a.{suffix}", *setting)
    whole = straight(path)
    assert len(whole) == FRAMES
    for places in ([0], [1], [59], [5, 6, 41], range(0, 60, 3), range(2, 50, 7), range(33, 60, 4), range(60)):
        frames = read_frames(str(path), [p / FPS for p in places])
        for place, frame in zip(places, frames, strict=True):
            assert np.array_equal(frame, whole[place]), (list(places), place)


def reorder_hidden(content: bytes) -> bytes:
    """An H.264 file of x264 without its word on how far B-frames reach (the SPS's last field, optional)."""
    start = content.index(b"avcC") + 4
    size = int.from_bytes(content[start + 6 : start + 8], "big")
    sps = content[start + 8 : start + 8 + size]
    bits = "".join(f"{byte:08b}" for byte in sps)
    end = bits.rindex("1")

    def restriction(at: int) -> bool:
        """Flag and `motion_vectors_over_pic_boundaries_flag`, then six numbers in Exp-Golomb code, to the end."""
        at += 2
        for _ in range(6):
            zeros = bits.index("1", at) - at
            at += 2 * zeros + 1
        return at == end

    flag = next(at for at in range(end - 60, end) if bits[at : at + 4] == "1111" and restriction(at))
    changed = (bits[:flag] + "01").ljust(len(bits), "0")  # no such field, and the bit that ends the SPS
    assert b"\0\0\3" not in sps[flag // 8 :]  # there, a byte would not be the decoder's
    return content.replace(sps, bytes(int(changed[i : i + 8], 2) for i in range(0, len(changed), 8)))


@pytest.mark.parametrize("b_frames", [2, 5])
def test_h264_that_does_not_tell_its_order_is_read_in_order(tmp_path, b_frames):
    whole = make(tmp_path / "a.mp4", "libx264", b_frames, 250, "b-adapt=0:b-pyramid=normal:ref=4")
    path = tmp_path / "b.mp4"
    path.write_bytes(reorder_hidden(whole.read_bytes()))
    assert path.read_bytes() != whole.read_bytes()
    expected = straight(whole)
    for places in (range(60), range(0, 60, 3), [0], [1, 2], [17]):
        assert np.array_equal(read_frames(str(path), [p / FPS for p in places]), expected[list(places)])


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_frames_that_nobody_needs_are_not_decoded(tmp_path, codec):
    """Noise in all packets that no frame refers to would raise, or change what is wanted."""
    params = "bframes=3:b-adapt=0:b-pyramid=0" if codec == "libx265" else "b-adapt=0:b-pyramid=none"
    clip = make(tmp_path / "a.mp4", codec, 3, 250, params)
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size]
        places = [round(p.pts * stream.time_base * FPS) for p in packets]
        spare = [n for n, p in enumerate(packets) if p.is_disposable or place_is_b(places, n)]
    wanted = [place for n, place in enumerate(places) if n not in spare]
    assert len(spare) > 30
    path = remux(clip, tmp_path / "b.mp4", damage=spare)
    frames = read_frames(str(path), [p / FPS for p in sorted(wanted)])
    assert indices_of(frames) == sorted(wanted)
    assert np.array_equal(frames, straight(clip)[sorted(wanted)])


def place_is_b(places: list[int], number: int) -> bool:
    """Without pyramids, a packet that is displayed before the one it follows is a B-frame that none refers to."""
    return number > 0 and places[number] < max(places[:number])


@pytest.mark.parametrize("codec", ["prores_ks", "mjpeg"])
def test_of_a_codec_without_references_only_wanted_packets_are_decoded(tmp_path, codec):
    pixel_format = "yuv422p10le" if codec == "prores_ks" else "yuvj420p"
    clip = write_clip(tmp_path / "a.mov", 20, FPS, codec=codec, pixel_format=pixel_format)
    path = remux(clip, tmp_path / "b.mov", damage=set(range(20)) - {3, 11})
    assert indices_of(read_frames(str(path), [3 / FPS, 11 / FPS])) == [3, 11]


def test_a_packet_is_spared_only_where_no_wanted_time_can_fall_on_it():
    needed = Needed([0.5, 10.0])
    for pts in (0, 4, 2, 1, 3, 8, 6, 5, 7):
        needed.add(pts)
    assert [pts for pts in range(9) if needed.is_on_display(pts)] == [0, 8]
    for pts in range(9, 11 + 17):
        assert not needed.is_complete
        needed.add(pts)
    assert needed.is_complete and [pts for pts in range(28) if needed.is_on_display(pts)] == [0, 10]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux tells how much a process reads")
def test_a_first_frame_is_had_from_the_headers_and_its_own_bytes():
    path = real_clip("bigbuckbunny.mp4")
    with av.open(str(path)) as container:
        samples = [entry.size for entry in container.streams.video[0].index_entries]
    before = bytes_read()
    frame = read_frames(str(path), [0.0])
    read = bytes_read() - before
    assert frame.shape == (1, 720, 1280, 3)
    # There is sound in between, and FFmpeg reads 32 KB at a time, at the headers and at the frame.
    assert samples[0] < read < samples[0] + 131072 < path.stat().st_size / 3


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])
