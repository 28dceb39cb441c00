"""The parts that all recipes share. Free of torch, so that `rsseg recipe validate` is fast.

A field's docstring gives its meaning, unit and the origin of its default; `rsseg recipe schema` exports them.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from rsseg.fields import Batch, Count, Index, ModelPath, Positive, Probability, Range, Side, Strict, Whole, ascending


class BackboneConfig(Strict):
    """One network of the zoo; see `rsseg backbone ls`."""

    name: str
    """Name in the zoo, such as `convnext_base` or `vit_base_patch14_dinov2`."""
    weights: str = "pretrained"
    """`pretrained` (hub or cache), `random`, or the path of a .safetensors file in timm's names."""
    out_indices: Annotated[tuple[Index, ...], Field(max_length=64)] | None = None
    """Indices of the pyramid levels or ViT blocks to return, from 0; None uses the zoo's default."""
    out_norm: Literal["all", "last", "none"] | None = None
    """Which returned maps pass a LayerNorm: for a ViT the network's final norm (`last` as in mmpretrain, `all` as in
    DINOv2), for a pyramid one norm per level. None uses the zoo's default."""
    image_size: Side | None = None
    """Image side in pixels that random weights and `pos_embed_round_trip` lay the position table out for; None keeps
    the network's own."""
    pos_embed: Literal["timm", "dinov2", "bicubic"] = "timm"
    """Resampling of position embeddings: timm (antialiased), DINOv2 (scale factor with offset 0.1), or bicubic without
    antialiasing (mmpretrain)."""
    pos_embed_round_trip: bool = False
    """Resize the stored table to `image_size` at load, and that one to other sizes (mmpretrain, KTDA's cloud run)."""
    pad: Literal["corner", "error"] = "corner"
    """Inputs that are not a multiple of the patch: pad with zeros at right and bottom after normalization, or raise."""
    drop_path: Probability = 0.0
    """Stochastic depth rate of the last block."""
    frozen_stages: Annotated[int, Field(ge=0)] = 0
    """First stages (pyramid; the stem belongs to stage 0) or blocks (ViT) that do not train, for few images."""
    checkpoint: bool = False
    """Activation checkpointing of a vision transformer: less memory in training for one more forward pass per step."""
    statistics: Literal["pretrained", "data"] = "pretrained"
    """Normalize with the statistics of the weights (their mean for other bands than red, green, blue) or of the
    training data."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Storage and compute type of a frozen teacher."""


def _trains_in_float32(config: BackboneConfig) -> BackboneConfig:
    if config.dtype != "float32":
        raise ValueError(
            f"dtype: {config.dtype} is for frozen teachers, a network that trains is stored in float32. Leave it out; "
            "trainer.amp_dtype computes in 16 bits"
        )
    return config


TrainedBackbone = Annotated[BackboneConfig, AfterValidator(_trains_in_float32)]
"""A backbone whose weights are optimized."""


class ScheduleConfig(Strict):
    """Learning rate as a product of a warm-up and a decay factor, by optimizer step."""

    warmup_steps: Whole = 0
    warmup_start: Probability = 1e-3
    """Factor at step 0; grows linearly to 1 at step `warmup_steps - 1` (`mmengine`) or `warmup_steps` (`mmcv`)."""
    warmup_style: Literal["mmengine", "mmcv"] = "mmengine"
    """Where warm-up and decay end: `mmengine` at their last step (a run's last step has the rate `min_lr`), `mmcv` at
    the step after it."""
    decay: Literal["poly", "cosine", "constant"] = "poly"
    power: Positive = 0.9
    decay_begin: Whole = 0
    """First step that decays; may lie inside the warm-up, then both factors act."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    lag: Annotated[int, Field(ge=0, le=1)] = 0
    """1 if the published code sets the rate after the step, so that steps 0 and 1 share the initial one."""


class OptimizerConfig(Strict):
    """One optimizer; each method defines the names (`rsseg recipe cat` shows them)."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Positive = 6e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Positive = 1e-8
    momentum: Probability = 0.9
    """SGD only."""
    schedule: ScheduleConfig = ScheduleConfig()


