"""The loop, on a network of three layers: resuming, signals, memory, divergence, averaging, resolutions."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tasks import loop as loop_module
from tasks.checkpoint import Checkpoints
from tasks.data import Split
from tasks.errors import Interrupted, NightlyError
from tasks.loop import Job, Loop, out_of_memory
from tasks.optimizers import make_loss, make_optimizer
from tasks.recipe import TrainParams

PARAMS = TrainParams(
    epochs=4, batch_size=16, optimizer="sgd", learning_rate=0.05, warmup_epochs=1, checkpoint_seconds=0, seed=3
)


def make_split(count: int, seed: int) -> Split:
    """Three classes of 8 px noise, each brightest in another channel."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = random.integers(0, 120, (count, 8, 8, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 90
    return Split(images, np.eye(3, dtype=np.float32)[labels])


TRAINING, VALIDATION = make_split(90, 1), make_split(20, 2)


def build(params: TrainParams, *, norm: bool = True, mixes: bool = True, resident: bool = False):
    """Return what a Job wants: a small learner with all that has state (seeds, dropout, BatchNorm, averages)."""

    def make(lower: int, parts: int):
        import keras

        from tasks.layers import RandomErasing, RandomFlip
        from tasks.learner import Learner

        keras.utils.set_random_seed(params.seed)
        images = keras.Input((8, 8, 3), dtype="uint8")
        x = keras.layers.Rescaling(1 / 255)(images)
        for _ in range(1 - lower):
            x = keras.layers.UpSampling2D(2)(x)
        x = keras.layers.Conv2D(4, 3, strides=2)(x)
        if norm:
            x = keras.layers.BatchNormalization(momentum=0.8)(x)
        x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x))
        if norm:
            x = keras.layers.Dropout(0.1)(x)
        classifier = keras.Model(images, keras.layers.Dense(3, activation="softmax")(x))
        augmentation = keras.Sequential([keras.Input((8, 8, 3), dtype="uint8")])
        if mixes:
            augmentation.add(RandomFlip(seed=1))
            augmentation.add(RandomErasing(seed=2))
        mix = None
        if mixes:
            from tasks.mixing import Mix

            mix = Mix(0.2, 1.0, seed=4)
        store = TRAINING if resident else None
        learner = Learner(
            classifier, augmentation, mix, make_loss(params), ema_momentum=params.ema_momentum, resident=store
        )
        learner.compile(
            optimizer=make_optimizer(params, 5, accumulation=parts), jit_compile=keras.backend.backend() == "jax"
        )
        classifier.compile(jit_compile=keras.backend.backend() == "jax")
        return learner

    return make


def run(folder: Path, params: TrainParams = PARAMS, training: Split = TRAINING, **options):
    job = Job(training, VALIDATION, make_loss(params), build(params, **options), options.get("resident", False))
    return Loop(job, params, Checkpoints(folder, "run")).run()


def same(first, second, *, exact: bool = True) -> None:
    for one, other in zip(first.weights, second.weights, strict=True):
        if exact:
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, atol=1e-5)
    for one, other in zip(first.rows, second.rows, strict=True):
        assert {**one, "seconds": 0} == pytest.approx({**other, "seconds": 0}, abs=1e-5)


@pytest.fixture(autouse=True)
def a_checkpoint_after_every_step(monkeypatch):
    monkeypatch.setattr(loop_module, "CHECKPOINT_SHARE", 1e9)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    params = PARAMS.changed(ema_momentum=0.9)
    return run(tmp_path_factory.mktemp("unbroken"), params)


class Killed(BaseException):
    """Stands for SIGKILL: nothing runs after it."""


def kill_after(monkeypatch, count: int, *, while_writing: bool = False) -> None:
    """Let the ``count``-th checkpoint be the last thing that happens, or be cut off in the middle."""
    save = Checkpoints.save
    calls = []

    def counted(self, state):
        calls.append(1)
        if len(calls) == count and while_writing:
            slot = self.directory / ("a.npz" if (self._written + 1) % 2 == 0 else "b.npz")
            slot.with_name(f".{slot.name}.partial-999999999").write_bytes(b"half a checkpoint")
            raise Killed
        save(self, state)
        if len(calls) == count:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", counted)


@pytest.mark.parametrize("count", [1, 3, 5, 6, 12, 20])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(unbroken, tmp_path, monkeypatch, count):
    params = PARAMS.changed(ema_momentum=0.9)
    with monkeypatch.context() as patch:
        kill_after(patch, count)
        with pytest.raises(Killed):
            run(tmp_path, params)
    same(run(tmp_path, params), unbroken)


def test_a_run_killed_in_mid_checkpoint_goes_on_from_the_one_before(unbroken, tmp_path, monkeypatch, capsys):
    params = PARAMS.changed(ema_momentum=0.9)
    with monkeypatch.context() as patch:
        kill_after(patch, 8, while_writing=True)
        with pytest.raises(Killed):
            run(tmp_path, params)
    capsys.readouterr()
    same(run(tmp_path, params), unbroken)
    assert "going on from the checkpoint after epoch 2, step 2 of 5" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob(".*")), "what the killed run had half written is gone"


