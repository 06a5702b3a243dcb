"""The values that pass between stages. Frozen: a stage makes a new one and never changes its input."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Kind = Literal["image", "video"]
KINDS: dict[str, str] = {"image": "stills", "video": "clips"}  # what people call them
MixPart = Literal["image", "video", "first_frame"]  # what `data.params.mix` gives shares to
Target = Literal["data", "base"]  # whose velocity a sample is trained on

# Seconds by which a time may precede a frame's start and still mean that frame, because files round times to their
# container's clock, and arithmetic to binary fractions.
TIME_TOLERANCE = 1e-3

_IMAGES = (
    ".jpg .jpeg .jpe .jfif .jif .jfi .pjpeg .pjp .mpo .png .webp .avif .heic .heif .hif .bmp .dib .tif .tiff .gif"
)
_VIDEOS = """
    .mp4 .m4v .mov .qt .f4v .3gp .3g2 .insv .mkv .mk3d .webm .avi .divx .flv .wmv .asf .mpg .mpeg .mpe .m1v
    .m2v .vob .ts .m2t .m2ts .mts .ogv .ogm .mxf .nut .ivf .y4m .rm .rmvb .dv .apng
"""
_OTHERS = """
    .txt .md .rst .log .json .jsonl .ndjson .csv .tsv .parquet .arrow .yaml .yml .toml .ini .cfg .xml .html
    .htm .css .js .py .pyc .pyd .pyi .ipynb .sh .bat .zip .gz .bz2 .xz .zst .7z .rar .tar .tgz .npy .npz .pt
    .pth .pkl .pickle .safetensors .ckpt .bin .h5 .hdf5 .mat .db .sqlite .lock .cls .cls2 .id .srt .vtt .ass
    .sub .lrc .wav .mp3 .flac .ogg .oga .opus .m4a .aac .wma .aiff .mid .caption .tags .torrent .url .lnk
    .part .tmp .bak .md5 .sha1 .sha256
"""
# What a folder is searched for. GIF and WebP count as stills here, and as clips once they prove to be animated.
IMAGE_EXTENSIONS, VIDEO_EXTENSIONS = frozenset(_IMAGES.split()), frozenset(_VIDEOS.split())
MEDIA_EXTENSIONS = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS
# Known to be neither. Files with other suffixes are counted and named, because they may be media.
OTHER_EXTENSIONS = frozenset(_OTHERS.split())

# Pillow's own limit against decompression bombs (1 GiB / 4 / 3 pixels), applied to video frames too.
MAX_PIXELS = 89_478_485

# What to do with a clip that is shorter than the longest bucket.
ShortClips = Literal["shorter_bucket", "loop", "pad_last", "drop"]
SHORT_CLIPS: tuple[ShortClips, ...] = get_args(ShortClips)


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One row of a source, before its file was opened.

    `path` is a file, a URL, or a member of a container (see `sat_ext.files`). `key`, the path relative to the
    source, is unique in it and the same on every machine. One of `captions` is drawn at each visit, in proportion
    to `caption_weights` (empty: uniformly).

    The rest narrows the file down: from `start` to `end` in seconds (None: the file's end), inside `crop` (left,
    top, width, height in pixels as displayed), played at `fps` frames a second (None: at the file's rate). A
    record of `weight` 2 is visited twice an epoch."""

    path: str
    key: str
    captions: tuple[str, ...]
    caption_weights: tuple[float, ...] = ()
    start: float = 0.0
    end: float | None = None
    crop: tuple[int, int, int, int] | None = None
    fps: float | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaInfo:
    """What a file holds. Width and height are in pixels as displayed, after rotation.

    A still, and a video of exactly one frame, has `frames` 1, `fps` 0.0 and `duration` 0.0.
    `duration` is in seconds, from the first frame's start to the last frame's end."""

    width: int
    height: int
    frames: int
    fps: float
    duration: float
    codec: str

    @property
    def kind(self) -> Kind:
        """A file of one frame is an image, whatever its container."""
        return "image" if self.frames == 1 else "video"


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Bucket:
    """The shape that every sample of one batch has: `frames` is 1 or 4k+1, sizes are in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def kind(self) -> Kind:
        """A sample of one frame is an image, whatever its file."""
        return "image" if self.frames == 1 else "video"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One training sample.

    `pixels` is uint8 (T, C, H, W), or latents (t, C, h, w) from a cache; then `condition` (1, C, h, w) is that of
    an image-to-video model. `num_frames` counts the frames without repeats, `fps` is what they play at."""

    pixels: torch.Tensor
    caption: str
    num_frames: int
    fps: int
    kind: Kind
    source: str
    key: str
    condition: torch.Tensor | None = None


def groups_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of a pack; a batch of one shape is its own only group."""
    return batch.get("groups", [batch])
