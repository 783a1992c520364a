"""What is found out about the device, and that several of them train like one."""

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from tasks import device as device_module
from tasks.device import Device, data_parallel, normalize_whole_batches, prepare_device
from tasks.errors import EXIT_INTERRUPTED


def run(program: str, backend: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own: a backend is set up once in a process's life."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "KERAS_BACKEND": backend, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_cpu_is_told_by_its_name_and_its_matrix_unit(tmp_path, monkeypatch):
    monkeypatch.setattr(device_module, "CPU", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Cray 1\nflags\t\t: fpu avx512_bf16 vme\n")
    found = prepare_device()
    assert (found.kind, found.count, found.driver, found.memory_bytes) == ("cpu", 1, None, None)
    assert found.name.startswith("Cray 1, ")
    assert not found.fast_bfloat16
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu amx_bf16 vme\n")
    assert prepare_device().fast_bfloat16
    (tmp_path / "cpuinfo").unlink()
    assert prepare_device().name.startswith("CPU, ")


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023", "535.54.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57  Release Build  (dvs-builder)", "575.57"),
        ("GCC version: gcc 12.2.0", None),
    ],
)
def test_the_driver_is_read_from_the_kernel(tmp_path, monkeypatch, line, version):
    monkeypatch.setattr(device_module, "DRIVER", tmp_path / "version")
    assert device_module._nvidia_driver() is None
    (tmp_path / "version").write_text(f"{line}\n")
    assert device_module._nvidia_driver() == version


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((10, 0), True), ((0,), False)])
def test_a_gpu_computes_in_bfloat16_since_ampere(monkeypatch, capability, fast):
    for name in ("_tensorflow_gpus", "_jax_gpus"):
        monkeypatch.setattr(device_module, name, lambda *_: [("Cray 2", capability), ("Cray 3", (3, 5))])
    monkeypatch.setattr(device_module, "_take_turn", lambda: None)
    found = prepare_device(require_gpu=True)
    assert (found.kind, found.name, found.count, found.fast_bfloat16) == ("gpu", "Cray 2", 2, fast)


#: Takes its turn at the GPUs that the command line names, says so, and keeps them.
TURN = """
    import sys, time
    from tasks import device
    from tasks.errors import run_main

    def work():
        device._take_turn()
        print("computing", flush=True)
        time.sleep(60)

    device._gpu_ids = lambda: sys.argv[1:]
    run_main(work)
"""


