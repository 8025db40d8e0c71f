"""Text for messages: untrusted text as one line, and "did you mean" hints."""

import difflib
from collections.abc import Iterable


def shown(name: object) -> str:
    """A file's name (or other text from outside) as one line that can be printed anywhere.

    Names are bytes: they may hold line breaks, marks that change the direction of writing, or bytes that are not UTF-8.
    Each such character becomes its escape, such as `\\n`, `\\u202e` or `\\xe9`.
    """
    text = str(name)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file's name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for error messages: "; did you mean 'x'?" or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
