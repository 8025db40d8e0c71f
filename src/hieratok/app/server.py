"""`hieratok app`: a tokenizer's reconstructions at each scale, and a generator's samples, in the browser.

The page is gradio's, without all features that would use the network or leave files on the disk.
"""

import contextlib
import functools
import importlib.util
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hieratok.app import page as app_page
from hieratok.app.config import ServeApp
from hieratok.app.handlers import GUIDANCE, SAMPLES, SEEDS, STEPS, Demo, ModelFacts
from hieratok.app.page import message, status
from hieratok.app.uploads import KEPT_SECONDS, MAX_BYTES, MAX_PIXELS, Uploads
from hieratok.app.worker import Worker, WorkerError
from hieratok.core.devices import best_device
from hieratok.core.extras import MissingPackageError
from hieratok.generation.dit import DiT
from hieratok.reports.templating import Html, asset
from hieratok.tasks.sample import check_models
from hieratok.tokenizer.model import HieraTok

if TYPE_CHECKING:
    import gradio
    from gradio.themes import Base

    from hieratok.app.gate import Visits

WAITING = 100  # length of the queue; further visitors are asked to try again
SESSIONS = 4  # sessions whose last page, of some megabytes, gradio keeps, though nothing uses it
CONNECTIONS = 500  # a browser needs three
END_SECONDS = 4.0  # largest time from SIGTERM to the end


def serve(options: ServeApp) -> None:
    """The command `hieratok app`: serves until it is interrupted.

    Raises:
        FileNotFoundError, ValueError: missing models, models that do not fit each other, no gradio, or a port in use.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MissingPackageError("gradio")
    if not options.time_limit > 0:
        raise ValueError(f"time_limit must be above 0 seconds, not {options.time_limit:g}")
    with (
        ended_by_sigterm(),
        listen(options.host, options.port) as listener,
        served(options, listener) as url,
        contextlib.suppress(KeyboardInterrupt),
    ):
        print(f"hieratok app: {url} (Ctrl+C ends it)", flush=True)
        threading.Event().wait()


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM interrupt the block as Ctrl+C does, and then end the process, even if threads still run."""
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the clean-up
        last = threading.Timer(END_SECONDS, os._exit, [0])  # if the clean-up hangs
        last.daemon = True
        last.start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ended:
            os._exit(0)
        signal.signal(signal.SIGTERM, before)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, made before the models are loaded.

    Raises:
        ValueError: the port is in use, or the host is not of this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}, port {port} ({error}): give another --port or --host") from error


def load(options: ServeApp, uploads: Path) -> Demo:
    """The models.

    Args:
        options: with their names.
        uploads: the folder of photos.

    Raises:
        FileNotFoundError, ValueError: as `serve`.
    """
    device = options.device or best_device()
    tokenizer = HieraTok.from_pretrained(options.run, device=device)
    if options.generator is None:
        return Demo(tokenizer, uploads)
    generator = DiT.from_pretrained(options.generator, device=device)
    check_models(generator, tokenizer, options.generator, options.run)
    return Demo(tokenizer, uploads, generator)


@contextlib.contextmanager
def served(options: ServeApp, listener: socket.socket) -> Iterator[str]:
    """Serve the page while the block runs; yields its address. The folder of uploads is removed after the block."""
    with tempfile.TemporaryDirectory(prefix="hieratok-app-", ignore_cleanup_errors=True) as folder:
        uploads = Path(folder) / "uploads"
        uploads.mkdir()
        worker = Worker(functools.partial(load, options, uploads), options.time_limit)
        try:
            os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported, so not before
            with running(worker, Uploads(uploads), options, listener):
                port = listener.getsockname()[1]
                name = "localhost" if options.host == "0.0.0.0" else options.host
                yield f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"
        finally:
            worker.close()


