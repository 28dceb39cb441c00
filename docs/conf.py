"""Settings of the documentation site: `make docs`. Warnings are errors, so a broken link stops the build."""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from reference import write_reference  # noqa: E402

from rsseg import __version__  # noqa: E402

project = "rsseg"
release = __version__
author = copyright = "the rsseg authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["examples", "_build", "reference/scene_options.md"]
html_theme = "furo"
html_title = "rsseg"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
highlight_language = "none"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
default_role = "code"  # docstrings use single backticks for code
copybutton_prompt_text = "$ "


def setup(app: Any) -> None:
    """Write the pages that follow from the code before Sphinx reads the sources."""
    app.connect("builder-inited", lambda _: write_reference(HERE / "reference"))
