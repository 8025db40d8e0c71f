"""The app as a process."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def photo(path: Path, width: int = 90, height: int = 60, seed: int = 0, **options) -> Path:
    """A smooth picture of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)
    return path


def pictures(html: str) -> list[torch.Tensor]:
    """The pictures of a page, uint8 (3, H, W), in their order."""
    found = []
    for data in re.findall(r'src="data:image/webp;base64,([^"]+)"', html):
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            found.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


WITHOUT_LIMIT = """
import sys
from hieratok.cli import main
from hieratok.core import pixels
pixels.MAX_SCANS = pixels.MAX_SEGMENTS = 10**9
if __name__ == "__main__":  # the worker, which is spawned, takes over what stands above
    sys.exit(main())
"""
"""`hieratok` without a limit of a JPEG's scans: such a file stands for all that keep a decoder busy for long."""


class Server:
    """`hieratok app`, without a limit of scans, in a process of its own, spoken to as a browser would."""

    def __init__(self, run: Path, home: Path, *options: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.temporary, self.place = home / "tmp", home / "place"
        self.temporary.mkdir()
        self.place.mkdir()
        program = home / "program.py"
        program.write_text(WITHOUT_LIMIT)
        command = [sys.executable, str(program), "app", str(run), "--generator", str(run), "--port", str(self.port)]
        self.log = home / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu", *options],
                cwd=self.place,
                env={**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"hieratok app: {self.url} (Ctrl+C ends it)\n", line + self.log.read_text()

    def upload(self, name: str, content: bytes) -> dict:
        """Send a file; gradio's record of it."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        body = f"{head}Content-Type: image/png\r\n\r\n".encode() + content + f"\r\n--{boundary}--\r\n".encode()
        (path,) = self.post("upload", body, f"multipart/form-data; boundary={boundary}")
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def call(self, handler: str, *values: object) -> str:
        """What a handler yields last; "error" if the server refuses."""
        event = self.post(f"call/{handler}", json.dumps({"data": values}).encode(), "application/json")["event_id"]
        kind, page = "", ""
        with urllib.request.urlopen(f"{self.url}gradio_api/call/{handler}/{event}", timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                field, _, value = line.partition(": ")
                kind = value if field == "event" else kind
                if field == "data" and kind in ("generating", "complete"):
                    page = json.loads(value)[0]
        return page if kind == "complete" else "error"

    def post(self, path: str, body: bytes, kind: str):
        request = urllib.request.Request(f"{self.url}gradio_api/{path}", body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def family(self) -> list[int]:
        """The process and those that it started."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [self.process.pid, *(int(pid) for file in children for pid in file.read_text().split())]

    def megabytes(self) -> float:
        """Resident memory of all its processes."""
        found = [re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()) for pid in self.family()]
        return sum(int(size) for sizes in found for size in sizes) / 1024

    def end(self, timeout: float = 5) -> int:
        """Ask it to stop; its exit status. Nothing that it started may be left."""
        family = self.family()
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=timeout)
        deadline = time.monotonic() + timeout
        while any(map(alive, family)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, family))
        return self.process.returncode

    def kill(self) -> None:
        """Whatever became of it."""
        self.process.kill()
        self.process.communicate()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
