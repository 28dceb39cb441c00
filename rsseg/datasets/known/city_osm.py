"""Aerial images of Paris and Chicago with labels from OpenStreetMap."""

from rsseg.datasets.card import RGB, DatasetCard, Variant, color_labels
from rsseg.datasets.layouts import Layout
from rsseg.datasets.prepare.tiles import Grid
from rsseg.datasets.splits import SplitRule, drawn_by_scene, drawn_tiles

CITY_OSM = DatasetCard(
    name="city-osm",
    title="roads and buildings, Paris and Chicago (CITY-OSM)",
    size="1,082 images",
    license="images: Google; labels: ODbL",
    labels=(
        color_labels(
            "map",
            "three classes, all pixels",
            (("background", (255, 255, 255)), ("road", (255, 0, 0)), ("building", (0, 0, 255))),
            # the files show roads blue and buildings red
            stored={"road": (0, 0, 255), "building": (255, 0, 0)},
        ),
    ),
    variants=(
        Variant(
            Layout("{domain}/{group}_image.png", "{domain}/{group}_labels.png", one_split="train"),
            RGB,
        ),
    ),
    rules=(
        SplitRule(
            "scene",
            "60, 20 and 20 % of the images of each city, seeded",
            drawn_by_scene({"train": 0.6, "val": 0.2, "test": 0.2}),
        ),
        SplitRule(
            "st-dasegnet",
            "512-pixel tiles of all images of a city shuffled into 70 and 30 %; the remainder of an image is dropped",
            drawn_tiles({"train": 0.7, "val": 0.3}, per_domain=True),
            ("train", "val"),
            tiles=True,
            grid=Grid(512, 512, edge="drop"),
            ignore_unknown=True,
            unknown_label=0,
        ),
    ),
    notes="Domains are the folders, such as paris and chicago. st-dasegnet makes colours it does not know background.",
    citation="Kaiser et al. 2017, doi:10.5281/zenodo.1154821",
)
