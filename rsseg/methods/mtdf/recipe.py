"""Recipe of RS-MTDF (arXiv 2506.08772): semi-supervised training with several frozen teachers."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rsseg.config import BackboneConfig, BaseRecipe, TrainedBackbone
from rsseg.fields import Positive, Probability, Side, Strict, Width
from rsseg.methods.plain_recipe import DecoderConfig

Weight = Annotated[float, Field(ge=0)]


class TeacherConfig(Strict):
    """One frozen teacher, whose last map the student learns to predict."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]
    """Name of the translator in the model file and of the loss in the log."""
    backbone: BackboneConfig
    """Its last returned map is the target. `dtype: bfloat16` halves its memory."""
    input_size: Side | None = None
    """Side in pixels of the square that the image is resized to for this teacher; None keeps the crop."""
    bands: tuple[str, ...] | None = None
    """Bands of the task that the teacher receives, such as red, green and blue of a multispectral task; None: all."""
    teacher_input: Literal["own", "student_normalized"] = "own"
    """Normalize the teacher's images with its own statistics or with the student's (published: CLIP receives ImageNet
    statistics)."""
    student_pass: Literal["resized", "shared"] = "resized"
    """Student features that are translated: `resized` runs the student once more on the image at `input_size` (as
    published, also at prediction); `shared` resizes the features of the full crop to the grid of the resized image.
    Identical without `input_size`."""
    grid: Literal["teacher", "student"] = "teacher"
    """Grid of the loss if those of teacher and student differ; the other map is resized."""
    standardize: bool = False
    """Scale each target vector to mean 0 and variance 1, so that a few large channels do not dominate the loss."""
    loss_weight: Positive = 1.0
    """Weight of this teacher's mean squared error; the weighted errors are averaged over the teachers."""
    fusion_weight: Weight = 0.1
    """Share of the translated and projected features in the student's last map."""


class MTDFRecipe(BaseRecipe):
    """FixMatch with a student that also predicts the features of frozen teachers and uses these predictions."""

    method: Literal["mtdf"]
    student: TrainedBackbone
    """Four maps: of ViT blocks, or of pyramid levels whose strides double."""
    decoder: DecoderConfig | None = None
    """A decoder of plain supervised training, so that a supervised run can be the `start`; None is the published DPT
    head, whose widths follow."""
    decoder_widths: tuple[Width, Width, Width, Width] = (48, 96, 192, 384)
    """Channels of the four maps in the DPT head (ViT-S; B: 96, 192, 384, 768; L: 256, 512, 1024, 1024)."""
    decoder_features: Width = 64
    """Channels of the DPT head's fusion path (ViT-S; B: 128, L: 256)."""
    teachers: Annotated[tuple[TeacherConfig, ...], Field(max_length=64)] = ()
    """Any number of teachers; without teachers this is FixMatch."""
    only_teachers: tuple[str, ...] | None = None
    """Names of the teachers to keep, for ablations with `--set`; None keeps all, [] none."""
    translator_width: Width = 1024
    """Hidden width of each feature translator."""
    fusion: bool = True
    """Mix the translated features into the student's last map; False only distils (ablation)."""
    student_weight: Weight = 0.8
    """Share of the student's own last map in the fusion."""
    unlabeled: bool = True
    """Train on pseudo-labels of unlabeled images; False never reads them (supervised baseline)."""
    confidence: Probability = 0.95
    """Minimum probability of a pseudo-label that is used."""
    class_thresholds: bool = False
    """Multiply `confidence` by the mean probability of a class's pseudo-labels, relative to that of the most certain
    class (after FlexMatch, arXiv 2110.08263, and FreeMatch, arXiv 2205.07246). One threshold for all drops most pixels
    of the rare and difficult classes, so that the student forgets them."""
    pseudo_ramp: Probability = 0.0
    """Part of the run over which the weight of the pseudo-label loss grows linearly from 0 to its value. Early
    pseudo-labels are the worst."""
    loss_divisor: Literal["valid", "confident"] = "valid"
    """Divisor of the pseudo-label loss, a sum over confident pixels: all pixels with data (published), or the confident
    ones."""
    padding: Literal["black", "mean"] = "black"
    """Value of pixels without data: 0 before scaling (published) or the student's normalization mean."""
    strong_views: Annotated[int, Field(ge=1, le=2)] = 1
    """Strongly augmented views of each unlabeled crop (UniMatch V2 has two): a second one gives another estimate of the
    same loss, in a longer step."""
    complementary_dropout: bool = False
    """UniMatch V2: drop half of the channels in one strong view and the other half in the other, so that each half has
    to suffice. The maps must be of equal width, as a ViT's are."""
    ema_decay: Probability = 0.996
    """Upper bound of the decay of the moving average, which makes the pseudo-labels and ships with `ship: average`;
    update k has the decay min(1 - 1/(k + 1), this)."""
    labeled_weight: Weight | None = None
    """Weight of the supervised loss; None, here and below, means 1 / number of losses in use (published), which takes
    half or more of the weight from the labels, the best information there is."""
    pseudo_weight: Weight | None = None
    """Weight of the pseudo-label loss."""
    distill_weight: Weight | None = None
    """Weight of the distillation loss, the mean over teachers."""
    head_lr_scale: Positive = 40.0
    """Learning rate of all parameters outside the student's backbone, as a multiple of the optimizer's."""

    @model_validator(mode="before")
    @classmethod
    def _without_idle_teachers(cls, values: Any) -> Any:
        """Drop the teachers that `only_teachers` leaves out, so that their weights are not needed."""
        if not isinstance(values, dict) or not isinstance(values.get("only_teachers"), list | tuple):
            return values
        wanted, teachers = values["only_teachers"], values.get("teachers")
        if not isinstance(teachers, list | tuple) or not all(isinstance(teacher, dict) for teacher in teachers):
            return values
        names = [teacher.get("name") for teacher in teachers]
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ValueError(f"only_teachers names {unknown[0]!r}; the recipe's teachers are {names}")
        return values | {"teachers": [teacher for teacher in teachers if teacher.get("name") in wanted]}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"two teachers share a name: {names}; rename one")
        if self.complementary_dropout and self.strong_views != 2:
            raise ValueError(
                "complementary_dropout drops half of the channels in each of two views: set strong_views to 2"
            )
        if self.decoder is not None:
            self.decoder.check_batch(self.trainer.batch_of("labeled"))
            if self.unlabeled:
                self.decoder.check_batch(self.strong_views * self.trainer.batch_of("unlabeled"))
        if self.decoder is not None and self.decoder.type == "deeplabv3plus":
            raise ValueError("decoder.type: mtdf's student has four maps; choose segformer, upernet, dpt or linear")
        return self

    @property
    def trainer_averages(self) -> bool:
        """False: the pseudo-labeller is the average."""
        return False

    def stream_names(self) -> tuple[str, ...]:
        """Labeled and unlabeled images; the supervised baseline reads only the former."""
        return ("labeled", "unlabeled")
