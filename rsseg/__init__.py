"""Remote-sensing image segmentation where labels are few: train, evaluate, predict.

The command line calls the same functions; they are imported on first use.

    load(path) -> Segmenter             model file or run folder -> network with `.task` and `predict_logits`
    train(recipe) -> TrainResult        recipe from `load_recipe` -> run folder and scores
    evaluate(...) -> Evaluation         confusion matrix and scores of a model on a split
    predict(...) -> SceneResult         a raster of any size -> a class raster on the same grid
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsseg.evaluation.model_file import evaluate_model as evaluate
    from rsseg.inference.network import load_segmenter as load
    from rsseg.recipe import load_recipe
    from rsseg.scene.predict import predict_scene as predict
    from rsseg.training.run import train

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "load", "load_recipe", "predict", "train"]

_PUBLIC = {
    "load": ("rsseg.inference.network", "load_segmenter"),
    "load_recipe": ("rsseg.recipe", "load_recipe"),
    "train": ("rsseg.training.run", "train"),
    "evaluate": ("rsseg.evaluation.model_file", "evaluate_model"),
    "predict": ("rsseg.scene.predict", "predict_scene"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rsseg' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)
