"""Load checkpoints of classification or self-supervised networks, in timm's names, into bodies without head."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rsseg.backbones.bands import RGB, adapt_first_conv
from rsseg.backbones.bodies import Pyramid, TokenMaps, resample_positions
from rsseg.backbones.keys import mit_to_timm
from rsseg.backbones.timm_adapter import LEVELS, Architecture, complete_network, in_timm_names
from rsseg.errors import WeightsError
from rsseg.foreign import odd_tensors_refused

_UNUSED = re.compile(r"mask_token|.*\.attention_bias_idxs")
"""Tensors that only pretraining uses or that follow from the architecture."""


@dataclass(frozen=True)
class Source:
    """A weights file and its network.

    first_conv  convolution that reads red, green, blue
    final_norm  the classifier's norm, which initializes the norm of the last level; None if there is none
    """

    path: Path
    architecture: Architecture
    first_conv: str
    final_norm: str | None


def load_pretrained(body: Pyramid | TokenMaps, source: Source, bands: Sequence[str]) -> None:
    """Fill a body from a .safetensors file in timm's names; 16-bit files become float32.

    The first convolution is adapted to `bands`, the position table to the body's grid. Tensors of the head and of
    omitted stages are dropped. The norms of a pyramid's levels start at 1 and 0 if the file has none.

    Raises:
        WeightsError: the file is unreadable or does not fit; names the first missing and unexpected tensor.
    """
    try:
        stored = load_file(source.path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{source.path} cannot be read: {error}. Fetch or convert it again.") from None
    bad = next((name for name, tensor in stored.items() if tensor.is_complex() or not tensor.isfinite().all()), None)
    if bad is not None:
        raise WeightsError(f"{source.path}: {bad[:200]!r} has complex or infinite values. Fetch or convert it again.")
    tensors = {name: tensor.float() for name, tensor in stored.items()}
    complete, wanted = complete_network(source.architecture), body.network.state_dict()
    with odd_tensors_refused(source.path, source.architecture.name):
        if source.architecture.name.startswith("pvt_v2"):
            tensors = mit_to_timm(tensors)
        tensors = {n: tensor for n, tensor in in_timm_names(complete, tensors).items() if not _UNUSED.fullmatch(n)}
        _check_names(source, tensors, wanted, known=complete.state_dict())
        _adapt(body, tensors, source, bands)
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise WeightsError(
                f"{source.path}: {name!r} has the shape {tuple(tensors[name].shape)}, {source.architecture.name} "
                f"needs {tuple(tensor.shape)}. Give the weights of that network."
            )
    body.network.load_state_dict({name: tensors[name] for name in wanted})
    if isinstance(body, Pyramid):
        _start_last_norm(body, tensors, source.final_norm)


def _check_names(
    source: Source, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> None:
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in known]
    if missing or unexpected:
        found = [f"{what} {names[0][:200]!r}" for what, names in (("no", missing), ("an unknown", unexpected)) if names]
        raise WeightsError(
            f"{source.path} has {' and '.join(found)} ({len(missing)} missing, {len(unexpected)} unexpected). "
            f"Give a file of {source.architecture.name} in timm's names."
        )


def _adapt(body: Pyramid | TokenMaps, tensors: dict[str, Tensor], source: Source, bands: Sequence[str]) -> None:
    first = f"{source.first_conv}.weight"
    if tensors[first].shape[1] == len(RGB):
        tensors[first] = adapt_first_conv(tensors[first], bands)
    if isinstance(body, TokenMaps) and body.position is not None:
        cells = body.network.pos_embed.shape[1] - body.position_prefix
        side = round(cells**0.5)
        tensors["pos_embed"] = resample_positions(
            tensors["pos_embed"], (side, side), prefix=body.position_prefix, mode=body.position
        )


def _start_last_norm(body: Pyramid, tensors: Mapping[str, Tensor], final_norm: str | None) -> None:
    last = str(LEVELS - 1)
    if final_norm is None or f"{final_norm}.weight" not in tensors or last not in body.norms:
        return
    body.norms[last].load_state_dict({name: tensors[f"{final_norm}.{name}"] for name in ("weight", "bias")})
