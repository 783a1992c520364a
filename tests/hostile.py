"""Image files as they come in real folders, good and bad, made in memory: shared by the tests that decode."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

from tasks.images import Status

WIDTH, HEIGHT = 40, 24


@functools.cache
def photo(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return a smooth RGB picture whose four corners differ, so that no flip or turn goes unnoticed."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(1, width - 1), 255 * y / max(1, height - 1)
    blue = 127 + 100 * np.sin(x / 9) * np.cos(y / 7)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """Return ``image`` as a file of format ``form``."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return one chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *extra: bytes) -> bytes:
    """Return a PNG file put together by hand; ``rows`` begin with their filter byte each."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + b"".join(extra)
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def with_checksums(png: bytes) -> bytes:
    """Return the PNG with the right checksum in each chunk, as far as its chunks go."""
    found, position = bytearray(png), 8
    while position + 12 <= len(png):
        end = position + 8 + int.from_bytes(png[position : position + 4])
        if end + 4 > len(png):
            break
        found[end : end + 4] = struct.pack(">I", zlib.crc32(png[position + 4 : end]))
        position = end + 4
    return bytes(found)


def exif_block(orientation: int, order: str = ">") -> bytes:
    """Return an EXIF block that holds nothing but the orientation."""
    start = b"MM\0*" if order == ">" else b"II*\0"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + start + struct.pack(order + "IH", 8, 1) + entry + struct.pack(order + "I", 0)


def jpeg_segment(code: int, content: bytes) -> bytes:
    """Return one segment with its marker and length."""
    return bytes([0xFF, code]) + struct.pack(">H", len(content) + 2) + content


def with_segment(jpeg: bytes, segment: bytes) -> bytes:
    """Return the JPEG with a segment put in front of all others."""
    return jpeg[:2] + segment + jpeg[2:]


def without_adobe(jpeg: bytes) -> bytes:
    """Return the JPEG without its Adobe marker."""
    start = jpeg.index(b"\xff\xee")
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4]) :]


def ycck() -> bytes:
    """Return the photo as a JPEG of YCCK samples, which Pillow cannot write: relabeled CMYK."""
    y, cb, cr = (255 - np.asarray(band) for band in photo().point(lambda value: 255 - value).convert("YCbCr").split())
    inks = Image.merge("CMYK", [Image.fromarray(band) for band in (y, cb, cr, np.zeros_like(y))])
    jpeg = bytearray(encoded(inks, "JPEG", quality=95))
    jpeg[jpeg.index(b"Adobe") + 11] = 2
    return bytes(jpeg)


def animation(form: str, **options: object) -> bytes:
    """Return three frames, of which the first is the photo."""
    frames = [photo(), photo().transpose(Image.Transpose.ROTATE_180), photo().convert("L").convert("RGB")]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)


def many_scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated: small to send, slow to decode."""
    jpeg = encoded(photo(), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * count + jpeg[-2:]


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """Return the JPEG with other figures in its frame header."""
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]


