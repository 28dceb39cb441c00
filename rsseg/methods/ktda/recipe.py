"""Recipe of KTDA (arXiv 2412.06664).

Defaults follow the code that produced the published numbers; docstrings name the alternative.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rsseg.config import BackboneConfig, BaseRecipe, TrainedBackbone
from rsseg.fields import Depth, Index, ModelPath, Positive, Probability, Side, Strict, Width


class FamConfig(Strict):
    """Feature alignment: projects student levels to the teacher's width and grid."""

    grid: Side | Literal["auto"] = "auto"
    """Side of the square grid in cells for images of any shape (published: 19 for 256 pixels, 37 for 512), or `auto`:
    one cell per started patch of the image."""
    width: Width | None = None
    """Channels of every level; None uses the teacher's."""
    path: Literal["main", "side"] = "main"
    """`main` (published): the decoder reads FAM's outputs, so all features pass through the teacher's coarse grid.
    `side`: the decoder reads the student's own levels, including fine ones; FAM is used for the distillation only and
    does not ship."""


class NeckConfig(Strict):
    """Multi-level neck: builds a pyramid from maps of one size."""

    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=16)], ...], Field(min_length=1, max_length=64)] = (
        4,
        2,
        1,
        0.5,
    )
    """Size factor per level."""
    width: Width | None = None
    """Channels of every level; None keeps the width of the first input."""
    sampling: Literal["factor", "ratio"] = "factor"
    """If a size was rounded down, `factor` (published) samples at multiples of 1/scale, which omits the end of the map;
    `ratio` spreads the samples over the whole map."""


class FmmConfig(Strict):
    """Feature modulation: blocks on the tokens of each level."""

    type: Literal["mlp", "vit_block"] = "mlp"
    """`mlp`: bottleneck without residual; `vit_block`: transformer block (the published models use four)."""
    depth: Depth = 1
    """Blocks per level."""
    rank_dim: Width = 4
    """`mlp` only: the bottleneck has channels // rank_dim."""
    heads: Depth = 8
    """`vit_block` only."""
    norm_eps: Positive = 1e-5
    """`vit_block` only: eps of the layer norms. Published weights need 1e-5; newer timm blocks use 1e-6."""


class DecoderConfig(Strict):
    """The segmentation head."""

    type: Literal["upernet", "segformer"] = "upernet"
    channels: Width = 512
    """Published: 512 for `upernet`, 256 for `segformer`."""
    pool_scales: Annotated[tuple[Depth, ...], Field(max_length=64)] = (1, 2, 3, 6)
    """`upernet` only: sides of the pooled grids in cells."""
    dropout: Probability = 0.1
    align_corners: bool = False
    """For every bilinear resize, including the one to the image's size; for checkpoints of code bases that set it."""


class AuxConfig(Strict):
    """One auxiliary FCN head, used in training only. Fields are those of the common FCN head configurations."""

    level: Index = 2
    """Index of the decoder input that it reads."""
    channels: Width = 256
    num_convs: Depth = 1
    concat_input: bool = False
    """Concatenate the input to the output of the convolutions and apply one more."""
    dropout: Probability = 0.1
    weight: Positive = 0.4
    """Weight of its cross-entropy, before the division by the number of heads."""


class DistillationConfig(Strict):
    """Loss between FAM's outputs and the teacher's maps: alpha * KL + (1 - alpha) * mean squared error, averaged.

    As published, it starts at 4 to 1000 times the cross-entropy and can harm training on small datasets. `weight`,
    `warmup_steps`, `decay` and `standardize` reduce it; the published recipes do not use them.
    """

    loss: Literal["kl_mse", "cosine"] = "kl_mse"
    """`cosine` replaces both terms by 1 - cosine between the channel vectors of each cell."""
    alpha: Probability = 0.5
    temperature: Positive = 1.0
    """Of the KL term, which is multiplied by the squared temperature."""
    kl_axis: Literal["width", "height", "channel"] = "width"
    """Axis along which values form one distribution: each row of a channel in the published code; `channel` is the
    usual choice for tokens."""
    kl_reduction: Literal["batchmean", "mean"] = "batchmean"
    """`batchmean` (published) divides the sum over all distributions by the batch size, so it grows with channels and
    rows; `mean` averages over distributions."""
    alpha_zero_halving: bool = True
    """With alpha 0, halve the loss once more, as the published code does."""
    standardize: bool = False
    """Scale each channel of a teacher map to mean 0 and standard deviation 1 over the batch first."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the loss relative to the segmentation loss."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the weight grows linearly from 0."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the weight falls to 0 from the end of the warm-up to the last step."""


