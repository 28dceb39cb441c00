"""The documentation site builds without a warning, and its reference pages hold what the code defines."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs the extra 'docs'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "trees"]
    built = subprocess.run([*command, ROOT / "docs", tmp_path / "site"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    recipes = (tmp_path / "site" / "reference" / "recipes.html").read_text(encoding="utf-8")
    assert "data.augment.crop_size" not in recipes  # keys are listed under their section
    for key in ("data.augment", "crop_size", "optimizers.NAME.schedule", "task_teacher", "pseudo"):
        assert key in recipes
    commands = (tmp_path / "site" / "reference" / "commands.html").read_text(encoding="utf-8")
    for name in ('id="rsseg-train"', "--resume-anyway", 'id="rsseg-dataset-prepare"', 'id="rsseg-assess"'):
        assert name in commands
    assert "load_segmenter" in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
