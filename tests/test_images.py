"""The decode-and-resize policy: every kind of file, good or bad, gives pixels or a reason."""

import io
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

import tasks.images
from tasks.images import DecodePolicy, Status, decode, encode_png, fit
from tests.hostile import (
    HEIGHT,
    WIDTH,
    animation,
    encoded,
    exif_block,
    half_transparent,
    hostile_images,
    jpeg_segment,
    photo,
    png,
    png_chunk,
    with_segment,
    with_size,
    without_adobe,
    ycck,
)

FILES = hostile_images()
POLICY = DecodePolicy(size=WIDTH)


def decoded(data: bytes, policy: DecodePolicy = POLICY) -> np.ndarray:
    """Return the pixels of a file that must be good, as integers that may be subtracted."""
    outcome = decode(data, policy)
    assert outcome.status == Status.OK, outcome.reason
    return outcome.pixels.astype(int)


def expected(image: Image.Image, policy: DecodePolicy = POLICY) -> np.ndarray:
    """Return what the policy makes of a picture that needs no decoding."""
    return fit(np.asarray(image.convert("RGB")), policy).astype(int)


def failing(error: Exception) -> Callable[..., None]:
    """Return a function that raises ``error``."""

    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_every_kind_of_file_has_its_status(name: str, resize: str):
    data, status = FILES[name]
    outcome = decode(data, DecodePolicy(size=16, resize=resize))
    assert outcome.status == status, outcome.reason
    if status == Status.OK:
        assert outcome.reason == ""
        assert outcome.pixels.shape == (16, 16, 3)
        assert outcome.pixels.dtype == np.uint8
        assert outcome.width > 0 < outcome.height
    else:
        assert outcome.pixels is None
        assert outcome.reason


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("phone.heic", "HEIC"),
        ("drawing.svg", "SVG"),
        ("paper.pdf", "PDF"),
        ("layers.psd", "PSD"),
        ("12-bit.jpg", "12-bit"),
    ],
)
def test_unsupported_names_the_format(name: str, word: str):
    assert word in decode(FILES[name][0], POLICY).reason


