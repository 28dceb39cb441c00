"""The datasets that rsseg knows by name: classes, bands, layout, splits, licence, where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rsseg.data.index import LabelMap
from rsseg.data.layouts import Layout
from rsseg.errors import UsageError
from rsseg.task import IGNORE_INDEX, ClassInfo, Color, Task


@dataclass(frozen=True)
class HubSource:
    """An archive in a dataset repository of the Hugging Face hub."""

    repo: str
    file: str


@dataclass(frozen=True)
class DatasetCard:
    """One dataset. `demo` is generated and `folder` is anyone's own, so these have no layout here."""

    name: str
    title: str
    size: str
    license: str
    classes: tuple[ClassInfo, ...] = ()
    bands: tuple[str, ...] = ()
    label_map: LabelMap | None = None
    layout: Layout | None = None
    splits: tuple[str, ...] = ()
    """Splits that the publisher ships; each must have images."""
    gsd_m: float | None = None
    notes: str = ""
    citation: str = ""
    hub: HubSource | None = None

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "classes": [info.name for info in self.classes],
            "bands": list(self.bands),
            "splits": list(self.splits),
            "size": self.size,
            "license": self.license,
            "download": None if self.hub is None else f"https://huggingface.co/datasets/{self.hub.repo}",
            "citation": self.citation,
            "notes": self.notes,
        }

    def task(self) -> Task:
        """The task of the publisher's 8-bit images, without statistics; raises `UsageError` without classes."""
        if not self.classes:
            raise UsageError(f"the card {self.name!r} has no classes of its own; give a prepared dataset with --data.")
        bands = len(self.bands)
        return Task(
            name=self.name,
            classes=self.classes,
            bands=self.bands,
            scale=(1 / 255,) * bands,
            offset=(0.0,) * bands,
            gsd_m=self.gsd_m,
        )

    def row(self) -> tuple[str, ...]:
        """name, what, classes, size, licence, download: for a table."""
        how = {"demo": "generated", "folder": "yours"}.get(self.name, "--download" if self.hub else "--src only")
        return (self.name, self.title, str(len(self.classes) or "any"), self.size, self.license, how)


def _classes(*entries: tuple[str, Color]) -> tuple[ClassInfo, ...]:
    """Classes whose stored values are their indices."""
    return tuple(ClassInfo(name=name, value=i, color=color) for i, (name, color) in enumerate(entries))


RGB = ("red", "green", "blue")
_KTDA = (
    "Knowledge Transfer and Domain Adaptation for Fine-Grained Remote Sensing Image Segmentation "
    "(KTDA); archives of the authors"
)
_KTDA_HUB = "XavierJiezou/ktda-datasets"

_DEMO = DatasetCard(
    name="demo",
    title="generated land cover, two regions",
    size="25 MB",
    license="Apache-2.0",
    classes=_classes(
        ("field", (222, 205, 120)),
        ("forest", (38, 115, 0)),
        ("road", (90, 90, 90)),
        ("building", (214, 56, 40)),
        ("water", (30, 90, 200)),
        ("cloud", (255, 255, 255)),
    ),
    bands=RGB,
    label_map=LabelMap(values={i: i for i in range(6)}),
    splits=("train", "unlabeled", "val", "test"),
    gsd_m=2.0,
    notes="Domains north and south: select with `domain`. `field` is all open land; ground in shadow keeps its class.",
)

_GRASS = DatasetCard(
    name="grass",
    title="grassland cover in five levels",
    size="180 MB",
    license="cc-by-nc-4.0",
    classes=_classes(
        ("low", (185, 101, 71)),
        ("middle-low", (248, 202, 155)),
        ("middle", (211, 232, 158)),
        ("middle-high", (138, 191, 104)),
        ("high", (92, 144, 77)),
    ),
    bands=RGB,
    label_map=LabelMap(values={**{i: i for i in range(5)}, 255: IGNORE_INDEX}),
    layout=Layout(images="img_dir/{split}/*.tif", masks="ann_dir/{split}/*.png"),
    splits=("train", "val"),
    notes="No test split: published figures are of val, which also chose the weights. "
    "Pixels that nobody labeled are stored as low.",
    citation=_KTDA,
    hub=HubSource(_KTDA_HUB, "grass.zip"),
)

_CLOUD = DatasetCard(
    name="cloud",
    title="clouds and shadows in Landsat 8 (L8 Biome, RGB)",
    size="2.8 GB",
    license="cc-by-nc-4.0",
    classes=_classes(
        ("Clear", (79, 253, 199)),
        ("Cloud Shadow", (221, 53, 223)),
        ("Thin Cloud", (251, 255, 41)),
        ("Cloud", (77, 2, 115)),
    ),
    bands=RGB,
    label_map=LabelMap(values={i: i for i in range(4)}),
    layout=Layout(images="img_dir/{split}/*.png", masks="ann_dir/{split}/*.png"),
    splits=("train", "val", "test"),
    gsd_m=30.0,
    notes="Choose weights on val; the published figures chose them on test.",
    citation=f"{_KTDA}; masks: Foga et al. 2017, doi:10.5066/F7251GDH",
    hub=HubSource(_KTDA_HUB, "cloud.zip"),
)

_FOLDER = DatasetCard(
    name="folder",
    title="your own images and masks",
    size="-",
    license="yours",
    notes="Needs --src, --classes and --images; docs/examples has class files.",
)

CARDS: Mapping[str, DatasetCard] = MappingProxyType({card.name: card for card in (_DEMO, _GRASS, _CLOUD, _FOLDER)})
