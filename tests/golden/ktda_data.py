"""Handlers of golden cases."""

from tests.golden.harness import Handler

HANDLERS: dict[str, Handler] = {}
