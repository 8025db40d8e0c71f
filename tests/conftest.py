"""Fixtures every test module shares."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real photos and small pretrained networks that lies beside a developer's checkout."""
    path = Path(os.environ.get("HIERATOK_SHARED", ROOT.parent / "shared"))
    if not (path / "data").is_dir() or not (path / "weights").is_dir():
        pytest.skip(f"needs photos and weights in {path.name}/ beside the checkout (or HIERATOK_SHARED)")
    return path
