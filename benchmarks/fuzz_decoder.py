"""Mutated images through the decoder: no exception, crash, hang, warning or memory growth, the same pixels each time.

``.venv/bin/python benchmarks/fuzz_decoder.py [--images 100000] [--seed 0] [--minutes M] [--save DIRECTORY]``

Files of every decoded format, those of the tests and larger ones, are damaged as disks, networks and
people with intent would: bits flipped, bytes cut off, cut out and put in, header fields set to extreme values,
segments and chunks swapped, repeated and dropped, files put one behind the other. PNG checksums are mended again in
most cases, since all else would be refused at once. Each mutant depends on the seed and its number alone.

Prints one JSON object; exits with 1 if anything failed. What failed is kept in the directory, and so is, as ``latest``,
what was being decoded when the process died.
"""

import argparse
import ctypes
import faulthandler
import gc
import hashlib
import json
import os
import random
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2

from tasks.images import Decoded, DecodePolicy, Status, decode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.hostile import encoded, half_transparent, hostile_images, photo, with_checksums

SLOW_SECONDS, HANG_SECONDS = 2.0, 120.0
#: An image may take longer if it is large: a file of 700 bytes can be a valid one of 65 million pixels.
PIXELS_PER_SECOND = 10e6
#: Growth of the resident memory that is none: allocators never give everything back.
GROWTH_RATIO, GROWTH_BYTES = 1.1, 20 * 2**20
POLICIES = [DecodePolicy(size=size, resize=resize) for size, resize in ((32, "squash"), (8, "crop"), (100, "pad"))]
EXTREMES = [0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
#: What stands at the beginning of parts that may be swapped, repeated or dropped.
JPEG_MARKERS = [bytes([0xFF, code]) for code in (0xC0, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE, 0xD9)]
CHUNKS = [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IEND"]
CHUNKS += [b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"EXIF", b"RIFF"]
CHUNKS += [b"ftyp", b"meta", b"iloc", b"iinf", b"iprp", b"ispe", b"av1C", b"mdat", b"jp2h", b"ihdr", b"colr", b"jp2c"]
CHUNKS += [b"\xff\x4f", b"\xff\x51", b"\xff\x52", b"\xff\x5c", b"\xff\x90", b"\xff\x93", b"!\xf9", b"!\xff", b",\0"]


def seeds() -> list[bytes]:
    """Return the files that are mutated: images, whole or truncated."""
    usable = (Status.OK, Status.TRUNCATED)
    found = [data for data, status in hostile_images().values() if status in usable and len(data) < 100_000]
    large, alpha = photo(200, 150), half_transparent()
    for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"):
        found.append(encoded(large, form))
        found.append(encoded(large.convert("L"), form))
    found += [encoded(large, "JPEG", **how) for how in ({"progressive": True}, {"restart_marker_blocks": 3})]
    found += [encoded(large, "JPEG", subsampling=how) for how in (0, 1, 2)]
    for how in ("tiff_deflate", "packbits", "group3", "jpeg"):
        found.append(encoded(large.convert("1") if how == "group3" else large, "TIFF", compression=how))
    found.append(encoded(large, "TIFF", compression="tiff_lzw", tiffinfo={317: 2}))
    for form in ("WEBP", "AVIF", "JPEG2000", "GIF"):  # the rarer ones among the tests' files
        found += [encoded(photo(*size), form) for size in ((64, 64), (97, 31), (300, 200))]
        found.append(encoded(alpha if form != "GIF" else alpha.quantize(9), form))
        found.append(encoded(large, form, lossless=True, quality=30, no_jp2=True, irreversible=True, optimize=True))
    return found


def parts(data: bytes) -> list[int]:
    """Return where the parts of a file may begin, in order."""
    starts = {0, len(data)}
    for marker in JPEG_MARKERS if data.startswith(b"\xff\xd8") else CHUNKS:
        position = data.find(marker)
        while position >= 0:
            starts.add(position - 4 if len(marker) == 4 else position)
            position = data.find(marker, position + 1)
    return sorted(start for start in starts if start >= 0)


def flip_bits(data: bytes, random: random.Random, _: bytes) -> bytes:
    found = bytearray(data)
    for _bit in range(2 ** random.randrange(5)):
        found[somewhere(data, random)] ^= 1 << random.randrange(8)
    return bytes(found)


def cut_off(data: bytes, random: random.Random, _: bytes) -> bytes:
    return data[: random.randrange(len(data))]


def cut_out(data: bytes, random: random.Random, _: bytes) -> bytes:
    start = somewhere(data, random)
    return data[:start] + data[start + 2 ** random.randrange(10) :]


def put_in(data: bytes, random: random.Random, _: bytes) -> bytes:
    start, count = somewhere(data, random), 2 ** random.randrange(10)
    kind = random.randrange(3)
    added = random.randbytes(count) if kind else bytes([random.choice([0, 255, 128])]) * count
    return data[:start] + added + data[start + (count if kind == 2 else 0) :]


def set_number(data: bytes, random: random.Random, _: bytes) -> bytes:
    """Overwrite one, two, four or eight bytes, mostly where headers are."""
    form = random.choice(["B", "<H", ">H", "<I", ">I", "<I", ">I", "<Q", ">Q"])
    size = struct.calcsize(form)
    number = random.choice(EXTREMES) if random.random() < 0.7 else random.getrandbits(random.randrange(1, 33))
    start = somewhere(data, random)
    return data[:start] + struct.pack(form, number % 256**size) + data[start + size :]


def set_dimension(data: bytes, random: random.Random, _: bytes) -> bytes:
    """Change every number that may be the width or height of the tests' images."""
    old = random.choice([24, 40, 150, 200])
    new = random.choice([0, 1, 2, old - 1, old + 1, 1_000, 9_999, 16_383, 30_000, 65_535])
    form = random.choice(["<H", ">H", "<I", ">I"])
    return data.replace(struct.pack(form, old), struct.pack(form, new))


def reorder(data: bytes, random: random.Random, _: bytes) -> bytes:
    """Swap two parts, repeat one or drop one."""
    starts = parts(data)
    pieces = [data[start:end] for start, end in pairwise(starts)]
    one, other = random.randrange(len(pieces)), random.randrange(len(pieces))
    kind = random.randrange(3)
    if kind == 0:
        pieces[one], pieces[other] = pieces[other], pieces[one]
    elif kind == 1:
        pieces[one:one] = [pieces[other]] * 2 ** random.randrange(6)
    else:
        del pieces[one]
    return b"".join(pieces)


def join(data: bytes, random: random.Random, other: bytes) -> bytes:
    """Put another file behind this one, inside it, or in place of its end."""
    start = random.choice([len(data), random.choice(parts(data)), random.randrange(len(data))])
    rest = random.choice([b"", data[start:]])
    return data[:start] + other[random.choice([0, random.choice(parts(other))]) :] + rest


def change_pixels(data: bytes, random: random.Random, other: bytes) -> bytes:
    """Mutate what a PNG's first IDAT chunk holds before its compression; another file as it is."""
    start = data.find(b"IDAT")
    if not data.startswith(b"\x89PNG") or start < 0:
        return set_number(data, random, other)
    end = start + 4 + int.from_bytes(data[start - 4 : start])
    try:
        rows = zlib.decompress(data[start + 4 : end])
    except zlib.error:
        return data
    packed = zlib.compress(random.choice([cut_off, cut_out, put_in, flip_bits])(rows or b"\0", random, b""))
    return data[: start - 4] + struct.pack(">I", len(packed)) + b"IDAT" + packed + data[end:]


def somewhere(data: bytes, random: random.Random) -> int:
    """Return a position in ``data``, in half of the cases near its beginning, where headers are."""
    return int(random.random() ** random.choice([1, 3]) * len(data))


MUTATIONS: list[Callable[[bytes, random.Random, bytes], bytes]] = [
    *(flip_bits, cut_off, cut_out, put_in, set_number, set_number, set_dimension, reorder, join, change_pixels)
]


def mutant(originals: list[bytes], seed: int, number: int) -> bytes:
    """Return mutant ``number``; it is never longer than a megabyte."""
    choices = random.Random(f"{seed}/{number}")
    original = data = choices.choice(originals)
    for _ in range(choices.choice([1, 1, 1, 2, 3, 8])):
        data = choices.choice(MUTATIONS)(data or b"\0", choices, choices.choice(originals))[: 2**20]
    if choices.random() < 0.7:
        data = original[:4] + data[4:]  # else no decoder would be asked
    if data.startswith(b"\x89PNG") and choices.random() < 0.8:
        data = with_checksums(data)
    return data


def complaint(outcome: Decoded, policy: DecodePolicy) -> str | None:
    """Return what is wrong with an outcome in itself, None if nothing is."""
    good = outcome.status == Status.OK
    if good != (outcome.pixels is not None) or good != (outcome.reason == ""):
        return f"status {outcome.status} with reason '{outcome.reason}' and pixels {outcome.pixels is not None}"
    if outcome.pixels is not None and outcome.pixels.shape != (policy.size, policy.size, 3):
        return f"pixels of shape {outcome.pixels.shape}"
    if not (outcome.reason.isascii() and (good or outcome.reason.isprintable()) and len(outcome.reason) < 300):
        return f"reason {outcome.reason!r}"
    return None


def same(first: Decoded, second: Decoded) -> bool:
    """Tell whether two outcomes are one."""
    facts = [(found.status, found.reason, found.width, found.height) for found in (first, second)]
    pixels = [None if found.pixels is None else found.pixels.tobytes() for found in (first, second)]
    return facts[0] == facts[1] and pixels[0] == pixels[1]


def resident_bytes() -> int:
    """Return the memory of this process, after all that is free has been given back."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fuzz(
    images: int, seed: int, minutes: float | None, save: Path, warned: list[warnings.WarningMessage]
) -> dict[str, Any]:
    """Decode mutants; return what was seen. ``warned`` is where Python's warnings go."""
    originals = seeds()
    statuses: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    memory: list[tuple[int, int]] = []
    slowest, slowest_number, began, done = 0.0, 0, time.monotonic(), 0
    latest = os.open(save / "latest", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    for number in range(images):
        if minutes is not None and time.monotonic() - began > minutes * 60:
            break
        data, policy = mutant(originals, seed, number), POLICIES[number % len(POLICIES)]
        os.pwrite(latest, data, 0)
        os.ftruncate(latest, len(data))
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        wrong = None
        start = time.thread_time()
        try:
            outcome = decode(data, policy)
            seconds = time.thread_time() - start
            wrong = complaint(outcome, policy)
            statuses[str(outcome.status)] += 1
            if wrong is None and outcome.pixels is not None and not same(outcome, decode(data, policy)):
                wrong = "another outcome the second time"
            if wrong is None and warned:
                wrong = f"warned: {warned.pop().message}"
            if wrong is None and seconds > max(SLOW_SECONDS, outcome.width * outcome.height / PIXELS_PER_SECOND):
                wrong = f"took {seconds:.1f} s"
        except Exception as error:
            seconds, wrong = time.thread_time() - start, f"raised {error!r}"
        if seconds > slowest:
            slowest, slowest_number = seconds, number
        if wrong:
            name = f"{hashlib.sha256(data).hexdigest()[:16]}.bin"
            (save / name).write_bytes(data)
            failures.append({"number": number, "file": name, "policy": policy.model_dump(), "what": wrong})
        done = number + 1
        if done % max(1, images // 20) == 0:
            memory.append((done, resident_bytes()))
    faulthandler.cancel_dump_traceback_later()
    memory.append((done, resident_bytes()))
    os.close(latest)
    (save / "latest").unlink()
    settled = next((size for count, size in memory if count >= done / 5), memory[-1][1])
    grown = memory[-1][1] > max(settled * GROWTH_RATIO, settled + GROWTH_BYTES)
    if grown:
        failures.append({"what": "memory grew"})
    return {
        "images": done,
        "seed": seed,
        "originals": len(originals),
        "seconds": round(time.monotonic() - began, 1),
        "statuses": dict(statuses.most_common()),
        "slowest_seconds": round(slowest, 3),
        "slowest": slowest_number,
        "resident_mib_after_a_fifth": round(settled / 2**20, 1),
        "resident_mib_at_the_end": round(memory[-1][1] / 2**20, 1),
        "resident_mib": [round(size / 2**20, 1) for _, size in memory],
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--save", type=Path, help="directory for what fails; a new one in the system's by default")
    options = parser.parse_args()
    save = options.save or Path(tempfile.mkdtemp(prefix="fuzz-decoder-"))
    save.mkdir(parents=True, exist_ok=True)
    faulthandler.enable()
    cv2.setNumThreads(1)
    with warnings.catch_warnings(record=True) as warned:
        found = fuzz(options.images, options.seed, options.minutes, save, warned)
    if not options.save and not found["failures"]:
        save.rmdir()
    print(json.dumps(found, indent=2))
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main()
