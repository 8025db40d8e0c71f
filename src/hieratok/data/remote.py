"""Files on object stores and web servers, by address: s3://, gs://, hf://, https:// (http:// on this machine only).

fsspec and its companions talk to the servers. They find credentials where each service's own tools do: in environment
variables and files in the home folder, never in the address. Nothing here prints an address's query, a password, or a
library's message that holds one. Reads have limits and are retried; an error is one line.
"""

import functools
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from hieratok.core.extras import needs_extras
from hieratok.core.messages import shown

SCHEMES = ("s3", "gs", "hf", "https", "http")
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
TRIES = 6
FIRST_WAIT = 0.5
"""Seconds before the second try; doubled for each further try: 15 s in all."""
TIMEOUT = 60.0
"""Seconds without a byte after which a request to a web server fails."""
MAX_REASON = 200
MAX_LISTED = 1_000_000
MARKS = ("ETag", "etag", "generation", "blob_id", "Last-Modified", "LastModified", "updated")
"""Fields that identify a file's version, the most reliable first; the first available one is used."""
PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Status codes of web servers that are worth a retry."""

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class RemoteError(OSError):
    """A request that a server refused or failed; the message is one line, names the file and has no secrets."""

    def __init__(self, message: str):
        # A DataLoader raises a worker's error again, with the traceback as its message; the last line is ours.
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{type(self).__module__}.{type(self).__name__}: "))


class _Final(Exception):
    """An error not worth a retry, with a message of ours, which may be shown."""


# --- Addresses --------------------------------------------------------------------------------------------------------


def is_address(path: str) -> bool:
    """Whether a path is an address on the network."""
    return SCHEME.match(path) is not None


def check_address(address: str) -> None:
    """Refuse addresses that cannot be read or may hold a secret, which would go into a run's settings and messages.

    Raises:
        ValueError: another scheme, http to another machine, a user's name, a query, or a chain of addresses.
    """
    scheme, _, rest = address.partition("://")
    if scheme not in SCHEMES:
        raise ValueError(
            f"{shown(scheme)}:// is not supported: give a path of this machine, or s3://, gs://, hf:// or https://"
        )
    server = rest.split("/", 1)[0]
    if "::" in address.replace("[::1]", "") or "#" in rest:
        raise ValueError(f"an address of {scheme}:// with :: or # in it is not supported")
    if scheme in ("http", "https"):
        if "?" in rest:
            raise ValueError(
                f"{shown(without_secrets(address))} was given with a query (?...), which may hold a secret and would be"
                " saved with the run's settings: give the address without it"
            )
        if "@" in server:
            raise ValueError(
                f"{shown(without_secrets(address))} was given with a user's name or password, which would be saved"
                " with the run's settings: leave it out"
            )
        if scheme == "http" and urlsplit(address).hostname not in THIS_MACHINE:
            raise ValueError(f"http://{shown(server)} is not encrypted: give https:// (http:// is for this machine)")
    if not server:
        raise ValueError(f"{shown(address)} names no {'server' if scheme.startswith('http') else 'bucket'}")


def without_secrets(text: str) -> str:
    """Text without the queries and user names of its addresses, which may be keys."""
    text = re.sub(r"(://[^\s'\"?]*)\?[^\s'\")]*", r"\1", text)
    return re.sub(r"(://)[^\s/'\"]*@", r"\1", text)


def is_several(address: str) -> bool:
    """Whether an address is a pattern."""
    return any(c in address.partition("://")[2] for c in "*?[")


def matching(pattern: str) -> list[str]:
    """Addresses of the files that a pattern matches, in order.

    Raises:
        FileNotFoundError: none.
        RemoteError: the server does not answer, or refuses.
        ValueError: a web server, which cannot be listed, or an address that is not supported.
    """
    _check_can_list(pattern)
    system = _system(pattern)
    found = _addresses(system, _ask(pattern, lambda: system.glob(_key(pattern))))
    if not found:
        raise FileNotFoundError(f"nothing matches {shown(pattern)}")
    return found


def files_in(folder: str) -> list[str]:
    """Sorted addresses of the files in a folder; on the Hugging Face hub, in its sub-folders too.

    Raises:
        FileNotFoundError: no such folder.
        RemoteError, ValueError: as `matching`.
    """
    _check_can_list(folder)
    system, key = _system(folder), _key(folder).rstrip("/")
    if folder.startswith("hf://"):
        return _addresses(system, _ask(folder, lambda: system.find(key)))
    entries = _ask(folder, lambda: system.ls(key, detail=True))
    return _addresses(system, [entry["name"] for entry in entries if entry["type"] == "file"])


def _check_can_list(address: str) -> None:
    check_address(address)
    if address.startswith("http"):
        raise ValueError(
            f"{shown(address)}: files on a web server cannot be listed: name them, as in https://HOST/train-{{000..146}}.tar"
        )


def _addresses(system: Any, keys: list[str]) -> list[str]:
    found = [str(system.unstrip_protocol(key)) for key in itertools.islice(keys, MAX_LISTED)]
    return sorted(re.sub(r"^gcs://", "gs://", re.sub(r"^s3a://", "s3://", one)) for one in found)


def _key(address: str) -> str:
    """A file system's name for an address; for web servers, the address itself."""
    return address if address.startswith("http") else address.partition("://")[2]


# --- Files ------------------------------------------------------------------------------------------------------------