class TaskTeacherConfig(Strict):
    """A second teacher: a model trained on the task before, usually a large network with supervised fine-tuning.

    A foundation model's features do not contain class probabilities. A fine-tuned teacher gives the student the
    probability of every class per pixel, also on images without labels.
    """

    model: ModelPath
    """Model file or run folder of any method, for the same classes, bands and scaling."""
    weight: Positive = 1.0
    """Weight of the divergence from the teacher's class probabilities (mean over valid pixels), added to the loss."""
    temperature: Positive = 2.0
    """Temperature of both softmaxes; the divergence is multiplied by its square. Values above 1 give more weight to
    unlikely classes."""
    unlabeled: bool = False
    """Also use the teacher on the stream `unlabeled`. The teacher gets the crop, the student a strong view of it
    (`data.strong`), so that the student does not just copy the teacher's errors."""
    cutmix: bool = False
    """`unlabeled` only: paste a box of another crop into the strong view (`data.strong.cutmix_*`), and into the
    teacher's probabilities. Boundaries without context make the student rely on what is inside each object."""


class KTDARecipe(BaseRecipe):
    """A pyramid student taught by a frozen vision transformer.

    Only `student` is required: without teacher, FAM, neck and FMM the decoder is trained on the student's own levels,
    without distillation.
    """

    method: Literal["ktda"]
    student: TrainedBackbone
    teacher: BackboneConfig | None = None
    """None trains without distillation of features, unless `task_teacher` and `fam` are given."""
    task_teacher: TaskTeacherConfig | None = None
    """Without `teacher`, `fam.path: side` distils the maps of this model's backbone."""
    teacher_input: Literal["own", "student_normalized"] = "own"
    """Normalize the teacher's images with its own statistics or with the student's (published; identical for networks
    with ImageNet statistics)."""
    fam: FamConfig | None = None
    fuse: bool = False
    """Sum all FAM levels into one map, which is distilled and decoded; the teacher's maps are summed as well
    (published ablation)."""
    neck: NeckConfig | None = None
    fmm: FmmConfig | None = None
    decoder: DecoderConfig = DecoderConfig()
    aux: Annotated[tuple[AuxConfig, ...], Field(max_length=64)] = ()
    distillation: DistillationConfig = DistillationConfig()
    """Unused without a teacher."""
    loss_divisor: Literal["all", "valid"] = "all"
    """Divisor of the cross-entropy: all pixels, unlabeled ones included (published), or the labeled ones."""
    weight_decay_exempt: Literal["names_with_norm", "norms_and_biases", "none"] = "names_with_norm"
    """Parameters without weight decay. `names_with_norm` (published): those with "norm" in their name, so that batch
    norms, some layer norms, layer scales and biases decay; `norms_and_biases`: all vectors."""
    student_passes: Annotated[int, Field(ge=1, le=2)] = 1
    """2 repeats the student's forward pass for the distillation, as the published code does: with stochastic depth the
    passes draw different sub-networks; otherwise only running statistics of batch norm change."""

    def stream_names(self) -> tuple[str, ...]:
        """Labeled images, and unlabeled ones if a task teacher labels them."""
        learns = self.task_teacher is not None and self.task_teacher.unlabeled
        return ("labeled", "unlabeled") if learns else ("labeled",)

    @property
    def side(self) -> bool:
        """Whether FAM is only a side branch for the distillation."""
        return self.fam is not None and self.fam.path == "side"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.fam is None and (self.teacher or self.fuse):
            raise ValueError("fam: 'teacher' and 'fuse' need feature alignment, 'fam: {}' takes its defaults")
        if self.side and (self.neck or self.fmm or self.fuse):
            raise ValueError(
                "fam.path: side gives the student's own levels to the decoder; neck, fmm and fuse belong to FAM's "
                "outputs: leave them out, or set fam.path: main"
            )
        if self.side and self.teacher is None and self.task_teacher is None:
            raise ValueError("fam.path: side is for distillation only; give a teacher or task_teacher")
        if self.fam and not self.side and self.teacher is None and (self.fam.width is None or self.fam.grid == "auto"):
            raise ValueError("fam: without a teacher give 'width' and 'grid' as numbers")
        batch = self.trainer.batch_of("labeled")
        if self.decoder.type == "upernet" and 1 in self.decoder.pool_scales and batch == 1:
            raise ValueError(
                "trainer.batch_size: the upernet decoder needs two samples, as the batch norm of pool scale 1 sees one "
                "value of each; raise it, or set decoder.pool_scales: [2, 3, 6]"
            )
        return self
