"""Remote-sensing image segmentation where labels are few: train, evaluate, predict."""

__version__ = "0.1.0"
