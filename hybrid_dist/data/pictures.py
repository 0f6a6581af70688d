"""A picture file as RGB pixels: OpenCV where it is right and fast, Pillow for the kinds that OpenCV gets wrong."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hybrid_dist.errors import UserError

MAX_PIXELS = 89_478_485
"""Larger pictures are refused unread: a small file may unpack to gigabytes. Pillow's own limit."""

BACKGROUND = (124, 116, 104)
"""What stands where a picture has no pixels: ImageNet's mean colour, which normalisation turns into about 0."""

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .avif".split()  # noqa: SIM905
)
"""How files of these formats end, in lower case."""
# OpenCV drops alpha instead of compositing it, and turns CMYK into RGB by other rules than everyone else.
_CV2 = {
    "JPEG": {"RGB", "L"},
    "MPO": {"RGB", "L"},
    "PNG": {"RGB", "L", "I;16"},
    "WEBP": {"RGB"},
    "BMP": {"RGB", "L"},
    "TIFF": {"I;16", "I;16B"},
    "PPM": {"I;16", "I"},
}
# Their names say greyscale: it is one bit less than colour, and that bit may not stand beside IMREAD_COLOR_RGB.
_REDUCED = {4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2}

SPARE = 2
"""How much longer than needed a reduced JPEG stays: closer to it, it would come out softer than a whole one, shrunk."""


class PictureError(UserError):
    """A picture that can't be used."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[PictureError], tuple[Path, str]]:
        # An exception is unpickled from its `args`; this one comes back from loader processes.
        return type(self), (self.path, self.reason)


def read_picture(path: Path | str, side: int | None = None) -> np.ndarray:
    """The picture as it is meant to be seen: uint8, shape (height, width, 3), RGB, turned by its EXIF orientation.

    Sixteen bits are scaled to eight, transparent parts show `BACKGROUND`, of an animation the first frame is taken.

    Args:
        side: The longer side that is needed. A JPEG that has `SPARE` times as much at a half or a quarter is decoded
            so: its blocks give that without the rest being computed.

    Raises:
        PictureError: no such file, no picture, cut off or damaged, or more than `MAX_PIXELS`.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise PictureError(path, f"can't be read: {error.strerror}") from None
    return decode_picture(data, path, side)


def decode_picture(data: bytes, path: Path | str, side: int | None = None) -> np.ndarray:
    """As `read_picture`, from a file's bytes; `path` names it in messages."""
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header alone
            if image.format not in _FORMATS:
                raise PictureError(path, f"is {image.format}; {', '.join(_FORMATS)} would do")
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(path, f"has {image.width} × {image.height} pixels, more than {MAX_PIXELS:,} in all")
            return _decode(data, image, path, side)
    except UnidentifiedImageError:
        start = f", it starts with {data[:16]!r}" if data else ": it is empty"
        raise PictureError(path, f"is no picture{start}") from None
    except Image.DecompressionBombError:
        raise PictureError(path, f"has more than {MAX_PIXELS:,} pixels") from None
    except PictureError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # decoders meet damage with whatever they like: RuntimeError, struct.error, TypeError
        raise PictureError(path, f"is cut off or damaged: {error}") from None


def _decode(data: bytes, image: Image.Image, path: Path | str, side: int | None) -> np.ndarray:
    # An MPO's further frames are other views of the same shot, its first is a plain JPEG.
    one_frame = image.format == "MPO" or not getattr(image, "is_animated", False)
    if one_frame and "transparency" not in image.info and image.mode in _CV2.get(image.format or "", ()):
        # IMREAD_COLOR_RGB: three channels, 8 bits (16 are scaled), EXIF orientation applied.
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | _reduced(image, side))
        if pixels is not None:
            return pixels
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise PictureError(path, f"has pixels of kind {image.mode}; 8 or 16 bits a channel would do")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image)
    return np.array(image.convert("RGB"))


def _reduced(image: Image.Image, side: int | None) -> int:
    """OpenCV's flag for the smallest decoding that has enough for `side`."""
    if side is not None and image.format in ("JPEG", "MPO"):
        for part, flag in _REDUCED.items():
            if max(image.size) >= side * part * SPARE:
                return flag
    return 0
