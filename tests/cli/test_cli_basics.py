"""Help, version, exit codes and the recipe commands, as a user types them."""

import io
import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from rich.console import Console

from rsseg import __version__
from rsseg.cli import run
from rsseg.commands.console import bar, print_facts, print_table, stage_bar


def test_version_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"rsseg {__version__}\n"


def test_help_fits_80_columns() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "rsseg", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "80", "PATH": "", "NO_COLOR": "1"},
    )
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    for command in ("train", "eval", "predict", "dataset", "recipe", "backbone", "weights", "runs", "info", "doctor"):
        assert f" {command} " in result.stdout


@pytest.mark.parametrize(
    "command", ["train", "eval", "predict", "dataset prepare", "recipe validate", "runs show", "info"]
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    assert "Usage:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["frobnicate"], ["train", "--nonsense"], ["recipe", "validate"]])
def test_wrong_usage_exits_2_without_traceback(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(("arguments", "code"), [(["recipe", "ls"], 0), (["frobnicate"], 2)])
def test_program_ends_with_its_exit_code_after_all_output_and_exit_handlers(arguments: list[str], code: int) -> None:
    """Although it ends without freeing its objects."""
    program = (
        "import atexit, sys; from rsseg import cli; run = cli.run; "
        "cli.run = lambda: (atexit.register(print, 'handler'), run())[1]; "
        f"sys.argv = ['rsseg', *{arguments!r}]; cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert result.stdout.endswith("handler\n")
    assert ("ktda-recommended" in result.stdout) == (code == 0)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("recipe ls >&-", 0),
        ("--version >&-", 0),
        ("recipe validate nope >&-", 3),
        ("recipe validate nope 2>&-", 3),
        ("recipe validate nope 2>/dev/full", 3),
        ("--help | head -1", 0),
        ("recipe ls | head -1", 0),
    ],
)
def test_closed_and_full_streams_change_no_exit_code(call: str, code: int, tmp_path: Path) -> None:
    script = f'{sys.executable} -m rsseg {call}; exit "${{PIPESTATUS[0]}}"'
    result = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
    )
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
    assert not list(tmp_path.iterdir()), "a bug was reported"


def test_train_without_recipe_says_which_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train"]) == 2
    assert "rsseg recipe ls" in capsys.readouterr().err


def test_recipe_ls_lists_packaged_recipes_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipe", "ls", "--json"]) == 0
    assert "grass.yaml" in {entry["name"] for entry in json.loads(capsys.readouterr().out)}


def test_recipe_cp_copies_and_does_not_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["recipe", "cp", "grass", "mine.yaml"]) == 0
    copied = Path("mine.yaml").read_text()
    assert run(["recipe", "cat", "grass"]) == 0
    assert capsys.readouterr().out.rstrip() == copied.rstrip()
    assert run(["recipe", "cp", "cloud", "mine.yaml"]) == 2
    assert Path("mine.yaml").read_text() == copied


def test_typo_in_a_recipe_exits_3_and_names_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    assert run(["recipe", "cp", "grass", str(file)]) == 0
    file.write_text(file.read_text().replace("trainer:", "trainr:"))
    for command in (["recipe", "validate", str(file)], ["train", "--recipe", str(file)]):
        assert run(command) == 3
        error = capsys.readouterr().err
        assert "trainr" in error
        assert "'trainer'" in error
        assert "line " in error


