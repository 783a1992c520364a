"""The card of a prepared data set, as one HTML page: what is in it, what was left out, and why."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tasks.pages import pixelated, render, rows_of, thumbnail, thumbnail_edge

SPLITS = ("train", "validation", "test")
# More classes or pictures than these make the page heavy and tell a reader nothing new.
SHOWN_CLASSES = 40
SHOWN_PICTURES = 8


def render_data_card(
    summary: Mapping[str, Any], manifest: pd.DataFrame, sample_images: Mapping[str, Sequence[np.ndarray]]
) -> str:
    """Return the card of a prepared data set as one HTML page, the same bytes for the same data.

    Args:
        summary: the content of prepared.json.
        manifest: one row per image found: ``name``, ``class``, ``split``, ``status``, ``reason``, ``width``,
            ``height``. Images whose status is ``ok`` are used; the others are counted by status.
        sample_images: uint8 ``(H, W, 3)`` pictures by class name, every class, in the order of the classes.
    """
    used = manifest[manifest["status"] == "ok"]
    counts = used.groupby(["class", "split"]).size()
    rows = [{"name": name, "counts": [int(counts.get((name, split), 0)) for split in SPLITS]} for name in sample_images]
    totals = [sum(row["counts"]) for row in rows]
    shown = {name: images[:SHOWN_PICTURES] for name, images in list(sample_images.items())[:SHOWN_CLASSES]}
    pictures = [image for images in shown.values() for image in images]
    edge = thumbnail_edge(len(pictures))
    return render(
        "card.html",
        source=summary["source"]["source"],
        size=summary["decode"]["size"],
        classes=len(sample_images),
        used=len(used),
        found=len(manifest),
        splits=[
            {"name": name, "images": summary["counts"][name], "share": summary["counts"][name] / max(len(used), 1)}
            for name in SPLITS
        ],
        balance=f"{max(totals) / min(totals):.2g} : 1" if min(totals) else "–",
        rows=[{**row, "images": total, "share": total / max(totals)} for row, total in zip(rows, totals, strict=True)],
        strips=[
            {"name": name, "sources": [thumbnail(image, edge) for image in images]} for name, images in shown.items()
        ],
        pixelated=pixelated(pictures),
        reasons=_exclusions(manifest),
        near=summary["near_duplicates"],
        sizes=_source_sizes(used),
        normalization=summary["normalization"],
        records=[
            ("Source", rows_of(summary["source"])),
            ("Decoding", rows_of(summary["decode"])),
            ("Digests", rows_of({"all splits": summary["data_digest"], "test split": summary["test_digest"]})),
        ],
    )


def _source_sizes(used: pd.DataFrame) -> str:
    """Return the size of the source images in words: the median, and the range where they differ."""
    width, height = used["width"], used["height"]
    middle = f"{width.median():.0f} × {height.median():.0f}"
    if width.nunique() == 1 and height.nunique() == 1:
        return f"every image is {middle} pixels"
    return (
        f"widths from {width.min():,} to {width.max():,} and heights from {height.min():,} to {height.max():,} "
        f"pixels, {middle} in the middle"
    )


def _exclusions(manifest: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the images left out, by status, the most frequent first, each with an example."""
    groups = manifest[manifest["status"] != "ok"].groupby("status", observed=True, sort=True)
    rows = [
        {
            "status": str(status).replace("_", " "),
            "images": len(group),
            "name": group["name"].iloc[0],
            "why": "" if pd.isna(group["reason"].iloc[0]) else group["reason"].iloc[0],
        }
        for status, group in groups
    ]
    return sorted(rows, key=lambda row: -row["images"])
