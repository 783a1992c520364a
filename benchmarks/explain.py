"""Do the heat maps of ``nightly explain`` show what a model decides by? A deletion test, as in Petsiuk et al. 2018.

``.venv/bin/python benchmarks/explain.py [--model BUNDLE] [--prepared DIRECTORY] [--images 1500]``

By default the model in service and its data, so run ``nightly retrain`` first. Of test images drawn at random, those
that the model gets right are explained. The hottest quarter of each one's pixels is blurred, and the probability of its
class measured again; so are others of the same area: the coldest quarter; the hottest one moved by chance, round the
edges; that of the next image, which keeps a map's shape and bias for the center; a square at a random place; random
pixels.

Blurred and not painted over, because holes are patterns themselves: with gray in their place, scattered pixels leave as
little of the probability as the hottest quarter (ResNet-20 on CIFAR-10: 0.34 and 0.33).

Prints one JSON object: the mean probability that each leaves, and the share of images in which the hottest quarter
leaves less than the other one. Exits with 1 if that is not more than half of them for one of the first three, which are
made of heat maps as well; how much a square or single pixels hide is another matter.
"""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np

from tasks.bundle import load_bundle, load_keras_model
from tasks.calibration import apply_temperature
from tasks.data import load_split
from tasks.device import prepare_device
from tasks.engines import KERAS_BATCH, KerasEngine
from tasks.heat import GradCam
from tasks.registry import champion_path

QUARTER = 0.25
#: Of the blur, as a share of the image's width: 4 px of 32.
SIGMA = 1 / 8


def hottest(heat: np.ndarray) -> np.ndarray:
    """Return a mask of a quarter of the pixels of each map (N, H, W); equally hot ones by chance."""
    ties = np.random.default_rng(0).permuted(np.tile(np.arange(heat[0].size), (len(heat), 1)), axis=1)
    order = np.lexsort((ties, -heat.reshape(len(heat), -1)), axis=1)
    mask = np.zeros(order.shape, bool)
    np.put_along_axis(mask, order[:, : round(QUARTER * order.shape[1])], True, axis=1)
    return mask.reshape(heat.shape)


def squares(shape: tuple[int, int, int]) -> np.ndarray:
    """Return a mask (N, H, W) with one square of a quarter of the area at a random place of each image."""
    count, height, width = shape
    mask, random = np.zeros(shape, bool), np.random.default_rng(1)
    tall, wide = (round(QUARTER**0.5 * side) for side in (height, width))
    tops, lefts = random.integers(0, height - tall + 1, count), random.integers(0, width - wide + 1, count)
    for image, top, left in zip(mask, tops, lefts, strict=True):
        image[top : top + tall, left : left + wide] = True
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prepared", type=Path, default=Path("data/prepared"))
    parser.add_argument("--images", type=int, default=1500)
    options = parser.parse_args()
    prepare_device()
    bundle = load_bundle(options.model or champion_path(Path("models")))
    network = load_keras_model(bundle)
    engine, gradcam = KerasEngine(network, KERAS_BATCH), GradCam(network)
    test = load_split(options.prepared, "test")
    images, targets = test.images, test.targets.argmax(axis=1)
    # Not the first ones: a source's images may stand class by class.
    drawn = np.sort(np.random.default_rng(0).permutation(len(images))[: options.images])
    images, targets = images[drawn], targets[drawn]
    right = np.flatnonzero(engine.probabilities(images).argmax(axis=1) == targets)
    images, targets = images[right], targets[right]

    def probability(pictures: np.ndarray) -> np.ndarray:
        found = apply_temperature(engine.probabilities(pictures), bundle.temperature)
        return found[np.arange(len(found)), targets]

    heat = gradcam.heat(images, targets)
    random, size = np.random.default_rng(1), heat.shape[1]
    hot = hottest(heat)
    masks = {
        "hottest": hot,
        "coldest": hottest(-heat),
        "moved": np.stack([np.roll(mask, random.integers(0, size, 2), axis=(0, 1)) for mask in hot]),
        "of_the_next_image": np.roll(hot, -1, axis=0),
        "square": squares(heat.shape),
        "random_pixels": hottest(random.random(heat.shape)),
    }
    blurred = np.stack([cv2.GaussianBlur(image, (0, 0), SIGMA * size) for image in images])
    left = {name: probability(np.where(mask[..., None], blurred, images)) for name, mask in masks.items()}
    others = [name for name in masks if name != "hottest"]
    less = {name: round(float((left["hottest"] < left[name]).mean()), 4) for name in others}
    facts = {
        "model_id": bundle.id,
        "backbone": bundle.parameters["model"]["backbone"],
        "cells": gradcam.cells,
        "images": len(images),
        "nothing_hot": int((~heat.any(axis=(1, 2))).sum()),
        "probability": round(float(probability(images).mean()), 4),
        "probability_left": {name: round(float(found.mean()), 4) for name, found in left.items()},
        "hottest_leaves_less_than": less,
    }
    print(json.dumps(facts, indent=2))
    sys.exit(min(less[name] for name in ("coldest", "moved", "of_the_next_image")) <= 0.5)


if __name__ == "__main__":
    main()