def test_bug_is_reported_in_a_file_and_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("rsseg.recipe.packaged_recipes", lambda: 1 / 0)
    assert run(["recipe", "ls"]) == 1
    assert list(Path().iterdir()) == []
    (report,) = (tmp_path / "cache" / "rsseg").glob("rsseg-bug-*.txt")
    assert "ZeroDivisionError" in report.read_text()
    assert report.name in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        OSError(28, "No space left on device"),
        RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"),
    ],
)
def test_limit_of_the_machine_is_no_bug(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("rsseg.recipe.packaged_recipes", fail)
    assert run(["recipe", "ls"]) == 6
    assert "not enough memory, disk space or open files" in capsys.readouterr().err


def test_progress_off_a_terminal_is_one_line_per_message_and_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rsseg.commands.console.INTERVAL_S", 0.05)
    with stage_bar() as advance:
        advance("fetch x.zip: 3 GB, licence CC-BY", 0, 1)
        advance("fetch x.zip: 3 GB, licence CC-BY", 1, 1)
        advance("verify", 1, 3)
        time.sleep(0.06)
        advance("verify", 2, 3)
        advance("verify", 3, 3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fetch x.zip: 3 GB, licence CC-BY"
    assert [line.split(",")[0] for line in lines[1:]] == ["verify: 2/3"]


def from_a_source_tree(package: str) -> str:
    """`importlib.metadata.version` where rsseg is not installed."""
    if package == "rsseg":
        raise PackageNotFoundError
    return version(package)


def test_doctor_finds_this_machine_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GDAL_DATA", "PROJ_LIB", "PROJ_DATA", "GDAL_DRIVER_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("rsseg.commands.inspect.version", from_a_source_tree)
    assert run(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert facts["rsseg"] == __version__
    monkeypatch.setenv("PROJ_LIB", "/elsewhere")
    assert run(["doctor"]) == 8
    assert "unset PROJ_LIB" in capsys.readouterr().err


def test_doctor_names_a_missing_package_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run(["doctor", "--json"]) == 8
    found = json.loads(capsys.readouterr().out)
    assert any("import of torch" in problem for problem in found["problems"])
    assert "raster drivers" in found["facts"]


WORDS = "a title of several words that is too long for one line of a terminal"
TABLE = (
    ("run", "method", "steps", *(f"iou_{name}" for name in ("water", "forest", "building", "road", "grass", "bare"))),
    [("2026-11-29_dasegnet_loveda_001", "dasegnet", 900, *[0.5] * 6), ("b", "ktda", 1, *[None] * 6)],
)


def test_table_splits_between_columns_and_never_inside_a_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table(*TABLE)
    output = capsys.readouterr().out
    assert max(len(line) for line in output.splitlines()) <= 80
    assert output.count("2026-11-29_dasegnet_loveda_001") == 3
    assert output.split().count("0.5000") == 6
    print_table(("name", "what"), [("dasegnet-potsdam-irrg-to-vaihingen-deeplab", WORDS)])
    output = capsys.readouterr().out
    assert max(len(line) for line in output.splitlines()) <= 80
    assert set(WORDS.split()) <= set(output.split())


def test_table_in_a_pipe_has_one_line_per_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(("name", "what"), [("n" * 90, WORDS * 3)])
    assert f"{'n' * 90}   {WORDS * 3}" in capsys.readouterr().out


def test_facts_are_one_line_each_without_python_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    facts = {"command": "c" * 100, "commit": None, "best": 0.6808123456, "bands": ["red", "nir"], "alpha": True}
    print_facts(facts.items())
    lines = ["command  " + "c" * 100, "best     0.6808", "bands    red, nir", "alpha    yes"]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("command", ["recipe ls", "backbone ls", "dataset list", "dataset list potsdam"])
def test_list_fits_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith(("citation", "notes")))


def test_loop_of_one_item_prints_no_title_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("evaluate") as advance:
        advance(0, 1)
        advance(1, 1)
    assert capsys.readouterr().err == ""


def test_bar_knows_its_total_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("rsseg.commands.console.is_live", lambda: True)
    monkeypatch.setattr("rsseg.commands.console.stderr", lambda: screen)
    with bar("evaluate") as advance:
        advance(0, 3)
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert "0/3" in shown
    assert "0/?" not in shown


def test_import_of_a_checkpoint_replaces_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, model = tmp_path / "authors.pth", tmp_path / "model.safetensors"
    for path in (checkpoint, model):
        path.write_bytes(b"mine")
    call = ["weights", "import", str(checkpoint), "--recipe", "grass", "--output"]
    assert run([*call, str(model)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run([*call, str(checkpoint), "--overwrite"]) == 2
    assert "would replace the input" in capsys.readouterr().err
    assert checkpoint.read_bytes() == model.read_bytes() == b"mine"
