"""The optimizers against their published update rules, and accumulated, resumed, distributed, on both backends."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tasks.optimizers import make_loss, make_optimizer
from tasks.recipe import TrainParams

KINDS = ("sgd", "adam", "adamw", "rmsprop")
RATE, HEAD_RATE, DECAY = 0.01, 0.05, 0.1
each_kind = pytest.mark.parametrize("kind", KINDS)


def params(**changes) -> TrainParams:
    return TrainParams(**{"learning_rate": RATE, "schedule": "constant", "epochs": 3, **changes})


def small_model(**settings):
    """Return a compiled model of two dense layers, the second one the head; its weights are always the same."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((5,)), layers.Dense(4, activation="tanh"), layers.Dense(3, "softmax")])
    optimizer = make_optimizer(head_variables=model.layers[-1].variables, **settings)
    model.compile(optimizer, make_loss(params()), jit_compile=True)
    return model


def small_data() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(48, 5)).astype("float32")
    return x, np.eye(3, dtype="float32")[np.arange(48) % 3]


# --- the learning rate


def rates(optimizer, batches: int) -> list[float]:
    """Return the learning rate before each of so many batches."""
    import keras

    variable = keras.Variable(np.zeros(2, "float32"))
    seen = []
    for _ in range(batches):
        seen.append(float(optimizer.learning_rate))
        optimizer.apply([np.ones(2, "float32")], [variable])
    return seen


def expected_rate(step: int, warmup: int, total: int) -> float:
    """Linear warm-up (Goyal et al. 2017), then half a cosine (Loshchilov and Hutter 2017, without restarts)."""
    if step < warmup:
        return RATE * step / warmup
    return RATE / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize("warmup_epochs", [0.0, 0.5])
def test_rate_rises_linearly_and_falls_as_a_cosine_to_zero(warmup_epochs):
    optimizer = make_optimizer(params(schedule="cosine", warmup_epochs=warmup_epochs), 4)
    expected = [expected_rate(step, round(warmup_epochs * 4), 12) for step in range(12)]
    np.testing.assert_allclose(rates(optimizer, 12), expected, rtol=1e-5, atol=1e-9)
    assert float(optimizer.learning_rate) == pytest.approx(0, abs=1e-9)


def test_constant_rate_stays():
    assert rates(make_optimizer(params(), 4), 5) == pytest.approx([RATE] * 5)


@pytest.mark.parametrize(("warmup_epochs", "warm"), [(0.0, 0), (0.5, 2)])
def test_rate_falls_in_steps_at_half_and_three_quarters(warmup_epochs, warm):
    optimizer = make_optimizer(params(schedule="steps", epochs=4, warmup_epochs=warmup_epochs), 4)
    expected = [RATE / 10] * warm + [RATE] * (8 - warm) + [RATE / 10] * 4 + [RATE / 100] * 4
    np.testing.assert_allclose(rates(optimizer, 16), expected, rtol=1e-5)


def test_warmup_leaves_the_cosine_a_step():
    assert rates(make_optimizer(params(schedule="cosine", epochs=1, warmup_epochs=0.9), 1), 1) == [pytest.approx(RATE)]


