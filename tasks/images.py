"""The one decode-and-resize policy: bytes in, RGB pixels of one size out, or the reason why not.

prepare and predict both come through here, so a file gives the same pixels in training and in service.
Formats are known by their first bytes, never by a file's name:

- JPEG, PNG, GIF, WebP, BMP, TIFF, binary PPM, AVIF and JPEG 2000 are decoded; of several frames or pages, the first.
- Other image formats are `unsupported`, named in the reason.
- EXIF orientation is applied; color profiles and gamma are not.
- Alpha, a transparent palette entry or a transparent color is laid over the policy's background.
- 16-bit samples keep their high byte. 32-bit integers and floats have no defined white: `unsupported`.
- CMYK becomes RGB by (1 - ink) × (1 - black); in a JPEG inks are inverted if an Adobe marker says so.

Pillow decodes everything, although OpenCV is faster at JPEG (by an eighth at 500×400 px, reduced): OpenCV lets
libjpeg and libpng write about damaged files to the process's stderr, which cannot be turned off, and takes some for
good that Pillow refuses. OpenCV resizes, with threads of its own: callers who decode in many may want
`cv2.setNumThreads(1)`.
"""

import contextlib
import ctypes
import io
import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

import cv2
import numpy as np
from PIL import Image, ImageChops
from pydantic import Field

from tasks.params import Section

Image.init()  # fills Image.OPEN
# Damaged files are reported by status and path. What is silenced here names neither: Pillow's own pixel limit (ours
# comes first), odd TIFF metadata, and libtiff, which writes to stderr. Where Pillow is built in one piece (macOS,
# Windows), libtiff's symbol is hidden, and damaged TIFFs stay noisy.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)