class TrainerConfig(Strict):
    """Training length, batch size, precision, evaluation and checkpoints."""

    steps: Count = 20000
    """Optimizer steps."""
    batch_size: Batch | Literal["auto"] = 8
    """Samples per stream, per process and micro-step. `auto`: as many as fit into memory, 2 to 256; the run's recipe
    then has the number. Learning rates and steps are not adapted to it."""
    stream_batch_sizes: Mapping[str, Batch] = {}
    """Exceptions to `batch_size` by stream name."""
    grad_accum_steps: Batch = 1
    """Batches whose gradients are summed per optimizer step, for batches that do not fit in memory."""
    amp_dtype: Literal["auto", "bf16", "fp16", "none"] = "none"
    """Autocast type; `auto` takes bf16 where the device computes with it and none elsewhere."""
    clip_grad: Positive | None = None
    """Largest L2 norm of each optimizer's gradient; None does not clip."""
    eval_every: Count = 1000
    checkpoint_every: Count = 1000
    log_every: Count = 20
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers to report to besides the run folder's tables; each needs the extra of its name."""
    keep_checkpoints: Count = 1
    """Newest checkpoints kept beside the best; above 1, `step-*.safetensors` are kept and the newest is also `last`."""
    patience: Count | None = None
    """Evaluations without a better score before the run ends."""
    monitor: Literal["miou", "mf1", "oa", "entropy", "last"] = "miou"
    """Score on the validation split that chooses `best`; `last` ships the final weights. `entropy` needs no labels and
    opens none: the mean entropy of the predicted probabilities, 0 (certain) to 1, of which the lowest is best. It
    measures confidence, not accuracy."""
    max_hours: Positive | None = None
    """Hours after which a run stops, counted from its start or its last resume. It is saved and can be resumed."""
    workers: Annotated[int, Field(ge=0, le=256)] = 2
    """Loader processes; 0 loads in the training process. Results do not depend on it."""
    channels_last: bool = False
    """Store tensors channels last, which is faster for convolutions on GPUs with tensor cores."""
    sync_batch_norm: bool = False
    """Compute batch-norm statistics over the batches of all GPUs, for batches that are small on each."""
    sharding: Literal["none", "full"] = "none"
    """`full`: each process keeps a share of weights, gradients and optimizer states, for networks that do not fit."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """Capture the training step of a GPU as CUDA graphs after some steps, which saves the launches of single kernels:
    small networks train much faster. `auto`: with one process, if the step can be captured; `on`: or an error."""
    tf32: bool = True
    """Compute float32 products of a GPU in TF32 (10 bits of mantissa), several times as fast; not `deterministic`."""
    deterministic: bool = False
    """Use deterministic kernels on a GPU too, as a CPU always does; an operation that has none is an error."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    def batch_of(self, stream: str) -> int:
        """Samples of a stream per process and micro-step; 2 for `auto`, the least that it may become."""
        size = self.stream_batch_sizes.get(stream, self.batch_size)
        return 2 if size == "auto" else size


class LossConfig(Strict):
    """Additions of every method to its cross-entropy on labels. The defaults give the published losses."""

    class_weights: Literal["none", "auto"] | tuple[Annotated[float, Field(ge=0)], ...] = "none"
    """Class weights of the cross-entropy, in the order of the task. Rare classes have little weight in a mean over
    pixels, but full weight in mean IoU. `auto`: one over the square root of the class's share in the labeled training
    images, scaled to a mean of 1 over their pixels. Not used by DASegNet's decoders with class weights of their own."""
    focal_gamma: Annotated[float, Field(ge=0)] = 0.0
    """Focal loss (arXiv 1708.02002): each pixel's cross-entropy is multiplied by (1 - p)^gamma, p being the probability
    of its class, which reduces the weight of pixels that are already classified well. 0: all pixels alike."""
    dice: Annotated[float, Field(ge=0)] = 0.0
    """Weight of an added Dice loss (arXiv 1606.04797): one minus the overlap of probabilities and labels per class,
    mean over the classes in the batch. It is closer to IoU than to pixel accuracy."""


PRESETS: Mapping[str, Mapping[str, object]] = {
    "light": {"scale_range": (0.8, 1.25), "hflip": 0.5, "vflip": 0.5, "rot90": 0.75, "photometric": "none"},
    "strong": {"scale_range": (0.5, 2.0), "hflip": 0.5, "vflip": 0.5, "rot90": 0.75, "photometric": "fast"},
}
"""Values of `AugmentConfig` by preset."""


