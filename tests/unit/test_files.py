"""Files are replaced whole or not at all."""

from pathlib import Path

import pytest

from rsseg.errors import MachineError
from rsseg.files import replaced, write_text


def fail(file: Path, error: Exception) -> None:
    with replaced(file) as temporary:
        temporary.write_text("half of the n")
        raise error


def test_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(MachineError, match=r"a\.txt: cannot be written: .*No space left"):
        fail(file, OSError(28, "No space left on device"))
    with pytest.raises(KeyError):
        fail(file, KeyError())
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