@pytest.fixture
def turn(tmp_path, monkeypatch):
    """Start a process that takes its turn at some GPUs."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv(device_module.GPU_SHARED, raising=False)
    with contextlib.ExitStack() as stack:

        def start(*gpus: str, **environment: str) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", textwrap.dedent(TURN), *gpus],
                    env={**os.environ, **environment},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process

        yield start


@pytest.mark.slow
def test_two_processes_never_compute_on_the_same_gpu_and_a_killed_one_frees_it(turn):
    first = turn("a", "b")
    assert first.stdout.readline() == "computing\n"
    second = turn("c", "b")
    said = second.stdout.readline()
    assert said.startswith(f"waiting for the GPU: process {first.pid} on ")
    assert f"in {os.getcwd()}, since 20" in said
    assert turn("d").stdout.readline() == "computing\n"
    assert turn("a", **{device_module.GPU_SHARED: "1"}).stdout.readline() == "computing\n"
    assert select.select([second.stdout], [], [], 1)[0] == []
    first.kill()
    assert second.stdout.readline() == "computing\n"

    third = turn("c")
    assert f"process {second.pid} on " in third.stdout.readline()
    third.send_signal(signal.SIGINT)
    assert third.stdout.read().startswith(f"interrupted: stopped while it waited for the GPU: process {second.pid}")
    assert third.wait() == EXIT_INTERRUPTED


def test_only_who_computes_on_a_gpu_takes_a_turn(monkeypatch):
    turns = []
    monkeypatch.setattr(device_module, "_take_turn", lambda: turns.append(1))
    prepare_device()
    assert turns == []
    monkeypatch.setattr(device_module, "_tensorflow_gpus", lambda *_: [("Cray 2", (8, 0))])
    prepare_device(only_look=True)
    assert turns == []
    prepare_device()
    assert turns == [1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_without_the_gpu_that_is_required_it_ends_in_seconds(backend):
    program = """
        from tasks.device import prepare_device
        from tasks.errors import run_main
        run_main(lambda: prepare_device(require_gpu=True))
    """
    start = time.monotonic()
    done = run(program, backend)
    assert time.monotonic() - start < 60
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: train.require_gpu is true, but {backend} sees no GPU: check 'nvidia-smi'")


@pytest.mark.slow
def test_determinism_is_asked_of_tensorflow_and_of_xla():
    program = """
        import os
        from tasks.device import prepare_device
        prepare_device(deterministic=True)
        import tensorflow as tf
        print(os.environ["XLA_FLAGS"])
        try:
            tf.random.uniform(())
        except RuntimeError as error:
            print(error)
    """
    flags, refusal = run(program, "tensorflow", XLA_FLAGS="--xla_cpu_enable_fast_math=false").stdout.splitlines()
    assert flags == "--xla_cpu_enable_fast_math=false --xla_gpu_deterministic_ops=true"
    assert "determinism is enabled" in refusal


def test_a_single_device_is_left_alone():
    import keras

    single = Device("tensorflow", "cpu", "CPU", 1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    with data_parallel(single):
        normalize_whole_batches(model, single)
    assert keras.distribution.distribution() is None
    assert not model.layers[0].synchronized


#: Trains a small model that has all that is special about distribution, and prints what came of it.
TRAINING = """
    import json, os, sys
    devices, part = int(sys.argv[1]), sys.argv[2]
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        import tensorflow as tf
        [cpu] = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    else:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

    from tasks.device import data_parallel, normalize_whole_batches, prepare_device
    device = prepare_device()

    import keras
    import numpy as np
    from tasks.layers import RandomErasing

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            draw = np.random.default_rng(index)
            targets = np.eye(3, dtype="float32")[draw.integers(0, 3, 8)]
            return ((draw.integers(0, 256, (8, 8, 8, 3), dtype="uint8"), targets),)

    class Learner(keras.Model):
        def __init__(self):
            super().__init__()
            images = keras.Input((8, 8, 3), dtype="uint8")
            x = keras.layers.Conv2D(4, 3)(keras.layers.Rescaling(1 / 255)(images))
            x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.5)(x))
            x = keras.layers.GlobalAveragePooling2D()(x)
            self.classifier = keras.Model(images, keras.layers.Dense(3, activation="softmax")(x))
            self.erasing = RandomErasing(p=1.0 if part == "erasing" else 0.0, seed=3)
            self.criterion = keras.losses.CategoricalCrossentropy()

        def call(self, inputs, training=None):
            images, targets = inputs
            if training:  # Keras's own trial run under MirroredStrategy comes with float32 images
                images = self.erasing(images, training=True)
            return {"targets": targets, "probabilities": self.classifier(images, training=training)}

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return self.criterion(y_pred["targets"], y_pred["probabilities"])

    losses = []

    class Listen(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            losses.append(float(logs["loss"]))

    keras.utils.set_random_seed(1)
    with data_parallel(device):
        learner = Learner()
        if part != "own-shares":
            normalize_whole_batches(learner.classifier, device)
        learner.compile(
            optimizer=keras.optimizers.SGD(0.5, momentum=0.9, nesterov=True),
            jit_compile=device.backend == "jax",
        )
        learner.fit(Batches(), epochs=3, shuffle=False, verbose=0, callbacks=[Listen()])
        probabilities = learner.classifier.predict(Batches()[0][0][0], batch_size=8, verbose=0)
    weights = np.concatenate([weight.ravel() for weight in learner.classifier.get_weights()])
    kept = learner.classifier.weights[0].value
    copies = len(kept.devices()) if device.backend == "jax" else len(getattr(kept, "values", "1"))
    result = {"losses": losses, "weights": weights.tolist(), "probabilities": probabilities.ravel().tolist()}
    print(json.dumps(result | {"devices": [device.count, copies]}))
"""


@functools.cache
def train_on(devices: int, backend: str, part: str) -> dict[str, np.ndarray]:
    program = f"import sys; sys.argv = ['', '{devices}', '{part}']\n" + textwrap.dedent(TRAINING)
    done = run(program, backend, TF_CPP_MIN_LOG_LEVEL="3")
    assert done.returncode == 0, done.stderr
    found = {name: np.array(values) for name, values in json.loads(done.stdout.splitlines()[-1]).items()}
    assert found["devices"].tolist() == [devices, devices]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "part"), [("tensorflow", "plain"), ("jax", "erasing")])
def test_two_devices_train_like_one(backend, part):
    one, two = train_on(1, backend, part), train_on(2, backend, part)
    for name in ("losses", "weights", "probabilities"):
        np.testing.assert_allclose(two[name], one[name], atol=1e-4)


@pytest.mark.slow
def test_random_layers_work_on_tensorflows_replicas():
    """They draw per replica there, so that the numbers are others than on one device."""
    found = train_on(2, "tensorflow", "erasing")
    assert np.isfinite(found["weights"]).all()
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.slow
def test_left_to_itself_tensorflow_normalizes_each_share_on_its_own():
    """Fails when Keras's default changes, and normalize_whole_batches can go."""
    one, two = train_on(1, "tensorflow", "plain"), train_on(2, "tensorflow", "own-shares")
    assert np.abs(one["weights"] - two["weights"]).max() > 0.01


@pytest.mark.parametrize(("keep", "few"), [(False, False), (True, True)])
def test_freed_memory_is_kept_and_not_fetched_again_page_by_page(keep, few):
    program = f"""
        import resource
        from tasks.device import keep_freed_memory
        if {keep}:
            keep_freed_memory()
        for _ in range(3):
            block = bytearray(64 << 20)
            del block
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            block = bytearray(64 << 20)
            del block
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 1000) is few
