"""Recipe of RS-MTDF (arXiv 2506.08772): semi-supervised training with several frozen teachers."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rsseg.config import BackboneConfig, BaseRecipe, Count, Positive, Probability, Strict

Weight = Annotated[float, Field(ge=0)]


class TeacherConfig(Strict):
    """One frozen teacher, and how the student imitates it. The student learns to predict the teacher's last map."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]
    """Names the translator in the model file and the loss in the log."""
    backbone: BackboneConfig
    """Its last returned map is the target. `dtype: bfloat16` halves its memory."""
    input_size: Count | None = None
    """Side in pixels of the square that the image is resized to for this teacher; None keeps the crop."""
    bands: tuple[str, ...] | None = None
    """Bands that the teacher sees; None takes all bands of the task."""
    teacher_input: Literal["own", "student_normalized"] = "own"
    """Normalize the teacher's images with its own statistics, or feed it the student's normalized batch (published:
    CLIP gets ImageNet statistics)."""
    student_pass: Literal["resized", "shared"] = "resized"
    """Which student features are translated: `resized` runs the student once more on the image at `input_size` (the
    publication; also at prediction), `shared` takes the features of the full crop, resized to the grid that the resized
    image would have. Without `input_size` both are the same."""
    grid: Literal["teacher", "student"] = "teacher"
    """Where the teacher's grid differs from the student's, the loss compares on this one; the other map is resized."""
    standardize: bool = False
    """Bring each target vector to mean 0 and variance 1, so that a few large channels do not rule the loss."""
    loss_weight: Positive = 1.0
    """Weight of this teacher's mean squared error; the weighted errors are averaged over the teachers."""
    fusion_weight: Weight = 0.1
    """Share of the translated and projected features in the student's last map."""


class MTDFRecipe(BaseRecipe):
    """FixMatch with a ViT student that also predicts, and feeds on, the features of frozen teachers."""

    method: Literal["mtdf"]
    student: BackboneConfig
    """Four maps: of ViT blocks, or of pyramid levels whose strides double."""
    decoder_widths: tuple[Count, Count, Count, Count] = (48, 96, 192, 384)
    """Channels of the four maps in the DPT head (small; base 96, 192, 384, 768; large 256, 512, 1024, 1024)."""
    decoder_features: Count = 64
    """Channels of the DPT head's fusion path (small; base 128, large 256)."""
    teachers: tuple[TeacherConfig, ...] = ()
    """Any number; none is FixMatch alone."""
    only_teachers: tuple[str, ...] | None = None
    """Names of the teachers to keep, for ablations; None keeps all of them, [] none."""
    start_from: Path | None = None
    """Model file or run folder of the same network, such as an imported one, whose weights the student starts from.
    `student_pass` may differ from the model's."""
    translator_width: Count = 1024
    """Hidden width of each feature translator."""
    fusion: bool = True
    """Mix the translated features into the student's last map; False only distils."""
    student_weight: Weight = 0.8
    """Share of the student's own last map in the mix."""
    unlabeled: bool = True
    """Train on pseudo-labels of unlabeled images; False leaves their stream unread (the supervised baseline)."""
    confidence: Probability = 0.95
    """Softmax maximum that a pseudo-label needs to count."""
    loss_divisor: Literal["valid", "confident"] = "valid"
    """Divisor of the pseudo-label loss, a sum over confident pixels: all pixels with data (published), or the confident
    ones."""
    padding: Literal["black", "mean"] = "black"
    """Value of pixels without data: 0 before scaling (published), or the student's normalization mean."""
    strong_views: Annotated[int, Field(ge=1, le=2)] = 1
    """Strongly augmented views of each unlabeled crop (UniMatch V2 has two)."""
    complementary_dropout: bool = False
    """UniMatch V2: drop half of the channels in one strong view and the other half in the other."""
    ema_decay: Probability = 0.996
    """Upper bound of the decay of the moving average that makes the pseudo-labels, and ships with `ship: average`;
    update k decays by min(1 - 1/(k + 1), this)."""
    labeled_weight: Weight | None = None
    """Weight of the supervised loss; None here and below: 1 / number of losses in use (published)."""
    pseudo_weight: Weight | None = None
    """Weight of the pseudo-label loss."""
    distill_weight: Weight | None = None
    """Weight of the teachers' mean loss."""
    head_lr_scale: Positive = 40.0
    """Learning rate of everything but the student's backbone, as a multiple of the optimizer's."""

    @model_validator(mode="before")
    @classmethod
    def _without_idle_teachers(cls, values: Any) -> Any:
        """Drop the teachers that `only_teachers` leaves out, so that nobody asks for their weights."""
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
        if set(self.optimizers) != {"main"}:
            raise ValueError(f"mtdf has one optimizer, called main; the recipe names {sorted(self.optimizers)}")
        return self

    @property
    def trainer_averages(self) -> bool:
        """Never: the pseudo-labeller is the average."""
        return False

    def stream_names(self) -> tuple[str, ...]:
        """Labeled images and unlabeled ones; the supervised baseline reads only the first."""
        return ("labeled", "unlabeled")
