"""What a product was made from, as one hash: equal hashes, equal products."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rsseg.methods.base import Segmenter

TAG = "RSSEG_MADE_FROM"
"""Tag of each output that holds the hash."""


def identify_model(segmenter: Segmenter) -> str:
    """Of the weights, the classes and what the network is made of."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{type(segmenter).__qualname__} {segmenter.tile} {segmenter.fill}".encode())
    digest.update(segmenter.task.model_dump_json().encode())
    for name, tensor in sorted(segmenter.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def identify_files(files: Sequence[str | Path]) -> str:
    """Of the contents of local files; of other names, such as URLs, the name."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        if Path(file).is_file():
            with Path(file).open("rb") as handle:
                digest.update(hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).digest())
        else:
            digest.update(str(file).encode())
    return digest.hexdigest()


def identify(*parts: str, settings: Mapping[str, Any]) -> str:
    """Of hashes and the settings that change pixels."""
    text = json.dumps([parts, settings], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
