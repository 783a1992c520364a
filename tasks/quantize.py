"""Post-training quantization to int8 with NNCF."""

import contextlib
import io
import logging
from typing import Any

import numpy as np

from tasks.engines import import_openvino

#: What int8 finds its ranges on; NNCF's own default.
CALIBRATION_IMAGES = 300


def calibration_sample(images: np.ndarray, seed: int) -> np.ndarray:
    """Return ``CALIBRATION_IMAGES`` of the images, or all if they are fewer; the same ones for the same seed."""
    count = min(CALIBRATION_IMAGES, len(images))
    return np.asarray(images[np.sort(np.random.default_rng(seed).choice(len(images), count, replace=False))])


def quantize(model: Any, images: np.ndarray) -> Any:
    """Return an ``openvino.Model`` computing in int8, its ranges found on uint8 ``images``, one by one.

    Symmetric ranges, NNCF's preset for networks with ReLU. The layer before a softmax stays in floating point: what
    is rounded there goes into the probabilities undamped. The same images give the same model.
    """
    import_openvino()
    import nncf

    # Not by nncf.set_log_level, which quiets every handler that anybody has given its logger, too.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    dataset = nncf.Dataset([image[np.newaxis] for image in images])
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(
            model,
            dataset,
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(images),
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(names=_logits(model)),
        )


def _logits(model: Any) -> list[str]:
    """Return the name of the matrix product that a softmax at the model's first output is taken of, if there is one."""
    node = model.outputs[0].get_node().input_value(0).get_node()
    if node.get_type_name() != "Softmax":
        return []
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    return [node.get_friendly_name()]
