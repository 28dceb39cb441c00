"""Recipes, sizes and images of `benchmarks/gpu.py` and of the tests on a GPU: random weights, nothing to download."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.scenes import make_task
from rsseg.data.index import IndexItem, LabelMap, SegmentationIndex
from rsseg.recipe import Recipe, recipe_from_dict

CLASSES = 6


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    pyramid: str = "tf_efficientnet_lite0"
    vit: str = "vit_small_patch14_dinov2"
    last_block: int = 11
    """Of the ViT."""
    crops: tuple[int, int] = (252, 256)
    """Of KTDA and RS-MTDF, of ST-DASegNet."""
    batches: tuple[int, int] = (8, 4)
    image: int = 512
    steps: int = 40
    trainer_steps: int = 160
    scene: int = 10000
    tile: int = 1024
    equal_steps: int = 20
    workers: int = 4
    decoder: tuple[int, ...] = (48, 96, 192, 384)
    features: int = 64
    """Of RS-MTDF's decoder."""


TOY = Size(
    pyramid="convnext_mini",
    vit="vit_mini_patch8",
    last_block=3,
    crops=(32, 192),
    batches=(2, 2),
    decoder=(8, 8, 16, 16),
    features=8,
    image=80,
    steps=1,
    trainer_steps=6,
    equal_steps=5,
    workers=0,
    scene=300,
    tile=128,
)


def recipes(data: Path, size: Size, device: str) -> dict[str, Recipe]:
    """The three methods with the networks and batches of docs/performance.md."""
    pyramid, vit = ({"name": name, "weights": "random"} for name in (size.pyramid, size.vit))
    streams = {"unlabeled": {"split": "unlabeled"}}
    stronger = {
        "confidence": 0.4,
        "teacher": {"type": "whole", "start": "student", "mode": "eval", "buffers": "average"},
        "student_view": "strong",
        "class_mix": True,
        "masked": {"patch": 32},
    }
    disc = {"name": "adam", "lr": 1e-5}
    methods = {
        "ktda": {
            "student": pyramid,
            "teacher": vit | {"image_size": size.crops[0]},
            "fam": {},
            "decoder": {"type": "segformer", "channels": 64},
        },
        "mtdf": {
            "student": vit,
            "teachers": [{"name": "dino", "backbone": vit | {"out_indices": [size.last_block]}}],
            "strong_views": 2,
            "decoder_widths": size.decoder,
            "decoder_features": size.features,
            "data": {"streams": streams},
        },
        "dasegnet": {
            "backbone": pyramid,
            "decoder": {"type": "segformer", "channels": 64},
            "adversarial": {"convs": 1},
            "self_training": stronger,
            "data": {"streams": {"target": {"split": "unlabeled"}}},
            "optimizers": {"main": {"lr": 6e-5}, "disc_source": disc, "disc_target": disc},
        },
    }
    made = {}
    for name, values in methods.items():
        number = int(name == "dasegnet")
        trainer = {
            "steps": size.trainer_steps,
            "batch_size": size.batches[number],
            "amp_dtype": "auto",
            "device": device,
            "workers": size.workers,
            "log_every": max(size.trainer_steps // 8, 1),
            "monitor": "last",
            "eval_every": 10**6,
            "checkpoint_every": 10**6,
        }
        images = {"path": str(data), "augment": {"crop_size": size.crops[number]}} | values.pop("data", {})  # type: ignore[operator]
        made[name] = recipe_from_dict({"method": name, "name": name, "data": images, "trainer": trainer} | values, name)
    return made


def write_dataset(root: Path, side: int) -> Path:
    """Images of large patches of colour, 16 labeled and 16 not."""
    rng, items = np.random.default_rng(0), []
    for split in ("train", "unlabeled"):
        for number in range(16):
            name, masked = f"{split}-{number}.png", split == "train"
            mask = rng.integers(0, CLASSES, (-(-side // 32),) * 2, np.uint8).repeat(32, 0).repeat(32, 1)[:side, :side]
            pixels = 40 * mask[..., None] + rng.integers(0, 40, (side, side, 3), np.uint8)
            for folder, array in (("images", pixels), ("masks", mask))[: 1 + masked]:
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / folder / name)
            mask_name = f"masks/{name}" if masked else None
            items.append(IndexItem(image=f"images/{name}", mask=mask_name, split=split))
    task = make_task(CLASSES)
    SegmentationIndex(task=task, label_map=LabelMap(values={i: i for i in range(CLASSES)}), items=tuple(items)).save(
        root
    )
    return root
