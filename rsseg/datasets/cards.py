"""The datasets that rsseg knows by name, described in `rsseg.datasets.known`."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from rsseg.data.index import LabelMap
from rsseg.datasets.card import RGB, DatasetCard, Labels, Variant, classes_of
from rsseg.datasets.known.aerial import CITY_OSM, POTSDAM, VAIHINGEN
from rsseg.datasets.known.satellite import CLOUD, DEEPGLOBE, GID5, GRASS, L8BIOME, LANDCOVERNET_S2, LOVEDA
from rsseg.datasets.layouts import Layout
from rsseg.datasets.splits import SplitRule, as_found
from rsseg.errors import UsageError

_DEMO = DatasetCard(
    name="demo",
    title="generated land cover, two regions",
    size="25 MB",
    license="Apache-2.0",
    labels=(
        Labels(
            "land",
            "six classes",
            classes_of(
                ("field", (222, 205, 120)),
                ("forest", (38, 115, 0)),
                ("road", (90, 90, 90)),
                ("building", (214, 56, 40)),
                ("water", (30, 90, 200)),
                ("cloud", (255, 255, 255)),
            ),
            LabelMap(values={i: i for i in range(6)}),
        ),
    ),
    variants=(Variant(Layout("{split}/images/*.png"), RGB),),
    rules=(SplitRule("made", "as generated; tiles do not overlap", as_found, ("train", "unlabeled", "val", "test")),),
    gsd_m=2.0,
    notes="Domains north and south: select with `domain`. `field` is all open land; shadowed ground keeps its class.",
)

_FOLDER = DatasetCard(
    name="folder",
    title="your own images and masks",
    size="-",
    license="yours",
    notes="Needs --src, --classes and --images; docs/examples has class files.",
)

_VECTORS = DatasetCard(
    name="vectors",
    title="your own scenes, labels drawn as polygons",
    size="-",
    license="yours",
    notes="Needs --src, --labels and --field; docs/qgis.md shows the way from QGIS and back.",
)

_ALL = (
    _DEMO, GRASS, CLOUD, L8BIOME, LOVEDA, POTSDAM, VAIHINGEN, DEEPGLOBE, GID5, LANDCOVERNET_S2, CITY_OSM, _FOLDER,
    _VECTORS,
)  # fmt: skip

CARDS: Mapping[str, DatasetCard] = MappingProxyType({card.name: card for card in _ALL})


def find_card(name: str) -> DatasetCard:
    """The card of a name; raises `UsageError` naming the nearest one."""
    if name not in CARDS:
        nearest = difflib.get_close_matches(name, CARDS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(CARDS)}."
        raise UsageError(f"there is no dataset {name!r}; {hint} Use `folder` or `vectors` for your own.")
    return CARDS[name]
