"""Grids and file names of published tilings."""

from collections.abc import Sequence


def whole_tile_origins(length: int, tile: int, stride: int, *, step: int | None = None) -> list[int]:
    """Left edges of the tiles that fit whole; what is left over at the end is dropped, as the published scripts do.

    Args:
        length: pixels of the scene's side.
        tile: pixels of the tile's side.
        stride: decides how many tiles there are.
        step: distance between tiles if another than `stride` was published (ISPRS Potsdam: `tile`); tiles that would
            leave the scene are moved in.
    """
    if length < tile:
        return []
    count = (length - tile) // stride + 1
    return sorted({min(i * (step or stride), length - tile) for i in range(count)})


def tile_name(scene: str, box: Sequence[int]) -> str:
    """File name of a tile: `<scene>_<left>_<top>_<right>_<bottom>.png`."""
    return f"{scene}_{'_'.join(str(edge) for edge in box)}.png"


def potsdam_scene(file_name: str) -> str:
    """`top_potsdam_2_10_RGBIR.tif` -> `2_10`."""
    return "_".join(file_name.split("_")[2:4])


def vaihingen_scene(file_name: str) -> str:
    """`top_mosaic_09cm_area1.tif` -> `area1`."""
    return file_name.partition(".")[0].split("_")[3]
