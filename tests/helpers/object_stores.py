"""An object store and a web server on this machine, and the archives that they serve."""

import http.server
import io
import json
import os
import re
import socketserver
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Members = list[tuple[str, bytes]]


def jpeg(shade: int, side: int = 16) -> bytes:
    """A grey square."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (shade, shade, shade)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar archive of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, members: Members, method: int = zipfile.ZIP_STORED) -> Path:
    """A zip of these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def samples(count: int, first: int = 0) -> Members:
    """Images of the shades `first`, ... and their classes, as WebDataset has them."""
    members = []
    for i in range(first, first + count):
        members += [(f"{i:05d}.jpg", jpeg(i)), (f"{i:05d}.cls", str(i % 7).encode())]
    return members


class WebServer:
    """Serves a folder over HTTP with ranges, and counts what it is asked for.

    Args:
        folder: what lies in it is served.

    Attributes:
        ranges: path, first and last byte of each range that was asked for.
        fails: called with the path of each GET; a status to answer with instead, or None.
        reads_ranges: whether ranges are understood; else the whole file is sent.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.ranges: list[tuple[str, int, int]] = []
        self.fails: Callable[[str], int | None] = lambda path: None
        self.reads_ranges = True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.answer(with_body=True, body=body.decode())

            def answer(self, with_body: bool, body: str = "") -> None:
                if (value := outer.json(self.path, body)) is not None:
                    data = json.dumps(value).encode()
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data if with_body else b"")
                    return
                path = outer.file(self.path)
                status = outer.fails(self.path) if with_body else None
                if status is not None or not path.is_file():
                    self.send_response(status or 404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = path.read_bytes()
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                size, start = len(data), 0
                if asked and outer.reads_ranges:
                    start, last = int(asked[1]), min(int(asked[2]), size - 1)
                    outer.ranges.append((self.path, start, last))
                    data = data[start : last + 1]
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{last}/{size}")
                else:
                    self.send_response(200)
                status = os.stat(path)
                self.send_header("ETag", f'"{status.st_mtime_ns}-{status.st_size}"')
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if with_body:
                    try:
                        self.wfile.write(data)
                    except OSError:
                        self.close_connection = True

        class Quiet(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def file(self, path: str) -> Path:
        """What is served under a path."""
        return self.folder / path.lstrip("/")

    def json(self, path: str, body: str) -> Any:
        """An answer that is no file; None where there is none."""
        return None

    def stop(self) -> None:
        """No more answers."""
        self._server.shutdown()
        self._server.server_close()
