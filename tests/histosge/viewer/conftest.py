"""One small world for all tests of the viewer, and a real server in front of it."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from browser_page import WAIT_MS
from viewer_world import Answer, Get, World, make_world, serving

from histosge.viewer.collection import Collection

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("viewer"))


@pytest.fixture(scope="session")
def address(world: World) -> Iterator[str]:
    opened = Collection.open(str(world.store), str(world.maps), str(world.sheet), world.domains)
    with serving(opened) as found:
        yield found


@pytest.fixture(scope="session")
def get(address: str) -> Get:
    def ask(path: str, **headers: str) -> Answer:
        request = urllib.request.Request(f"{address}/{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return Answer(response.status, response.read(), dict(response.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read(), dict(error.headers))

    return ask


@pytest.fixture(scope="module")
def browser(chromium_path: str) -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium_path, headless=True, args=flags, timeout=120_000
        )
        yield started
        started.close()


@pytest.fixture
def page(browser: "Browser") -> "Iterator[Page]":
    opened = browser.new_page(viewport={"width": 1200, "height": 760})
    opened.set_default_timeout(WAIT_MS)
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("requestfailed", lambda request: said.append(f"failed: {request.url}"))
    yield opened
    opened.close()
    assert said == []
