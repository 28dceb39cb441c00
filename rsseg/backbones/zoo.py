"""The networks of the zoo and their weights, in the Hugging Face cache or a file. Imports neither torch nor timm.

Only `pull_weights` downloads; training and prediction never do."""

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import huggingface_hub

from rsseg.config import BackboneConfig
from rsseg.errors import RecipeError, WeightsError

OutNorm = Literal["all", "last", "none"]

PYRAMID_STRIDES = (4, 8, 16, 32)
HUB_FILE = "model.safetensors"


@dataclass(frozen=True)
class ZooEntry:
    """One network and its pretrained weights.

    name       our name, used in recipes
    timm_name  architecture and, after a dot, tag of the weights if there are any
    millions   parameters of the complete network with head, as in its weights file
    strides    of a pyramid's levels, or the patch of a ViT
    out_indices  default pyramid levels or ViT blocks to return
    out_norm   default selection of returned maps that pass a LayerNorm
    license    of the weights
    hub        Hugging Face repository of the weights, None if there are none
    arguments  for timm, if the network differs from the architecture's defaults
    norm_eps   eps of every LayerNorm if it differs from timm's
    final_norm name of the classifier's norm, which initializes the last level's
    """

    name: str
    timm_name: str
    kind: Literal["pyramid", "vit"]
    millions: float
    strides: tuple[int, ...] = PYRAMID_STRIDES
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    out_norm: OutNorm = "none"
    license: str = "apache-2.0"
    hub: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    norm_eps: float | None = None
    final_norm: str | None = None

    @property
    def patch_size(self) -> int | None:
        """Pixels; None for a pyramid."""
        return self.strides[0] if self.kind == "vit" else None


NO_WEIGHTS = "none"


def _pyramid(timm_name: str, millions: float, name: str | None = None, **differences: Any) -> ZooEntry:
    return ZooEntry(
        name or timm_name.partition(".")[0], timm_name, "pyramid", millions, hub=f"timm/{timm_name}", **differences
    )


def _convnext(timm_name: str, millions: float, **differences: Any) -> ZooEntry:
    return _pyramid(timm_name, millions, out_norm="all", final_norm="head.norm", **differences)


def _convnextv2(timm_name: str, millions: float) -> ZooEntry:
    return _convnext(timm_name, millions, license="cc-by-nc-4.0")


def _swin(timm_name: str, millions: float) -> ZooEntry:
    any_size = {"strict_img_size": False}
    return _pyramid(timm_name, millions, out_norm="all", final_norm="norm", license="mit", arguments=any_size)


def _mit(size: int, millions: float) -> ZooEntry:
    # SegFormer's encoder is PVTv2 with another eps; its own weights are not free, PVTv2's are
    return _pyramid(f"pvt_v2_b{size}.in1k", millions, f"mit_b{size}", norm_eps=1e-6)


def _vit(timm_name: str, millions: float, patch: int, blocks: tuple[int, ...], **differences: Any) -> ZooEntry:
    chosen = {"name": timm_name.partition(".")[0], "out_norm": "all", "hub": f"timm/{timm_name}"} | differences
    return ZooEntry(
        timm_name=timm_name,
        kind="vit",
        millions=millions,
        strides=(patch,) * len(blocks),
        out_indices=blocks,
        **chosen,
    )


BLOCKS_12 = (2, 5, 8, 11)
BLOCKS_24 = (5, 11, 17, 23)
DINOV2_24 = (4, 11, 17, 23)
"""Blocks that DINOv2's own dense heads read from the large network."""


