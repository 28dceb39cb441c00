"""A default QGIS style inside a GeoPackage: colours by a field, and a form with a list of allowed values."""

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree as Xml

_STYLES = """
CREATE TABLE IF NOT EXISTS layer_styles (
  id INTEGER PRIMARY KEY AUTOINCREMENT, f_table_catalog TEXT(256), f_table_schema TEXT(256), f_table_name TEXT(256),
  f_geometry_column TEXT(256), styleName TEXT(30), styleQML TEXT, styleSLD TEXT, useAsDefault BOOLEAN,
  description TEXT, owner TEXT(30), ui TEXT(30),
  update_time DATETIME DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')))
"""


def form_style(choices: Mapping[str, Sequence[str]], *, hidden: Sequence[str] = ()) -> str:
    """QML whose form offers a list of values for the fields of `choices` and does not show the `hidden` ones."""
    root = Xml.Element("qgis", version="3.22", styleCategories="Fields|Forms")
    fields = Xml.SubElement(root, "fieldConfiguration")
    for name, values in choices.items():
        config = _widget(fields, name, "ValueMap")
        options = Xml.SubElement(Xml.SubElement(config, "Option", type="Map"), "Option", name="map", type="List")
        for value in values:
            entry = Xml.SubElement(options, "Option", type="Map")
            Xml.SubElement(entry, "Option", name=value, value=value, type="QString")
    for name in hidden:
        Xml.SubElement(_widget(fields, name, "Hidden"), "Option")
    return Xml.tostring(root, encoding="unicode")


def outline_style(label: str, *, color: str = "255,127,0,255") -> str:
    """QML that draws polygons as outlines, labeled with the values of a field."""
    root = Xml.Element("qgis", version="3.22", styleCategories="Symbology|Labeling", labelsEnabled="1")
    symbols = Xml.SubElement(Xml.SubElement(root, "renderer-v2", type="singleSymbol"), "symbols")
    layer = Xml.SubElement(Xml.SubElement(symbols, "symbol", type="fill", name="0"), "layer")
    layer.set("class", "SimpleFill")
    options = Xml.SubElement(layer, "Option", type="Map")
    for name, value in (
        ("style", "no"),
        ("outline_color", color),
        ("outline_style", "solid"),
        ("outline_width", "0.8"),
    ):
        Xml.SubElement(options, "Option", name=name, value=value, type="QString")
    settings = Xml.SubElement(Xml.SubElement(root, "labeling", type="simple"), "settings")
    Xml.SubElement(settings, "text-style", fieldName=label, textColor=color, fontSize="11", fontSizeUnit="Point")
    return Xml.tostring(root, encoding="unicode")


def _widget(fields: Xml.Element, name: str, kind: str) -> Xml.Element:
    field = Xml.SubElement(fields, "field", name=name)
    return Xml.SubElement(Xml.SubElement(field, "editWidget", type=kind), "config")


def add_style(geopackage: Path, layer: str, qml: str) -> None:
    """Store a style that QGIS applies when it opens the layer.

    QGIS keeps styles in an attribute table of the file, `layer_styles`. Raises `sqlite3.Error`.
    """
    with closing(sqlite3.connect(geopackage)) as database, database:
        column = database.execute(
            "SELECT column_name FROM gpkg_geometry_columns WHERE table_name = ?", (layer,)
        ).fetchone()
        database.execute(_STYLES)
        database.execute(
            "INSERT OR IGNORE INTO gpkg_contents (table_name, data_type, identifier, srs_id) "
            "VALUES ('layer_styles', 'attributes', 'layer_styles', 0)"
        )
        database.execute(
            "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, f_geometry_column, styleName, "
            "styleQML, styleSLD, useAsDefault, description, owner) VALUES ('', '', ?, ?, 'rsseg', ?, '', 1, '', '')",
            (layer, column[0], qml),
        )
