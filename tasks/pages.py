"""What every HTML page shares: the template environment, pictures as data URIs, figures in words.

Pages load nothing, run no script but their own, and escape every name that comes from data. Each figure stands in a
``<data data-metric="...">`` element with its exact value, so that a page can be checked against its JSON.
"""

import base64
import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

# Up to this size pixels are shown as squares; photographs are better smoothed.
PIXELATED_SIZE = 64
LARGEST_THUMBNAIL = 112


def render(
    template: str, *, folders: Sequence[Path] = (), filters: Mapping[str, Callable] | None = None, **values: Any
) -> str:
    """Return a page from ``folders`` or ``tasks/templates``; a name that the template wants and lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).with_name("templates")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, number=number, counted=counted, **(filters or {}))
    return environment.get_template(template).render(values) + "\n"


def percent(share: float, digits: int = 0) -> str:
    """Write a share as a percentage."""
    return f"{share * 100:.{digits}f}%"


def number(value: float, digits: int) -> str:
    """Write a figure that is no share."""
    return f"{value:.{digits}f}"


def counted(count: int, singular: str, plural: str | None = None) -> str:
    """Write a count with its noun."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def rows_of(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested mappings as (dotted name, text) rows."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += rows_of(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", text_of(value)))
    return rows


def text_of(value: Any) -> str:
    """Write a parameter's value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(text_of(item) for item in value) or "none"
    return "none" if value is None else str(value)


def thumbnail(pixels: np.ndarray, edge: int) -> str:
    """Return a ``uint8`` RGB picture ``(H, W, 3)`` as a PNG data URI, shrunk to at most ``edge`` pixels."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((edge, edge), Image.Resampling.BOX)
    return data_uri(picture)


def thumbnail_edge(count: int, pixel_budget: int = 300_000) -> int:
    """Return the largest edge at which ``count`` square pictures stay within a page's budget of pixels."""
    return int(min(LARGEST_THUMBNAIL, math.sqrt(pixel_budget / max(count, 1))))


def pixelated(images: Sequence[np.ndarray]) -> bool:
    """Tell whether pictures are small enough to be enlarged as squares."""
    return all(max(image.shape[:2]) <= PIXELATED_SIZE for image in images)


def data_uri(picture: Image.Image, kind: str = "png", **options: Any) -> str:
    """Return a picture as a data URI; ``options`` are those of Pillow's format."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **(options or {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def allow_script(page: str) -> str:
    """Let a page run its only script: its policy names that very one, by digest, and nothing else runs in it."""
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.replace("default-src 'none';", f"default-src 'none'; script-src 'sha256-{digest}';", 1)
