"""Common interface of backbones: images in, feature maps out, normalization inside."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.weights import WeightsFile
from rsseg.errors import RecipeError


@dataclass(frozen=True)
class BackboneInfo:
    """Facts about a backbone for decoders and model headers.

    channels, strides  per returned map
    input_multiple     input sides should be multiples of it, in pixels
    patch_size         pixels; None for a pyramid
    mean, std          per band of the task, scaled units
    license            of the pretrained weights
    """

    name: str
    timm_name: str
    kind: Literal["pyramid", "vit"]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    input_multiple: int
    patch_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str


class Backbone(nn.Module):
    """A network that normalizes its own input, so that several backbones can share a batch.

    `weights` is the file of its tensors; None if they are random or loaded by the caller.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        info: BackboneInfo,
        body: nn.Module,
        *,
        pad: Literal["corner", "error"] = "corner",
        dtype: torch.dtype = torch.float32,
        weights: WeightsFile | None = None,
    ) -> None:
        """Wrap a body.

        Args:
            info: describes `body` and the normalization.
            body: normalized images (B, C, H, W) in `dtype` -> one NCHW map per output index.
            pad: treatment of a ViT input that is not a multiple of the patch, see `BackboneConfig`.
            dtype: storage and compute type of `body`; maps are returned in float32.
            weights: file of the tensors.
        """
        super().__init__()
        self.info = info
        self.body = body.to(dtype)
        self.pad = pad
        self.dtype = dtype
        self.weights = weights
        for name in ("mean", "std"):
            values = torch.tensor(getattr(info, name), dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of images.

        Args:
            images: float (B, C, H, W) in scaled units, bands in the task's order.

        Returns:
            One float (B, channels[i], H / strides[i], W / strides[i]) per index; a ViT rounds up, a pyramid as its
            convolutions do.
        """
        return self.forward_normalized(self.normalize(images))

    def parameters_by_depth(self) -> list[list[nn.Parameter]]:
        """All parameters from input to output: a transformer's embedding and blocks, a pyramid's levels."""
        return self.body.parameters_by_depth()  # type: ignore[no-any-return, operator]

    def normalize(self, images: Tensor) -> Tensor:
        """(images - mean) / std, per band, float32."""
        return (images.float() - self.mean) / self.std

    def forward_normalized(self, images: Tensor) -> tuple[Tensor, ...]:
        """Like `forward` for images (B, C, H, W) that are already normalized."""
        maps = self.body(self._padded(images).to(self.dtype))
        if self.dtype == torch.float32:
            return tuple(maps)
        return tuple(level.float() for level in maps)

    def _padded(self, images: Tensor) -> Tensor:
        if self.info.patch_size is None:
            return images
        height, width = images.shape[-2:]
        bottom, right = -height % self.info.input_multiple, -width % self.info.input_multiple
        if not bottom and not right:
            return images
        if self.pad == "error":
            raise RecipeError(
                f"{self.info.name} got {height} x {width} pixels, which is not a multiple of its patch of "
                f"{self.info.patch_size}. Choose such a crop and tile size, or set pad: corner."
            )
        return F.pad(images, (0, right, 0, bottom))