def test_importing_is_light_and_decoding_silent():
    code = """if True:
        import sys, tests.hostile as hostile
        from tasks.images import DecodePolicy, decode
        odd_metadata = hostile.tiff_with(0x0103, 1, count=2)
        assert decode(odd_metadata, DecodePolicy()).status == "ok"
        for data, _ in hostile.hostile_images().values():
            decode(data, DecodePolicy())
            decode(data[: len(data) * 2 // 3], DecodePolicy())
        print(sorted({"tensorflow", "keras", "openvino", "pandas"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[1])
    assert (done.stdout, done.stderr) == (b"[]\n", b"")


@pytest.mark.parametrize("name", ["rgb.jpg", "rgb.png", "rotated.jpg", "two-pictures.mpo.jpg"])
def test_width_and_height_are_those_of_the_upright_image(name: str):
    outcome = decode(FILES[name][0], DecodePolicy(size=2))
    assert (outcome.width, outcome.height) == ((HEIGHT, WIDTH) if name == "rotated.jpg" else (WIDTH, HEIGHT))


STORED = {  # how a camera stores an upright picture under each EXIF orientation
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("order", "<>")
def test_orientation_is_undone_exactly(orientation: int, order: str):
    upright = np.asarray(photo())
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = exif_block(orientation, order)
    files = {
        "png": encoded(stored, "PNG", exif=exif),
        "webp": encoded(stored, "WEBP", lossless=True, exif=exif),
        "tiff": encoded(stored, "TIFF", tiffinfo={0x0112: orientation}),
        "lzw": encoded(stored, "TIFF", tiffinfo={0x0112: orientation}, compression="tiff_lzw"),
    }
    for name, data in files.items():
        outcome = decode(data, POLICY)
        assert (outcome.width, outcome.height) == (WIDTH, HEIGHT), name
        np.testing.assert_array_equal(outcome.pixels, fit(upright, POLICY), err_msg=name)
    lossy = {"jpeg": encoded(stored, "JPEG", quality=95, exif=exif), "avif": encoded(stored, "AVIF", exif=exif)}
    for name, data in lossy.items():
        assert np.abs(decoded(data) - fit(upright, POLICY)).mean() <= 4, name


def test_orientation_after_the_image_data_of_a_png_counts():
    data = encoded(photo().transpose(Image.Transpose.ROTATE_180), "PNG")
    data = data[:-12] + png_chunk(b"eXIf", exif_block(3)[6:]) + data[-12:]
    np.testing.assert_array_equal(decoded(data), expected(photo()))


@pytest.mark.parametrize("block", [b"", b"II*\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", exif_block(9)])
def test_a_broken_orientation_is_none(block: bytes):
    data = with_segment(encoded(photo(), "JPEG"), jpeg_segment(0xE1, b"Exif\0\0" + block.removeprefix(b"Exif\0\0")))
    np.testing.assert_array_equal(decoded(data), decoded(encoded(photo(), "JPEG")))


# Bytes that may be missing at the end of a file that is still good: what follows the last pixel.
SPARE = {"GIF": 2, "TIFF": 0, "BMP": 0, "PPM": 0, "WEBP": 0, "PNG": 0, "JPEG": 0, "AVIF": 0, "JPEG2000": 0}


@pytest.mark.parametrize("form", SPARE)
@pytest.mark.parametrize("options", [{}, {"progressive": True, "lossless": True, "compression": "tiff_lzw"}])
def test_a_cut_file_is_never_good(form: str, options: dict):
    data = encoded(photo(), form, **options)
    cuts = {*range(1, 40), *range(1, len(data), 11), *range(len(data) - 40, len(data) - SPARE[form])}
    for cut in cuts:
        outcome = decode(data[:cut], POLICY)
        allowed = {Status.TRUNCATED, Status.NOT_AN_IMAGE} if cut < 20 else {Status.TRUNCATED}
        allowed |= {Status.UNSUPPORTED} if form == "TIFF" else set()  # the table of its kind of pixels is cut
        assert outcome.status in allowed, (cut, outcome.reason)


def test_every_flipped_bit_of_a_png_is_noticed():
    data = encoded(photo(), "PNG")
    for position in range(8, len(data), 3):
        damaged = data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :]
        assert decode(damaged, POLICY).status in (Status.TRUNCATED, Status.UNSUPPORTED), position


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_counts(form: str):
    options = {"lossless": True} if form == "WEBP" else {}
    difference = np.abs(decoded(animation(form, **options)) - expected(photo()))
    assert difference.mean() <= {"GIF": 12, "MPO": 3}.get(form, 0)


BACKGROUND = DecodePolicy(size=WIDTH, background=(10, 20, 30))


@pytest.mark.parametrize(
    "data",
    [
        encoded(half_transparent(), "PNG"),
        encoded(half_transparent(), "WEBP", lossless=True),
        encoded(half_transparent(), "TIFF"),
        encoded(half_transparent(), "GIF"),
    ],
    ids=["png", "webp", "tiff", "gif"],
)
def test_transparency_shows_the_background(data: bytes):
    pixels = decoded(data, BACKGROUND)
    assert (pixels[:, WIDTH // 2 :] == (10, 20, 30)).all()
    assert np.abs(pixels - expected(photo()))[:, : WIDTH // 2].mean() <= 12


def test_half_transparent_gray_is_blended():
    image = Image.fromarray(np.full((4, 4, 2), (200, 128), np.uint8), "LA")
    pixels = decoded(encoded(image, "PNG"), DecodePolicy(size=4, background=(0, 100, 255)))
    np.testing.assert_allclose(pixels[0, 0], (100, 150, 227), atol=1)


def test_transparent_palette_entries():
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    policy = DecodePolicy(size=2, background=(100, 100, 100))
    one, all_entries = (encoded(image, "PNG", transparency=how) for how in (1, bytes([255, 0, 0, 128])))
    assert decoded(one, policy).tolist() == [[[255, 0, 0], [100] * 3], [[0, 0, 255], [9] * 3]]
    np.testing.assert_allclose(decoded(all_entries, policy)[1], [[100] * 3, [54] * 3], atol=1)


@pytest.mark.parametrize(
    ("depth", "color", "row", "key"),
    [
        (1, 0, b"\x40", struct.pack(">H", 1)),
        (2, 0, b"\x20", struct.pack(">H", 2)),
        (4, 0, b"\x2a", struct.pack(">H", 10)),
        (8, 0, b"\x02\xaa", struct.pack(">H", 170)),
        (16, 0, b"\x02\0\xab\xcd", struct.pack(">H", 0xABCD)),
        (8, 2, b"\1\2\3\4\5\6", struct.pack(">HHH", 4, 5, 6)),
        (16, 2, b"\1\0\2\0\3\0\4\0\5\0\6\0", struct.pack(">HHH", 0x400, 0x500, 0x600)),
    ],
)
def test_a_transparent_color_of_any_depth(depth: int, color: int, row: bytes, key: bytes):
    data = png(2, 1, depth, color, b"\0" + row, png_chunk(b"tRNS", key))
    pixels = decoded(data, DecodePolicy(size=2, resize="pad", background=(99, 98, 97)))
    assert pixels[0, 1].tolist() == [99, 98, 97]
    assert pixels[0, 0].tolist() != [99, 98, 97]


def test_transparency_after_the_pixels_of_a_png_is_none():
    data = encoded(photo().quantize(16), "PNG", transparency=bytes(16))
    start = data.index(b"tRNS") - 4
    chunk, rest = data[start : start + 28], data[:start] + data[start + 28 :]
    np.testing.assert_array_equal(decoded(rest[:-12] + chunk + rest[-12:]), decoded(rest))
    assert (decoded(data) == 255).all()


@pytest.mark.parametrize(
    "data",
    [
        encoded(photo().convert("CMYK"), "JPEG", quality=95),
        without_adobe(encoded(photo().convert("CMYK").point(lambda value: 255 - value), "JPEG", quality=95)),
        ycck(),
        encoded(photo().convert("CMYK"), "TIFF"),
    ],
    ids=["adobe", "plain", "ycck", "tiff"],
)
def test_cmyk_comes_close_to_its_source(data: bytes):
    assert np.abs(decoded(data) - expected(photo())).mean() <= 3


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_keeps_its_high_byte(form: str):
    values = np.array([[0, 257, 0x00FF], [0x8000, 0xFFFF, 0x1234], [1, 2, 3]], np.uint16)
    pixels = decoded(encoded(Image.fromarray(values), form), DecodePolicy(size=3))
    np.testing.assert_array_equal(pixels, np.repeat((values >> 8)[..., None], 3, axis=-1))


def test_16_bit_color_keeps_its_high_byte():
    assert decoded(FILES["rgb16.png"][0], DecodePolicy(size=1)).tolist() == [[[255, 128, 0]]]


def test_crop_takes_the_central_square():
    pixels = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    policy = DecodePolicy(size=2, resize="crop")
    np.testing.assert_array_equal(fit(pixels, policy), pixels[:, 1:3])
    np.testing.assert_array_equal(fit(pixels.swapaxes(0, 1), policy), pixels.swapaxes(0, 1)[1:3])


def test_pad_centers_between_background():
    pixels = np.full((2, 6, 3), 50, np.uint8)
    policy = DecodePolicy(size=6, resize="pad", background=(1, 2, 3))
    wide, tall = fit(pixels, policy), fit(pixels.swapaxes(0, 1), policy)
    assert (wide[2:4] == 50).all()
    assert (wide[[0, 1, 4, 5]] == (1, 2, 3)).all()
    np.testing.assert_array_equal(tall, wide.swapaxes(0, 1))
    sliver = fit(np.full((1, 500, 3), 50, np.uint8), policy)
    assert (sliver == 50).all(axis=-1).sum() == 6


def test_squash_averages_areas_and_interpolates_where_it_grows():
    pixels = np.repeat(np.array([[0, 100, 200, 44]], np.uint8)[..., None], 3, axis=-1)
    assert fit(pixels, DecodePolicy(size=1))[0, 0].tolist() == [86, 86, 86]
    assert fit(pixels, DecodePolicy(size=2))[..., 0].tolist() == [[50, 122], [50, 122]]
    stripes = np.zeros((2, 64, 3), np.uint8)
    stripes[:, ::4] = 200
    assert (fit(stripes, DecodePolicy(size=8)) == 50).all()
    edge = np.repeat(np.repeat(np.array([[90, 90, 160, 160]], np.uint8)[..., None], 3, axis=-1), 4, axis=0)
    large = fit(edge, DecodePolicy(size=37))
    assert (large.min(), large.max()) == (90, 160)


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_nothing_changes_at_the_right_size(resize: str):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 9, 3), np.uint8)
    policy = DecodePolicy(size=9, resize=resize)
    assert np.shares_memory(fit(pixels, policy), pixels)
    outcome = decode(encode_png(pixels), policy)
    np.testing.assert_array_equal(outcome.pixels, pixels)
    assert outcome.pixels.flags.writeable


@pytest.mark.parametrize(("width", "height"), [(640, 512), (1001, 751), (517, 2000)])
@pytest.mark.parametrize("size", [16, 32, 100])
@pytest.mark.parametrize("form", ["RGB", "L", "CMYK"])
def test_reduced_decoding_stays_close_to_full(monkeypatch, width: int, height: int, size: int, form: str):
    seen = []
    monkeypatch.setattr(tasks.images, "fit", lambda pixels, policy: seen.append(pixels.shape) or fit(pixels, policy))
    data = encoded(photo(width, height).convert(form), "JPEG", quality=90)
    whole = expected(Image.open(io.BytesIO(data)), DecodePolicy(size=size))
    difference = np.abs(decoded(data, DecodePolicy(size=size)) - whole)
    assert difference.mean() <= 1.5
    assert difference.max() <= 14
    scale = max(scale for scale in (1, 2, 4, 8) if scale * 2 * size <= min(width, height))
    assert seen == [(round(height / scale), round(width / scale), 3)]


def test_bombs_cost_no_time_and_no_memory():
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for name, (data, status) in FILES.items():
        if status == Status.TOO_LARGE:
            decode(data, POLICY)
            assert time.perf_counter() - start < 2, name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
    assert "30000 x 30000" in decode(FILES["bomb.png"][0], POLICY).reason


@pytest.mark.parametrize(("side", "most"), [(9_000, 2), (100, 8)])
def test_only_so_many_large_images_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch, side: int, most: int):
    everybody, now, seen = threading.Barrier(most), [], []

    def pixels(*_: object) -> np.ndarray:
        now.append(1)
        seen.append(len(now))
        everybody.wait(10)
        now.pop()
        raise ValueError("room is given back whatever happens")

    monkeypatch.setattr(tasks.images, "_pixels", pixels)
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda _: decode(png(side, side, 8, 2, b""), POLICY), range(16)))
    assert {outcome.reason for outcome in outcomes} == {"PNG: room is given back whatever happens"}
    assert max(seen) == most


def test_an_image_of_more_pixels_than_there_is_room_for_is_decoded_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks.images._Room, "PIXELS", 10)
    monkeypatch.setattr(tasks.images._Room, "SMALL", 5)
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda _: decode(FILES["rgb.png"][0], POLICY), range(20)))
    assert {outcome.status for outcome in outcomes} == {Status.OK}


def test_pixel_limit_is_the_policys_alone():
    data = with_size(encoded(photo(), "JPEG"), 9_600, 9_600)  # more than Pillow's own limit
    assert decode(data, POLICY).status == Status.OK
    assert decode(data, DecodePolicy(max_pixels=9_600 * 9_600 - 1)).status == Status.TOO_LARGE


def test_no_memory_is_too_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks.images, "fit", failing(MemoryError()))
    assert decode(FILES["rgb.png"][0], POLICY).status == Status.TOO_LARGE


def test_reasons_are_one_short_line_of_ascii(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks.images, "fit", failing(ValueError("grüße\n" * 500)))
    outcome = decode(FILES["rgb.png"][0], POLICY)
    assert outcome.status == Status.TRUNCATED
    assert outcome.reason.isascii()
    assert outcome.reason.isprintable()
    assert len(outcome.reason) < 220


@settings(derandomize=True, max_examples=300, deadline=None, database=None)
@given(
    name=st.sampled_from([name for name, (data, _) in FILES.items() if data]),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=4
    ),
)
def test_no_mutation_raises(name: str, edits: list[tuple[float, int, bytes]]):
    data = FILES[name][0]
    for where, removed, inserted in edits:
        position = int(where**3 * len(data))  # mostly in the header
        data = data[:position] + inserted + data[position + removed :]
    outcome = decode(data, DecodePolicy(size=8, max_pixels=1_000_000))
    assert (outcome.pixels is not None) == (outcome.status == Status.OK) == (outcome.reason == "")


@settings(derandomize=True, max_examples=100, deadline=None, database=None)
@given(data=st.binary(max_size=200))
def test_no_junk_is_an_image(data: bytes):
    assert decode(data, POLICY).status != Status.OK


def test_threads_do_not_disturb_each_other():
    alone = [decode(data, POLICY) for data, _ in FILES.values()]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda item: decode(item[0], POLICY), list(FILES.values()) * 4))
    for index, outcome in enumerate(together):
        other = alone[index % len(alone)]
        assert (outcome.status, outcome.reason) == (other.status, other.reason)
        np.testing.assert_array_equal(outcome.pixels, other.pixels)


@pytest.mark.parametrize(
    "values", [{"size": 0}, {"size": 2049}, {"resize": "stretch"}, {"background": (0, 0, 256)}, {"sise": 32}]
)
def test_a_wrong_policy_is_refused(values: dict):
    with pytest.raises(ValidationError):
        DecodePolicy(**values)


def test_encode_png_can_be_read_elsewhere():
    pixels = np.asarray(photo())
    read = cv2.imdecode(np.frombuffer(encode_png(pixels), np.uint8), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(read, pixels)