class AugmentConfig(Strict):
    """Weak augmentation of a training crop, applied in this order."""

    preset: Literal["light", "strong"] | None = None
    """Defaults for nadir images, which have no preferred direction; keys given in the recipe override them. `light`:
    all eight orientations, scales 0.8 to 1.25. `strong`: also scales 0.5 to 2 and colour jitter, for few images, or
    other places and seasons."""
    crop_size: Side = 512
    """Side of the square crop in pixels."""
    scale_range: Range | None = None
    """Range of the random image scale before the crop; None keeps the scale."""
    scale_style: Literal["uniform", "long_side"] = "uniform"
    """`long_side` draws the integer length of the long side (UniMatch), `uniform` the factor itself."""
    resampling: Literal["opencv", "pillow"] = "opencv"
    """Resampling of a scaled crop. `opencv`: from whole source pixels, without antialiasing. `pillow`: antialiased
    where it shrinks, cut from the scaled whole image (UniMatch); meant for tiles, slow on whole scenes."""
    pad_first: bool = False
    """Pad images that are smaller than the crop before mirroring and turning (UniMatch), so that the padding can lie at
    any side; False pads last, at right and bottom."""
    crop_max_class_ratio: Probability = 1.0
    """Redraw the crop (10 tries) while one class covers more than this part of it; 1 never redraws."""
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    rot90: Probability = 0.0
    """Probability of a turn by 90, 180 or 270 degrees."""
    photometric: Literal["none", "mmseg", "fast"] = "none"
    """`mmseg` is the published distortion on 8-bit red, green, blue (exact arithmetic of OpenCV's 8-bit HSV); `fast`
    jitters brightness, contrast, saturation and hue of any bands in one pass."""
    fit: Literal["crop", "squeeze"] = "crop"
    """`squeeze` resizes the whole image to the crop size without keeping its aspect ratio (ST-DASegNet's target)."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        preset = PRESETS.get(str(values.get("preset"))) if isinstance(values, dict) else None
        return values if preset is None else {**preset, **values}


class StrongConfig(Strict):
    """Strong views of a weak crop (same geometry): colour jitter, grey, blur, and CutMix boxes."""

    jitter_probability: Probability = 0.8
    brightness: Annotated[float, Field(ge=0, le=100)] = 0.5
    contrast: Annotated[float, Field(ge=0, le=100)] = 0.5
    saturation: Annotated[float, Field(ge=0, le=100)] = 0.5
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.25
    gray_probability: Probability = 0.2
    blur_probability: Probability = 0.5
    blur_sigma: Range = (0.1, 2.0)
    """Pixels."""
    cutmix_probability: Probability = 0.5
    cutmix_area: Annotated[tuple[Probability, Probability], AfterValidator(ascending)] = (0.02, 0.4)
    cutmix_aspect: Range = (0.3, 1 / 0.3)


class MergeConfig(Strict):
    """Classes made of a dataset's classes, by name. Each of these must be named once, in `into` or in `ignore`."""

    into: Annotated[Mapping[str, Annotated[tuple[str, ...], Field(min_length=1)]], Field(min_length=1)]
    """Class of the task, in order -> classes of the dataset that become it."""
    ignore: tuple[str, ...] = ()
    """Classes of the dataset whose pixels are ignored."""

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        names = [*(name for several in self.into.values() for name in several), *self.ignore]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"class {twice[0]!r} is named twice")
        return self


class SelectConfig(Strict):
    """Selection of prepared images for a stream or a split; all conditions must hold."""

    path: Path | None = None
    """Prepared dataset to use instead of `data.path`."""
    bands: tuple[str, ...] | None = None
    """Bands of these images in network order, where they have other names than the task's: near infrared, red and green
    for a network of red, green and blue. None uses those of the same names."""
    classes: MergeConfig | None = None
    """Mapping of that dataset's classes to the task's; None expects the same names, in any order."""
    split: str | None = None
    domain: str | None = None
    items: Path | None = None
    """Text file with one image path per line, as in the index."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Seeded random share of the images, chosen so that every class is present if possible."""
    count: Count | None = None
    """Like `fraction`, as a number of images."""
    complement: bool = False
    """Select the images that `fraction`, `count` or `items` would leave out."""
    augment: AugmentConfig | None = None
    """Augmentation to use instead of `data.augment`."""


class DataConfig(Strict):
    """Sources and augmentation of the images."""

    path: Path
    """Folder made by `rsseg dataset prepare`, relative to the working folder."""
    bands: tuple[str, ...] | None = None
    """Bands by name, in network order; None uses all."""
    classes: MergeConfig | None = None
    """Merges classes of the dataset `path`; None keeps them."""
    augment: AugmentConfig = AugmentConfig()
    strong: StrongConfig = StrongConfig()
    streams: Mapping[str, SelectConfig] = {}
    """Per training stream of the method; the method's defaults hold for keys that are not given."""
    val: SelectConfig = SelectConfig(split="val")
    test: SelectConfig = SelectConfig(split="test")
    rare_class_sampling: Positive | None = None
    """Temperature of rare class sampling (arXiv 2111.14887: 0.01) for labeled training images: draw a class, rare ones
    more often, then an image that contains it, and up to ten times a crop until one percent of its pixels have that
    class. None draws images uniformly, as published for all three methods."""
    match_gsd: bool = False
    """Resample images of other datasets to the ground sampling distance of `data.path`, as declared by both, before all
    other steps, in training and evaluation."""
    cache: bool = True
    """Convert each image once to an uncompressed file beside the index that is memory-mapped afterwards."""

    def augment_of(self, stream: str) -> AugmentConfig:
        """Augmentation of a training stream: its own, or that of all."""
        select = self.streams.get(stream)
        return self.augment if select is None or select.augment is None else select.augment


