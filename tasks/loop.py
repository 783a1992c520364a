"""The training loop: Keras's fit, made resumable, interruptible and watchful."""

import gc
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.checkpoint import Checkpoints, State
from tasks.data import Split
from tasks.errors import Interrupted, NightlyError
from tasks.progress import Advance, progress
from tasks.recipe import TrainParams
from tasks.signals import stop_requests
from tasks.standing import Outcome, Standing, numbered, where

#: At most this share of the time goes into writing checkpoints.
CHECKPOINT_SHARE = 0.02
#: Steps of an epoch before its mean loss is taken seriously.
STEPS_BEFORE_JUDGING = 100


@dataclass(frozen=True)
class Job:
    """What to train on, and how to build the learner for it.

    ``criterion`` is the Keras loss of (targets, probabilities). ``build`` takes how many doublings fewer than the
    model's there shall be, and the number of micro-batches, and returns a compiled tasks.learner.Learner; it is
    called again after running out of memory and when the resolution changes. ``steps_per_epoch`` is how many batches,
    drawn anew, lie between two validations; None: as many as the training split has.
    """

    training: Split
    validation: Split
    criterion: Any
    build: Callable[[int, int], Any]
    data_on_device: bool = False
    devices: int = 1
    steps_per_epoch: int | None = None