def test_schedule_counts_updates_not_batches():
    optimizer = make_optimizer(params(schedule="cosine", warmup_epochs=0.5), 4, accumulation=3)
    expected = [expected_rate(batch // 3, 2, 12) for batch in range(36)]
    np.testing.assert_allclose(rates(optimizer, 36), expected, rtol=1e-5, atol=1e-9)
    assert int(optimizer.iterations) == 12


# --- the update rules


class Sgd:
    """Nesterov's momentum as Sutskever et al. 2013, equation 3 and 4, with w the point looked ahead to."""

    velocity = 0.0

    def step(self, w, g, rate):
        before, self.velocity = self.velocity, 0.9 * self.velocity - rate * g
        return w - 0.9 * before + 1.9 * self.velocity


class Adam:
    """Kingma and Ba 2015, algorithm 1."""

    m = v = t = 0.0

    def step(self, w, g, rate):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        return w - rate * (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-7)


class Rmsprop:
    """Tieleman and Hinton 2012, lecture 6.5, with Keras's rho."""

    v = 0.0

    def step(self, w, g, rate):
        self.v = 0.9 * self.v + 0.1 * g**2
        return w - rate * g / np.sqrt(self.v + 1e-7)


RULES = {"sgd": Sgd, "adam": Adam, "adamw": Adam, "rmsprop": Rmsprop}


@pytest.mark.parametrize("accumulation", [1, 3])
@each_kind
def test_updates_are_as_published(kind, accumulation):
    import keras

    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 2), "bias": (2,), "head kernel": (2, 4), "head bias": (4,)}
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    variables = {name: keras.Variable(value.astype("float32")) for name, value in values.items()}
    optimizer = make_optimizer(
        params(optimizer=kind, head_learning_rate=HEAD_RATE, weight_decay=DECAY),
        4,
        head_variables=[variable for name, variable in variables.items() if "head" in name],
        accumulation=accumulation,
    )
    rules = {name: RULES[kind]() for name in shapes}
    for _ in range(3):
        micro = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(accumulation)]
        for gradients in micro:
            optimizer.apply([gradients[name].astype("float32") for name in shapes], list(variables.values()))
        for name in shapes:
            rate = HEAD_RATE if "head" in name else RATE
            # Loshchilov and Hutter 2019, algorithm 2: the decay takes no part in the moments.
            decayed = values[name] * (1 - rate * DECAY * ("kernel" in name))
            mean = np.mean([gradients[name] for gradients in micro], axis=0)
            values[name] = rules[name].step(decayed, mean, rate)
            # The tiny epsilon stands before or after the bias correction: hence not closer than this.
            np.testing.assert_allclose(np.asarray(variables[name]), values[name], rtol=2e-5, atol=2e-6)


def test_without_momentum_sgd_is_plain():
    import keras

    variable = keras.Variable(np.array([1.0, 2.0], "float32"))
    optimizer = make_optimizer(params(optimizer="sgd", momentum=0.0), 4)
    for _ in range(2):
        optimizer.apply([np.array([1.0, -1.0], "float32")], [variable])
    np.testing.assert_allclose(np.asarray(variable), [1 - 2 * RATE, 2 + 2 * RATE], rtol=1e-6)
    assert len(optimizer.variables) == 2  # the count of steps and the rate: no momentum


def test_momentum_of_the_resnet_paper_does_not_look_ahead():
    import keras

    variable = keras.Variable(np.zeros(1, "float32"))
    optimizer = make_optimizer(params(optimizer="sgd", nesterov=False), 4)
    for _ in range(2):
        optimizer.apply([np.ones(1, "float32")], [variable])
    np.testing.assert_allclose(np.asarray(variable), [-2.9 * RATE], rtol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@each_kind
def test_only_kernels_decay_each_by_its_own_rate_and_once_an_update(kind, accumulation):
    import keras
    from keras import layers

    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            layers.Conv2D(2, 3, bias_initializer="ones"),
            layers.BatchNormalization(beta_initializer="ones"),
            layers.Flatten(),
            layers.Dense(3, bias_initializer="ones"),
        ]
    )
    before = {variable.path: np.array(variable) for variable in model.trainable_variables}
    optimizer = make_optimizer(
        params(optimizer=kind, head_learning_rate=HEAD_RATE, weight_decay=DECAY),
        4,
        head_variables=model.layers[-1].variables,
        accumulation=accumulation,
    )
    for _ in range(accumulation):
        zeros = [np.zeros(variable.shape, "float32") for variable in model.trainable_variables]
        optimizer.apply(zeros, model.trainable_variables)
    left = {variable.path: np.array(variable) / before[variable.path] for variable in model.trainable_variables}
    conv, norm, dense = (model.layers[index].name for index in (0, 1, 3))
    for name in (f"{conv}/bias", f"{norm}/gamma", f"{norm}/beta", f"{dense}/bias"):
        assert (left.pop(next(path for path in left if path.endswith(name))) == 1).all()
    for name, rate in ((conv, RATE), (dense, HEAD_RATE)):
        share = left.pop(next(path for path in left if path.endswith(f"{name}/kernel")))
        np.testing.assert_allclose(share, 1 - rate * DECAY, rtol=1e-6)
    assert not left


