"""Recipe of ST-DASegNet (arXiv 2301.05526). Defaults are the published code's, also where they surprise."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rsseg.config import BackboneConfig, BaseRecipe, Count, Positive, Probability, Strict

DISCRIMINATORS = ("disc_source", "disc_target")
"""Names of the discriminators' optimizers."""

GanLoss = Literal["vanilla", "lsgan", "l1", "hinge", "wgan", "wgan-logistic-ns"]
"""Losses of the published code; only `vanilla` was used for published numbers."""

Weights = tuple[Annotated[float, Field(ge=0)], ...]


class DecoderConfig(Strict):
    """Both decoders, and the averaged ones of the teacher."""

    kind: Literal["segformer", "deeplabv3plus"] = "segformer"
    channels: Count = 256
    """Width; 256 for SegFormer (also beside MiT-B5), 512 for DeepLabV3+, as published."""
    dilations: tuple[Count, ...] = (1, 12, 24, 36)
    """DeepLabV3+ only; 1 is a 1x1 convolution."""
    low_channels: Count = 48
    """DeepLabV3+ only: width of the first level."""
    dropout: Probability = 0.1


class NeckConfig(Strict):
    """Domain disentangled module."""

    kind: Literal["ds2", "dsk"] = "ds2"
    """`ds2`: DSM at all levels and DUM at the last; `dsk`: DSM only."""
    reduction: Count = 8
    """Channels over reduced channels."""
    min_width: Count = 8
    """Least number of reduced channels."""
    energies: Literal["sum", "mean"] = "sum"
    """How the DUM compares channels. Published: the sum over positions, whose soft minimum sharpens as the map
    grows, so that a network sees tiles of another size differently than its crops. `mean` does not depend on it."""


class AdversarialConfig(Strict):
    """Feature alignment: one discriminator per style, on the softmax over positions of the last backbone level."""

    weight: Positive = 0.005
    loss: GanLoss = "vanilla"
    """`vanilla` (published): cross-entropy. `lsgan`, `l1`: squared and absolute error. `hinge`; `wgan` and
    `wgan-logistic-ns`: Wasserstein, plain and through a softplus, without the penalties that usually go with them."""
    convs: Annotated[int, Field(ge=1, le=5)] = 2
    """Strided convolutions: 2 for stride-32 features (crops of 384 or more), 3 for ResNet's stride 8."""
    base_channels: Count = 64
    weight_on_discriminators: bool = True
    """Published: `weight` also multiplies the discriminators' own losses (under Adam it hardly matters). The
    documentation of the published code says it should not: False."""


class TeacherConfig(Strict):
    """Where pseudo-labels come from."""

    kind: Literal["decoder_only_t", "single_t", "whole"] = "decoder_only_t"
    """`decoder_only_t`: averaged decoders on the students' own features. `single_t`: the averaged target backbone and
    decoder beside the student's source path. `whole`: everything averaged (not published)."""
    decay: Probability = 0.999
    """Of the average; in step t at most 1 - 1 / (t + 1), so that early steps count alike."""
    start: Literal["random", "student"] = "random"
    """Published: weights of its own, drawn at random, whose share is 1 / (t + 1). `student`: a copy."""
    mode: Literal["train", "eval"] = "train"
    """Published: dropout acts and batch norm uses the batch. `eval` switches both off."""
    buffers: Literal["own", "average"] = "own"
    """Running statistics of batch norm: `own` follows the teacher's own passes (published; in `eval` mode they would
    never change), `average` averages the student's."""
    counter: Literal["step", "process"] = "step"
    """What t counts: optimizer steps, or steps since the process began. The published code lost its counter when a run
    was resumed, after which the first steps overwrote the teacher: `process`. Unbroken runs are the same."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.mode == "eval" and self.buffers == "own":
            raise ValueError("mode 'eval' needs buffers 'average': the teacher's own statistics would never be filled")
        return self


class MaskedConfig(Strict):
    """Masked image consistency: the student must find the pseudo-label of target images of which parts are hidden.

    Source: Hoyer et al. 2023 (arXiv 2212.01322).
    """

    weight: Positive = 1.0
    """Relative to the other self-training losses."""
    patch: Count = 64
    """Side of a hidden square in pixels."""
    ratio: Probability = 0.7
    """Part of the squares that is hidden."""


class SelfTrainingConfig(Strict):
    """Training on the target's pseudo-labels."""

    weight: Positive = 0.25
    confidence: Probability = 0.975
    """A pixel at least this probable is confident; the part of confident pixels in the batch weights all of them."""
    rare_confidence: Probability | None = 0.8
    """From here on `class_weights` act; below, `unsure_weight`. None: all pixels alike."""
    class_weights: Weights | None = None
    """Per class; None: all pixels alike, whatever their probability."""
    unsure_weight: Annotated[float, Field(ge=0)] = 0.5
    class_weight_rule: Literal["in_place", "table"] = "in_place"
    """Published: weights replace class indices in one map, class by class, so that a weight which equals a later index
    is replaced again; hence 1.01 for 1. And a class with the weight 0 gets `unsure_weight`. `table` looks weights up,
    0 included."""
    missing_class_weights: Literal["error", "class_index"] = "error"
    """`class_index`: classes without an entry are weighted by their own index (published, four-class tasks)."""
    teacher: TeacherConfig = TeacherConfig()
    student_view: Literal["same", "strong"] = "same"
    """Published: the students learn from the image that the teacher saw. `strong`: from a view with colours changed as
    `data.strong` says."""
    class_mix: bool = False
    """Paste half of a source image's classes, with their labels, on the target image (ClassMix; not published)."""
    masked: MaskedConfig | None = None
    """Not published."""

    @property
    def learns_from_teachers_image(self) -> bool:
        """Whether the students' target image is the one that the teacher labels."""
        return self.student_view == "same" and not self.class_mix


