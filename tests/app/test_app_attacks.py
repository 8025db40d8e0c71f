"""The app among strangers: what they can read, whom they can stop, and what is left of them. A real server on
localhost, spoken to without manners; every loop is bounded.
"""

import http.client
import io
import json
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from helpers.models import save_generator, save_tokenizer
from helpers.servers import Server, photo, pictures
from hieratok.app import uploads
from hieratok.app.handlers import Demo
from hieratok.app.server import ServeApp
from hieratok.app.uploads import GONE, KEPT_SECONDS, LEAST_BYTES, Uploads, content_of, read_upload
from hieratok.core.pixels import BadImageError

pytest.importorskip("starlette", reason="the app needs gradio, which brings it")
from starlette.applications import Starlette
from starlette.datastructures import Headers

from hieratok.app.gate import GRACE_SECONDS, LOCAL, KnownHosts, Visits

META = {"meta": {"_type": "gradio.FileData"}}
BUSY = 60.0  # seconds that an answer may take on a machine that does other things besides


def scans_bomb(scans: int) -> bytes:
    """A small JPEG of 25 megapixels that takes some 10 ms a scan to decode, in a library that nothing interrupts.

    The server of these tests has no limit of scans.
    """
    buffer = io.BytesIO()
    Image.new("L", (4992, 4992), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of uploads; beside it lie things of the server."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    photo(folder / "mine.png")
    photo(tmp_path / "secret.png")
    return folder


def planted(kind: str, folder: Path) -> object:
    """Something that is not an upload; its path, or whatever a request puts into its place."""
    secret, inside = folder.parent / "secret.png", folder / "planted"
    if kind == "fifo":
        os.mkfifo(inside)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(inside))
    elif kind == "folder":
        inside.mkdir()
    elif kind == "link outside":
        inside.symlink_to(secret)
    elif kind == "link to itself":
        inside.symlink_to(inside)
    elif kind == "link to a device":
        inside.symlink_to("/dev/zero")
    else:
        return {
            "outside": str(secret),
            "outside fifo": str(folder.parent / "pipe"),
            "relative": os.path.relpath(secret),
            "dots": f"{folder}/../secret.png",
            "missing": str(folder / "none.png"),
            "the folder": str(folder),
            "a folder of that name": f"{folder}-else/x.png",
            "null byte": f"{folder}/mine.png\0",
            "long": f"{folder}/{'x' * 5000}",
            "empty": "",
            "nothing": None,
            "number": 3,
            "list": [str(folder / "mine.png")],
            "address": "http://127.0.0.1:9/a.png",
            "file address": f"file://{folder}/mine.png",
            "surrogate": "\ud800",
        }[kind]
    return str(inside)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "kind",
    ["fifo", "socket", "folder", "link outside", "link to itself", "link to a device", "outside", "outside fifo"]
    + ["relative", "dots", "missing", "the folder", "a folder of that name", "null byte", "long", "empty", "nothing"]
    + ["number", "list", "address", "file address", "surrogate"],
)
def test_only_regular_files_in_the_folder_are_read(kind, folder):
    os.mkfifo(folder.parent / "pipe")
    (folder.parent / "uploads-else").mkdir()
    photo(folder.parent / "uploads-else" / "x.png")
    with pytest.raises(BadImageError) as error:
        content_of(planted(kind, folder), "photo.png", folder)
    assert str(error.value) == GONE, "the same words whatever lies there"


def test_uploads_are_read_whichever_way_the_folder_is_written(folder, monkeypatch):
    expected = (folder / "mine.png").read_bytes()
    monkeypatch.chdir(folder.parent)
    (folder.parent / "link").symlink_to(folder)
    for path in (str(folder / "mine.png"), "uploads/mine.png", "link/mine.png"):
        for whose in (folder, Path("uploads"), Path("link")):
            assert content_of(path, "", whose) == expected
    assert read_upload(str(folder / "mine.png"), "", 256, folder).shape == (3, 60, 90)


