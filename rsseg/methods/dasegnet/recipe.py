"""Recipe of ST-DASegNet (arXiv 2301.05526). Defaults follow the published code, not the paper."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rsseg.config import BaseRecipe, TrainedBackbone
from rsseg.fields import Positive, Probability, Side, Strict, Width
from rsseg.methods.plain_recipe import PlainConfig

DISCRIMINATORS = ("disc_source", "disc_target")
"""Names of the discriminators' optimizers."""

OF_THE_PAIR = (
    "decoder",
    "source_decoder_weights",
    "target_decoder_weights",
    "head_lr_scale",
    "weight_decay_exempt",
    "side_by_side",
)
"""Settings of the two students only; `single` has its own."""

GanLoss = Literal["vanilla", "lsgan", "l1", "hinge", "wgan", "wgan-logistic-ns"]
"""Losses of the published code; only `vanilla` was used for published numbers."""

Weights = tuple[Annotated[float, Field(ge=0)], ...]


class DecoderConfig(Strict):
    """Both decoders, and their averages in the teacher."""

    type: Literal["segformer", "deeplabv3plus"] = "segformer"
    channels: Width = 256
    """Published: 256 for `segformer` (also with MiT-B5), 512 for `deeplabv3plus`."""
    dilations: Annotated[tuple[Side, ...], Field(min_length=1, max_length=64)] = (1, 12, 24, 36)
    """`deeplabv3plus` only: one branch per rate, 1 being a 1x1 convolution. Published for backbones of stride 8."""
    low_channels: Width = 48
    """`deeplabv3plus` only: channels of the projected first level."""
    dropout: Probability = 0.1


class NeckConfig(Strict):
    """Domain disentangled module; ratio and least width are those of the published modules."""

    type: Literal["ds2", "dsk"] = "ds2"
    """`ds2`: DSM at all levels and DUM at the last; `dsk`: DSM only."""
    reduction: Width = 8
    """Ratio of channels to reduced channels."""
    min_width: Width = 8
    """Least number of reduced channels."""
    energies: Literal["sum", "mean"] = "sum"
    """How the DUM compares channels. Published: sums over positions, which make the attention depend on the size of
    the map, so that tiles of another size than the crops give other results; `mean` avoids this."""


class AdversarialConfig(Strict):
    """Feature alignment: one discriminator per style, on the spatial softmax of the last backbone level."""

    weight: Positive = 0.005
    loss: GanLoss = "vanilla"
    """`vanilla` (published): cross-entropy. `lsgan`, `l1`: squared and absolute error. `hinge`; `wgan` and
    `wgan-logistic-ns`: Wasserstein, plain and through a softplus, without the penalties that usually go with them."""
    convs: Annotated[int, Field(ge=1, le=5)] = 2
    """Strided convolutions: 2 for stride-32 features (crops of 384 or more), 3 for ResNet's stride 8."""
    base_channels: Width = 64
    weight_on_discriminators: bool = True
    """Published: `weight` also multiplies the discriminators' own losses, contrary to the published code's
    documentation; with Adam the effect is small."""


class TeacherConfig(Strict):
    """The averaged networks that make the pseudo-labels."""

    type: Literal["decoder_only_t", "single_t", "whole"] = "decoder_only_t"
    """`decoder_only_t`: averaged decoders on the students' features. `single_t`: averaged target backbone and decoder
    with the student's source path. `whole`: an average of the whole network (not published), which varies less than
    the students that its labels teach."""
    decay: Probability = 0.999
    """Decay of the average; in step t at most 1 - 1 / (t + 1), so that early steps have equal weight."""
    start: Literal["random", "student"] = "random"
    """Initial weights. Published: random ones, whose share is 1 / (t + 1); `student`: a copy."""
    mode: Literal["train", "eval"] = "train"
    """Published: dropout and batch statistics are active; `eval` disables both, for labels that do not depend on the
    other images of the batch."""
    buffers: Literal["own", "average"] = "own"
    """Running statistics of batch norm: `own` records the teacher's passes (published; not in `eval` mode), `average`
    averages the student's."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.mode == "eval" and self.buffers == "own":
            raise ValueError("mode 'eval' needs buffers 'average': the teacher's own statistics would never be filled")
        return self


class MaskedConfig(Strict):
    """Masked image consistency: the students predict the pseudo-labels from partly hidden target images.

    Source: Hoyer et al. 2023 (arXiv 2212.01322).
    """

    weight: Positive = 1.0
    """Relative to the other self-training losses."""
    patch: Side = 64
    """Side of a hidden square in pixels."""
    ratio: Probability = 0.7
    """Fraction of hidden squares."""


class SelfTrainingConfig(Strict):
    """Training on the target's pseudo-labels."""

    weight: Positive = 0.25
    confidence: Probability = 0.975
    """Least probability of a confident pixel; the fraction of confident pixels in the batch weights all pixels."""
    rare_confidence: Probability | None = 0.8
    """Probability from which `class_weights` apply; pixels below it weigh 0.5 (published). None: all pixels alike."""
    class_weights: Weights | None = None
    """Weight per class; None: all pixels alike."""
    class_weight_rule: Literal["in_place", "table"] = "in_place"
    """`in_place` (published): weights replace class indices in one map, class by class, so that a weight equal to a
    later index is replaced again (hence 1.01 instead of 1), and weight 0 becomes 0.5. `table`: every class has its own
    weight."""
    missing_class_weights: Literal["error", "class_index"] = "error"
    """`class_index`: classes without an entry are weighted by their index (published, four-class tasks)."""
    teacher: TeacherConfig = TeacherConfig()
    student_view: Literal["same", "strong"] = "same"
    """Published: the students learn from the teacher's image. `strong`: from a strong view of it, see `data.strong`, so
    that they do not just repeat the teacher's errors."""
    class_mix: bool = False
    """Paste half of the classes of a source image with their labels on the target image (ClassMix; not published): true
    labels in the target's surroundings offset wrong pseudo-labels."""
    masked: MaskedConfig | None = None
    """Not published: hidden squares make the students rely on the surroundings."""

    @property
    def learns_from_teachers_image(self) -> bool:
        """Whether the students learn from the image that the teacher labels."""
        return self.student_view == "same" and not self.class_mix