ENTRIES: tuple[ZooEntry, ...] = (
    _convnext("convnext_atto.d2_in1k", 3.7),
    _convnext("convnext_femto.d1_in1k", 5.2),
    _convnext("convnext_pico.d1_in1k", 9.0),
    _convnext("convnext_nano.in12k_ft_in1k", 15.6),
    _convnext("convnext_tiny.in12k_ft_in1k", 28.6),
    _convnext("convnext_small.in12k_ft_in1k", 50.2),
    _convnext("convnext_base.fb_in22k_ft_in1k", 88.6),
    _convnext("convnext_large.fb_in22k_ft_in1k", 197.8),
    _convnextv2("convnextv2_atto.fcmae_ft_in1k", 3.7),
    _convnextv2("convnextv2_femto.fcmae_ft_in1k", 5.2),
    _convnextv2("convnextv2_pico.fcmae_ft_in1k", 9.1),
    _convnextv2("convnextv2_nano.fcmae_ft_in22k_in1k", 15.6),
    _convnextv2("convnextv2_tiny.fcmae_ft_in22k_in1k", 28.6),
    _convnextv2("convnextv2_base.fcmae_ft_in22k_in1k", 88.7),
    _convnextv2("convnextv2_large.fcmae_ft_in22k_in1k", 198.0),
    _pyramid("resnet18.a1_in1k", 11.7),
    _pyramid("resnet34.a1_in1k", 21.8),
    _pyramid("resnet50.a1_in1k", 25.6),
    _pyramid("resnet101.a1h_in1k", 44.5),
    _pyramid(
        "resnet50c.gluon_in1k",
        25.6,
        "resnet50_v1c_d8",  # three 3x3 convolutions as stem; the last two stages dilated instead of strided
        strides=(4, 8, 8, 8),
        arguments={"output_stride": 8},
    ),
    _pyramid("efficientnet_b0.ra_in1k", 5.3),
    _pyramid("efficientnet_b1.ra4_e3600_r240_in1k", 7.8),
    _pyramid("efficientnet_b2.ra_in1k", 9.1),
    _pyramid("efficientnet_b3.ra2_in1k", 12.2),
    _pyramid("efficientnet_b4.ra2_in1k", 19.3),
    _pyramid("tf_efficientnet_b5.ns_jft_in1k", 30.4),
    _pyramid("tf_efficientnet_b6.ns_jft_in1k", 43.0),
    _pyramid("tf_efficientnet_b7.ns_jft_in1k", 66.3),
    _pyramid("tf_efficientnet_lite0.in1k", 4.7),
    _pyramid("tf_efficientnet_lite1.in1k", 5.4),
    _pyramid("tf_efficientnet_lite2.in1k", 6.1),
    _pyramid("tf_efficientnet_lite3.in1k", 8.2),
    _pyramid("tf_efficientnet_lite4.in1k", 13.0),
    _pyramid("mobilenetv3_small_100.lamb_in1k", 2.5),
    _pyramid("mobilenetv3_large_100.ra_in1k", 5.5),
    _swin("swin_tiny_patch4_window7_224.ms_in1k", 28.3),
    _swin("swin_small_patch4_window7_224.ms_in22k_ft_in1k", 49.6),
    _swin("swin_base_patch4_window7_224.ms_in22k_ft_in1k", 87.8),
    _pyramid("pvt_v2_b0.in1k", 3.7),
    _pyramid("pvt_v2_b1.in1k", 14.0),
    _pyramid("pvt_v2_b2.in1k", 25.4),
    _pyramid("pvt_v2_b3.in1k", 45.2),
    _pyramid("pvt_v2_b4.in1k", 62.6),
    _pyramid("pvt_v2_b5.in1k", 82.0),
    _mit(0, 3.7),
    _mit(1, 14.0),
    _mit(2, 25.4),
    _mit(3, 45.2),
    _mit(4, 62.6),
    _mit(5, 82.0),
    _pyramid("tiny_vit_5m_224.dist_in22k", 12.1),
    _pyramid("tiny_vit_11m_224.dist_in22k", 20.4),
    _pyramid("tiny_vit_21m_224.dist_in22k", 33.2),
    _pyramid("tiny_vit_21m_512.dist_in22k_ft_in1k", 21.3),
    ZooEntry(
        "resnet_mini",  # for demos that learn from scratch in a few hundred steps
        "resnet18",
        "pyramid",
        0.7,
        license=NO_WEIGHTS,
        arguments={"layers": (1, 1, 1, 1), "channels": (32, 64, 96, 128), "stem_type": "deep", "stem_width": 16},
    ),
    ZooEntry(
        "convnext_mini",  # for tests and demos that learn from scratch
        "convnext_tiny",
        "pyramid",
        0.2,
        out_norm="all",
        license=NO_WEIGHTS,
        final_norm="head.norm",
        arguments={"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 96), "ls_init_value": None},
    ),
    _vit("vit_small_patch14_dinov2.lvd142m", 22.1, 14, BLOCKS_12),
    _vit("vit_base_patch14_dinov2.lvd142m", 86.6, 14, BLOCKS_12),
    _vit("vit_large_patch14_dinov2.lvd142m", 304.4, 14, DINOV2_24),
    _vit("vit_giant_patch14_dinov2.lvd142m", 1136.5, 14, (9, 19, 29, 39)),
    _vit("vit_small_patch14_reg4_dinov2.lvd142m", 22.1, 14, BLOCKS_12),
    _vit("vit_base_patch14_reg4_dinov2.lvd142m", 86.6, 14, BLOCKS_12),
    _vit("vit_large_patch14_reg4_dinov2.lvd142m", 304.4, 14, DINOV2_24),
    _vit("vit_small_patch16_dinov3.lvd1689m", 21.6, 16, BLOCKS_12, license="dinov3-license"),
    _vit("vit_base_patch16_dinov3.lvd1689m", 85.6, 16, BLOCKS_12, license="dinov3-license"),
    _vit("vit_large_patch16_dinov3.lvd1689m", 303.1, 16, BLOCKS_24, license="dinov3-license"),
    _vit(
        "vit_large_patch16_dinov3.sat493m",
        303.1,
        16,
        BLOCKS_24,
        name="vit_large_patch16_dinov3_sat",  # pretrained on satellite images, with their mean and deviation
        license="dinov3-license",
    ),
    _vit(
        "vit_base_patch16_clip_quickgelu_224.openai",
        86.2,
        16,
        BLOCKS_12,
        out_norm="none",
        hub="timm/vit_base_patch16_clip_224.openai",
    ),
    _vit(
        "vit_large_patch14_clip_quickgelu_224.openai",
        304.0,
        14,
        BLOCKS_24,
        out_norm="none",
        hub="timm/vit_large_patch14_clip_224.openai",
    ),
    _vit("samvit_base_patch16.sa1b", 89.7, 16, BLOCKS_12, out_norm="none"),
    _vit("samvit_large_patch16.sa1b", 308.3, 16, BLOCKS_24, out_norm="none"),
    _vit("vit_base_patch16_siglip_224.v2_webli", 92.9, 16, BLOCKS_12),
    _vit("vit_base_patch16_siglip_512.v2_webli", 93.5, 16, BLOCKS_12),
    _vit("vit_so400m_patch14_siglip_224.v2_webli", 427.7, 14, (5, 12, 19, 26)),
    ZooEntry(
        "vit_mini_patch8",  # for tests, and for demo teachers that were never trained
        "vit_tiny_patch16_224",
        "vit",
        0.2,
        strides=(8,) * 4,
        out_indices=(0, 1, 2, 3),
        out_norm="all",
        license=NO_WEIGHTS,
        arguments={"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "init_values": 1.0},
    ),
)

ZOO: Mapping[str, ZooEntry] = MappingProxyType({entry.name: entry for entry in ENTRIES})


def find_entry(name: str) -> ZooEntry:
    """The entry of a name.

    Raises:
        RecipeError: there is none; the message names the nearest.
    """
    if name in ZOO:
        return ZOO[name]
    near = difflib.get_close_matches(name, ZOO, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise RecipeError(f"unknown backbone {name!r}. {hint}`rsseg backbone ls` lists them.")


@dataclass(frozen=True)
class WeightsFile:
    """A weights file on this machine.

    license  of the zoo's entry, or "unknown" for a user's file
    source   hub repository, or path as given
    """

    path: Path
    license: str
    source: str

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content in hex, computed at first use."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def check_weights(config: BackboneConfig) -> WeightsFile | None:
    """Locate the weights of a recipe's backbone, without reading them; None for random weights.

    Raises:
        RecipeError: unknown backbone.
        WeightsError: they are not on this machine; the message says how to get them.
    """
    entry = find_entry(config.name)
    if config.weights == "random":
        return None
    if config.weights == "pretrained":
        return resolve_weights(entry)
    path = Path(config.weights)
    try:
        found = path.is_file()
    except OSError:  # a name that is too long
        found = False
    if not found:
        raise WeightsError(
            f"{config.name}: there is no weights file {config.weights[:200]}. "
            "Give the path of a .safetensors file, or write pretrained or random."
        )
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"{path} is not a .safetensors file. Other formats can execute code when opened; "
            "convert it with `rsseg weights import`."
        )
    return WeightsFile(path, "unknown", config.weights)


def resolve_weights(entry: ZooEntry) -> WeightsFile:
    """Locate an entry's pretrained weights in the cache.

    Raises:
        WeightsError: they are not there, or the entry has none; the message names the command that downloads them.
    """
    path = _cached(entry)
    if path is None:
        raise WeightsError(
            f"the weights of {entry.name} ({_megabytes(entry)}, licence {entry.license}) are not on this machine. "
            f"Get them with `rsseg weights pull {entry.name}`, or set weights: FILE.safetensors in the recipe."
        )
    return WeightsFile(path, entry.license, _repository(entry))


def is_cached(entry: ZooEntry) -> bool:
    """Whether the pretrained weights are on this machine."""
    return entry.hub is not None and _cached(entry) is not None


def pull_weights(entry: ZooEntry, *, announce: Callable[[str], None]) -> WeightsFile:
    """Download an entry's pretrained weights unless they are cached; never if RSSEG_OFFLINE is set.

    Args:
        entry: of the zoo.
        announce: called with file, size and licence before the download; may raise to prevent it.

    Raises:
        WeightsError: offline, unreachable, or refused by the hub.
    """
    repository = _repository(entry)
    if _cached(entry) is None:
        if os.environ.get("RSSEG_OFFLINE"):
            raise WeightsError(
                f"the weights of {entry.name} are not on this machine, and downloads are disabled. "
                f"Run `rsseg weights pull {entry.name}` without --offline or RSSEG_OFFLINE, or set "
                "weights: FILE.safetensors in the recipe."
            )
        announce(f"{repository}/{HUB_FILE} from huggingface.co: {_megabytes(entry)}, licence {entry.license}")
        try:
            huggingface_hub.hf_hub_download(repository, HUB_FILE, cache_dir=_cache())
        except OSError as error:
            raise WeightsError(
                f"{repository}/{HUB_FILE} could not be fetched: {error} "
                "Check the connection, accept the licence on the hub if it asks, or set weights: FILE.safetensors."
            ) from error
    return resolve_weights(entry)


def verify_weights(entry: ZooEntry) -> WeightsFile:
    """Compare the hash of cached weights with the one that the hub stated at download.

    Raises:
        WeightsError: not cached, or damaged.
    """
    weights = resolve_weights(entry)
    expected = weights.path.resolve().name  # the cache names a large file by its sha256
    if re.fullmatch("[0-9a-f]{64}", expected) and weights.sha256 != expected:
        raise WeightsError(
            f"{weights.path} is damaged: its sha256 is {weights.sha256}, not {expected}. "
            f"Delete it and run `rsseg weights pull {entry.name}`."
        )
    return weights


def _repository(entry: ZooEntry) -> str:
    if entry.hub is None:
        raise WeightsError(f"{entry.name} has no pretrained weights. Set weights: random.")
    return entry.hub


def _cached(entry: ZooEntry) -> Path | None:
    found = huggingface_hub.try_to_load_from_cache(_repository(entry), HUB_FILE, cache_dir=_cache())
    return Path(found) if isinstance(found, str) else None


def _cache() -> str | None:
    # huggingface_hub reads the variable once, at import; None is its own default
    return os.environ.get("HF_HUB_CACHE")


def _megabytes(entry: ZooEntry) -> str:
    return f"about {entry.millions * 4:.0f} MB"
