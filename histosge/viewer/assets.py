"""The page's own files, by name: what is not in this list does not exist."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

ASSETS = {
    "index.html": "text/html; charset=utf-8",
    "static/viewer.css": "text/css; charset=utf-8",
    "static/main.js": "text/javascript; charset=utf-8",
    "static/data.js": "text/javascript; charset=utf-8",
    "static/colours.js": "text/javascript; charset=utf-8",
    "static/panel.js": "text/javascript; charset=utf-8",
    "static/layers.js": "text/javascript; charset=utf-8",
    "static/legend.js": "text/javascript; charset=utf-8",
    "static/search.js": "text/javascript; charset=utf-8",
    "static/vendor/openseadragon.min.js": "text/javascript; charset=utf-8",
    "static/vendor/openseadragon.LICENSE.txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True)
class Asset:
    """One file of the page."""

    content: bytes
    media_type: str


# Read once, not at each request.
@cache
def assets() -> dict[str, Asset]:
    """Return every file of the page by its path below the page's address."""
    folder = files("histosge.viewer") / "static"
    return {
        name: Asset((folder / name.removeprefix("static/")).read_bytes(), media)
        for name, media in ASSETS.items()
    }
