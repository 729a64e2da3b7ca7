"""The page's own files, by name: what is not in this list does not exist."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

SCRIPTS = (
    "elements.js",
    "data.js",
    "colours.js",
    "geometry.js",
    "notes.js",
    "legend.js",
    "layers.js",
    "subject.js",
    "content.js",
    "panel.js",
    "drawing.js",
    "statistics.js",
    "gene_table.js",
    "regions.js",
    "contrast.js",
    "link.js",
    "save.js",
    "search.js",
    "sets.js",
    "theme.js",
    "main.js",
)
"""Modules of the page: each after those that it imports, as a page of one file needs them."""
_TEXT = "; charset=utf-8"
ASSETS = {
    "index.html": f"text/html{_TEXT}",
    "static/viewer.css": f"text/css{_TEXT}",
    **{f"static/{name}": f"text/javascript{_TEXT}" for name in SCRIPTS},
    "static/vendor/openseadragon.min.js": f"text/javascript{_TEXT}",
    "static/vendor/openseadragon.LICENSE.txt": f"text/plain{_TEXT}",
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
