"""`rsseg export`."""

from pathlib import Path
from typing import Annotated

import typer

from rsseg.commands.console import print_json, print_note, print_result
from rsseg.commands.launch import wait_passively
from rsseg.errors import UsageError

_TARGETS = "onnx, deepness, geodeep, torch-export or stac-mlm"


def export(
    model: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder or model file (default: the newest run).")
    ] = None,
    target: Annotated[str, typer.Option("--for", metavar="TARGET", help=f"Program: {_TARGETS}.")] = "onnx",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write (default: beside the model).")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")] = Path("runs"),
    tile: Annotated[
        int | None, typer.Option("--tile", min=1, help="Side of the network's input (default: 1024 or training size).")
    ] = None,
    resolution: Annotated[
        float | None,
        typer.Option("--resolution", min=1e-3, help="Centimetres per pixel (default: of the training data)."),
    ] = None,
    check: Annotated[
        str | None, typer.Option("--check", metavar="SCENE", help="Compare classes with rsseg's own on this scene.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a model for other programs: ONNX (QGIS Deepness, geodeep, any runtime), torch.export, or a STAC item."""
    wait_passively()
    from rsseg.export.targets import ENDINGS, TARGETS
    from rsseg.runs import choose_model

    chosen = next((name for name in TARGETS if name == target), None)
    if chosen is None:
        raise UsageError(f"--for {target}: choose {_TARGETS}.")
    if chosen == "stac-mlm" and (tile, check) != (None, None):
        raise UsageError("--for stac-mlm describes a model and runs nothing. Leave out --tile and --check.")
    file = choose_model(model, runs)
    print_note(f"Model: {file}")
    from rsseg.export.model import export_model

    result = export_model(
        file,
        chosen,
        output or file.with_suffix(ENDINGS.get(chosen, ".onnx")),
        tile=tile,
        resolution_cm=resolution,
        check=check,
        overwrite=overwrite,
    )
    if as_json:
        print_json(result)
        return
    if result.agreement is not None:
        share, pixels = result.agreement
        print_note(f"{share:.3%} of {pixels} pixels have rsseg's own class.")
    print_result(f"{result.output}")
