"""Recipe of KTDA (arXiv 2412.06664).

Defaults follow the code that produced the published numbers; docstrings name the alternative.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rsseg.config import BackboneConfig, BaseRecipe, Count, Positive, Probability, Strict


class FamConfig(Strict):
    """Feature alignment: projects student levels to the teacher's width and grid."""

    grid: Count | Literal["auto"] = "auto"
    """Side of the square grid in cells for images of any shape (published: 19 for 256 pixels, 37 for 512), or `auto`:
    one cell per started patch of the image."""
    width: Count | None = None
    """Channels of every level; None uses the teacher's."""


class NeckConfig(Strict):
    """Multi-level neck: builds a pyramid from maps of one size."""

    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (4, 2, 1, 0.5)
    """Size factor per level."""
    width: Count | None = None
    """Channels of every level; None keeps the width of the first input."""
    sampling: Literal["factor", "ratio"] = "factor"
    """If a size was rounded down, `factor` (published) samples at multiples of 1/scale, which omits the end of the map;
    `ratio` spreads the samples over the whole map."""


class FmmConfig(Strict):
    """Feature modulation: blocks on the tokens of each level."""

    type: Literal["mlp", "vit_block"] = "mlp"
    """`mlp`: bottleneck without residual; `vit_block`: transformer block (the published models use four)."""
    depth: Count = 1
    """Blocks per level."""
    rank_dim: Count = 4
    """`mlp` only: the bottleneck has channels // rank_dim."""
    heads: Count = 8
    """`vit_block` only."""
    norm_eps: Positive = 1e-5
    """`vit_block` only: eps of the layer norms. Published weights need 1e-5; newer timm blocks use 1e-6."""


class DecoderConfig(Strict):
    """The segmentation head."""

    type: Literal["upernet", "segformer"] = "upernet"
    channels: Count = 512
    """Published: 512 for `upernet`, 256 for `segformer`."""
    pool_scales: tuple[Count, ...] = (1, 2, 3, 6)
    """`upernet` only: sides of the pooled grids in cells."""
    dropout: Probability = 0.1
    align_corners: bool = False
    """Of every bilinear resize, including the one to the image's size; for checkpoints of code bases that set it."""


class AuxConfig(Strict):
    """One auxiliary FCN head, used in training only. Fields are those of the common FCN head configurations."""

    level: Annotated[int, Field(ge=0)] = 2
    """Index of the decoder input that it reads."""
    channels: Count = 256
    num_convs: Count = 1
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


class KTDARecipe(BaseRecipe):
    """A pyramid student taught by a frozen vision transformer.

    Only `student` is required: without teacher, FAM, neck and FMM the decoder is trained on the student's own levels,
    without distillation.
    """

    method: Literal["ktda"]
    student: BackboneConfig
    teacher: BackboneConfig | None = None
    """None trains without distillation."""
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
    aux: tuple[AuxConfig, ...] = ()
    distillation: DistillationConfig = DistillationConfig()
    """Unused without a teacher."""
    loss_divisor: Literal["all", "valid"] = "all"
    """Divisor of the cross-entropy: all pixels, unlabeled ones included (published), or the labeled ones."""
    weight_decay_exempt: Literal["names_with_norm", "norms_and_biases", "none"] = "names_with_norm"
    """Parameters without weight decay. `names_with_norm` (published): those with "norm" in their name, so that batch
    norms, some layer norms, layer scales and biases decay; `norms_and_biases`: all vectors."""
    student_passes: Literal[1, 2] = 1
    """2 repeats the student's forward pass for the distillation, as the published code does: with stochastic depth the
    passes draw different sub-networks; otherwise only running statistics of batch norm change."""

    def stream_names(self) -> tuple[str, ...]:
        """KTDA trains on labeled images only."""
        return ("labeled",)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if set(self.optimizers) != {"main"}:
            raise ValueError(f"optimizers: ktda has exactly one, 'main'; found {sorted(self.optimizers)}")
        if self.fam is None and (self.teacher or self.fuse):
            raise ValueError("fam: 'teacher' and 'fuse' need feature alignment, 'fam: {}' takes its defaults")
        if self.fam and self.teacher is None and (self.fam.width is None or self.fam.grid == "auto"):
            raise ValueError("fam: without a teacher give 'width' and 'grid' as numbers")
        batch = self.trainer.stream_batch_sizes.get("labeled", self.trainer.batch_size)
        if self.decoder.type == "upernet" and 1 in self.decoder.pool_scales and batch == 1:
            raise ValueError(
                "trainer.batch_size: the upernet decoder needs two samples, as the batch norm of pool scale 1 sees one "
                "value of each; raise it, or set decoder.pool_scales: [2, 3, 6]"
            )
        return self