def test_state_is_the_optimizers_alone():
    # The head's variables are known to the optimizer, but a checkpoint of its state must not hold them twice.
    model = small_model(params=params(optimizer="adam", schedule="cosine"), steps_per_epoch=4)
    model.optimizer.build(model.trainable_variables)
    assert len(model.optimizer.variables) == 1 + 2 * len(model.trainable_variables)


# --- accumulated, resumed, in half precision


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop"])
def test_small_batches_accumulated_are_one_large_batch(kind):
    recipe = params(
        optimizer=kind, schedule="cosine", warmup_epochs=0.5, head_learning_rate=HEAD_RATE, weight_decay=DECAY
    )
    x, y = small_data()
    weights = []
    for accumulation in (1, 3):
        model = small_model(params=recipe, steps_per_epoch=4, accumulation=accumulation)
        before = model.get_weights()
        model.fit(x, y, batch_size=12 // accumulation, shuffle=False, epochs=3, verbose=0)
        assert int(model.optimizer.iterations) == 12
        weights.append(model.get_weights())
    for one, other, start in zip(*weights, before, strict=True):
        assert np.abs(one - start).max() > 1e-3
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop"])
def test_resumed_run_ends_with_the_unbroken_runs_weights(kind, accumulation):
    settings = {
        "params": params(optimizer=kind, schedule="cosine", weight_decay=DECAY, head_learning_rate=HEAD_RATE),
        "steps_per_epoch": 4,
        "accumulation": accumulation,
    }
    x, y = small_data()

    def train(model, first: int, last: int) -> None:
        for batch in range(first, last):
            model.train_on_batch(x[8 * batch : 8 * batch + 8], y[8 * batch : 8 * batch + 8])

    unbroken = small_model(**settings)
    train(unbroken, 0, 6)
    # With accumulation the break after three batches lies in the middle of a set of two.
    broken = small_model(**settings)
    train(broken, 0, 3)
    saved = [np.array(variable) for variable in broken.optimizer.variables]
    resumed = small_model(**settings)
    resumed.set_weights(broken.get_weights())
    resumed.optimizer.build(resumed.trainable_variables)
    for variable, value in zip(resumed.optimizer.variables, saved, strict=True):
        variable.assign(value)
    train(resumed, 3, 6)
    for one, other in zip(resumed.get_weights(), unbroken.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert any((one != other).any() for one, other in zip(broken.get_weights(), unbroken.get_weights(), strict=True))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop"])
def test_run_may_go_on_with_smaller_batches(kind, schedule):
    import keras

    recipe = params(optimizer=kind, schedule=schedule, weight_decay=DECAY)
    gradients = np.random.default_rng(0).normal(size=(6, 3, 2)).astype("float32")

    def start(accumulation: int):
        variable = keras.Variable(np.ones((3, 2), "float32"))
        optimizer = make_optimizer(recipe, 4, accumulation=accumulation)
        optimizer.build([variable])
        return optimizer, variable

    optimizer, variable = start(1)
    for number, gradient in enumerate(gradients):
        if number == 3:
            state, middle = [np.array(one) for one in optimizer.variables], np.array(variable)
        optimizer.apply([gradient], [variable])
    halved, halved_variable = start(2)
    halved_variable.assign(middle)
    state[0] *= 2  # the count of batches
    for one, value in zip(halved.variables, state, strict=False):
        one.assign(value)
    for gradient in gradients[3:]:
        halved.apply([gradient - 1], [halved_variable])
        halved.apply([gradient + 1], [halved_variable])
    np.testing.assert_allclose(np.asarray(halved_variable), np.asarray(variable), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_mixed_precision_leaves_rates_and_state_in_float32():
    import keras

    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = small_model(params=params(schedule="cosine"), steps_per_epoch=16, accumulation=2)
        x, y = small_data()
        model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    finally:
        keras.config.set_dtype_policy(policy)
    assert model.layers[0].compute_dtype == "bfloat16"
    state = [variable for variable in model.optimizer.variables if "int" not in variable.dtype]
    assert {variable.dtype for variable in state} == {"float32"}
    assert float(model.optimizer.learning_rate) == pytest.approx(expected_rate(3, 0, 48), rel=1e-6)


# --- elsewhere: the other backend, several devices

DISTRIBUTED = """
import numpy as np
from tests.test_optimizers import DECAY, HEAD_RATE, params, small_data, small_model

x, y = small_data()


def run(kind, accumulation, jit_compile):
    recipe = params(optimizer=kind, schedule="cosine", weight_decay=DECAY, head_learning_rate=HEAD_RATE)
    model = small_model(params=recipe, steps_per_epoch=4, accumulation=accumulation)
    model.compile(model.optimizer, model.loss, jit_compile=jit_compile)
    return model, lambda: model.fit(x, y, batch_size=12 // accumulation, shuffle=False, epochs=2, verbose=0)


def compare(alone, together):
    for one, other in zip(alone.get_weights(), together.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)
    for one, other in zip(alone.optimizer.variables, together.optimizer.variables, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=2e-6)
"""

MIRRORED = """
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
for kind in ("sgd", "adam"):
    for accumulation in (1, 3):
        alone, fit = run(kind, accumulation, False)
        fit()
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            together, fit = run(kind, accumulation, False)
        fit()
        compare(alone, together)
"""

DATA_PARALLEL = """
import jax
import keras

assert len(jax.devices()) == 2
for kind in ("sgd", "adam"):
    for accumulation in (1, 3):
        keras.distribution.set_distribution(None)
        alone, fit = run(kind, accumulation, True)
        fit()
        keras.distribution.set_distribution(keras.distribution.DataParallel())
        together, fit = run(kind, accumulation, True)
        fit()
        compare(alone, together)
"""


def run_elsewhere(script: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
def test_elsewhere_two_devices_under_mirrored_strategy():
    run_elsewhere(DISTRIBUTED + MIRRORED, KERAS_BACKEND="tensorflow")


@pytest.mark.slow
def test_elsewhere_two_devices_under_jax():
    run_elsewhere(
        DISTRIBUTED + DATA_PARALLEL, KERAS_BACKEND="jax", XLA_FLAGS="--xla_force_host_platform_device_count=2"
    )


@pytest.mark.slow
def test_elsewhere_all_of_this_on_jax_without_tensorflow():
    script = "import sys; sys.modules['tensorflow'] = None\nimport pytest\n"
    script += f"sys.exit(pytest.main(['-q', '-x', '-k', 'not elsewhere', {__file__!r}]))"
    run_elsewhere(script, KERAS_BACKEND="jax")


# --- the loss


def test_losses_are_cross_entropies_of_smoothed_targets():
    targets = np.array([[1, 0, 0], [0, 0, 1]], "float32")
    probabilities = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], "float32")
    smooth = targets * 0.9 + 0.1 / 3
    expected = -(smooth * np.log(probabilities)).sum(axis=1).mean()
    assert float(make_loss(params(label_smoothing=0.1))(targets, probabilities)) == pytest.approx(expected, rel=1e-5)
    smooth = targets * 0.9 + 0.1 / 2
    expected = -(smooth * np.log(probabilities) + (1 - smooth) * np.log(1 - probabilities)).mean()
    binary = make_loss(params(loss="binary_crossentropy", label_smoothing=0.1))
    assert float(binary(targets, probabilities)) == pytest.approx(expected, rel=1e-5)
