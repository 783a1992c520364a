"""One training of the depth study, from the prepared data to its row of figures."""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from tasks.augmentation import AugmentParams, build_augmentation
from tasks.checkpoint import Checkpoints
from tasks.classifier import ModelParams, build_classifier
from tasks.data import Split, load_split
from tasks.device import data_parallel, keep_freed_memory, normalize_whole_batches, prepare_device
from tasks.errors import NightlyError, run_main
from tasks.files import read_json, write_json
from tasks.loop import Job, Loop
from tasks.machine import choose, describe
from tasks.metrics import top_k_error
from tasks.optimizers import make_loss, make_optimizer
from tasks.params import read_section
from tasks.resnet import multiply_adds
from tasks.study import VGG, StudyParams, Trial, depth, doublings, family, identity, recipe, trials

EVALUATION_BATCH = 250


class StudyLoop(Loop):
    """The training loop, in the paper's words."""

    def _told(self, row: dict[str, float]) -> str:
        where = self._iteration(row["epoch"] * self.steps_per_epoch)
        return f"{where}: training error {1 - row['accuracy']:.2%}, test error {1 - row['val_accuracy']:.2%}"

    def _position(self) -> str:
        return self._iteration(self.standing.epoch * self.steps_per_epoch + self.standing.step)

    def _iteration(self, done: int) -> str:
        return f"iteration {done:,} of {self.params.epochs * self.steps_per_epoch:,}"


