"""Downloads from a publisher's server that breaks off, ignores ranges, or serves another file."""

import dataclasses
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rsseg.datasets.card import DatasetCard, WebSource, fetch_web
from rsseg.datasets.cards import CARDS
from rsseg.errors import DataError

CONTENT = bytes(range(256)) * 4000


class Server(ThreadingHTTPServer):
    """Serves `content`; `breaks`: bytes after which the connection is closed, one per answer."""

    content = CONTENT
    ranges = True
    breaks: list[int]
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        content = self.server.content
        if asked and begin >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        end = self.server.breaks.pop(0) if self.server.breaks else len(content)
        self.wfile.write(content[begin : begin + end])

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    with Server(("127.0.0.1", 0), Handler) as made:
        made.breaks, made.asked = [], []
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        yield made
        made.shutdown()


def card(server: Server) -> DatasetCard:
    url = f"http://127.0.0.1:{server.server_port}/Train.zip"
    return dataclasses.replace(CARDS["loveda"], web=(WebSource(url, "Train.zip", hashlib.md5(CONTENT).hexdigest()),))


def fetched(server: Server, folder: Path) -> bytes:
    fetch_web(card(server), folder, download=True, offline=False, progress=lambda *_: None)
    assert [file.name for file in folder.iterdir()] == ["Train.zip"]
    return (folder / "Train.zip").read_bytes()


def test_a_download_that_was_killed_before_its_check_is_finished(server: Server, tmp_path: Path) -> None:
    (tmp_path / "Train.zip.partial").write_bytes(CONTENT)
    assert fetched(server, tmp_path) == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]


def test_a_connection_that_breaks_off_is_resumed_where_it_was(server: Server, tmp_path: Path) -> None:
    server.breaks = [300_000, 200_000]
    assert fetched(server, tmp_path) == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=500000-"]


def test_what_was_fetched_is_kept_when_the_server_gives_up(server: Server, tmp_path: Path) -> None:
    server.breaks = [300_000] + [0] * 50
    with pytest.raises(DataError, match=r"loveda: fetching Train\.zip failed.*Repeat the command to resume"):
        fetched(server, tmp_path)
    assert (tmp_path / "Train.zip.partial").read_bytes() == CONTENT[:300_000]
    server.breaks = []
    assert fetched(server, tmp_path) == CONTENT


def test_a_server_without_ranges_sends_the_whole_file(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "Train.zip.partial").write_bytes(CONTENT[:1000])
    assert fetched(server, tmp_path) == CONTENT


def test_another_file_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    server.content = b"a page that says sorry"
    with pytest.raises(DataError, match="its publisher states"):
        fetched(server, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_partial_file_of_another_version_does_not_fail_for_ever(server: Server, tmp_path: Path) -> None:
    (tmp_path / "Train.zip.partial").write_bytes(bytes(len(CONTENT) + 7))
    with pytest.raises(DataError, match="its publisher states"):
        fetched(server, tmp_path)
    assert fetched(server, tmp_path) == CONTENT


def test_no_server_is_an_error_that_keeps_the_partial_file(server: Server, tmp_path: Path) -> None:
    nobody = dataclasses.replace(card(server), web=(WebSource("http://127.0.0.1:1/Train.zip", "Train.zip", "0"),))
    (tmp_path / "Train.zip.partial").write_bytes(b"begun")
    with pytest.raises(DataError, match="failed"):
        fetch_web(nobody, tmp_path, download=True, offline=False, progress=lambda *_: None)
    assert (tmp_path / "Train.zip.partial").read_bytes() == b"begun"


def test_progress_names_megabytes_of_all(server: Server, tmp_path: Path) -> None:
    server.content = bytes(3 << 20)
    told: list[tuple[str, int, int]] = []
    with pytest.raises(DataError, match="MD5"):
        fetch_web(card(server), tmp_path, download=True, offline=False, progress=lambda *one: told.append(one))
    assert told[0][0].startswith("fetch Train.zip (licence cc-by-nc-sa-4.0) from")
    assert told[-1] == ("fetch Train.zip (MB)", 3, 3)
