"""The model bundle: a directory with everything that prediction needs, and nothing it has to guess.

``model.keras`` takes raw ``uint8`` RGB images and gives class probabilities; ``bundle.json`` says how the
pixels were decoded, what the classes are called, where the model came from and how far each engine agrees.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field, ValidationError

from tasks.errors import NightlyError
from tasks.files import read_json, write_json
from tasks.images import DecodePolicy
from tasks.params import Section

FORMAT = 1
MODEL_FILE = "model.keras"
FACTS_FILE = "bundle.json"
#: Drift statistics of the validation split, see ``tasks.tally.Tally``.
REFERENCE_FILE = "reference.npz"


class Limits(Section):
    """How far an engine may be from Keras in float32 and still be offered for prediction.

    Attributes:
        minimum_agreement: share of images that must get the same label.
        maximum_loss: accuracy, 0..1, that may be lost.
    """

    minimum_agreement: float = Field(0.995, ge=0, le=1)
    maximum_loss: float = Field(0.003, ge=0, le=1)


class Bundle(Section):
    """What ``bundle.json`` holds, and the directory it was read from.

    Attributes:
        id: the first 12 hex digits of a SHA-256 over the weights and all that changes a prediction, so the
            same model always has the same id.
        classes: class names in the order of the model's outputs.
        normalization: what the layer inside the model does: ``mode``, ``mean``, ``std``, ``channel_order``.
        training: device, precision, seconds and the like; for people, never compared.
        engines: by engine name what ``tasks.choice.compare`` found on the validation split, ``images_per_second``,
            and whether it is ``offered`` for prediction; in the registry also under ``test`` what was found there.
        limits: what ``offered`` was decided by.
        machine: the one that the speeds were measured on, see ``tasks.choice.this_machine``.
        temperature: what ``tasks.calibration`` divides the logits by; 1 before ``export``.
        threshold: the smallest confidence, after that, at which a prediction is accepted; null before ``export``.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    path: Path
    format: int
    id: str
    created: str
    classes: list[str]
    decode: DecodePolicy
    normalization: dict[str, Any]
    parameters: dict[str, Any]
    data_digest: str
    test_digest: str
    libraries: dict[str, str]
    training: dict[str, Any]
    engines: dict[str, dict[str, Any]] = Field(default_factory=dict)
    limits: Limits = Limits()
    machine: dict[str, Any] = Field(default_factory=dict)
    temperature: float = Field(1.0, gt=0)
    threshold: float | None = None

    @property
    def model_file(self) -> Path:
        return self.path / MODEL_FILE

    @property
    def openvino_file(self) -> Path:
        return self.engine_file("openvino-float32")

    @property
    def reference_file(self) -> Path:
        return self.path / REFERENCE_FILE

    def engine_file(self, name: str) -> Path:
        """Return the model file of an OpenVINO engine; float32 and bfloat16 share one."""
        folder = name if name == "openvino-int8" else "openvino"
        return self.path / "engines" / folder / "model.xml"

    def save(self) -> None:
        """Write ``bundle.json`` into the bundle's directory."""
        write_json(self.path / FACTS_FILE, self.model_dump(mode="json", exclude={"path"}))


def load_bundle(path: Path) -> Bundle:
    """Read the facts of the bundle at ``path``.

    Raises:
        NightlyError: it is no bundle, an incomplete one, or one of a newer format.
    """
    facts_file = path / FACTS_FILE
    if not facts_file.is_file():
        raise NightlyError(f"{path} is no model bundle: it has no {FACTS_FILE}")
    try:
        facts = read_json(facts_file)
        if facts.get("format") != FORMAT:
            raise NightlyError(f"{facts_file}: format must be {FORMAT}, but is {facts.get('format')!r}")
        bundle = Bundle(path=path, **facts)
    except (ValueError, ValidationError, AttributeError, TypeError) as error:
        raise NightlyError(f"{facts_file} is damaged: {' '.join(str(error).split())}") from None
    if not bundle.model_file.is_file():
        raise NightlyError(f"{path} is incomplete: it has no {MODEL_FILE}")
    return bundle


def model_id(weights: list[np.ndarray], classes: list[str], decode: DecodePolicy, normalization: dict[str, Any]) -> str:
    """Return 12 hex digits that are the same for the same predictions: weights, classes, preprocessing."""
    digest = hashlib.sha256(repr((classes, decode.model_dump(), sorted(normalization.items()))).encode())
    for array in weights:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:12]


def load_keras_model(bundle: Bundle) -> Any:
    """Load the bundle's Keras model in safe mode, for inference.

    Raises:
        NightlyError: the file is damaged or holds a layer this software does not know.
    """
    import keras

    import tasks.layers  # noqa: F401  registers the layers that the file names

    try:
        return keras.saving.load_model(bundle.model_file, compile=False, safe_mode=True)
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise NightlyError(f"{bundle.model_file} cannot be loaded: {str(error).splitlines()[0]}") from None