class DASegNetRecipe(BaseRecipe):
    """Two students, in the style of source and target, with disentangling, alignment and self-training.

    Ablations: `self_training: null`, `adversarial: null`, `neck: null`; without the first two only source images are
    used.
    """

    method: Literal["dasegnet"]
    backbone: TrainedBackbone
    """Of both students, from the same weights."""
    single: PlainConfig | None = None
    """Train one plain network, with the source's labels and the pseudo-labels of its average on the target, in place of
    the two students, neck and discriminators, for which the keys `decoder` to `side_by_side` below hold. A network that
    was tuned on the source before (`start`) gains less from alignment than from good pseudo-labels, and one network
    predicts twice as fast as two."""
    neck: NeckConfig | None = NeckConfig()
    decoder: DecoderConfig = DecoderConfig()
    adversarial: AdversarialConfig | None = AdversarialConfig()
    self_training: SelfTrainingConfig | None = SelfTrainingConfig()
    source_decoder_weights: Weights | None = None
    """Class weights of the source-style decoder's cross-entropy, for labels and pseudo-labels."""
    target_decoder_weights: Weights | None = None
    """The same for the target-style decoder."""
    loss_divisor: Literal["all", "valid"] = "all"
    """Divisor of the cross-entropy: all pixels, unlabeled ones included (published), or the labeled ones."""
    head_lr_scale: Positive = 1.0
    """Learning rate of the decoders, as a multiple of the optimizer's. The published configurations set 10 with
    SegFormer but never apply it; with DeepLabV3+ 2 is applied."""
    weight_decay_exempt: Literal["names_with_norm", "norms", "none"] = "names_with_norm"
    """Parameters of the students without weight decay. `names_with_norm` (published): layer norms except the one that
    ends each stage, whose name in the published code lacks the word; `norms`: every layer, group and batch norm."""
    side_by_side: bool = False
    """On a GPU, run the two students on two CUDA streams, for students too small to occupy it."""

    def stream_names(self) -> tuple[str, ...]:
        """Labeled source images and unlabeled target images."""
        return ("source", "target")

    @property
    def uses_target(self) -> bool:
        """Whether training reads target images."""
        return self.adversarial is not None or self.self_training is not None

    @property
    def students_see_target(self) -> bool:
        """Whether the students process the unchanged target images, not only harder views."""
        config = self.self_training
        return self.adversarial is not None or (
            config is not None and (config.learns_from_teachers_image or config.teacher.type != "whole")
        )

    @model_validator(mode="before")
    @classmethod
    def _single_has_no_pair(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("single") is None:
            return values
        return {"neck": None, "adversarial": None, **values}

    @model_validator(mode="before")
    @classmethod
    def _no_idle_optimizers(cls, values: Any) -> Any:
        """Drop the discriminators' optimizers without adversarial training, so that an ablation changes one key."""
        if not isinstance(values, dict) or values.get("adversarial", ...) is not None:
            return values
        optimizers = values.get("optimizers")
        if not isinstance(optimizers, dict):
            return values
        return values | {"optimizers": {key: value for key, value in optimizers.items() if key not in DISCRIMINATORS}}

    def optimizer_names(self) -> tuple[str, ...]:
        """One for the students, neck and decoders, and one per discriminator."""
        return ("main", *(DISCRIMINATORS if self.adversarial is not None else ()))

    @model_validator(mode="after")
    def _single(self) -> Self:
        if self.single is None:
            return self
        fields = type(self).model_fields
        inert = [key for key in ("neck", "adversarial") if getattr(self, key) is not None]
        inert += [key for key in OF_THE_PAIR if getattr(self, key) != fields[key].default]
        if inert:
            raise ValueError(f"{inert[0]}: belongs to the two students, which single replaces; leave it out")
        teacher = None if self.self_training is None else self.self_training.teacher
        if teacher is not None and (teacher.type != "whole" or teacher.start != "student"):
            raise ValueError("self_training.teacher: single needs {type: whole, start: student}")
        for stream in self.stream_names() if self.self_training is not None else ("source",):
            self.single.decoder.check_batch(self.trainer.batch_of(stream))
        return self