@pytest.mark.parametrize("handler", ["photo", "two_photos"])
def test_every_handler_reads_uploads_alone(handler, folder, run):
    from hieratok.app.server import load

    demo: Demo = load(ServeApp(run=str(run), device="cpu"), folder)
    for record in ({"path": str(folder.parent / "secret.png")}, {}, {"path": None, "orig_name": 3}):
        *_, page = demo.photo(record) if handler == "photo" else demo.two_photos(record, record)
        assert GONE in page
        assert not pictures(page)


def keep(kept: Uploads, size: int, client: str) -> Path:
    return kept.keep(io.BytesIO(bytes(size)), client)


def test_uploads_have_names_of_their_own(tmp_path):
    kept = Uploads(tmp_path)
    a, b = keep(kept, 5, "a"), keep(kept, 5, "b")
    assert a != b, "the same content twice: nobody learns that it was there already"
    assert a.parent == tmp_path.resolve()
    assert a.read_bytes() == bytes(5)
    for path in (a, b):
        assert kept.find(str(path)) == path
    for other in (str(tmp_path), f"{a}/", f"{tmp_path}/./{a.name}", "", "\0", None, 3, [str(a)]):
        assert kept.find(other) in (None, a)
    (tmp_path / "planted").write_bytes(b"")
    assert kept.find(str(tmp_path / "planted")) is None, "not sent by anybody"


def test_uploads_are_limited_per_client_and_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "CLIENT_BYTES", 3 * LEAST_BYTES)
    monkeypatch.setattr(uploads, "TOTAL_BYTES", 7 * LEAST_BYTES)
    kept = Uploads(tmp_path)
    other = keep(kept, 10, "other")
    mine = [keep(kept, 10, "me") for _ in range(5)]
    assert [path.exists() for path in mine] == [False, False, True, True, True], "one's own oldest go"
    assert other.exists()
    for i in range(50):
        keep(kept, 2 * LEAST_BYTES, f"client {i}")
        assert sum(max(path.stat().st_size, LEAST_BYTES) for path in tmp_path.iterdir()) <= 7 * LEAST_BYTES
    assert not other.exists()
    assert kept.find(str(other)) is None
    assert len(list(tmp_path.iterdir())) == len(kept._kept) == 3


def test_old_uploads_go_and_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    kept = Uploads(tmp_path)
    old = keep(kept, 5, "me")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + KEPT_SECONDS + 1)
    new = keep(kept, 5, "me")
    assert list(tmp_path.iterdir()) == [new]
    assert kept.find(str(old)) is None

    def full(_, file):
        file.write(b"a part")
        raise OSError("no space left on device")

    monkeypatch.setattr(uploads.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="no space"):
        keep(kept, 5, "me")
    assert list(tmp_path.iterdir()) == [new]


# --- hosts, and who is waiting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "fine"),
    [
        ({"host": "localhost:7860"}, True),
        ({"host": "127.0.0.1"}, True),
        ({"host": "[::1]:7860"}, True),
        ({"host": "Photos.Example.org"}, True),
        ({"host": "photos.example.org:8443", "origin": "https://photos.example.org:8443"}, True),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, True),
        ({"host": "photos.example.org", "x-forwarded-host": "photos.example.org, localhost"}, True),
        ({}, False),
        ({"host": ""}, False),
        ({"host": "evil.example"}, False),
        ({"host": "localhost.evil.example"}, False),
        ({"host": "localhost@evil.example"}, False),
        ({"host": "[::1"}, False),
        ({"host": "0.0.0.0:7860"}, False),
        ({"host": "localhost", "x-forwarded-host": "evil.example"}, False),
        ({"host": "localhost", "x-forwarded-host": "localhost, evil.example"}, False),
        ({"host": "localhost:7860", "origin": "http://localhost:3000"}, False),
        ({"host": "localhost:7860", "origin": "http://evil.example"}, False),
        ({"host": "localhost:7860", "origin": "null"}, False),
        ({"host": "localhost:7860", "origin": ""}, False),
        ({"host": "localhost:7860", "origin": "http://[::1"}, False),
    ],
)
def test_hosts_and_origins(headers, fine):
    hosts = KnownHosts(Starlette(), (*LOCAL, "photos.example.org"))
    assert (hosts.problem(Headers(headers)) is None) == fine