class NormStatisticsConfig(Strict):
    """Re-estimate the batch-norm statistics of the shipped network on images without labels.

    Statistics of the place and season of prediction give a part of the gain of domain adaptation for the cost of some
    forward passes. The weights are unchanged; `checkpoints/best.safetensors` keeps the statistics of training.
    """

    images: SelectConfig = SelectConfig(split="unlabeled")
    """Images of the place of prediction; their masks are never opened."""
    batches: Count = 32
    """Batches of `trainer.batch_size` crops, without augmentation; the statistics are the mean over them."""


class EvalConfig(Strict):
    """Evaluation of a split, and the default tiling of scenes."""

    mode: Literal["tiled", "resized"] = "tiled"
    """`resized` resizes each image to `tile` (aspect ratio not kept) and its logits back, as published for KTDA."""
    tile: Side | None = None
    """Side in pixels; None uses the network's."""
    overlap: Annotated[int, Field(ge=0)] | None = None
    """Pixels shared by neighbouring tiles, fewer than `tile`; None uses the network's."""
    blend: Literal["crop", "hann", "mean"] = "crop"
    """`crop` decides each pixel in the tile whose border is farthest; `hann` and `mean` average logits."""
    batch_size: Batch = 4
    resize_multiple: Side | None = None
    """Scale each image so that its sides become the nearest multiple (UniMatch: 14); None pads instead."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=16)], ...], Field(min_length=1, max_length=16)] = (1.0,)
    """Test-time scales whose probabilities are averaged."""
    flip: bool = False
    """Also average a horizontal mirror image."""
    ignore_classes: tuple[str, ...] = ()
    """Classes excluded from the scores: their labeled pixels are not counted."""
    calibrate: Literal["none", "temperature", "per_class"] = "temperature"
    """Temperature of the probabilities, fitted to the validation images (arXiv 1706.04599); classes do not change."""

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        if self.tile is not None and self.overlap is not None and self.overlap >= self.tile:
            raise ValueError(f"overlap: {self.overlap} pixels do not fit tiles of {self.tile}; give less than the tile")
        return self


class BaseRecipe(Strict):
    """Fields of the recipes of all methods."""

    name: Annotated[str, Field(pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$", max_length=100)]
    """Part of the run folder's name."""
    title: str = ""
    """One line for `rsseg recipe ls`."""
    reference: str = ""
    """Paper and table row that this recipe reproduces, and the score to expect."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    start: ModelPath | None = None
    """Model file or run folder of any method, for the same classes and bands, that initializes the parts of the network
    that it has as well. Pseudo-labels of an untrained decoder mislead the student; those of a tuned one help."""
    data: DataConfig
    loss: LossConfig = LossConfig()
    optimizers: Mapping[str, OptimizerConfig] = {"main": OptimizerConfig()}
    trainer: TrainerConfig = TrainerConfig()
    eval: EvalConfig = EvalConfig()
    ship: Literal["student", "average"] = "student"
    """Weights that are evaluated and shipped: those that the optimizers train, or their exponential moving average."""
    norm_statistics: NormStatisticsConfig | None = None
    """None ships the statistics of training."""
    ema_decay: Probability = 0.999
    """Decay of the moving average per optimizer step; not used with `ship: student`."""

    @model_validator(mode="after")
    def _named_streams(self) -> Self:
        unknown = {*self.trainer.stream_batch_sizes, *self.data.streams} - {*self.stream_names()}
        if unknown:
            raise ValueError(f"unknown stream {sorted(unknown)[0]!r}; this method has {sorted(self.stream_names())}")
        return self

    @model_validator(mode="after")
    def _named_optimizers(self) -> Self:
        if set(self.optimizers) != set(wanted := self.optimizer_names()):
            raise ValueError(f"optimizers: this recipe needs {sorted(wanted)}; it has {sorted(self.optimizers)}")
        return self

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        augments = [self.data.augment, *(s.augment for s in self.data.streams.values() if s.augment is not None)]
        squeezed = any(augment.fit == "squeeze" for augment in augments)
        if self.data.match_gsd and (squeezed or self.eval.mode == "resized"):
            what = "fit: squeeze" if squeezed else "eval.mode: resized"
            raise ValueError(f"data.match_gsd: has no effect on images that {what} resizes; leave one of them out")
        return self

    @property
    def trainer_averages(self) -> bool:
        """Whether the trainer keeps the moving average that ships; False where the method keeps its own."""
        return self.ship == "average"

    def optimizer_names(self) -> tuple[str, ...]:
        """Names of the optimizers of this recipe's method."""
        return ("main",)

    @abstractmethod
    def stream_names(self) -> tuple[str, ...]:
        """Names of the training streams of this recipe's method."""