@contextlib.contextmanager
def running(worker: Worker, uploads: Uploads, options: ServeApp, listener: socket.socket) -> Iterator[None]:
    """The server, in its own thread, so that this one can handle signals."""
    import uvicorn
    from fastapi import FastAPI
    from gradio import mount_gradio_app

    from hieratok.app.gate import Visits, gated

    visits = Visits()
    blocks = build(worker, visits).queue(max_size=WAITING)
    blocks.state_session_capacity = SESSIONS
    page = mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        path="/",
        show_error=False,
        theme=theme(),
        css=str(asset("app.css")),
        js=str(asset("app.js")),
        footer_links=[],
        max_file_size=MAX_BYTES,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    hosts = [*options.allowed_hosts] + [options.host] * (options.host not in ("", "0.0.0.0", "::"))
    functions = {number: str(function.api_name) for number, function in blocks.fns.items()}
    config = uvicorn.Config(
        gated(page, uploads, visits, functions, hosts, lambda _: page.router.lifespan_context(page)),
        log_level="warning",
        access_log=False,
        ws="none",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise ValueError("the server did not start; the lines above say why")
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        worker.close()  # handlers wait for it
        thread.join(END_SECONDS / 2)


def theme() -> "Base":
    """gradio's theme with the system's fonts, as its default fonts are downloaded, and a darker grey."""
    from gradio.themes import Default

    plain = Default(
        primary_hue="blue",
        neutral_hue="gray",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return plain.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")


def build(worker: Worker, visits: "Visits") -> "gradio.Blocks":
    """The page: its components, connected to the worker's methods."""
    import gradio as gr

    def photo(photo: Any, request: gr.Request) -> Iterator[str]:
        yield from answer(request, "photo", photo)

    def two_photos(first: Any, second: Any, request: gr.Request) -> Iterator[str]:
        yield from answer(request, "two_photos", first, second)

    def generate(
        label: Any,
        guidance: Any,
        steps: Any,
        seed: Any,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008
    ) -> Iterator[str]:
        def show(done: int, total: int) -> None:
            progress((done, total), "Sampling", unit="steps")

        yield from answer(request, "generate", label, guidance, steps, seed, progress=show)

    def answer(request: gr.Request, method: str, *arguments: Any, **options: Any) -> Iterator[str]:
        session = request.session_hash or ""
        if not visits.wait(session):
            return
        try:
            yield from worker.run(method, *arguments, wanted=lambda: visits.is_there(session), **options)
        except WorkerError as error:
            yield str(message(str(error)))

    # Handlers get unprocessed values, which our own code checks: gradio would open and copy files by its own rules.
    shared: dict[str, Any] = dict(
        preprocess=False, show_progress="minimal", concurrency_limit=1, concurrency_id="model"
    )
    with gr.Blocks(title="hieratok", analytics_enabled=False) as blocks:
        result(app_page.heading())
        with gr.Tab("Photo"), gr.Row():
            with gr.Column(scale=1, min_width=260):
                image = upload("Photo")
                result(limits(worker.facts))
            with gr.Column(scale=3, min_width=320):
                page = result(status("No photo yet."))
            image.change(photo, image, page, api_name="photo", **shared)
        with gr.Tab("Two photos"), gr.Row():
            with gr.Column(scale=1, min_width=260):
                first, second = upload("First photo"), upload("Second photo")
            with gr.Column(scale=3, min_width=320):
                page = result(status("Two photos are needed."))
            gr.on([first.change, second.change], two_photos, [first, second], page, api_name="two_photos", **shared)
        if worker.facts.classes is not None:
            with gr.Tab("Generate"), gr.Row():
                inputs = settings(worker.facts.classes, worker.facts.guided)
                with gr.Column(scale=3, min_width=320):
                    page = result(status(f"{SAMPLES} samples at every scale."), min_height=160)
                *values, button = inputs
                button.click(generate, values, page, api_name="generate", **shared)
    return blocks


def settings(classes: int, guided: bool) -> "list[Any]":
    """The column of the generator's settings: class, guidance, steps, seed, and the button."""
    import gradio as gr

    last = classes - 1
    with gr.Column(scale=1, min_width=260):
        return [
            gr.Slider(0, max(last, 1), value=0, step=1, label=f"Class, 0 to {last}", visible=last > 0),
            gr.Slider(*GUIDANCE, value=2 if guided else 1, step=0.1, label="Guidance, 1 is none", visible=guided),
            gr.Slider(*STEPS, value=50, step=1, label="Steps from noise to latent"),
            gr.Number(0, label="Seed", precision=0, minimum=SEEDS[0], maximum=SEEDS[1]),
            gr.Button("Generate", variant="primary"),
        ]


def upload(label: str) -> "gradio.Image":
    """The component for dropping, pasting or choosing a photo."""
    import gradio as gr

    return gr.Image(label=label, sources=["upload", "clipboard"], buttons=[], height=260, placeholder=PLACEHOLDER)


def limits(facts: ModelFacts) -> Html:
    """What may be sent, and what becomes of it."""
    return app_page.limits(MAX_BYTES // 2**20, MAX_PIXELS // 10**6, facts.max_side, minutes=KEPT_SECONDS // 60 + 1)


def result(html: Html, min_height: int | None = None) -> "gradio.HTML":
    """A component with our own HTML."""
    import gradio as gr

    return gr.HTML(str(html), elem_classes="results", apply_default_css=False, min_height=min_height)


PLACEHOLDER = "Drop or paste a photo here,\nor press to choose one"
