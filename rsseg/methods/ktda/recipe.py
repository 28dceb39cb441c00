"""Recipe of KTDA (arXiv 2412.06664).

Defaults of options follow the code that produced the published numbers; each docstring names the plainer alternative.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rsseg.config import BackboneConfig, BaseRecipe, Count, Positive, Probability, Strict


class FamConfig(Strict):
    """Feature alignment: student levels to the teacher's width and grid."""

    grid: Count | Literal["auto"] = "auto"
    """Side of the square grid in cells, whatever the image's shape (published: 19 for 256 pixels, 37 for 512), or
    `auto`: one cell per started patch of the image."""
    width: Count | None = None
    """Channels of every level; None takes the teacher's."""


class NeckConfig(Strict):
    """Multi-level neck: rebuilds a pyramid from maps of one size."""

    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (4, 2, 1, 0.5)
    """Size factor per level."""
    width: Count | None = None
    """Channels of every level; None keeps the width of the first input."""
    sampling: Literal["factor", "ratio"] = "factor"
    """Where a size is rounded down, `factor` (published) samples at multiples of 1/scale and leaves out the map's last
    part; `ratio` spreads the samples over all of it."""


class FmmConfig(Strict):
    """Feature modulation: blocks on the tokens of each level."""

    type: Literal["mlp", "vit_block"] = "mlp"
    """`mlp` is a bottleneck without residual, `vit_block` a transformer block (the published models use four)."""
    depth: Count = 1
    """Blocks per level."""
    rank_dim: Count = 4
    """`mlp` only: the bottleneck has channels // rank_dim."""
    heads: Count = 8
    """`vit_block` only."""
    norm_eps: Positive = 1e-5
    """`vit_block` only: of the layer norms. The published weights belong to 1e-5; newer timm blocks have 1e-6."""


class DecoderConfig(Strict):
    """The segmentation head."""

    type: Literal["upernet", "segformer"] = "upernet"
    channels: Count = 512
    """Published: 512 for `upernet`, 256 for `segformer`."""
    pool_scales: tuple[Count, ...] = (1, 2, 3, 6)
    """`upernet` only: sides of the pooled grids."""
    dropout: Probability = 0.1
    align_corners: bool = False
    """Of every bilinear resize, the one to the image's size included."""


class AuxConfig(Strict):
    """One auxiliary FCN head. It trains, but does not ship."""

    level: Annotated[int, Field(ge=0)] = 2
    """Which of the decoder's inputs it sees."""
    channels: Count = 256
    num_convs: Count = 1
    concat_input: bool = False
    dropout: Probability = 0.1
    weight: Positive = 0.4
    """Of its cross-entropy, before the division by the number of heads."""


class DistillationConfig(Strict):
    """What pulls FAM's outputs to the teacher's maps: alpha * KL + (1 - alpha) * mean squared error, mean over levels.

    As published, the sum starts at 4 to 1000 times the cross-entropy and can hurt small data sets; `weight`, `decay`
    and `standardize` are the remedies, all off in the published recipes.
    """

    loss: Literal["kl_mse", "cosine"] = "kl_mse"
    """`cosine` replaces both terms by 1 - cosine between the channel vectors of each cell."""
    alpha: Probability = 0.5
    temperature: Positive = 1.0
    """Of the KL term, which is multiplied by its square."""
    kl_axis: Literal["width", "height", "channel"] = "width"
    """Axis along which values form one distribution: the published code takes each row of a channel; `channel` is the
    usual one for tokens."""
    kl_reduction: Literal["batchmean", "mean"] = "batchmean"
    """`batchmean` (published) divides the sum over all distributions by the batch size only, so it grows with channels
    and rows; `mean` averages over distributions."""
    alpha_zero_halving: bool = True
    """With alpha 0 the published code halves the loss once more; False does not."""
    standardize: bool = False
    """Give each channel of a teacher map mean 0 and standard deviation 1 over the batch first."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the whole term beside the segmentation loss."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the weight grows linearly from 0."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the weight falls from the end of the warm-up to the last step."""
    final: Probability = 0.0
    """Part of the weight that is left at the last step, if it decays."""


class KTDARecipe(BaseRecipe):
    """A pyramid student taught by a frozen vision transformer.

    Only `student` is required: without teacher, FAM, neck and FMM this is plain supervised training of the decoder on
    the student's own levels.
    """

    method: Literal["ktda"]
    student: BackboneConfig
    teacher: BackboneConfig | None = None
    """None trains without distillation."""
    teacher_input: Literal["own", "student_normalized"] = "own"
    """Normalize the teacher's images with its own statistics, or feed it the student's normalized batch (published;
    the same for networks with ImageNet's statistics)."""
    fam: FamConfig | None = None
    fuse: bool = False
    """Sum all FAM levels into one map, which is distilled and decoded; the teacher's maps are summed as well."""
    neck: NeckConfig | None = None
    fmm: FmmConfig | None = None
    decoder: DecoderConfig = DecoderConfig()
    aux: tuple[AuxConfig, ...] = ()
    distillation: DistillationConfig = DistillationConfig()
    """Not used without a teacher."""
    loss_divisor: Literal["all", "valid"] = "all"
    """Divisor of the cross-entropy: all pixels, unlabeled ones included (published), or the labeled ones."""
    weight_decay_exempt: Literal["names_with_norm", "norms_and_biases", "none"] = "names_with_norm"
    """Parameters without weight decay. `names_with_norm` (published) goes by the parameter's name, so batch norms,
    layer norms without a name of their own, layer scales and biases decay; `norms_and_biases` exempts all vectors."""
    student_passes: Annotated[int, Field(ge=1, le=2)] = 1
    """The published code runs the student once more for the distillation. With stochastic depth the two passes draw
    different sub-networks; without it 2 costs time and changes nothing but batch norm's running averages."""

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
