"""Images that come more than once: exact copies by their content, near ones by how they look."""

import numpy as np
import pandas as pd
from natsort import natsorted


def mark_duplicates(manifest: pd.DataFrame) -> pd.DataFrame:
    """Return the manifest with the status of exact copies changed to ``duplicate`` or ``label_conflict``.

    Of several images with the same content one stays, in the test split if any of them is there. Where copies
    stand in different classes none stays, since at least one label is wrong. But additions never take an image of the
    source away, which may be one of the test split: the source's label holds against theirs.
    """
    manifest = manifest.copy()
    readable = manifest[manifest.status == "ok"]
    for _, copies in readable[readable.duplicated("content_hash", keep=False)].groupby("content_hash"):
        classes = set(copies["class"])
        of_source = set(copies["class"][copies.origin == "source"])
        doubtful = copies[~copies["class"].isin(of_source)] if len(of_source) == 1 else copies
        if len(classes) > 1:
            manifest.loc[doubtful.index, "status"] = "label_conflict"
            manifest.loc[doubtful.index, "reason"] = f"same content in {', '.join(natsorted(classes))}"
            copies = copies.drop(doubtful.index)
        if copies.empty:
            continue
        keep = (copies.index[copies.split == "test"].tolist() or copies.index.tolist())[0]
        others = copies.index.drop(keep)
        manifest.loc[others, "status"] = "duplicate"
        manifest.loc[others, "reason"] = f"same content as {manifest.name[keep]}"
    return manifest


def near_duplicates(pixels: np.ndarray, rows: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of ``rows`` whose images look the same without being exact copies.

    Two images are a pair when their 64-bit difference hashes are equal and their pixels differ by 3 of 255 on
    average or less. Compared are neighbors within a hash, which finds chains and stays linear.
    """
    import cv2

    by_hash: dict[bytes, int] = {}
    pairs = []
    for row in rows:
        gray = cv2.cvtColor(pixels[row], cv2.COLOR_RGB2GRAY)
        small = cv2.resize(gray, (9, 8), interpolation=cv2.INTER_AREA)
        key = np.packbits(small[:, 1:] > small[:, :-1]).tobytes()
        earlier = by_hash.get(key)
        if earlier is not None:
            difference = np.abs(pixels[row].astype(np.int16) - pixels[earlier]).mean()
            if difference <= 3:
                pairs.append((int(earlier), int(row)))
        by_hash[key] = int(row)
    return pairs
