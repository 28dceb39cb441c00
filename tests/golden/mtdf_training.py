"""Golden cases of the training step: unsupervised loss, average, schedule and three whole steps."""

from rsseg.methods.mtdf.method import cutmix  # noqa: F401
from tests.golden.harness import Handler

HANDLERS: dict[str, Handler] = {}