class DASegNetRecipe(BaseRecipe):
    """Two students in the style of the source and of the target, disentangled, aligned and self-trained.

    Ablations: `self_training: null`, `adversarial: null`, `neck: null`; without the first two only source images are
    used.
    """

    method: Literal["dasegnet"]
    backbone: BackboneConfig
    """Both students, from the same weights."""
    neck: NeckConfig | None = NeckConfig()
    decoder: DecoderConfig = DecoderConfig()
    adversarial: AdversarialConfig | None = AdversarialConfig()
    self_training: SelfTrainingConfig | None = SelfTrainingConfig()
    source_decoder_weights: Weights | None = None
    """Cross-entropy weight per class of the source-style decoder, for labels and pseudo-labels."""
    target_decoder_weights: Weights | None = None
    """The same for the target-style decoder."""
    ce_divisor: Literal["all", "valid"] = "all"
    """Published: the sum over labeled pixels is divided by the number of all pixels."""
    rare_class_sampling: Annotated[float, Field(gt=0)] | None = None
    """Temperature of drawing source images by how rare their classes are (DAFormer: 0.01); None draws uniformly, as
    published."""
    decoder_lr_scale: Positive = 1.0
    """The published configurations ask for 10 with SegFormer but never apply it; with DeepLabV3+ 2 is applied."""
    norm_weight_decay: Literal["published", "all", "none"] = "published"
    """Layer norms of the students: `published` exempts all but the one that ends each stage."""
    batching: Literal["auto", "separate"] = "auto"
    """`auto` passes source and target images together through students whose norms do not mix samples; the numbers are
    the same. Batch norm always gets separate passes."""
    side_by_side: bool = False
    """Run both students at once on two CUDA streams."""

    def stream_names(self) -> tuple[str, ...]:
        """Source images with labels, target images without."""
        return ("source", "target")

    @property
    def uses_target(self) -> bool:
        """Whether target images are needed in training."""
        return self.adversarial is not None or self.self_training is not None

    @property
    def students_see_target(self) -> bool:
        """Whether the students must look at the target images as they are, not only at harder versions."""
        config = self.self_training
        return self.adversarial is not None or (
            config is not None and (config.learns_from_teachers_image or config.teacher.kind != "whole")
        )

    @model_validator(mode="before")
    @classmethod
    def _no_idle_optimizers(cls, values: Any) -> Any:
        """An ablation needs one switch only: without discriminators, their optimizers go."""
        if isinstance(values, dict) and values.get("adversarial", ...) is None and "optimizers" in values:
            kept = {name: value for name, value in values["optimizers"].items() if name not in DISCRIMINATORS}
            return values | {"optimizers": kept}
        return values

    @model_validator(mode="after")
    def _optimizers(self) -> Self:
        wanted = ["main", *(DISCRIMINATORS if self.adversarial is not None else ())]
        missing = [name for name in wanted if name not in self.optimizers]
        if missing:
            raise ValueError(f"optimizers: {missing[0]!r} is missing; this recipe needs {wanted}")
        return self
