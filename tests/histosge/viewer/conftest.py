"""One small world for all tests of the viewer, and a real server in front of it."""

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from viewer_world import Answer, Get, World, make_world, serving

from histosge.viewer.collection import Collection


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
            with urllib.request.urlopen(request, timeout=10) as response:
                return Answer(response.status, response.read(), dict(response.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read(), dict(error.headers))

    return ask
