"""Every command of README and docs is parsed, and run where it can be, on a small dataset and a model of a few steps.

A comment before a block, `<!-- not run: why -->`, leaves it out of the run; its options are checked all the same.
"""

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from rsseg.cli import app, run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STEPS = "trainer.steps=4"


@dataclass(frozen=True)
class Command:
    """One call of `rsseg` on a page; `skipped` is the reason why it is not run."""

    words: tuple[str, ...]
    line: int
    skipped: str


def commands(page: Path) -> Iterator[Command]:
    """Calls in indented and fenced blocks, without comments; continued lines are joined.

    In a block with `$ ` before its calls all other lines are their output.
    """
    skipped, fenced, prompted = "", False, False
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        fenced ^= line.startswith("```")
        if found := re.fullmatch(r"<!-- not run: (.+) -->", line.strip()):
            skipped = found[1]
        elif line.strip() and not line.startswith(("    ", "```")) and not fenced:
            skipped, prompted = "", False
        text = line.strip() if fenced or line.startswith("    ") else ""
        if text.startswith("$ "):
            text, prompted = text.removeprefix("$ "), True
        elif prompted:
            continue
        while text.endswith("\\"):
            text = text.removesuffix("\\") + next(lines)[1].strip()
        for call in re.sub(r"(\s|^)#.*", "", text).split("; "):
            if call.startswith("rsseg "):
                yield Command(tuple(shlex.split(call)[1:]), number, skipped)


def test_pages_have_commands() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_has_known_options(page: Path) -> None:
    for command in commands(page):
        group: Any = typer.main.get_command(app)
        context = group.make_context("rsseg", list(command.words))
        while hasattr(group, "commands"):
            name, group, rest = group.resolve_command(context, [*context._protected_args, *context.args])
            context = group.make_context(name, rest, parent=context)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: the built-in dataset, a finished run, and scenes."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["dataset", "prepare", "demo"]) == 0
        assert run(["train", "--recipe", "demo-ktda", "--set", STEPS]) == 0
    for name in ("scene.tif", "huge.tif", "scenes/a.tif", "scenes/b.tif"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "data/demo/scene/scene.tif", folder / name)
    shutil.copytree(ROOT / "docs" / "examples", folder / "docs" / "examples")
    return folder


MADE = ("dataset", "prepare", "demo")


def commands_to_run(page: Path) -> list[Command]:
    """Without the built-in dataset, which the workspace has."""
    return [command for command in commands(page) if not command.skipped and command.words != MADE]


@pytest.mark.parametrize("page", [page for page in PAGES if commands_to_run(page)], ids=lambda page: page.stem)
def test_commands_run(
    page: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page, in one folder; trainings take a few steps."""
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    for command in commands_to_run(page):
        code = run(_shortened(command.words))
        assert code == 0, (
            f"{page.name}, line {command.line}: rsseg {' '.join(command.words)}\n{capsys.readouterr().err}"
        )


def _shortened(words: tuple[str, ...]) -> list[str]:
    """With stand-ins for names in capitals; a training takes a few steps, an output may be there."""
    call = ["runs/latest" if word == "RUN" else word for word in words]
    if call[0] == "train":
        call = [STEPS if word.startswith("trainer.steps=") else word for word in call]
        call += [] if STEPS in call else ["--set", STEPS]
    if call[:2] in (["dataset", "prepare"], ["recipe", "cp"]) or call[0] in ("predict", "sample"):
        call.append("--overwrite")
    return call
