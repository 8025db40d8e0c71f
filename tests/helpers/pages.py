"""Reading pages."""

import re
from html.parser import HTMLParser


class Reader(HTMLParser):
    """What a browser makes of a page: its elements' attributes, its visible text, its table cells."""

    def __init__(self, document: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.cells: list[str] = []
        self.feed(str(document))  # not Markup, which would escape what is cut from it

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "wbr"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
            if "td" in self.open or "th" in self.open:
                self.cells[-1] += data

    def tags(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def assert_self_contained(document: str) -> None:
    """No element of the page fetches anything."""
    for tag, attributes in Reader(document).elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            target = attributes.get(name) or ""
            assert not target or target.startswith(("data:", "#")), f"<{tag} {name}={target[:60]!r}>"
    assert "@import" not in document
    assert not re.search(r"url\((?!#)", document), "a style loads something"
