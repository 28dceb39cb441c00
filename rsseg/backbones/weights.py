"""Locate pretrained weights in the Hugging Face cache or a file, without importing torch.

Only `pull_weights` downloads; training and prediction never do.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import huggingface_hub

from rsseg.backbones.table import ZooEntry, find_entry
from rsseg.config import BackboneConfig
from rsseg.errors import WeightsError

HUB_FILE = "model.safetensors"


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