def test_a_run_killed_after_its_last_checkpoint_only_hands_out_its_result(unbroken, tmp_path):
    params = PARAMS.changed(ema_momentum=0.9)
    run(tmp_path, params)
    job = Job(TRAINING, VALIDATION, make_loss(params), lambda *_: pytest.fail("there is nothing left to train"))
    same(Loop(job, params, Checkpoints(tmp_path, "run")).run(), unbroken)


def test_a_signal_ends_the_run_after_the_step_and_the_rest_equals_an_unbroken_run(unbroken, tmp_path, monkeypatch):
    params = PARAMS.changed(ema_momentum=0.9, checkpoint_seconds=1e9)
    ended = loop_module.Loop._end_epoch

    def end_epoch(self, learner, logs):
        ended(self, learner, logs)
        if self.standing.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Loop, "_end_epoch", end_epoch)
        with pytest.raises(Interrupted, match=r"SIGTERM after epoch 3, step 1 of 5; the same command goes on"):
            run(tmp_path, params)
    assert signal.getsignal(signal.SIGTERM) is before
    same(run(tmp_path, params), unbroken)


def test_early_stopping_counts_on_over_a_kill(tmp_path, monkeypatch):
    params = PARAMS.changed(epochs=12, learning_rate=1e-12, early_stopping_epochs=3, keep="last", warmup_epochs=0)
    whole = run(tmp_path / "whole", params, norm=False)
    assert len(whole.rows) == 4
    with monkeypatch.context() as patch:
        kill_after(patch, 5 * (len(whole.rows) - 1))
        with pytest.raises(Killed):
            run(tmp_path / "cut", params, norm=False)
    same(run(tmp_path / "cut", params, norm=False), whole)


def test_the_best_epochs_weights_survive_a_kill(tmp_path, monkeypatch):
    params = PARAMS.changed(learning_rate=0.5, epochs=6, seed=5)
    whole = run(tmp_path / "whole", params, mixes=False)
    losses = [row["val_loss"] for row in whole.rows]
    assert whole.kept["val_loss"] == min(losses)
    with monkeypatch.context() as patch:
        kill_after(patch, 26)
        with pytest.raises(Killed):
            run(tmp_path / "cut", params, mixes=False)
    same(run(tmp_path / "cut", params, mixes=False), whole)


def test_images_on_the_device_give_what_images_in_host_memory_give(unbroken, tmp_path):
    same(run(tmp_path, PARAMS.changed(ema_momentum=0.9), resident=True), unbroken, exact=False)


def test_checkpoints_do_not_hold_the_images_on_the_device(tmp_path):
    run(tmp_path, PARAMS.changed(epochs=2), resident=True)
    state = Checkpoints(tmp_path, "run").load()
    assert state
    assert max(array.size for array in state.arrays.values()) < TRAINING.images.size


def test_low_resolution_comes_first_and_is_never_the_kept_epoch(tmp_path, monkeypatch):
    params = PARAMS.changed(epochs=5, low_resolution_epochs=3, learning_rate=1e-9)
    whole = run(tmp_path / "whole", params, mixes=False)
    assert whole.kept["epoch"] in (4, 5)
    with monkeypatch.context() as patch:
        kill_after(patch, 15)  # exactly between the two resolutions
        with pytest.raises(Killed):
            run(tmp_path / "cut", params, mixes=False)
    same(run(tmp_path / "cut", params, mixes=False), whole)


class Full(Exception):
    """What a backend raises when memory is used up."""

    def __init__(self) -> None:
        super().__init__("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")


def memory_for(monkeypatch, images: int) -> None:
    from tasks.learner import TrainingBatches

    give = TrainingBatches.__getitem__

    def limited(self, index):
        if self._batch_size > images:
            raise Full
        return give(self, index)

    monkeypatch.setattr(TrainingBatches, "__getitem__", limited)


def test_out_of_memory_halves_the_batch_and_keeps_the_recipe(tmp_path, monkeypatch, capsys):
    options = {"norm": False, "mixes": False}  # without BatchNorm the parts add up to the same steps
    whole = run(tmp_path / "whole", PARAMS, **options)
    with monkeypatch.context() as patch:
        memory_for(patch, 4)
        parts = run(tmp_path / "parts", PARAMS, **options)
    assert parts.micro_batches == 4
    same(parts, whole, exact=False)
    said = capsys.readouterr().out
    assert "out of memory: going on from epoch 1, step 0 of 5 with 8 images at a time" in said
    assert "with 4 images at a time and gradients accumulated over 4, so that a step still sees 16" in said


def test_running_out_of_memory_later_goes_on_from_the_checkpoint(tmp_path, monkeypatch):
    options = {"norm": False, "mixes": False}
    whole = run(tmp_path / "whole", PARAMS, **options)
    with monkeypatch.context() as patch:
        kill_after(patch, 7)
        with pytest.raises(Killed):
            run(tmp_path / "parts", PARAMS, **options)
    with monkeypatch.context() as patch:
        memory_for(patch, 8)
        parts = run(tmp_path / "parts", PARAMS, **options)
    assert parts.micro_batches == 2
    same(parts, whole, exact=False)


