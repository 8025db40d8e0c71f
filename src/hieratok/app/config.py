"""Options of `hieratok app`. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServeApp:
    """Show a tokenizer's reconstructions of photos, and a generator's samples, in the browser.

    Example: hieratok app runs/quickstart --generator runs/quickstart/dit
    """

    run: str
    """Tokenizer: a run's folder, a tokenizer's folder or a hub id."""
    generator: str | None = None
    """Generator of its latents: a run's folder, a generator's folder or a hub id. Default: no samples."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is this machine only. 0.0.0.0 opens it to the network, without a password."""
    port: int = 7860
    """Port to listen on."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names of the app, such as '[photos.example.org]'. Requests for other names than these, localhost and --host
    are refused."""
    time_limit: float = 120.0
    """Largest time of one request, in seconds; then it is stopped."""
    device: str | None = None
    """Where to compute, such as cuda:0 or cpu. Default: the GPU if there is one."""
