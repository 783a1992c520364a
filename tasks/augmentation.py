"""The augmentation: its parameters, and the layers that training puts in front of the network."""

from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from tasks.errors import NightlyError
from tasks.params import Section


class EraserParams(Section):
    """The random eraser (Zhong et al. 2017, arXiv 1708.04896), by the names of the notebook's function.

    Attributes:
        p: share of the images that are erased; 0 turns it off.
        s_l: smallest share of the image's area.
        s_h: largest share of it.
        r_1: smallest height / width of the rectangle.
        r_2: largest height / width.
        v_l: smallest gray that it is filled with, a pixel value.
        v_h: largest one.
        pixel_level: fill it with noise instead, each pixel and channel with a value of its own.
    """

    p: float = Field(0.25, ge=0, le=1)
    s_l: float = Field(0.02, gt=0, le=1)
    s_h: float = Field(0.4, gt=0, le=1, validate_default=True)
    r_1: float = Field(0.3, gt=0)
    r_2: float = Field(1 / 0.3, gt=0, validate_default=True)
    v_l: float = Field(0, ge=0, le=255)
    v_h: float = Field(255, ge=0, le=255, validate_default=True)
    pixel_level: bool = False

    @field_validator("s_h", "r_2", "v_h")
    @classmethod
    def _in_order(cls, value: float, info: ValidationInfo) -> float:
        lower = {"s_h": "s_l", "r_2": "r_1", "v_h": "v_l"}[info.field_name or ""]
        # A lower bound that is wrong itself is missing here, and reported on its own.
        if value < info.data.get(lower, value):
            raise ValueError(f"must be at least {lower} ({info.data[lower]:g})")
        return value


class AugmentParams(Section):
    """What happens to training images, in this order; a class must survive it (a mirrored digit is none).

    Attributes:
        flip_horizontal: mirror half of the images left to right.
        flip_vertical: turn half of them upside down.
        shift_pixels: shifts are uniform in minus to plus so many pixels on both axes.
        shift_fill: what comes in over the edge: its last pixel repeated (``edge``), the mirrored image (``reflect``:
            good for photographs, but it brings bits of a digit's strokes back in), or black (``constant``).
        eraser: a rectangle of each chosen image is filled.
        copies: augmented copies of the training split, written for training on cached features, which a frozen backbone
            computes once; each costs as much disk as the split, and as much computing of features.
    """

    flip_horizontal: bool = False
    flip_vertical: bool = False
    shift_pixels: int = Field(1, ge=0)
    shift_fill: Literal["edge", "reflect", "constant"] = "edge"
    eraser: EraserParams = EraserParams()
    copies: int = Field(0, ge=0)


def build_augmentation(params: AugmentParams, image_shape: tuple[int, int, int], seed: int) -> Any:
    """Return the augmentation as a Keras model, uint8 ``(N, H, W, 3)`` in and out, active in training only.

    Each layer draws from a stream of its own, derived from ``seed``; Keras's global random state is not used.

    Raises:
        NightlyError: a shift as large as the image, or an eraser whose rectangles never fit into it.
    """
    import keras

    from tasks.layers import RandomErasing, RandomFlip, RandomShift

    smallest = min(image_shape[:2])
    if params.shift_pixels >= smallest:
        raise NightlyError(
            f"augment.shift_pixels must be below the image's {smallest} pixels, but is {params.shift_pixels}"
        )
    seeds = [int(state) for state in np.random.SeedSequence(seed).generate_state(3, np.uint32) >> 1]
    stages: list[Any] = []
    if params.flip_horizontal or params.flip_vertical:
        stages.append(RandomFlip(params.flip_horizontal, params.flip_vertical, seed=seeds[0]))
    if params.shift_pixels:
        stages.append(RandomShift(params.shift_pixels, params.shift_fill, seed=seeds[1]))
    if params.eraser.p:
        stages.append(RandomErasing(**params.eraser.model_dump(), seed=seeds[2], name="eraser"))
    stages = stages or [keras.layers.Identity()]
    try:
        return keras.Sequential([keras.Input(image_shape, dtype="uint8"), *stages], name="augmentation")
    except ValueError as error:
        raise NightlyError(f"augment.eraser: {error}") from None
