"""What every test shares: a quiet CPU-only TensorFlow and no telemetry, set before anything is imported."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("NO_COLOR", "1")

import io
import json
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

# A shell's background job ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: the last ones to run should be short, so that no core waits long."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


COLORS = {"blue": (40, 60, 200), "green": (50, 190, 70), "red": (200, 50, 40)}
IMAGE_SIZE = 8


def colored_image(name: str, seed: int) -> np.ndarray:
    """Return a noisy uint8 (8, 8, 3) RGB image in the color that is its class."""
    noise = np.random.default_rng([seed, len(name)]).normal(0, 25, (IMAGE_SIZE, IMAGE_SIZE, 3))
    return np.clip(np.array(COLORS[name]) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The download stage's output for a source of three colors, 60 PNG images each."""
    from tasks.images import encode_png

    folder = tmp_path_factory.mktemp("raw")
    with tarfile.open(folder / "images.tar", "w") as archive:
        for name in COLORS:
            for seed in range(60):
                data = encode_png(colored_image(name, seed))
                info = tarfile.TarInfo(f"{name}/{seed}.png")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    facts = {"source": "folder", "format": "folder", "file": "images.tar", "bytes": 0, "sha256": ""}
    (folder / "source.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="session")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepare stage's output for the three colors."""
    from tasks.prepare import PrepareParams, prepare

    out = tmp_path_factory.mktemp("prepared") / "prepared"
    prepare(raw, Path("nowhere"), out, out.with_name("card.html"), PrepareParams(decode={"size": IMAGE_SIZE}))
    return out


@contextmanager
def small_network() -> Iterator[None]:
    """Put one small convolution where the backbone stands, so that training takes seconds."""
    import tasks.classifier

    def build(params, size):
        import keras

        images = keras.Input((size, size, 3))
        x = keras.layers.Conv2D(8, 3, strides=4)(images)
        x = keras.layers.BatchNormalization(momentum=params.batch_normalization_momentum)(x)
        return keras.Model(images, keras.layers.ReLU()(x), name="tiny")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.classifier, "_backbone", build)
        yield


@pytest.fixture
def tiny_backbone() -> Iterator[None]:
    """``small_network`` for the length of a test."""
    with small_network():
        yield


@pytest.fixture(scope="session")
def layers():
    """The module, which needs Keras."""
    from tasks import layers

    return layers


@pytest.fixture(scope="session")
def augmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training wants to see of the augment stage."""
    folder = tmp_path_factory.mktemp("augmented")
    (folder / "summary.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def candidate(prepared: Path, augmented: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The train stage's output: a small network trained on the three colors."""
    from tasks.augmentation import AugmentParams
    from tasks.classifier import ModelParams
    from tasks.recipe import TrainParams
    from tasks.train import train

    out = tmp_path_factory.mktemp("candidate") / "candidate"
    model = ModelParams(batch_normalization_momentum=0.5)
    params = TrainParams(epochs=8, batch_size=16, learning_rate=0.03)
    with small_network():
        train(prepared, augmented, out, params, model, AugmentParams())
    return out


@pytest.fixture(scope="session")
def exported(candidate: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export stage's output for that network."""
    from tasks.export import ExportParams, export

    out = tmp_path_factory.mktemp("exported") / "exported"
    export(candidate, prepared, out, ExportParams())
    return out


@pytest.fixture(scope="session")
def server():
    """One temporary Prefect server for all tests of a process, whose events go to the first one that it knows."""
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    import flows  # noqa: F401  telemetry off before Prefect is imported

    with (
        prefect_test_harness(server_startup_timeout=180),
        temporary_settings({PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True}),
    ):
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            url = str(client.api_url).rstrip("/")
        with temporary_settings({PREFECT_API_URL: url}):
            yield url