def build_network(network: str, params: StudyParams, size: int, classes: int, normalization: dict[str, Any]) -> Any:
    """Return a Keras model from uint8 (N, size, size, 3) RGB to float32 (N, classes) probabilities.

    The VGG networks are those of keras.applications without their three dense layers, which at 32 px would look at
    a single place; pooling and one dense layer follow, as in the residual networks. So do the random weights, since
    with Keras's Glorot it is still guessing after 200 iterations.

    Raises:
        NightlyError: the images are too small for the network.
    """
    if network not in VGG:
        model = ModelParams(
            backbone=network,
            doublings=doublings(network, params),
            batch_normalization_momentum=params.batch_normalization_momentum,
        )
        return build_classifier(model, size, classes, normalization)
    import keras
    from keras import layers

    from tasks.layers import Normalize

    if size < 32:
        raise NightlyError(f"{network} needs images of 32 px or more, but prepare.decode.size is {size}")
    backbone = {"vgg16": keras.applications.VGG16, "vgg19": keras.applications.VGG19}[network]
    images = keras.Input((size, size, 3), dtype="uint8", name="images")
    x = Normalize(
        mean=normalization["mean"],
        std=normalization["std"],
        reverse_channels=normalization["channel_order"] == "BGR",
        name="normalize",
    )(images)
    convolutions = backbone(include_top=False, weights=None, input_shape=(size, size, 3), name=network)
    for layer in convolutions.layers:
        if isinstance(layer, layers.Conv2D):
            layer.kernel.assign(keras.initializers.HeNormal()(layer.kernel.shape))
    x = convolutions(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    probabilities = layers.Dense(classes, activation="softmax", dtype="float32", name="probabilities")(x)
    return keras.Model(images, probabilities, name=network)


def run(
    prepared: Path, out: Path, scratch: Path, trial: Trial, params: StudyParams, augment: AugmentParams
) -> dict[str, Any]:
    """Train one network from wherever its checkpoints stand, write its result to ``out`` and return it.

    Raises:
        Interrupted: by a signal, after a checkpoint was written.
        NightlyError: no GPU where one is required, fewer images than an interval takes, a loss that is not finite.
    """
    training, test = load_split(prepared, "train"), load_split(prepared, "test")
    facts, classes = read_json(prepared / "prepared.json"), len(read_json(prepared / "classes.json"))
    count, size, train = len(training.images), training.images.shape[1], recipe(trial.network, trial.seed, params)
    if params.evaluate_every * params.batch_size > count:
        raise NightlyError(
            f"study.evaluate_every must be at most {count // params.batch_size} with study.batch_size "
            f"{params.batch_size} and {count:,} training images, but is {params.evaluate_every}"
        )
    device = prepare_device(params.require_gpu)
    if device.kind == "cpu":
        keep_freed_memory()
    machine = choose(train, device, training.images)
    print(f"{trial.network}, seed {trial.seed}, on {describe(device, machine, train)}", flush=True)

    def learner(lower: int, parts: int) -> Any:
        import keras

        from tasks.learner import Learner

        keras.utils.set_random_seed(trial.seed)
        keras.config.set_dtype_policy(machine.precision)
        try:
            classifier = build_network(trial.network, params, size, classes, facts["normalization"])
            normalize_whole_batches(classifier, device)
            augmentation = build_augmentation(augment, training.images.shape[1:], trial.seed)
            resident = training if machine.data_on_device else None
            made = Learner(classifier, augmentation, None, make_loss(train), resident=resident)
            optimizer = make_optimizer(train, params.evaluate_every, accumulation=parts)
            made.compile(optimizer=optimizer, **machine.compile_options())
            classifier.compile(jit_compile=machine.jit_compile)
        finally:
            keras.config.set_dtype_policy("float32")
        return made

    job = Job(
        training,
        spread(test, params.curve_test_images),
        make_loss(train),
        learner,
        data_on_device=machine.data_on_device,
        devices=device.count,
        steps_per_epoch=params.evaluate_every,
    )
    checkpoints = Checkpoints(scratch, f"{trial.digest}-{device.backend}-{device.kind}-{machine.precision}")
    with data_parallel(device):
        outcome = StudyLoop(job, train, checkpoints).run()
    network = build_network(trial.network, params, size, classes, facts["normalization"])
    network.set_weights(outcome.weights)
    network.compile(jit_compile=machine.jit_compile)
    seen = spread(training, params.final_train_images)
    test_error, top5_error = errors(network, test)
    interval = params.evaluate_every * params.batch_size
    found = {
        "network": trial.network,
        "seed": trial.seed,
        "digest": trial.digest,
        "family": family(trial.network),
        "depth": depth(trial.network),
        "parameters": sum(int(np.prod(variable.shape)) for variable in network.trainable_variables),
        "multiply_adds": multiply_adds(network),
        "train_images": count,
        "test_images": len(test.images),
        "curve_test_images": len(job.validation.images),
        "final_train_images": len(seen.images),
        "final_training_error": errors(network, seen)[0],
        "test_error": test_error,
        "top5_error": top5_error,
        # The median interval: neither the first one, which compiles, nor one in which the machine was busy otherwise.
        "seconds_per_epoch": round(statistics.median(row["seconds"] for row in outcome.rows) * count / interval, 2),
        "training_seconds": round(sum(row["seconds"] for row in outcome.rows), 1),
        "device": device.name,
        "backend": device.backend,
        "precision": machine.precision,
        "parallel": params.parallel,
        "recipe": identity(trial.network, trial.seed, params, augment),
        "data_digest": facts["data_digest"],
        "curve": [
            {
                "iteration": row["epoch"] * params.evaluate_every,
                "training_error": round(1 - row["accuracy"], 6),
                "training_loss": row["loss"],
                "test_error": round(1 - row["val_accuracy"], 6),
                "test_loss": row["val_loss"],
                "seconds": row["seconds"],
            }
            for row in outcome.rows
        ],
    }
    if outcome.micro_batches > 1:
        found["micro_batches"] = outcome.micro_batches
    write_json(out, found)
    checkpoints.clear()
    return found


def spread(split: Split, count: int | None) -> Split:
    """Return ``count`` images of a split, evenly spread over it; all if None or if there are no more."""
    total = len(split.images)
    if count is None or count >= total:
        return split
    rows = np.arange(count) * total // count
    return Split(split.images[rows], split.targets[rows])


def errors(network: Any, split: Split) -> tuple[float, float]:
    """Return top-1 and top-5 error of a network on a split, in inference mode and without augmentation."""
    from tasks.learner import probabilities

    found, targets = probabilities(network, split.images, EVALUATION_BATCH), split.targets.argmax(axis=1)
    return top_k_error(targets, found, 1), top_k_error(targets, found, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="checkpoints")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--threads", type=int, help="of a CPU; all if not given")
    args = parser.parse_args()
    if args.threads:
        # Read by TensorFlow when it starts.
        os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = str(args.threads)
    params = read_section(args.params, "study", StudyParams)
    augment = read_section(args.params, "augment", AugmentParams)
    chosen = [t for t in trials(args.prepared, params, augment) if (t.network, t.seed) == (args.network, args.seed)]
    if not chosen:
        raise NightlyError(f"{args.network} with seed {args.seed} is no part of the study in {args.params}")
    found = run(args.prepared, args.results / chosen[0].file_name, args.scratch, chosen[0], params, augment)
    print(
        f"{args.network}, seed {args.seed}: test error {found['test_error']:.2%}, training error "
        f"{found['final_training_error']:.2%}, {found['training_seconds']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    run_main(main)
