"""A backbone by name: `create_backbone`, `list_backbones`. Importing this file loads neither torch nor timm."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from rsseg.backbones.table import ENTRIES, ZOO, ZooEntry
from rsseg.config import BackboneConfig
from rsseg.errors import RecipeError
from rsseg.task import Task

if TYPE_CHECKING:
    from rsseg.backbones.backbone import Backbone


def list_backbones() -> tuple[ZooEntry, ...]:
    """Every network of the zoo; see `weights.is_cached` for whether its weights are on this machine."""
    return ENTRIES


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


def create_backbone(config: BackboneConfig, task: Task, *, load_weights: bool = True) -> Backbone:
    """Build a backbone for the bands of a task.

    Args:
        config: the recipe's part.
        task: its bands choose kernels and statistics.
        load_weights: False leaves the tensors random and touches neither files nor network, for a caller that loads
            a checkpoint.

    Raises:
        RecipeError: unknown name, or options that the network does not have.
        WeightsError: weights are missing or do not fit.
        DataError: `statistics: data` without measured statistics.
    """
    from rsseg.backbones.assembly import assemble

    return assemble(find_entry(config.name), config, task, load_weights=load_weights)
