"""The optimizer and the loss: schedule, weight decay, a rate of its own for the head, accumulated gradients."""

from collections.abc import Iterable, Sequence
from typing import Any

from tasks.recipe import TrainParams


def make_optimizer(
    params: TrainParams, steps_per_epoch: int, *, head_variables: Iterable[Any] = (), accumulation: int = 1
) -> Any:
    """Return the Keras optimizer with its learning-rate schedule.

    Args:
        steps_per_epoch: weight updates in an epoch (with accumulation: whole sets of micro-batches).
        head_variables: the Keras variables that ``head_learning_rate`` is for.
        accumulation: how many batches' mean gradient makes one weight update.
    """
    import keras

    rate: Any = params.learning_rate
    if params.schedule == "cosine":
        total = params.epochs * steps_per_epoch
        # Rounding may not leave the cosine without a step.
        warmup = min(round(params.warmup_epochs * steps_per_epoch), total - 1)
        rate = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup else params.learning_rate,
            decay_steps=total - warmup,
            warmup_target=params.learning_rate if warmup else None,
            warmup_steps=warmup,
        )
    elif params.schedule == "steps":
        total, full = params.epochs * steps_per_epoch, params.learning_rate
        starts = {0: full / 10, round(params.warmup_epochs * steps_per_epoch): full}
        starts |= {total // 2: full / 10, total * 3 // 4: full / 100}
        # Keras changes the rate after the step that it calls the boundary.
        boundaries = [step - 1 for step in starts if step]
        rate = keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, list(starts.values()))
    rule: Any
    match params.optimizer:
        case "adam" | "adamw":  # Keras's AdamW is its Adam with a decay by default; ours decays in _Update
            rule, settings = keras.optimizers.Adam, {}
        case "rmsprop":
            rule, settings = keras.optimizers.RMSprop, {}
        case "sgd":
            rule, settings = (
                keras.optimizers.SGD,
                {"momentum": params.momentum, "nesterov": params.nesterov and params.momentum > 0},
            )
    return type(rule.__name__, (_Update, rule), {})(
        learning_rate=rate,
        head_variables=head_variables,
        head_factor=(params.head_learning_rate or params.learning_rate) / params.learning_rate,
        kernel_decay=params.weight_decay,
        accumulation=accumulation,
        **settings,
    )


def make_loss(params: TrainParams) -> Any:
    """Return the Keras loss on probabilities."""
    import keras

    kinds = {
        "categorical_crossentropy": keras.losses.CategoricalCrossentropy,
        "binary_crossentropy": keras.losses.BinaryCrossentropy,
    }
    return kinds[params.loss](label_smoothing=params.label_smoothing)


class _Update:
    """Put before a Keras optimizer among the bases: what goes on around its update rule, variable by variable.

    Weight decay stands here, because Keras's own takes one learning rate for all variables. So does gradient
    accumulation, because Keras's own ``gradient_accumulation_steps`` moves the schedule on with every
    micro-batch, and its conditional update cannot be compiled under MirroredStrategy ("merge_call called while
    defining a new graph"). Here every micro-batch computes the update, and all but the last of a set assign
    what was there before: no branch, so any backend, XLA and any distribution will do. The sums of gradients
    come last among the ``variables``: what comes before is the same for every ``accumulation``, but for the
    first, which counts batches.
    """

    def __init__(
        self,
        *,
        head_variables: Iterable[Any],
        head_factor: float,
        kernel_decay: float,
        accumulation: int,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        # Keys, not the variables: Keras would take any variable it finds here for the optimizer's state.
        self._head_keys = frozenset(self._var_key(variable) for variable in head_variables)
        self._head_factor = head_factor
        self._kernel_decay = kernel_decay
        self.accumulation = accumulation

    def build(self, variables: Sequence[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        self._factors = tuple(self._head_factor if self._var_key(v) in self._head_keys else 1.0 for v in variables)
        # Kernels are what has more than one axis; biases and BatchNorm's gamma and beta have one.
        self._decays = tuple(self._kernel_decay if len(v.shape) > 1 else 0.0 for v in variables)
        if self.accumulation > 1:
            self._gradient_sums = self.add_optimizer_variables(variables, "gradient_sum")

    @property
    def iterations(self) -> Any:
        """Weight updates so far; ``_iterations`` counts batches."""
        return self._iterations if self.accumulation == 1 else self._iterations // self.accumulation

    def _get_current_learning_rate(self) -> Any:
        rate = self._learning_rate
        return rate(self.iterations) if callable(rate) else rate

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        from keras import ops

        index = self._get_variable_index(variable)
        rate = ops.cast(learning_rate, variable.dtype) * self._factors[index]
        if self.accumulation > 1:
            total = self._gradient_sums[index] + ops.cast(gradient, variable.dtype)
            super().assign(self._gradient_sums[index], ops.where(self._due(), ops.zeros_like(total), total))
            gradient = total / self.accumulation
        if self._decays[index]:
            self.assign_sub(variable, variable * (rate * self._decays[index]))
        super().update_step(gradient, variable, rate)

    # Keras's update rules change every variable by these three.

    def assign(self, variable: Any, value: Any) -> None:
        from keras import ops

        super().assign(variable, self._if_due(value, ops.convert_to_tensor(variable)))

    def assign_add(self, variable: Any, value: Any) -> None:
        super().assign_add(variable, self._if_due(value, 0.0))

    def assign_sub(self, variable: Any, value: Any) -> None:
        super().assign_sub(variable, self._if_due(value, 0.0))

    def _if_due(self, value: Any, otherwise: Any) -> Any:
        from keras import ops

        return value if self.accumulation == 1 else ops.where(self._due(), value, otherwise)

    def _due(self) -> Any:
        return (self._iterations + 1) % self.accumulation == 0