def test_a_run_that_was_halved_stays_halved_after_a_kill(tmp_path, monkeypatch):
    options = {"norm": False, "mixes": False}
    whole = run(tmp_path / "whole", PARAMS, **options)
    with monkeypatch.context() as patch:
        memory_for(patch, 8)
        kill_after(patch, 7)
        with pytest.raises(Killed):
            run(tmp_path / "parts", PARAMS, **options)
    parts = run(tmp_path / "parts", PARAMS, **options)
    assert parts.micro_batches == 2
    same(parts, whole, exact=False)


def test_too_little_memory_for_anything_gives_up_in_plain_words(tmp_path, monkeypatch):
    memory_for(monkeypatch, 0)
    with pytest.raises(NightlyError, match=r"out of memory with 1 images at a time.*lower train\.batch_size"):
        run(tmp_path)


def test_other_errors_are_not_taken_for_memory(tmp_path):
    def broken(lower, parts):
        raise ValueError("a defect")

    job = Job(TRAINING, VALIDATION, make_loss(PARAMS), broken)
    with pytest.raises(ValueError, match="a defect"):
        Loop(job, PARAMS, Checkpoints(tmp_path, "run")).run()
    assert out_of_memory(MemoryError())
    assert not out_of_memory(ValueError("RESOURCE"))


def test_a_loss_that_is_not_finite_stops_at_the_step(tmp_path):
    params = PARAMS.changed(learning_rate=1e38, schedule="constant", warmup_epochs=0)
    with pytest.raises(NightlyError, match=r"epoch 1, step \d of 5: the loss is nan, at learning rate 1e\+38"):
        run(tmp_path, params, mixes=False)


def test_divergence_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 7)
        with pytest.raises(Killed):
            run(tmp_path)
    from tasks.learner import Learner

    call = Learner.call

    def spoiled(self, inputs, training=None):
        found = call(self, inputs, training=training)
        return {**found, "probabilities": found["probabilities"] * (float("nan") if training else 1)}

    monkeypatch.setattr(Learner, "call", spoiled)
    with pytest.raises(NightlyError, match=r"last good checkpoint: .*run, after epoch 2, step 2 of 5"):
        run(tmp_path)


def test_a_finite_loss_far_worse_than_guessing_stops_too(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "STEPS_BEFORE_JUDGING", 3)
    from tasks.learner import Learner

    call = Learner.call

    def wrong(self, inputs, training=None):
        from keras import ops

        found = call(self, inputs, training=training)
        return {**found, "probabilities": ops.roll(found["targets"], 1, axis=1) + 0 * found["probabilities"]}

    monkeypatch.setattr(Learner, "call", wrong)
    with pytest.raises(NightlyError, match=r"step \d of 5: the epoch's mean loss so far is 1\d.*worse than guessing"):
        run(tmp_path, mixes=False)


def test_checkpoints_cost_a_small_share_of_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "CHECKPOINT_SHARE", 0.02)
    saves = []
    save = Checkpoints.save

    def slow(self, state):
        save(self, state)
        saves.append(1)
        self.seconds_to_write = 1000.0

    monkeypatch.setattr(Checkpoints, "save", slow)
    run(tmp_path)
    assert len(saves) == 2, "one, after which the next would come too early, and one at the end"


CHILD = """
    import sys, time
    from pathlib import Path
    from tasks.device import prepare_device
    prepare_device()
    from tests import test_loop
    test_loop.loop_module.CHECKPOINT_SHARE = 1e9
    save = test_loop.Checkpoints.save
    def told(self, state):
        save(self, state)
        print("saved", flush=True)
        time.sleep(0.05)
    test_loop.Checkpoints.save = told
    found = test_loop.run(Path(sys.argv[1]), test_loop.PARAMS.changed(ema_momentum=0.9))
    test_loop.np.savez(sys.argv[2], *found.weights)
    Path(sys.argv[2]).with_suffix(".json").write_text(test_loop.json.dumps(found.rows))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_real_kill_at_any_moment(tmp_path, backend):
    """SIGKILL to a process of its own after a few checkpoints, three times, then to the end; on both backends."""

    def start(name: str, folder: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path / folder), str(tmp_path / f"{name}.npz")]
        environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONWARNINGS": "ignore"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def to_the_end(name: str) -> None:
        with start(name, name) as child:
            said, _ = child.communicate(timeout=240)
        assert child.returncode == 0, said

    to_the_end("whole")
    for saves in (2, 5, 7):
        with start("cut", "cut") as child:
            assert child.stdout
            for _ in range(saves):
                while child.stdout.readline() != "saved\n":
                    assert child.poll() is None
            child.kill()
    to_the_end("cut")
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "cut.npz") as cut:
        for name in whole.files:
            np.testing.assert_allclose(cut[name], whole[name], atol=1e-6)
    histories = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "cut")]
    for one, other in zip(*histories, strict=True):
        assert {**one, "seconds": 0} == pytest.approx({**other, "seconds": 0}, abs=1e-5)
