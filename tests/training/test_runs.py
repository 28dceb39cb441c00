from pathlib import Path

import pytest

from rsseg.cli import run as run_cli
from rsseg.errors import MachineError, UsageError, WeightsError
from rsseg.files import append_row, keep_rows_until, read_rows
from rsseg.runs import Manifest, RunFolder, choose_model, create_run, find_run, list_runs, newest_finished


def test_folder_without_runs_says_how_to_make_one(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "absent") == []
    with pytest.raises(UsageError, match="rsseg train --recipe NAME"):
        find_run(None, tmp_path)
    with pytest.raises(WeightsError, match="no finished run"):
        newest_finished(tmp_path)
    with pytest.raises(WeightsError, match="no such file or folder"):
        choose_model(tmp_path / "absent", tmp_path)
    with pytest.raises(WeightsError, match="no model yet"):
        choose_model(create_run(tmp_path, method="m", name="n").path, tmp_path)


def test_runs_are_numbered_and_latest_points_to_the_newest(tmp_path: Path) -> None:
    first, second = (create_run(tmp_path, method="ktda", name="a/b c") for _ in range(2))
    assert first.path.name.endswith("_ktda_a-b-c_001")
    assert second.path.name.endswith("_ktda_a-b-c_002")
    assert (tmp_path / "latest").resolve() == second.path.resolve()


def test_latest_is_a_text_file_where_links_are_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run = create_run(tmp_path, method="m", name="n")
    (run.path / "manifest.json").write_text("{}")
    assert find_run(Path("latest"), tmp_path).path == run.path
    with pytest.raises(UsageError, match="not a readable run folder"):
        run.manifest()


def manifest(run: RunFolder, **changes: object) -> None:
    values = {"name": "n", "method": "m", "recipe": "r", "created": "2026-01-01T00:00:00+00:00", "host": "h", "pid": 1}
    values |= {"command": [], "versions": {}, "commit": None, "device": "CPU", "seed": 0, "monitor": "miou"}
    run.write_manifest(Manifest.model_validate(values | {"plan": {}, "used": {}, "state": "finished"} | changes))
    run.model.write_text("weights")


def test_unreadable_manifest_is_listed_and_never_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = (create_run(tmp_path, method="m", name="n") for _ in range(2))
    manifest(good)
    (bad.path / "manifest.json").write_text('{"name": "half')
    assert [run.path for run in list_runs(tmp_path)] == [bad.path, good.path]
    assert choose_model(None, tmp_path) == good.model
    assert find_run(None, tmp_path).path == good.path
    assert run_cli(["runs", "ls", "--output", str(tmp_path)]) == 0
    assert "unreadable" in capsys.readouterr().out


def test_runs_are_sorted_by_time_whatever_the_utc_offset(tmp_path: Path) -> None:
    early, late = (create_run(tmp_path, method="m", name=name) for name in ("a", "b"))
    manifest(early, created="2026-03-01T09:00:00+09:00")
    manifest(late, created="2026-03-01T01:00:00+00:00")
    assert [run.path for run in list_runs(tmp_path)] == [early.path, late.path]
    assert newest_finished(tmp_path).path == late.path


def test_output_that_is_a_file_is_a_machine_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        create_run(tmp_path / "runs", method="m", name="n")


def test_table_takes_new_columns_and_forgets_later_steps(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    append_row(file, {"step": 1, "a": 'x, "y"'})
    append_row(file, {"step": 2, "b": None})
    append_row(file, {"step": 3, "a": 5})
    assert read_rows(file) == [
        {"step": "1", "a": 'x, "y"', "b": ""},
        {"step": "2", "a": "", "b": ""},
        {"step": "3", "a": "5", "b": ""},
    ]
    with file.open("a") as stream:
        stream.write("4,")  # a process died while writing
    keep_rows_until(file, 2)
    assert [row["step"] for row in read_rows(file)] == ["1", "2"]