class Loop:
    """Trains to the end from wherever the checkpoints stand."""

    def __init__(self, job: Job, params: TrainParams, checkpoints: Checkpoints) -> None:
        self.job = job
        self.params = params
        self.checkpoints = checkpoints
        self.steps_per_epoch = job.steps_per_epoch or len(job.training.images) // params.batch_size
        self.standing = Standing()
        self._stop: list[int] = []
        self.limit = _hopeless(job)
        self._state: State | None = None
        self._saved = time.monotonic()

    def run(self) -> Outcome:
        """Train; return the history and the weights to keep.

        Raises:
            Interrupted: by SIGTERM or SIGINT, after a checkpoint was written.
            NightlyError: the loss is not finite or far worse than guessing, or not even one image fits the memory.
        """
        self._state = self.checkpoints.load()
        if self._state:
            self.standing = Standing.of(self._state)
            print(f"going on from the checkpoint after {self._position()}", flush=True)
        total = self.params.epochs * self.steps_per_epoch
        with stop_requests() as self._stop, progress("Training", total, "steps") as advance:
            advance(self.standing.epoch * self.steps_per_epoch + self.standing.step)
            while not self._over():
                try:
                    self._train_phase(advance)
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    self._halve(error)
        standing = self.standing
        best = self.params.keep == "best"
        kept = standing.rows[(standing.best_epoch if best else len(standing.rows)) - 1]
        assert self._state
        return Outcome(
            standing.rows,
            kept,
            standing.best_weights if best else numbered(self._state.arrays, "used"),
            standing.micro_batches,
        )

    def _over(self) -> bool:
        standing, params = self.standing, self.params
        waited = standing.epoch - max(standing.best_epoch, params.low_resolution_epochs)
        patience = params.early_stopping_epochs
        return standing.epoch >= params.epochs or (patience is not None and waited >= patience)

    def _train_phase(self, advance: Advance) -> None:
        """Train until the resolution changes or all is done."""
        from tasks.learner import TrainingBatches

        standing, params = self.standing, self.params
        low = standing.epoch < params.low_resolution_epochs
        learner = self.job.build(int(low), standing.micro_batches)
        learner.optimizer.build(learner.trainable_variables)
        if self._state:
            self._restore(learner)
        callback = self._watch(learner, advance)
        end = params.low_resolution_epochs if low else params.epochs

        def fit(until: int) -> None:
            batches = TrainingBatches(
                self.job.training,
                params.batch_size // standing.micro_batches,
                params.seed,
                epoch=standing.epoch,
                start=standing.step * standing.micro_batches,
                steps=self.steps_per_epoch * standing.micro_batches,
                rows_only=self.job.data_on_device,
            )
            learner.fit(
                batches, initial_epoch=standing.epoch, epochs=until, shuffle=False, verbose=0, callbacks=[callback]
            )

        if standing.step:  # the rest of the epoch in which the run was stopped
            fit(standing.epoch + 1)
        if standing.epoch < end and not self._over():
            fit(end)

    def _watch(self, learner: Any, advance: Advance) -> Any:
        import keras

        loop, standing, micro = self, self.standing, self.standing.micro_batches

        class Watch(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
                self.start = standing.step
                self.before = standing.seconds
                self.began = time.monotonic()
                self.last: dict | None = None
                if standing.step:
                    assert loop._state
                    _assign(learner.metrics_variables, numbered(loop._state.arrays, "metric"))

            def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
                # The loss that is looked at is the previous step's: waiting for this one's would leave the
                # device idle between steps.
                if self.last is not None:
                    loop._judge(self, float(self.last["loss"]))
                self.last = logs
                step, inside = divmod(batch + 1, micro)
                if inside:
                    return
                advance(self.start + step - standing.step)
                standing.step = self.start + step
                standing.seconds = self.before + time.monotonic() - self.began
                if standing.step < loop.steps_per_epoch and loop._due():
                    loop._judge(self, float(logs["loss"]))
                    loop._save(self.model)
                    # Writing is not training.
                    self.began = time.monotonic() - (standing.seconds - self.before)

            def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
                standing.seconds = self.before + time.monotonic() - self.began
                loop._judge(self, float(logs["loss"]))
                loop._end_epoch(self.model, logs)

        return Watch()

    def _due(self) -> bool:
        interval = max(self.params.checkpoint_seconds, self.checkpoints.seconds_to_write / CHECKPOINT_SHARE)
        return bool(self._stop) or time.monotonic() - self._saved >= interval

    def _end_epoch(self, learner: Any, logs: dict[str, float]) -> None:
        """Validate, write the epoch into the history, keep the best weights, save if it is time."""
        standing, params = self.standing, self.params
        rate = float(learner.optimizer.learning_rate)
        used = learner.weights_in_use()
        val_loss, val_accuracy = self._validate(learner, used)
        measured = {"loss": float(logs["loss"]), "accuracy": float(logs["accuracy"])}
        measured |= {"val_loss": val_loss, "val_accuracy": val_accuracy}
        if not np.isfinite(val_loss):
            self._give_up(f"the validation loss is {val_loss}", rate)
        standing.epoch += 1
        seconds = standing.seconds
        standing.rows.append(
            {
                "epoch": standing.epoch,
                **{name: round(value, 6) for name, value in measured.items()},
                "learning_rate": rate,
                "seconds": round(seconds, 2),
            }
        )
        # The model has the full resolution: an epoch at the low one is no candidate.
        if standing.epoch > params.low_resolution_epochs and val_loss < standing.best_loss:
            standing.best_loss, standing.best_epoch = val_loss, standing.epoch
            if params.keep == "best":
                standing.best_weights = used
        images = self.steps_per_epoch * params.batch_size
        print(f"{self._told(standing.rows[-1])}, {seconds:.1f} s, {images / seconds:,.0f} images/s", flush=True)
        standing.step, standing.seconds = 0, 0.0
        phase_ends = standing.epoch in (params.low_resolution_epochs, params.epochs)
        if self._over():
            learner.stop_training = True
        if self._due() or phase_ends or self._over():
            self._save(learner, used)

    def _told(self, row: dict[str, float]) -> str:
        return (
            f"epoch {row['epoch']}/{self.params.epochs}: loss {row['loss']:.4f}, accuracy {row['accuracy']:.4f}, "
            f"validation loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.4f}"
        )

    def _validate(self, learner: Any, used: list[np.ndarray]) -> tuple[float, float]:
        from tasks.learner import mean_loss, probabilities

        classifier = learner.classifier
        raw = classifier.get_weights() if learner.averages else None
        if raw is not None:
            classifier.set_weights(used)
        found = probabilities(classifier, self.job.validation.images, self._validation_batch())
        if raw is not None:
            classifier.set_weights(raw)
        targets = np.asarray(self.job.validation.targets)
        right = found.argmax(axis=1) == targets.argmax(axis=1)
        return mean_loss(self.job.criterion, targets, found), float(right.mean())

    def _validation_batch(self) -> int:
        return max(1, self.params.batch_size // self.standing.micro_batches)

    def _judge(self, callback: Any, loss: float) -> None:
        """Stop a run whose loss is not finite, or whose mean over the epoch so far is far worse than guessing."""
        if np.isfinite(loss):
            if self.standing.step < STEPS_BEFORE_JUDGING:
                return
            if loss <= self.limit:
                return
            what = f"the epoch's mean loss so far is {loss:.3g}, far worse than guessing (limit {self.limit:.3g})"
        else:
            what = f"the loss is {loss}"
        self._give_up(what, float(callback.model.optimizer.learning_rate))  # 'model' fetches it from the device

    def _give_up(self, what: str, rate: float) -> None:
        last = "none had been written"
        if self._state:
            last = f"{self.checkpoints.directory}, after {where(Standing.of(self._state), self.steps_per_epoch)}"
        raise NightlyError(
            f"training diverged in {self._position()}: {what}, at learning rate {rate:.3g}; the last good checkpoint: "
            f"{last}. Lower train.learning_rate or raise train.warmup_epochs"
        )

    def _position(self) -> str:
        return where(self.standing, self.steps_per_epoch)

    def _save(self, learner: Any, used: list[np.ndarray] | None = None) -> None:
        """Write a checkpoint; end the run here if a signal asked for it."""
        arrays = {}
        optimizer = learner.optimizer
        groups = {
            "learner": learner.state_variables(),
            "optimizer": [variable for variable in optimizer.variables if not _bookkeeping(optimizer, variable)],
            "metric": learner.metrics_variables,
        }
        for group, variables in groups.items():
            arrays |= {f"{group}:{number}": _value(variable) for number, variable in enumerate(variables)}
        arrays |= {f"best:{number}": array for number, array in enumerate(self.standing.best_weights)}
        if used is not None:
            arrays |= {f"used:{number}": array for number, array in enumerate(used)}
        arrays["steps:0"] = np.asarray(int(_value(optimizer.iterations)))
        self._state = State(arrays, self.standing.facts())
        self.checkpoints.save(self._state)
        self._saved = time.monotonic()
        if self._stop and not self._over():
            name = signal.Signals(self._stop[0]).name
            raise Interrupted(
                f"training stopped by {name} after {self._position()}; the same command goes on from there"
            )

    def _restore(self, learner: Any) -> None:
        assert self._state
        arrays, optimizer = self._state.arrays, learner.optimizer
        _assign(learner.state_variables(), numbered(arrays, "learner"))
        kept = [variable for variable in optimizer.variables if not _bookkeeping(optimizer, variable)]
        _assign(kept, numbered(arrays, "optimizer"))
        # It counts micro-batches, and their number may have changed.
        optimizer._iterations.assign(int(arrays["steps:0"]) * self.standing.micro_batches)

    def _halve(self, error: Exception) -> None:
        """Go back to the last checkpoint and compute each batch in twice as many parts."""
        import keras

        micro = self.standing.micro_batches * 2
        batch = self.params.batch_size
        if batch % (micro * self.job.devices):
            raise NightlyError(
                f"out of memory with {batch // (micro // 2)} images at a time, and train.batch_size {batch} cannot be "
                f"halved further: lower train.batch_size or model.doublings ({str(error).splitlines()[0][:200]})"
            ) from None
        self.standing = Standing.of(self._state) if self._state else Standing()
        self.standing.micro_batches = micro
        print(
            f"out of memory: going on from {self._position()} with {batch // micro} images at a time and gradients "
            f"accumulated over {micro}, so that a step still sees {batch}; BatchNorm sees {batch // micro}",
            flush=True,
        )
        error.__traceback__ = None  # it holds the arrays that filled the memory
        keras.utils.clear_session()
        gc.collect()


def _hopeless(job: Job) -> float:
    """Return the loss half-way from guessing evenly to being certain and wrong."""
    from tasks.learner import mean_loss

    truth = np.eye(job.training.targets.shape[1], dtype=np.float32)
    even, wrong = np.full_like(truth, 1 / len(truth)), np.roll(truth, 1, axis=1)
    return (mean_loss(job.criterion, truth, even) + mean_loss(job.criterion, truth, wrong)) / 2


def out_of_memory(error: BaseException) -> bool:
    """Tell whether ``error`` is how TensorFlow, JAX or Python say that memory is used up."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "ResourceExhaustedError"
        or "RESOURCE_EXHAUSTED" in str(error)
        or "Out of memory while trying to allocate" in str(error)
    )


def _bookkeeping(optimizer: Any, variable: Any) -> bool:
    """Tell whether an optimizer's variable follows from the rest: its counter, and gradients being accumulated."""
    return variable is optimizer._iterations or "gradient_sum" in variable.path


def _value(variable: Any) -> np.ndarray:
    from keras import ops

    return np.array(ops.convert_to_numpy(variable))


def _assign(variables: list[Any], arrays: list[np.ndarray]) -> None:
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
