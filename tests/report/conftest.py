from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.browser import CHROMIUM, Browser
from tests.report.planted_run import write_planted_run


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Path:
    """A run directory with planted mistakes."""
    return write_planted_run(tmp_path_factory.mktemp("runs") / "planted")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    browser = Browser()
    yield browser
    browser.close()