def test_who_asks_and_does_not_listen_has_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    visits = Visits()
    assert not visits.is_there("stranger")
    visits.asked("left")
    visits.asked("stays")
    with visits.listening("stays"):
        assert visits.wait("stays")
        assert now[0] == 100
        assert not visits.wait("left")
        assert now[0] == pytest.approx(100 + GRACE_SECONDS, abs=0.1), "browsers listen a moment after they have asked"
        assert visits.take_left() == ["left"]
        assert visits.take_left() == []
        now[0] += 1000
        assert visits.is_there("stays")
    visits.asked("stays")
    assert visits.take_left() == [], "a second request of one session"
    now[0] += GRACE_SECONDS + 1
    assert visits.take_left() == ["stays"]
    assert not visits._visits


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = save_tokenizer(tmp_path_factory.mktemp("run"))
    return save_generator(folder, folder)


@pytest.fixture(scope="module")
def server(run, tmp_path_factory) -> Iterator[Server]:
    pytest.importorskip("gradio", reason="the app needs gradio")
    server = Server(run, tmp_path_factory.mktemp("attacked"))
    try:
        yield server
        stop_while_busy(server)
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def usable(request, tmp_path):
    """After every attack on the server it answers somebody else."""
    server = request.getfixturevalue("server") if "server" in request.fixturenames else None
    yield
    if server is not None:
        content = photo(tmp_path / "visitor.png").read_bytes()
        began = time.monotonic()
        assert server.call("photo", server.upload("visitor.png", content)).count("<section") == 4
        assert time.monotonic() - began < BUSY


def stop_while_busy(server: Server) -> None:
    """SIGTERM ends it within 5 s while a decoder is stuck, others wait, and a photo is on its way."""
    bomb = server.upload("bomb.jpg", scans_bomb(100_000))
    ask(server, "photo", bomb)
    with socket.create_connection(("127.0.0.1", server.port)) as slow, ThreadPoolExecutor(8) as others:
        slow.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\nx")
        for i in range(8):
            others.submit(listen, server, ask(server, "photo", bomb) if i < 4 else None)
        time.sleep(2)
        assert server.end(timeout=5) == 0
    left = [path for folder in (server.temporary, server.place) for path in folder.rglob("*") if path.is_file()]
    assert not left, "nothing is kept on the disk"


def ask(server: Server, handler: str, *values: object) -> str:
    """Put a call into the queue; the word for its answers."""
    return server.post(f"call/{handler}", json.dumps({"data": values}).encode(), "application/json")["event_id"]


def listen(server: Server, event: str | None) -> None:
    """Wait for answers, or for nothing."""
    path = f"call/photo/{event}" if event else f"heartbeat/{uuid.uuid4().hex}"
    try:
        with urllib.request.urlopen(f"{server.url}gradio_api/{path}", timeout=BUSY) as answer:
            answer.read()
    except (OSError, http.client.HTTPException):
        pass