def huge_gif() -> bytes:
    """Return a GIF whose only frame claims 65,535 × 65,535 pixels and wants them cleared afterwards."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0)
    control = b"!\xf9\4" + struct.pack("<BHBB", 2 << 2, 0, 0, 0)
    return screen + control + b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\2\2\x4c\1\0;"


def huge_webp() -> bytes:
    """Return a lossless WebP that claims 16,384 × 16,384 pixels."""
    webp = encoded(photo(), "WEBP", lossless=True)
    return webp[:21] + struct.pack("<I", 16_383 | 16_383 << 14) + webp[25:]


def huge_tiff() -> bytes:
    """Return a TIFF that claims 40,000 × 40,000 pixels."""
    tiff = encoded(photo(), "TIFF")
    for tag, value in ((0x0100, WIDTH), (0x0101, HEIGHT)):
        tiff = tiff.replace(struct.pack("<HHII", tag, 4, 1, value), struct.pack("<HHII", tag, 4, 1, 40_000))
    return tiff


def tiff_with(tag: int, value: int, count: int = 1) -> bytes:
    """Return a TIFF with another value, or count of values, for one of its short tags."""
    tiff = encoded(photo(), "TIFF")
    start = tiff.index(struct.pack("<HHI", tag, 3, 1))
    return tiff[:start] + struct.pack("<HHIHH", tag, 3, count, value, 0) + tiff[start + 12 :]


def half_transparent() -> Image.Image:
    """Return RGBA whose left half is opaque and whose right half is not there."""
    image = photo().convert("RGBA")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (WIDTH // 2, 0, WIDTH, HEIGHT))
    image.putalpha(alpha)
    return image


@functools.cache
def hostile_images() -> dict[str, tuple[bytes, Status]]:
    """Return file name → (bytes, the status that decoding with any usual policy must give).

    Names carry the extension a person would expect, except where that is the point.
    """
    rgb, gray, alpha = photo(), photo().convert("L"), half_transparent()
    palette = rgb.quantize(16)
    jpeg, flat_png = encoded(rgb, "JPEG", quality=90), encoded(rgb, "PNG")
    large, progressive = (encoded(photo(200, 150), "JPEG", progressive=how) for how in (False, True))
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    jp2 = encoded(rgb, "JPEG2000")
    lzw = encoded(rgb, "TIFF", compression="tiff_lzw")
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    heic = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + bytes(64)
    good = {
        "gray.jpg": encoded(gray, "JPEG"),
        "rgb.jpg": jpeg,
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "stored-as-rgb.jpg": encoded(rgb, "JPEG", keep_rgb=True),
        "cmyk-adobe.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "cmyk-plain.jpg": without_adobe(encoded(rgb.convert("CMYK"), "JPEG")),
        "rotated.jpg": encoded(rgb, "JPEG", exif=exif_block(6)),
        "broken-exif.jpg": with_segment(jpeg, jpeg_segment(0xE1, exif_block(6)[:-9])),
        "junk-exif.jpg": with_segment(jpeg, jpeg_segment(0xE1, b"Exif\0\0junk" * 50)),
        "broken-multi-picture.jpg": with_segment(jpeg, jpeg_segment(0xE2, b"MPF\0II*\0junk")),
        "two-pictures.mpo.jpg": animation("MPO"),
        "trailing-video.jpg": jpeg + b"ftypmp42" * 200,
        "fill-bytes.jpg": jpeg[:2] + b"\xff" * 9 + jpeg[2:],
        "damaged-scan.jpg": jpeg[:-60] + bytes(range(1, 59)) + jpeg[-2:],
        "rgb.png": flat_png,
        "gray.png": encoded(gray, "PNG"),
        "bilevel.png": encoded(rgb.convert("1"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "palette-transparent.png": encoded(palette, "PNG", transparency=3),
        "palette-translucent.png": encoded(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "gray-alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "rgba.png": encoded(alpha, "PNG"),
        "color-key.png": encoded(rgb, "PNG", transparency=(0, 0, 127)),
        "gray16.png": encoded(deep, "PNG"),
        "rgb16.png": png(1, 1, 16, 2, bytes([0, 255, 255, 128, 0, 0, 1])),
        "animated.png": animation("PNG"),
        "broken-animation.png": flat_png[:33] + png_chunk(b"acTL", b"\0") + flat_png[33:],
        "compressed-text-bomb.png": encoded(rgb, "PNG", pnginfo=text),
        "trailing-junk.png": flat_png + b"junk" * 9,
        "still.gif": encoded(rgb, "GIF"),
        "transparent.gif": encoded(alpha, "GIF"),
        "animated.gif": animation("GIF"),
        "lossy.webp": encoded(rgb, "WEBP"),
        "lossless.webp": encoded(rgb, "WEBP", lossless=True),
        "alpha.webp": encoded(alpha, "WEBP"),
        "animated.webp": animation("WEBP"),
        "rgb.bmp": encoded(rgb, "BMP"),
        "palette.bmp": encoded(palette, "BMP"),
        "rgb.tif": encoded(rgb, "TIFF"),
        "lzw.tif": lzw,
        "jpeg.tif": encoded(rgb, "TIFF", compression="jpeg"),
        "fax.tif": encoded(rgb.convert("1"), "TIFF", compression="group4"),
        "cmyk.tif": encoded(rgb.convert("CMYK"), "TIFF"),
        "rgba.tif": encoded(alpha, "TIFF"),
        "gray16.tif": encoded(deep, "TIFF"),
        "lab.tif": encoded(rgb.convert("LAB"), "TIFF"),
        "pages.tif": animation("TIFF"),
        "rgb.ppm": encoded(rgb, "PPM"),
        "gray16.pgm": encoded(deep, "PPM"),
        "rgb.avif": encoded(rgb, "AVIF"),
        "alpha.avif": encoded(alpha, "AVIF"),
        "rgb.jp2": jp2,
        "codestream.j2k": encoded(rgb, "JPEG2000", no_jp2=True),
        "one-pixel.png": png(1, 1, 8, 2, b"\0\1\2\3"),
        "sliver.png": png(5_000, 1, 8, 0, bytes(5_001)),
        "png-inside.jpg": flat_png,
        "jpeg-inside.txt": jpeg,
        "no-extension": jpeg,
        "grüße 🐈.jpg": jpeg,
    }
    bad = {
        Status.EMPTY: {"empty.jpg": b""},
        Status.NOT_AN_IMAGE: {
            "text.jpg": b"hello, I am no image at all\n" * 20,
            "bmw.bmp": b"BMW builds cars, and BM is a magic number.\n" * 4,
            "p5.pgm": b"P5 is a name of many things",
            "zeros.png": bytes(4_000),
            "ones.jpg": b"\xff" * 4_000,
            "short.jpg": b"\xff\xd8",
            "page.html": b"<!DOCTYPE html><html><body>no picture</body></html>",
            "archive.zip": b"PK\3\4" + bytes(60),
            "film.mp4": struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 0, b"mp42") + bytes(64),
            "sound.wav": b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + bytes(28),
            ".DS_Store": b"\0\0\0\1Bud1" + bytes(400),
        },
        Status.UNSUPPORTED: {
            "phone.heic": heic,
            "drawing.svg": b'<?xml version="1.0"?>\n<!-- hi --><svg xmlns="http://www.w3.org/2000/svg"/>',
            "bare.svg": b"<svg viewBox='0 0 1 1'/>",
            "paper.pdf": b"%PDF-1.7\n" + bytes(50),
            "print.eps": b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n",
            "layers.psd": b"8BPS\0\1" + bytes(60),
            "favicon.ico": encoded(rgb, "ICO"),
            "plain.ppm": b"P3\n# plain text\n1 1\n255\n1 2 3\n",
            "float.pfm": encoded(gray.convert("F"), "PPM"),
            "float.tif": encoded(gray.convert("F"), "TIFF"),
            "int32.tif": encoded(gray.convert("I"), "TIFF"),
            "modern.jxl": b"\xff\x0a" + bytes(30),
            "game.dds": b"DDS " + bytes(124),
            "many-scans.jpg": many_scans(1_000),
            "12-bit.jpg": jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
            "unknown-compression.tif": tiff_with(0x0103, 12_345),
            "apple-crushed.png": flat_png[:8] + png_chunk(b"CgBI", bytes(4)) + flat_png[8:],
        },
        Status.TRUNCATED: {
            "half.jpg": large[: len(large) // 2],
            "half-progressive.jpg": progressive[: len(progressive) // 2],
            "no-end-marker.jpg": jpeg[:-2],
            "zero-filled.jpg": large[: len(large) // 2] + bytes(len(large) // 2),
            "header-only.jpg": jpeg[:20],
            "magic-only.jpg": b"\xff\xd8\xff\xe0",
            "junk-after-magic.jpg": b"\xff\xd8\xff" + b"junk" * 50,
            "thumbnail-only.jpg": with_segment(jpeg, jpeg_segment(0xE1, b"Exif\0\0" + jpeg))[:-200],
            "half.png": flat_png[: len(flat_png) // 2],
            "magic-only.png": flat_png[:8],
            "no-end-chunk.png": flat_png[:-12],
            "bit-flip.png": flat_png[:60] + bytes([flat_png[60] ^ 1]) + flat_png[61:],
            "no-pixels.png": png(4, 4, 8, 2, b""),
            "zero-size.png": png(0, 0, 8, 2, b""),
            "half.gif": encoded(rgb, "GIF")[:600],
            "half.webp": encoded(rgb, "WEBP")[:60],
            "half.bmp": encoded(rgb, "BMP")[:900],
            "half.tif": encoded(rgb, "TIFF")[:900],
            "damaged-lzw.tif": lzw[:600] + b"junk" * 9 + lzw[636:],
            "half.ppm": encoded(rgb, "PPM")[:900],
            "half.avif": encoded(rgb, "AVIF")[:300],
            "many-samples.tif": tiff_with(0x0115, 2_819),
            "half.jp2": jp2[:300],
            "no-tiles.jp2": jp2[: jp2.index(b"\xff\x90") + 2],
        },
        Status.TOO_LARGE: {
            "bomb.png": png(30_000, 30_000, 8, 2, b""),
            "bomb.gif": huge_gif(),
            "bomb.bmp": encoded(rgb, "BMP")[:18] + struct.pack("<ii", 40_000, 40_000) + encoded(rgb, "BMP")[26:],
            "bomb.webp": huge_webp(),
            "bomb.tif": huge_tiff(),
            "bomb.ppm": b"P6 60000 60000 255\n" + bytes(30),
            "bomb.jpg": with_size(jpeg, 65_000, 65_000),
        },
    }
    files = {name: (data, Status.OK) for name, data in good.items()}
    for status, group in bad.items():
        files.update({name: (data, status) for name, data in group.items()})
    return files