class RemoteFile:
    """A remote file, for reads by ranges from any thread.

    Args:
        address: checked by `check_address`.

    Attributes:
        size: in bytes.
        mark: what identifies this version on the server; empty if unknown.

    Raises:
        FileNotFoundError: no such file.
        RemoteError: the server does not answer, refuses, or does not say how large the file is.
        ValueError: as `check_address`.
    """

    def __init__(self, address: str):
        check_address(address)
        self._address = address
        self._system = _system(address)
        self._key = _key(address)
        info = _ask(address, self._info)
        size = info.get("size")
        if not isinstance(size, int) or size < 0:
            raise RemoteError(f"{shown(address)}: the server does not say how large the file is")
        self.size = size
        self.mark = next((str(info[name])[:200] for name in MARKS if info.get(name)), "")

    def read(self, size: int, offset: int) -> bytes:
        """So many bytes from a place on; fewer where the file ends.

        Raises:
            FileNotFoundError, RemoteError: the file is gone, or the server still fails after 6 tries.
        """
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        return _ask(self._address, lambda: self._range(offset, end))

    def _info(self) -> dict[str, Any]:
        self._system.invalidate_cache()  # a cached listing may be outdated
        return self._system.info(self._key)

    def _range(self, start: int, end: int) -> bytes:
        # hf:// reads ranges from opened files only, which would otherwise read ahead megabytes
        options = {"cache_type": "none"} if self._address.startswith("hf://") else {}
        data = self._system.cat_file(self._key, start=start, end=end, **options)
        if len(data) != end - start:
            raise OSError(f"{len(data):,} bytes came instead of {end - start:,}")
        return data


def _system(address: str) -> Any:
    """The file system of an address's server, one for each process, with fsspec's own configuration."""
    return _open_system(address.partition("://")[0], os.getpid())


_opening = threading.Lock()


def _open_system(scheme: str, process: int) -> Any:
    with _opening:
        return _opened_system(scheme, process)


@functools.lru_cache(maxsize=8)
def _opened_system(scheme: str, process: int) -> Any:
    with needs_extras():
        if scheme == "s3":
            from s3fs import S3FileSystem

            system = S3FileSystem(skip_instance_cache=True, config_kwargs={"retries": {"total_max_attempts": 1}})
            system.retries = 1  # tries within tries, of three libraries, take minutes
            return system
        if scheme == "gs":
            from gcsfs import GCSFileSystem

            return GCSFileSystem(skip_instance_cache=True)
        if scheme == "hf":
            from huggingface_hub import HfFileSystem

            return HfFileSystem(skip_instance_cache=True)
        return _web_system()


def _web_system() -> Any:
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    class BoundedHTTPFileSystem(HTTPFileSystem):
        """fsspec's class reads an answer of any size: the whole file from a server that ignores ranges."""

        async def _info(self, url: str, **kwargs: Any) -> dict[str, Any]:
            try:
                return await super()._info(url, **kwargs)
            except FileNotFoundError as error:  # raised for every failure
                cause = error.__cause__
                if isinstance(cause, Exception) and _status(cause) not in (404, 410):
                    raise cause from None
                raise

        async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
            assert start is not None
            assert end is not None
            session = await self.set_session()
            headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            async with session.get(self.encode_url(url), headers=headers) as answer:
                self._raise_not_found_for_status(answer, url)
                said = answer.headers.get("Content-Range", f"bytes {start}-")
                if answer.status != 206 or not said.startswith(f"bytes {start}-"):
                    raise _Final("the server does not read parts of files (HTTP ranges), which shards need")
                return await answer.content.readexactly(end - start)

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    return BoundedHTTPFileSystem(skip_instance_cache=True, client_kwargs={"timeout": timeout})


# --- Tries ------------------------------------------------------------------------------------------------------------


def _ask(address: str, call: Callable[[], Result]) -> Result:
    """The result of a call to a server, which is tried up to six times.

    Raises:
        FileNotFoundError: there is no such file.
        RemoteError: any other failure.
    """
    name = shown(without_secrets(address))
    for wait in _waits():
        try:
            return call()
        except _Final as error:
            raise RemoteError(f"{name}: {error}") from None
        except Exception as error:  # libraries raise errors of many types
            if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
                private = ", or is private (hf auth login)" if address.startswith("hf://") else ""
                raise FileNotFoundError(f"{name} does not exist{private}") from None
            if reason := _refusal(error):
                raise RemoteError(f"{name} may not be read: {reason}") from None
            reason = _reason(error)
            if not wait or not _may_pass(error):
                tries = f" after {TRIES} tries" if _may_pass(error) else ""
                raise RemoteError(f"{name} cannot be read{tries}: {reason}") from None
            logger.info("%s: %s; trying again in %g s", name, reason, wait)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _waits() -> Iterator[float]:
    """Seconds after each try; 0 after the last."""
    yield from (FIRST_WAIT * 2**i for i in range(TRIES - 1))
    yield 0


def _status(error: Exception) -> int | None:
    """Status code of a web server's answer."""
    for holder, name in ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")):
        found = getattr(holder, name, None)
        if found is not None and str(found).isdigit():
            return int(found)
    return None


def _refusal(error: Exception) -> str:
    """Why the server refuses, so that a retry is of no use; empty for other failures."""
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
        return "there are no credentials for it (docs/train.md says where they are looked for)"
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return "access denied"
    return ""


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    return status is None or status in PASSING


def _reason(error: Exception) -> str:
    if (status := _status(error)) is not None:
        return f"the server answers {status}"
    text = without_secrets(" ".join(str(error).split()))[:MAX_REASON]
    return shown(text or type(error).__name__)
