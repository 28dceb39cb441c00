"""From a model file to a network that predicts."""

from pathlib import Path

from rsseg.checkpoint import find_model, load_tensors, read_header
from rsseg.errors import RecipeError, WeightsError
from rsseg.inference.device import resolve_device
from rsseg.methods.base import Segmenter
from rsseg.methods.registry import segmenter_for
from rsseg.recipe import recipe_from_dict


def load_segmenter(path: Path | str, *, device: str = "cpu") -> Segmenter:
    """The network of a model file or of a run folder, in eval mode; needs no other file and no network.

    Args:
        path: `model.safetensors`, another file of that format, or the folder of a run.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        WeightsError: there is no model, or it is damaged, foreign, or of another version.
        MachineError: the device is not there.
    """
    target = resolve_device(device)
    file = find_model(Path(path))
    header = read_header(file)
    try:
        segmenter = segmenter_for(recipe_from_dict(header.recipe, str(file)), header.task)
    except RecipeError as error:
        made_with = header.made_with.get("rsseg", "another version")
        raise WeightsError(f"{error}\nThis model was made with rsseg {made_with}; use that version.") from None
    load_tensors(segmenter, file)
    return segmenter.to(target).eval()