def send(
    server: Server, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Any request: status, headers and body of the answer. Nothing is added to the headers but a host."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=BUSY)
    try:
        headers = {"Host": f"127.0.0.1:{server.port}", **(headers or {})}
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {**headers, **({"Content-Length": str(len(body))} if body is not None else {})}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def refusal(server: Server, route: str, record: object) -> tuple[int, bytes]:
    """What the server says to a call with an upload's record."""
    handler, _, way = route.partition(" by ")
    data = [record] if handler == "photo" else [record, record]
    function = {"photo": 0, "two_photos": 1}[handler]
    session = {"session_hash": uuid.uuid4().hex[:12], "fn_index": function}
    path, call = ("queue/join", {"data": data, **session}) if way else (f"call/{handler}", {"data": data})
    kind = {"Content-Type": "application/json"}
    status, _, body = send(server, "POST", f"/gradio_api/{path}", kind, json.dumps(call).encode())
    return status, body


@pytest.mark.parametrize("route", ["photo", "two_photos", "photo by page", "two_photos by page"])
def test_the_servers_files_are_out_of_reach(server, route, tmp_path):
    secret, fifo = photo(tmp_path / "secret.png"), tmp_path / "pipe"
    os.mkfifo(fifo)
    upload = server.upload("a.png", secret.read_bytes())["path"]
    paths = [str(secret), os.path.relpath(secret, server.place), str(fifo), str(tmp_path / "none.png"), str(tmp_path)]
    paths += ["/dev/zero", "/etc/passwd", f"{upload}/../../../{secret}", upload + "x", str(Path(upload).parent)]
    paths += [f"file://{secret}", "http://127.0.0.1:9/a.png", server.url, upload + "\0", "", None, 5, [upload]]
    answers = set()
    for path in paths:
        for more in ({}, META, {"url": server.url, **META}, {"is_stream": True, **META}):
            answers.add(refusal(server, route, {"path": path, **more}))
    assert [(status, json.loads(body)) for status, body in answers] == [(400, {"detail": GONE})], "one answer for all"
    nested = {"image": {"path": str(secret), **META}}
    for record in (nested, [nested], [{"path": str(secret)}], str(secret), True, "x" * 999):
        status, body = refusal(server, route, record)
        assert status == 400
        assert str(secret).encode() not in body


def test_uploads_can_be_looked_at_and_nothing_else(server, tmp_path):
    secret = photo(tmp_path / "secret.png")
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    upload = server.upload("drawing.svg", script)["path"]
    status, headers, body = send(server, "GET", f"/gradio_api/file={upload}")
    assert (status, body) == (200, script)
    assert headers["content-type"] == "application/octet-stream", "no script of a visitor's runs in the page's name"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"].startswith("attachment")
    elsewhere = [
        str(secret),
        str(tmp_path / "none"),
        "/etc/passwd",
        upload + "x",
        str(Path(upload).parent),
        "/dev/zero",
    ]
    elsewhere += ["http://127.0.0.1:9/", server.url, "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "", "%00"]
    answers = {send(server, "GET", f"/gradio_api/file={path}")[::2] for path in elsewhere}
    assert len(answers) == 1
    assert answers.pop()[0] == 404


# What gradio serves besides. Some write to the disk, some fetch addresses, some call handlers past the queue.
API = """file/etc/passwd proxy=http://127.0.0.1:9/ stream/a/b/1/playlist.m3u8 stream/a/b/1/playlist-file openapi.json
    runs deep_link?session_hash=x
    custom_component/a/client/b/c dev/reload queue/status token
    app_id user vibe-code startup-events profiling/traces run-history/buckets run-history/records"""
API_POST = """run/photo api/photo call/v2/photo component_server process_recording cancel reset stream/x stream/x/close
    vibe-edit vibe-code run-history/connect"""
PAGES = ["/monitoring", "/monitoring/summary", "/monitoring/x", "/logout", "/pwa_icon/99999", "/docs", "/openapi.json"]
CLOSED = {
    "GET": [f"/gradio_api/{path}" for path in API.split()] + PAGES,
    "POST": [f"/gradio_api/{path}" for path in API_POST.split()] + ["/login", "/config", "/"],
    "PUT": ["/", "/gradio_api/upload"],
    "OPTIONS": ["/", "/gradio_api/queue/join"],
}


def test_what_the_page_does_not_need_is_closed(server):
    for method, paths in CLOSED.items():
        for path in paths:
            body = b'{"data": []}' if method == "POST" else None
            status, headers, _ = send(server, method, path, {"Content-Type": "application/json"}, body)
            assert status in (404, 405), (method, path)
            assert not [name for name in headers if name.startswith("access-control")]


def test_answers_are_for_those_who_asked(server):
    for session in ("x", "a&b", "../.."):
        for path in (f"queue/data?session_hash={session}", f"call/photo/{session}"):
            assert send(server, "GET", f"/gradio_api/{path}")[0] in (404, 405)


def test_other_hosts_and_other_sites_are_refused(server):
    own = f"127.0.0.1:{server.port}"
    for headers in (
        {"Host": "evil.example"},
        {"X-Forwarded-Host": "evil.example"},
        {"Host": f"evil.example:{server.port}"},
    ):
        for path in ("/", "/config", "/gradio_api/info", "/gradio_api/upload"):
            status, _, body = send(server, "GET", path, headers)
            assert (status, b"evil" in body) == (403, False)
    for origin in ("http://evil.example", "null", f"http://localhost:{server.port}", "http://127.0.0.1:1", ""):
        for method in ("GET", "OPTIONS", "POST"):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Content-Type": "text/plain"}
            status, headers, _ = send(
                server, method, "/gradio_api/queue/join", asked, b"{}" if method == "POST" else None
            )
            assert status == 403
            assert not [name for name in headers if name.startswith("access-control")]
    assert send(server, "GET", "/", {"Origin": f"http://{own}"})[0] == 200
    assert send(server, "GET", "/", {"Host": f"localhost:{server.port}"})[0] == 200
    with socket.create_connection(("127.0.0.1", server.port)) as old:
        old.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 403 " in old.recv(100)


def test_those_who_ask_and_leave_do_not_keep_others_out(server, tmp_path):
    upload = server.upload("a.png", photo(tmp_path / "a.png", 900, 900).read_bytes())
    for _ in range(40):
        ask(server, "photo", upload)
    assert server.call("photo", upload).count("<section") == 4, "40 left alone"

    def left_alone(_) -> int:
        kind = {"Content-Type": "application/json"}
        call = {"data": [upload], "session_hash": uuid.uuid4().hex[:12], "fn_index": 0}
        return send(server, "POST", "/gradio_api/queue/join", kind, json.dumps(call).encode())[0]

    with ThreadPoolExecutor(10) as strangers:
        assert set(strangers.map(left_alone, range(200))) <= {200, 503}
    time.sleep(GRACE_SECONDS + 0.5)
    assert server.call("photo", upload).count("<section") == 4, "a full queue of those who have left"


def multipart(files: int, size: int) -> tuple[dict[str, str], bytes]:
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(size) + b"\r\n"
    return {"Content-Type": "multipart/form-data; boundary=b"}, part * files + b"--b--\r\n"


def test_uploads_are_limited_and_broken_ones_leave_nothing(server):
    def on_disk() -> int:
        return sum(1 for path in server.temporary.rglob("*") if path.is_file())

    before = on_disk()
    for files, size, expected in ((5, 10, 400), (0, 10, 400), (2, uploads.MAX_BYTES // 2 + 2**17, 413)):
        assert send(server, "POST", "/gradio_api/upload", *multipart(files, size))[0] == expected
    headers, body = multipart(1, 10)
    assert send(server, "POST", "/gradio_api/upload", headers, body[:-20])[0] in (200, 400)
    assert send(server, "POST", "/gradio_api/upload", {"Content-Type": "application/json"}, b"{}")[0] == 400
    assert send(server, "POST", "/gradio_api/upload", {"Content-Type": "multipart/form-data"}, b"x")[0] == 400
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as broken:
            broken.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n")
            broken.sendall(b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + multipart(1, 4_000_000)[1][:-20])
    time.sleep(0.5)
    assert on_disk() - before <= 1


def bad_request(number: int, server: Server, upload: dict) -> tuple[str, str, dict[str, str], bytes | None]:
    """One of many; method, path, headers, body."""
    dice = random.Random(number)
    deep = b"[" * 7000
    values = [
        None,
        True,
        -1,
        1e308,
        "x",
        "\ud800",
        [],
        {},
        {"path": "/etc/passwd"},
        upload,
        [upload],
        {"a": {}},
        10**30,
    ]
    bodies = [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        deep,
        b'{"data": ' + deep,
        b'{"data": NaN}',
        b"\xff\xfe",
        b'{"data": [NaN]}',
    ]
    bodies += [json.dumps({"data": dice.choices(values, k=dice.randrange(6))}).encode() for _ in range(10)]
    for key in ("session_hash", "fn_index", "trigger_id", "event_id", "event_data", "batched"):
        bodies.append(
            json.dumps({"data": [upload], "session_hash": "s", "fn_index": 0, key: dice.choice(values)}).encode()
        )
    bodies.append(b'{"data": ["' + b"x" * 200_000 + b'"]}')
    bodies.append(json.dumps({"data": [{**upload, "orig_name": dice.choice(values)}]}).encode())
    name = dice.choice(["photo", "two_photos", "generate", "none", "%00", "..", "photo/x", "v2/photo"])
    path = dice.choice([f"/gradio_api/call/{name}", "/gradio_api/queue/join", "/gradio_api/upload"])
    headers = {"Content-Type": dice.choice(["application/json", "text/plain", "multipart/form-data; boundary=b", ""])}
    if dice.random() < 0.2:
        path = dice.choice(
            [*CLOSED["GET"], "/" + "x" * 5000, "/%ff", "/assets/../../x", "/static/%2e%2e/x", "//etc/passwd"]
        )
        return dice.choice(["GET", "HEAD", "DELETE"]), path, headers, None
    return "POST", path, headers, dice.choice(bodies)


def test_a_thousand_bad_requests(server, tmp_path):
    upload = server.upload("a.png", photo(tmp_path / "a.png").read_bytes())
    before = server.megabytes()

    def one(number: int) -> int:
        try:
            return send(server, *bad_request(number, server, upload))[0]
        except (OSError, http.client.HTTPException):
            return 0  # refused by the connection's end

    with ThreadPoolExecutor(8) as strangers:
        statuses = list(strangers.map(one, range(1000)))
    assert statuses.count(0) < 50
    assert sum(status >= 500 for status in statuses) == statuses.count(503), "nothing of it is the server's own error"
    assert server.call("photo", upload).count("<section") == 4
    assert server.megabytes() < 1.2 * before
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_sixty_clients_at_once_and_the_memory_that_they_leave(run, tmp_path):
    pytest.importorskip("gradio", reason="the app needs gradio")
    server = Server(run, tmp_path)
    content = photo(tmp_path / "large.png", 3000, 2000).read_bytes()
    try:
        before = server.megabytes()
        started = threading.Barrier(60)

        def visit(number: int) -> str:
            started.wait()
            upload = server.upload("large.png", content)
            if number % 3 == 2:  # every third leaves at once
                ask(server, "photo", upload)
                return ""
            return server.call("photo", upload)

        with ThreadPoolExecutor(60) as clients:
            pages = list(clients.map(visit, range(60)))
        assert all(page.count("<section") == 4 for number, page in enumerate(pages) if number % 3 != 2)
        time.sleep(5)
        after = server.megabytes()
        print(f"{before:.0f} MB before, {after:.0f} MB after")
        assert after < 1.2 * before, f"{before:.0f} MB before, {after:.0f} MB after"
        assert server.end(timeout=5) == 0
    finally:
        server.kill()


@pytest.mark.slow
def test_a_decoder_that_is_stuck_is_stopped_at_the_limit(run, tmp_path):
    pytest.importorskip("gradio", reason="the app needs gradio")
    server = Server(run, tmp_path, "--time_limit", "10")
    try:
        began = time.monotonic()
        page = server.call("photo", server.upload("bomb.jpg", scans_bomb(100_000)))
        assert "this took longer than 10 s" in page
        assert time.monotonic() - began < BUSY
        content = photo(tmp_path / "a.png").read_bytes()
        assert server.call("photo", server.upload("a.png", content)).count("<section") == 4
    finally:
        server.kill()