# Pillow's names of what is decoded. Not what else it could: Ghostscript would run PostScript, for one.
_DECODED = {"JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"}
_BEGINNINGS = [
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"\xff\xd8\xff", "JPEG"),
        (rb"\x89PNG\r\n\x1a\n", "PNG"),
        (rb"GIF8[79]a", "GIF"),
        (rb"RIFF.{4}WEBP", "WEBP"),
        (rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),  # plain text may begin with BM
        (rb"II\*\0.{4}CR|.{4}ftypcrx |FUJIFILMCCD-RAW|IIRO|IIU\0", "camera raw"),
        (rb"II[*+]\0|MM\0[*+]", "TIFF"),
        (rb"P[456]\s+(?:#[^\n]*\n\s*)*\d", "PPM"),
        (rb"P[1237fF]\s+(?:#[^\n]*\n\s*)*[\dW-]", "plain-text, floating-point or PAM PPM"),
        (rb".{4}ftyp(?:.{4}){0,9}?avi[fs]", "AVIF"),
        (rb".{4}ftyp(?:.{4}){0,9}?(?:hei[cxms]|hev[cx]|mif1|msf1)", "HEIC"),
        (rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
        (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (rb"(?:\xef\xbb\xbf)?\s*<(?:(?:\?xml|!--|!DOCTYPE svg).*?<)?svg[\s>]", "SVG"),
        (rb"%PDF-", "PDF"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
        (rb"8BPS", "PSD"),
        (rb"\0\0\x01\0[^\0]\0.{3}\0", "ICO"),
        (rb"DDS ", "DDS"),
        (rb"v/1\x01|#\?RADIANCE", "high dynamic range (OpenEXR, Radiance)"),
    )
]
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_JPEG_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # APP1 to APP15 without Adobe's APP14, and comments
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_MAX_PARTS = 100_000  # chunks of a PNG or segments of a JPEG; more is an attack on our patience
_MAX_SCANS = 200  # of a progressive JPEG: each costs a pass over all pixels, and a few bytes make one
# Pillow tells "cannot" from "broken" in words only.
_CANNOT = re.compile(r"unsupported|not (yet )?(supported|implemented|available|installed)|unknown|cannot handle", re.I)


class Status(StrEnum):
    """What became of a file; exactly the files that are `ok` have pixels."""

    OK = "ok"
    EMPTY = "empty"  # zero bytes
    NOT_AN_IMAGE = "not_an_image"  # no image format starts like this
    UNSUPPORTED = "unsupported"  # an image, but of a format or kind that is not decoded here
    TRUNCATED = "truncated"  # bytes are missing, or damaged so that the decoder notices
    TOO_LARGE = "too_large"  # more bytes or pixels than the policy allows, or than there is memory for
    UNREADABLE = "unreadable"  # no regular file, no permission, or the disk fails
    VANISHED = "vanished"  # no longer there, or a link to nothing


Byte = Annotated[int, Field(ge=0, le=255)]


class DecodePolicy(Section):
    """How image files become pixels; part of a model's bundle, since prediction must do the same."""

    size: int = Field(32, ge=1, le=2048, description="width and height of the result, pixels")
    resize: Literal["squash", "crop", "pad"] = Field("squash", description="crop: central square; pad: centered")
    background: tuple[Byte, Byte, Byte] = Field((255, 255, 255), description="RGB under alpha and around pad")
    max_pixels: int = Field(100_000_000, ge=1, le=178_956_970, description="width × height; Pillow's own limit")
    max_bytes: int = Field(256 * 2**20, ge=1, description="of a file, before it is read")


@dataclass(frozen=True, eq=False)
class Decoded:
    """The outcome for one file.

    Args:
        reason: one line of ASCII, empty if `ok`.
        pixels: uint8 (size, size, 3), RGB; None unless `ok`.
        width, height: of the whole image in pixels, after orientation; 0 if the header was not understood.
    """

    status: Status
    reason: str = ""
    pixels: np.ndarray | None = None
    width: int = 0
    height: int = 0


class _Room:
    """Keeps threads from decoding many large images at once: a pixel takes 24 bytes on its way, 100 million 2.4 GB."""

    PIXELS, SMALL = 200_000_000, 2**22

    def __init__(self) -> None:
        self._taken, self._changed = 0, threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for an image, or it is alone; a small one needs none."""
        if pixels <= self.SMALL:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + pixels <= self.PIXELS)
            self._taken += pixels
        try:
            yield
        finally:
            if _trim:
                _trim(0)
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


_room = _Room()
#: glibc keeps what a thread frees for that thread, so that each would hold a large image's memory for ever.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
#: A JPEG is reduced as it is decoded; a progressive one takes 6 bytes a pixel all the same, others next to nothing.
_JPEG_SHARE = 8


class _Refused(Exception):
    """Why there will be no pixels."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def decode(data: bytes, policy: DecodePolicy) -> Decoded:
    """Decode and resize one image; never raises, whatever the bytes.

    A JPEG or JPEG 2000 without its end marker and a PNG with a missing or damaged chunk are `truncated`; so is any
    other file in which Pillow misses pixels of the first frame. Damage inside a JPEG's image data shows in the
    picture but is reported by no decoder.
    """
    name, width, height = "", 0, 0
    try:
        name = _format(data)
        image, orientation = _open(name, data)
        width, height = image.size if orientation < 5 else image.size[::-1]
        if width * height > policy.max_pixels:
            raise _Refused(Status.TOO_LARGE, f"{width} x {height} pixels, allowed: {policy.max_pixels}")
        with _room.taken(width * height // (_JPEG_SHARE if name == "JPEG" else 1)):
            pixels = fit(_upright(_pixels(image, policy), orientation), policy)
        return Decoded(Status.OK, "", np.require(pixels, requirements="CW"), width, height)
    except _Refused as refusal:
        status, reason = refusal.status, str(refusal)
    except (MemoryError, Image.DecompressionBombError) as error:
        status, reason = Status.TOO_LARGE, str(error) or "not enough memory"
    except Exception as error:
        # Decoders raise almost anything on hostile bytes (struct.error, KeyError, RuntimeError, zlib.error ...), and
        # one bad file may not stop the other hundred thousand. This is the only place that turns them into a row.
        reason = str(error) if isinstance(error, OSError | RuntimeError | SyntaxError | ValueError) else repr(error)
        if reason.isdigit():  # a table in Pillow lacks this entry
            reason = f"unknown code {reason}"
        status = Status.UNSUPPORTED if _CANNOT.search(reason) else Status.TRUNCATED
    reason = " ".join(reason.encode("ascii", "backslashreplace").decode().split())[:200]
    return Decoded(status, f"{name}: {reason}" if name else reason, None, width, height)


def fit(pixels: np.ndarray, policy: DecodePolicy) -> np.ndarray:
    """Bring uint8 (H, W, 3) to (size, size, 3); what has that size already is returned as it is, not copied."""
    size = policy.size
    height, width = pixels.shape[:2]
    if policy.resize == "crop":
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        return _resize(pixels[top : top + side, left : left + side], size, size)
    if policy.resize == "squash" or width == height:
        return _resize(pixels, size, size)
    longer = max(width, height)
    inner_width, inner_height = max(1, round(width * size / longer)), max(1, round(height * size / longer))
    top, left = (size - inner_height) // 2, (size - inner_width) // 2
    canvas = np.full((size, size, 3), policy.background, np.uint8)
    canvas[top : top + inner_height, left : left + inner_width] = _resize(pixels, inner_width, inner_height)
    return canvas


def encode_png(pixels: np.ndarray) -> bytes:
    """Return uint8 (H, W, 3) RGB or (H, W) gray pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Average areas along an axis that shrinks, then interpolate along one that grows.

    Two steps, because INTER_AREA stops averaging as soon as one axis grows. Linear, because cubic overshoots at
    edges; the EXACT variant, because it alone gives the same pixels on every CPU.
    """
    old_height, old_width = pixels.shape[:2]
    smaller = min(width, old_width), min(height, old_height)
    if smaller != (old_width, old_height):
        pixels = cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA)
    if smaller != (width, height):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    return pixels


def _format(data: bytes) -> str:
    """Return the format's name, one of _DECODED."""
    if not data:
        raise _Refused(Status.EMPTY, "zero bytes")
    name = next((name for beginning, name in _BEGINNINGS if beginning.match(data, 0, 4096)), None)
    if name is None:
        raise _Refused(Status.NOT_AN_IMAGE, "no image format starts like this")
    if name not in _DECODED:
        raise _Refused(Status.UNSUPPORTED, f"{name} is not decoded here")
    return name


def _open(name: str, data: bytes) -> tuple[Image.Image, int]:
    """Read the header alone; return the image, not yet decoded, and its EXIF orientation."""
    exif = b""
    if name == "JPEG":
        data, exif = _essential_jpeg(data)
    elif name == "PNG":
        data, exif = _essential_png(data)
    elif name == "JPEG2000" and data.rfind(b"\xff\xd9") < data.find(b"\xff\x4f\xff\x51"):
        raise _Refused(Status.TRUNCATED, "ends before its end marker")
    image = Image.OPEN[name][0](io.BytesIO(data), "")  # Image.open would add Pillow's own pixel limit
    if name == "PNG":
        _scale_color_key(image, depth=data[24])
    # A TIFF's orientation is not found here: Pillow itself applies it while it decodes.
    return image, _orientation(exif or image.info.get("exif", b""))


def _essential_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """Check that a JPEG goes on to its end marker; return it without metadata, and its EXIF block.

    Pillow reads broken EXIF blocks with warnings and odd multi-picture tables with exceptions: it gets neither.
    """
    kept, exif, position, progressive = [data[:2]], b"", 2, False
    for _ in range(_MAX_PARTS):
        marker = _JPEG_MARKER.search(data, position)
        if marker is None or marker[1] == b"\xd9":
            raise _Refused(Status.TRUNCATED, "ends before its image data")
        code, position = marker[1][0], marker.end()
        if code == 0x01 or 0xD0 <= code <= 0xD8:
            continue  # stands alone, without a length
        end = position + max(2, int.from_bytes(data[position : position + 2]))
        if end > len(data):
            raise _Refused(Status.TRUNCATED, "ends before its image data")
        if code == 0xDA:
            break
        if code == 0xE1 and not exif and data.startswith(b"Exif\0\0", position + 2):
            exif = data[position + 2 : end]
        if code not in _JPEG_METADATA:
            kept.append(data[marker.start() : end])
        progressive |= code in (0xC2, 0xCA)
        position = end
    else:
        raise _Refused(Status.UNSUPPORTED, f"more than {_MAX_PARTS} segments")
    if data.rfind(b"\xff\xd9", end) < 0:
        raise _Refused(Status.TRUNCATED, "ends before its end marker")
    if progressive and (scans := data.count(b"\xff\xda", end)) > _MAX_SCANS:
        raise _Refused(Status.UNSUPPORTED, f"{scans} progressive scans")
    kept.append(memoryview(data)[marker.start() :])
    return b"".join(kept), exif


def _essential_png(data: bytes) -> tuple[bytes, bytes]:
    """Check a PNG's chunks up to the last; return only those that make pixels, and its EXIF block.

    Compressed texts and profiles may be bombs, animation tables broken: Pillow gets none of them.
    """
    view, kept, exif, position, late = memoryview(data), [data[:8]], b"", 8, False
    for _ in range(_MAX_PARTS):
        if position + 12 > len(data):
            raise _Refused(Status.TRUNCATED, "ends before its last chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise _Refused(Status.TRUNCATED, "ends in the middle of a chunk")
        if kind in _PNG_CHUNKS or not kind[0] & 0x20:  # an upper-case first letter: needed for the pixels
            if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
                raise _Refused(Status.TRUNCATED, f"damaged chunk at byte {position}")
            if kind not in _PNG_CHUNKS:
                raise _Refused(Status.UNSUPPORTED, f"unknown kind of chunk {kind!r}")
            late |= kind == b"IDAT"
            if not (late and kind == b"tRNS"):  # against the standard, and Pillow warns
                kept.append(view[position:end])
        elif kind == b"eXIf":
            exif = data[position + 8 : end - 4]
        if kind == b"IEND":
            return b"".join(kept), exif
        position = end
    raise _Refused(Status.UNSUPPORTED, f"more than {_MAX_PARTS} chunks")


def _scale_color_key(image: Image.Image, depth: int) -> None:
    """Bring a PNG's transparent color from the file's bit depth to 8, as Pillow does with the pixels alone."""
    key, scale = image.info.get("transparency"), {2: 85, 4: 17, 16: 1 / 256}.get(depth)
    if key is not None and scale and image.mode != "P":
        key = tuple(int(value * scale) for value in key) if isinstance(key, tuple) else int(key * scale)
        image.info["transparency"] = key


def _orientation(exif: bytes) -> int:
    """Return tag 0x0112 of an EXIF block's first directory, 1 to 8; 1 if missing or broken."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order:
        with contextlib.suppress(struct.error):  # the block ends too early: no orientation, but still an image
            (start,) = struct.unpack_from(order + "I", exif, 4)
            (entries,) = struct.unpack_from(order + "H", exif, start)
            for position in range(start + 2, start + 2 + 12 * entries, 12):
                tag, _, _, value = struct.unpack_from(order + "HHIH", exif, position)
                if tag == 0x0112:
                    return value if 1 <= value <= 8 else 1
    return 1


def _pixels(image: Image.Image, policy: DecodePolicy) -> np.ndarray:
    """Decode to uint8 (H, W, 3) RGB, a JPEG at reduced scale where it stays twice the target's size.

    libjpeg's halves, quarters and eighths are no area averages. On photographs, what is reduced to at least twice the
    target differs from a full decode and INTER_AREA by 0.3 to 2 of 255 levels on average; reduced to no less than the
    target, by up to 4. The scale depends on the header and the policy alone.
    """
    whole = None
    if image.format == "JPEG" and (draft := image.draft(None, (2 * policy.size, 2 * policy.size))):
        whole = draft[1]
    pixels = _rgb(image, policy.background)
    if whole:
        # A reduced size is rounded up. Without the nearly empty last row and column, nothing moves by more than a
        # quarter of a pixel of the result.
        pixels = pixels[: max(1, round(whole[3])), : max(1, round(whole[2]))]
    return pixels


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> np.ndarray:
    """Decode to uint8 (H, W, 3) RGB of the file's own size."""
    transparency = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise _Refused(Status.UNSUPPORTED, "32-bit samples have no defined white")
    elif image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes Adobe's inverted inks for granted
    if transparency is not None or image.mode in ("LA", "PA", "RGBA"):
        if transparency is not None:
            image.info["transparency"] = transparency
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation, 1 to 8."""
    if orientation >= 5:
        pixels = cv2.transpose(pixels)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else cv2.flip(pixels, flip)
