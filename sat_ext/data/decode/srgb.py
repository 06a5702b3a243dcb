"""A still's pixels as 8-bit sRGB: bit depth, colour profile and transparency."""

import io
import re
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from sat_ext.colour import encode_srgb, to_srgb

# PNG's rendering rule: a file's gamma within this of sRGB's own 1/2.2 is sRGB (W3C PNG, section 13.13).
_SRGB_GAMMA, _SAME_GAMMA = 0.45455, 0.01
_UNSPECIFIED = (2, 2)
_HEAD = 1 << 16  # bytes
_BITS, _WHITE, _PLANES = 258, 262, 284  # TIFF's BitsPerSample, PhotometricInterpretation, PlanarConfiguration


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit sRGB, with transparency flattened on white. Raises `ValueError` for pixels of unknown range."""
    if image.mode in ("F", "I"):
        what = "floating point pixels" if image.mode == "F" else "pixels of 32 bits or with a sign"
        raise ValueError(f"{what} have no defined range; save it with 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PLANES) == 2 and max(tags.get(_BITS, (8,))) > 8 and image.info.get("compression") == "raw":
        raise ValueError("separate planes of 16 bits, which Pillow misreads; save it with compression")
    info = image.info  # kept, as conversions lose parts of it
    coded = _coded_colours(image)  # before the pixels are read, which closes the file
    colour, alpha = _split(image)
    if convert := to_srgb(*coded):
        colour = Image.fromarray(convert(np.asarray(colour.convert("RGB"))))
    elif profile := info.get("icc_profile"):
        if transform := _transform(profile, colour.mode):
            colour = ImageCms.applyTransform(colour, transform) or colour
    elif "srgb" not in info and abs(info.get("gamma", _SRGB_GAMMA) - _SRGB_GAMMA) > _SAME_GAMMA:
        light = np.linspace(0, 1, 256) ** (1 / max(info["gamma"], 1e-3))  # of gAMA: value = light ** gamma
        colour = colour.point(encode_srgb(light).tolist() * len(colour.getbands()))
    colour = colour if colour.mode == "RGB" else colour.convert("RGB")  # which would copy it
    return colour if alpha is None else Image.composite(colour, Image.new("RGB", image.size, "white"), alpha)


def _coded_colours(image: Image.Image) -> tuple[int, int]:
    """Transfer and primaries (ITU-T H.273) that the file states as numbers; 2 is unspecified.

    Pillow ignores them. PNG's override a profile (W3C PNG, section 4.3), AVIF's and HEIF's do not.
    """
    if image.format == "PNG":
        code = re.search(rb"\x00\x00\x00\x04cICP(.)(.)", _head(image), re.DOTALL)
        return (code[2][0], code[1][0]) if code else _UNSPECIFIED
    if image.format == "AVIF" and "icc_profile" not in image.info:
        code = re.search(rb"colrnclx(..)(..)", _head(image), re.DOTALL)
        return (int.from_bytes(code[2], "big"), int.from_bytes(code[1], "big")) if code else _UNSPECIFIED
    if image.format == "HEIF" and "icc_profile" not in image.info and (nclx := image.info.get("nclx_profile")):
        return nclx["transfer_characteristics"], nclx["color_primaries"]
    return _UNSPECIFIED


def _head(image: Image.Image) -> bytes:
    """Where a file has its properties: before a PNG's pixels, and in a container's first boxes."""
    file = getattr(image, "fp", None)
    if file is None:  # a later frame of an animation
        return b""
    place = file.tell()
    file.seek(0)
    head = file.read(_HEAD)
    file.seek(place)
    return head.split(b"IDAT")[0] if image.format == "PNG" else head


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours in 8 bits (grey, RGB or CMYK), and the opacity unless all is opaque.

    Kept apart because colour profiles apply to colours without opacity, and those of greys to greys.
    """
    stored = {tile.args for tile in getattr(image, "tile", ())}
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        # Pillow's own conversion clips everything above 255 to white, and compares the transparent value to that.
        grey = np.asarray(image)
        key = image.info.get("transparency")
        alpha = None if key is None else Image.fromarray(np.where(grey == key, 0, 255).astype(np.uint8))
        levels = np.rint(grey * np.float32(255 / ((1 << tags.get(_BITS, (16,))[0]) - 1))).astype(np.uint8)
        return Image.fromarray(255 - levels if tags.get(_WHITE) == 0 else levels), alpha
    if stored == {"RGB;16B"} and "transparency" in image.info:
        # Pillow keeps the high byte of each sample, and compares it to the whole transparent one.
        image.info["transparency"] = tuple(sample >> 8 for sample in image.info["transparency"])
    if stored == {"LA;16B"}:  # which Pillow opens as RGBA, unfit for a profile of greys
        return image.getchannel("R"), image.getchannel("A")
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        return image.convert("L" if image.mode == "LA" else "RGB"), image.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def is_srgb(profile: bytes | None) -> bool:
    """Whether pixels with this ICC profile can be used as they are."""
    return not profile or _transform(profile, "RGB") is None


@lru_cache(maxsize=64)  # data sets have few profiles, and lcms takes some ms to link one
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colours to sRGB; None if there is nothing to do, or it is broken or for other pixels."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode != "RGB":
        return transform
    # What the profile does decides, and not its name: "GIMP built-in Linear sRGB" is linear.
    levels = np.linspace(0, 255, 18, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    changed = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform)).astype(int) - colours
    return transform if np.abs(changed).max() > 1 else None  # a level is lcms's rounding
