"""Recipe parts of a plain network, one backbone and one decoder, that several methods train. Free of torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rsseg.fields import Depth, Positive, Probability, Side, Strict, Width

LinearName = Annotated[str, Field(pattern=r"^\w+$")]


class DecoderConfig(Strict):
    """The segmentation head. Every type works with every backbone that has the right number of maps.

    `upernet` and `deeplabv3plus` need maps of several resolutions: a vision transformer's maps, with patch size p, are
    first resampled to strides of p/4, p/2, p and 2p, or p/4 and p. `deeplabv3plus` reads the backbone's first and last
    map only.
    """

    type: Literal["segformer", "upernet", "dpt", "deeplabv3plus", "linear"] = "segformer"
    """`linear` is a batch norm and one 1x1 convolution per map: a linear probe of the backbone."""
    channels: Width | None = None
    """Width; None takes 256 (`segformer`), 512 (`upernet`, `deeplabv3plus`) or 64 (`dpt`, its fusion path)."""
    dropout: Probability = 0.1
    """Channel dropout before the last convolution; `dpt` and `linear` have none."""
    pool_scales: Annotated[tuple[Depth, ...], Field(max_length=64)] = (1, 2, 3, 6)
    """`upernet` only: sides of the pooled grids."""
    dilations: Annotated[tuple[Side, ...], Field(min_length=1, max_length=64)] = (1, 12, 24, 36)
    """`deeplabv3plus` only; 1 is a 1x1 convolution."""
    widths: tuple[Width, Width, Width, Width] = (48, 96, 192, 384)
    """`dpt` only: channels of the four maps (small; base 96, 192, 384, 768; large 256, 512, 1024, 1024)."""

    def check_batch(self, batch: int) -> None:
        """Raise `ValueError` if a batch norm would get one value per channel."""
        pools_to_one = self.type == "deeplabv3plus" or (self.type == "upernet" and 1 in self.pool_scales)
        if batch == 1 and pools_to_one:
            raise ValueError(
                f"trainer.batch_size: the decoder {self.type!r} needs two images, as one of its batch norms "
                "sees one value of each; raise it, or choose another decoder"
            )


class LoraConfig(Strict):
    """Low-rank adaptation (arXiv 2106.09685): the backbone's linear layers are frozen, and a trained product of two
    low-rank matrices is added to each. Few trained parameters reduce overfitting on few labels and optimizer memory.
    """

    rank: Width = 8
    """Rank of the product."""
    alpha: Positive = 16.0
    """The product is multiplied by alpha / rank."""
    targets: Annotated[tuple[LinearName, ...], Field(min_length=1)] = ("qkv", "proj", "fc1", "fc2")
    """Last name of the linear layers: in timm's transformers `qkv` and `proj` belong to the attention, `fc1` and `fc2`
    to the MLP."""


class PlainConfig(Strict):
    """Decoder and tuning of a plain network."""

    decoder: DecoderConfig = DecoderConfig()
    tune: Literal["full", "frozen", "lora"] = "full"
    """Trained part of the backbone: all of it, nothing, or low-rank adapters of its linear layers, which are merged
    into the weights of the shipped model."""
    lora: LoraConfig = LoraConfig()
    """`tune: lora` only."""
    head_lr_scale: Positive = 1.0
    """Learning rate of the decoder and of low-rank adapters, as a multiple of the optimizer's, which the backbone uses.
    A pretrained transformer needs a low rate, its decoder 10 to 40 times as much."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """`tune: full` only: the learning rate of each transformer block (pyramid level) is that of the next one times this
    factor, so that early layers change less."""

    @model_validator(mode="after")
    def _layers_train(self) -> Self:
        if self.tune != "full" and self.layer_decay != 1.0:
            raise ValueError(f"layer_decay: acts on a backbone that trains, but tune is {self.tune!r}; leave it out")
        return self
