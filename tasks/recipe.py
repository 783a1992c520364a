"""The parameters of training: which recipe, for how long, with what optimizer, on what precision."""

from typing import Literal

from pydantic import Field, model_validator

from tasks.params import Section


class ProbeParams(Section):
    """How a head is trained on the frozen backbone's features, which are computed once.

    Attributes:
        epochs: passes over the features.
        batch_size: rows of features per step.
        learning_rate: Adam's, without warm-up; how it falls, and the loss, are ``train``'s.
        weight_decay: decoupled, as ``train.weight_decay`` is, and of weights for standardized features.
        precision: of the features on a CPU: ``auto`` is bfloat16 where the processor computes in it, else float32;
            ``int8`` quantizes the backbone with a sample of the training images. On a GPU Keras computes them.
    """

    epochs: int = Field(30, ge=1)
    batch_size: int = Field(256, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"


class TrainParams(Section):
    """How the classifier is trained.

    Of what is about the machine, null lets it be chosen for the device, and the choice is printed.

    Attributes:
        recipe: ``finetune`` trains every layer; ``probe`` trains the head on the features of a frozen backbone;
            ``probe-then-finetune`` does one after the other, so that a random head does not spoil a trained backbone.
        probe: the head's own training; ``finetune`` does without.
        epochs: passes over the training split.
        low_resolution_epochs: the first so many have one doubling less, at a quarter of the cost.
        batch_size: images per step, of all devices together.
        optimizer: the update rule.
        learning_rate: its peak.
        head_learning_rate: that of the layers after the pooling; null: the same.
        momentum: of ``sgd``.
        nesterov: ``sgd`` looks ahead; false is the momentum of the ResNet paper.
        weight_decay: decoupled, on kernels only: each step takes ``learning_rate * weight_decay`` of them away. (With
            SGD's momentum m, L2 in the loss as papers give it corresponds to 1 / (1 - m) times its figure here.)
        schedule: ``cosine`` lets the rate fall to zero after the warm-up; ``steps`` divides it by ten at half and at
            three quarters of the run (He et al. 2015, section 4.2).
        warmup_epochs: of linear rise, with ``steps`` of a tenth of the rate; parts of an epoch count.
        loss: between the targets and the probabilities.
        label_smoothing: share of each target that is spread over all classes.
        mixup_alpha: the Beta distribution's parameter, 0 for none; with cutmix, too, each batch draws one of the two.
        cutmix_alpha: the same of cutmix.
        ema_momentum: keeps a moving average of the weights, which is what is validated and saved; null for none.
        freeze_batch_normalization: the backbone's layers keep the statistics that they came with.
        warm_start: begin with the weights of the model in service, if there is one that fits.
        keep: which epoch's weights become the model: that of the lowest validation loss, or the last.
        early_stopping_epochs: stop after so many without a lower validation loss; null: never.
        seed: of the order of the images, the augmentation, the random weights.
        precision: Keras's dtype policy in training; the saved model is float32 either way.
        jit_compile: compile the step with XLA.
        steps_per_execution: steps between two returns to Python.
        data_on_device: keep the training images in the device's memory.
        deterministic: the same seed on the same machine gives the same weights, also where a GPU's fastest kernels
            would not.
        require_gpu: fail in seconds rather than train on the CPU all night.
        checkpoint_seconds: between two checkpoints; never so often that writing takes more than a fiftieth of the time.
    """

    recipe: Literal["finetune", "probe", "probe-then-finetune"] = "finetune"
    probe: ProbeParams = ProbeParams()
    epochs: int = Field(10, ge=1)
    low_resolution_epochs: int = Field(0, ge=0)
    batch_size: int = Field(32, ge=1)
    optimizer: Literal["adam", "adamw", "rmsprop", "sgd"] = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    head_learning_rate: float | None = Field(None, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "steps"] = "cosine"
    warmup_epochs: float = Field(0.0, ge=0)
    loss: Literal["categorical_crossentropy", "binary_crossentropy"] = "categorical_crossentropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup_alpha: float = Field(0.0, ge=0)
    cutmix_alpha: float = Field(0.0, ge=0)
    ema_momentum: float | None = Field(None, gt=0, lt=1)
    freeze_batch_normalization: bool = False
    warm_start: bool = False
    keep: Literal["best", "last"] = "best"
    early_stopping_epochs: int | None = Field(None, ge=1)
    seed: int = Field(1, ge=0, lt=2**31)

    precision: Literal["float32", "mixed_bfloat16"] | None = None
    jit_compile: bool | None = None
    steps_per_execution: int | None = Field(None, ge=1)
    data_on_device: bool | None = None
    deterministic: bool = False
    require_gpu: bool = False
    checkpoint_seconds: float = Field(60.0, ge=0)

    @model_validator(mode="after")
    def _epochs_fit(self) -> "TrainParams":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be below epochs ({self.epochs})")
        if self.warmup_epochs and self.schedule == "constant":
            raise ValueError("warmup_epochs needs schedule: cosine or steps")
        if self.schedule == "steps" and self.warmup_epochs >= self.epochs / 2:
            raise ValueError(f"warmup_epochs must be below half of epochs ({self.epochs}) with schedule: steps")
        if self.low_resolution_epochs >= self.epochs:
            raise ValueError(f"low_resolution_epochs must be below epochs ({self.epochs})")
        if self.low_resolution_epochs and self.recipe == "probe":
            raise ValueError("low_resolution_epochs needs recipe: finetune or probe-then-finetune")
        return self
