"""`hieratok app`: a tokenizer in the browser; what it keeps of any photo at each scale, and a generator's samples.

The page is gradio's, of which all is switched off that would go out to the network or stay on the disk.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hieratok.app_handlers import SAMPLERS, SAMPLES, Demo
from hieratok.app_page import STYLE, status
from hieratok.generation.dit import DiT
from hieratok.reconstruct import best_device
from hieratok.sample import Sample, check_models
from hieratok.tokenizer.model import HieraTok
from hieratok.uploads import MAX_BYTES, MAX_PIXELS

if TYPE_CHECKING:
    import gradio
    from gradio.themes import Base

WAITING = 32  # people in the queue; whoever comes then is told to try again
SESSIONS = 100  # whose last page is remembered
KEPT_SECONDS = 1800  # how long an upload lies in the temporary folder


@dataclass(frozen=True, kw_only=True)
class ServeApp:
    """Show what a tokenizer keeps of photos, and what a generator makes, in the browser.

    Example: hieratok app runs/quickstart --generator runs/quickstart/dit
    """

    run: str
    """The tokenizer: a run's folder, a tokenizer's folder or a hub id."""
    generator: str | None = None
    """A generator of its latents: a run's folder, a generator's folder or a hub id. Default: no samples."""
    host: str = "127.0.0.1"
    """Address to listen on: this machine alone. 0.0.0.0 lets everybody in who reaches it; there is no password."""
    port: int = 7860
    """Port to listen on."""
    device: str | None = None
    """Where to compute, such as cuda:0 or cpu. Default: the GPU if there is one."""


def serve(options: ServeApp) -> None:
    """The command `hieratok app`: serves until it is interrupted or ended.

    Raises:
        FileNotFoundError, ValueError: no such models, ones that do not fit each other, no gradio, or a port in use.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the app needs gradio: pip install 'hieratok[demo]'")
    check_port(options.host, options.port)
    demo = load(options)
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        with served(demo, options.host, options.port) as url, contextlib.suppress(KeyboardInterrupt):
            print(f"hieratok app: {url} (Ctrl+C ends it)", flush=True)
            stop.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def check_port(host: str, port: int) -> None:
    """Raise ValueError unless the port can be listened on, before models take their time to load."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}, port {port} ({error}): give another --port or --host") from error


def load(options: ServeApp) -> Demo:
    """The models.

    Raises:
        FileNotFoundError, ValueError: as `serve`.
    """
    device = options.device or best_device()
    tokenizer = HieraTok.from_pretrained(options.run, device=device)
    if options.generator is None:
        return Demo(tokenizer)
    generator = DiT.from_pretrained(options.generator, device=device)
    sampler = SAMPLERS[generator.config.objective]
    check_models(generator, tokenizer, Sample(run=options.generator, tokenizer=options.run, out="", sampler=sampler))
    return Demo(tokenizer, generator)


@contextlib.contextmanager
def served(demo: Demo, host: str, port: int) -> Iterator[str]:
    """Serve the page while the block runs; yields its address. Uploads lie in a folder that goes with the block."""
    with tempfile.TemporaryDirectory(prefix="hieratok-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported, so not before, and when a page is built
        blocks = build(demo)
        _, url, _ = blocks.queue(max_size=WAITING).launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme(),
            css=STYLE,
            js=PASTE,
            footer_links=[],
            max_file_size=MAX_BYTES,
            state_session_capacity=SESSIONS,
            share=False,
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
        )
        try:
            yield url
        finally:
            blocks.close(verbose=False)


def theme() -> "Base":
    """gradio's look with the reader's own fonts, as its default ones come from elsewhere, and a darker grey."""
    from gradio.themes import Default

    plain = Default(
        primary_hue="blue",
        neutral_hue="gray",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return plain.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")


def build(demo: Demo) -> "gradio.Blocks":
    """The page: components, and which of them starts which of the demo's methods."""
    import gradio as gr

    one_queue: dict[str, Any] = dict(concurrency_limit=1, concurrency_id="model")
    with gr.Blocks(title="hieratok", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as blocks:
        result(HEADING)
        with gr.Tab("Photo"), gr.Row():
            with gr.Column(scale=1, min_width=260):
                photo = upload("Photo")
                result(limits(demo))
            with gr.Column(scale=3, min_width=320):
                page = result(status("No photo yet."))
            photo.change(
                demo.photo, photo, page, preprocess=False, api_name="photo", show_progress="minimal", **one_queue
            )
        with gr.Tab("Two photos"), gr.Row():
            with gr.Column(scale=1, min_width=260):
                first, second = upload("First photo"), upload("Second photo")
            with gr.Column(scale=3, min_width=320):
                page = result(status("Two photos are needed."))
            gr.on(
                [first.change, second.change],
                demo.two_photos,
                [first, second],
                page,
                preprocess=False,
                api_name="two_photos",
                show_progress="minimal",
                **one_queue,
            )
        if demo.generator is not None:
            with gr.Tab("Generate"), gr.Row():
                generate_tab(demo, demo.generator, one_queue)
    return blocks


def generate_tab(demo: Demo, generator: DiT, one_queue: dict[str, Any]) -> None:
    """The tab of the generator."""
    import gradio as gr

    last, guides = generator.config.num_classes - 1, generator.config.label_dropout > 0
    with gr.Column(scale=1, min_width=260):
        label = gr.Slider(0, max(last, 1), value=0, step=1, label=f"Class, 0 to {last}", visible=last > 0)
        guidance = gr.Slider(1, 10, value=2 if guides else 1, step=0.1, label="Guidance, 1 is none", visible=guides)
        steps = gr.Slider(5, 250, value=50, step=1, label="Steps from noise to latent")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
        button = gr.Button("Generate", variant="primary")
    with gr.Column(scale=3, min_width=320):
        page = result(status(f"{SAMPLES} samples at every scale."), min_height=160)

    def generate(label: float, guidance: float, steps: float, seed: float, progress=gr.Progress()) -> Iterator[str]:  # noqa: B008
        yield from demo.generate(
            label, guidance, steps, seed, lambda done, total: progress((done, total), "Sampling", unit="steps")
        )

    button.click(generate, [label, guidance, steps, seed], page, api_name="generate", **one_queue)


def upload(label: str) -> "gradio.Image":
    """Where a photo is dropped, pasted or chosen. Its handlers get gradio's record of the file, not yet opened."""
    import gradio as gr

    image = gr.Image(label=label, sources=["upload", "clipboard"], buttons=[], height=260, placeholder=PLACEHOLDER)
    move_to_cache = image.async_move_resource_to_block_cache

    async def uploads_only(url_or_file_path: str | Path | None) -> str | None:
        """Without this gradio would download what a request names by an http address."""
        is_url = str(url_or_file_path).startswith(("http:", "https:"))
        return None if is_url else await move_to_cache(url_or_file_path)

    image.async_move_resource_to_block_cache = uploads_only
    return image


def limits(demo: Demo) -> str:
    """What may be sent, and what becomes of it."""
    return (
        f"<p><small>{MAX_BYTES // 2**20} MB and {MAX_PIXELS // 10**6} million pixels at most; what is longer than"
        f" {demo.max_side} px is scaled down to that. Photos stay on the machine that runs this page and are deleted"
        f" within {KEPT_SECONDS // 60 + 1} minutes.</small></p>"
    )


def result(html: str, min_height: int | None = None) -> "gradio.HTML":
    """A part of the page that we write ourselves."""
    import gradio as gr

    return gr.HTML(html, elem_classes="results", apply_default_css=False, min_height=min_height)


HEADING = """<h1>hieratok</h1><p>What a multi-scale image tokenizer keeps of a photo: from a few numbers to the picture,
coarse to fine.</p>"""
PLACEHOLDER = "Drop or paste a photo here,\nor press to choose one"
# gradio has a button for pasting, which browsers allow on localhost and by https alone; Ctrl+V works everywhere.
PASTE = """() => document.addEventListener("paste", event => {
  const inputs = [...document.querySelectorAll("input[type=file]")];
  const free = inputs.find(input => input.parentElement.offsetParent);  // of the open tab, without a photo yet
  if (!free || !event.clipboardData.files.length) return;
  free.files = event.clipboardData.files;
  free.dispatchEvent(new Event("change", {bubbles: true}));
})"""
