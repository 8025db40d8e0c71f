"""Options of `hieratok app`. Imports no torch."""

from dataclasses import dataclass


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
    """Address to listen on: this machine alone. 0.0.0.0 listens to everybody who reaches it; there is no password."""
    port: int = 7860
    """Port to listen on."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which others reach the app, such as '[photos.example.org]'. Requests for any other name than these,
    localhost and --host are refused."""
    time_limit: float = 120.0
    """Seconds that one request may take; then it is stopped."""
    device: str | None = None
    """Where to compute, such as cuda:0 or cpu. Default: the GPU if there is one."""
