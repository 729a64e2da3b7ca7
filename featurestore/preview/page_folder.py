"""The page as a folder of files: it opens from a disk, so its data is a script, which a browser may load, and no JSON.

The pictures are written first, the data after them, and ``index.html`` last.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from featurestore.earlier_results import short_fingerprint
from featurestore.errors import EarlierResultError, OutputError
from featurestore.location import Location, PathOrUrl
from featurestore.preview.slide_card import SlideCard
from featurestore.whole_file import check_output, whole_file

ASSETS = ("preview.css", "preview.js", "index.html")
"""In the order in which they are written."""
DATA = "slides.js"
PICTURES = "pictures"
_BEGIN = "preview.begin("


@dataclass(frozen=True)
class StoreName:
    """Which store a page is of. The page may be sent to others, so it holds no path of this machine.

    Parameters
    ----------
    name
        The last part of its path.
    place
        A hash of its path, which tells two stores of one name apart.
    """

    name: str
    place: str

    @classmethod
    def from_url(cls, url: PathOrUrl) -> "StoreName":
        """Return the name of the store at a folder or URL."""
        location = Location(url)
        full = str(Path(location.label).absolute()) if "://" not in location.label else location.label
        return cls(full.rstrip("/").rpartition("/")[2], short_fingerprint(f"{full} ".ljust(32)))


@dataclass(frozen=True)
class PageFolder:
    """The folder of a page. Make one with `PageFolder.open`."""

    folder: Path
    store: StoreName

    @classmethod
    def open(cls, folder: Path, store: PathOrUrl, *, overwrite: bool = False) -> "PageFolder":
        """Check that a page may be written, before the work that it shows.

        Parameters
        ----------
        folder
            A new or empty folder, or one that holds a page.
        store
            The store that is shown, which need not exist. A page of the same store is replaced, since a store grows.
        overwrite
            Replace a page of another store.

        Raises
        ------
        OutputError
            If the folder holds something that is no page, or cannot be written.
        EarlierResultError
            If it holds a page of another store.
        """
        if "://" in str(folder) or ":/" in str(folder):
            raise OutputError(
                f"a page is written into a folder of this machine, not to {folder}; copy it on from there"
            )
        check_output(folder, folder=True)
        name = StoreName.from_url(store)
        if folder.is_dir() and any(folder.iterdir()):
            if not (folder / "preview.js").is_file() and not (folder / PICTURES).is_dir():
                raise OutputError(
                    f"{folder} holds something that is no preview; nothing was written, give a new or empty folder"
                )
            earlier = _store_of(folder / DATA)
            if earlier is not None and earlier.place != name.place and not overwrite:
                raise EarlierResultError(
                    f"{folder} holds the preview of another store, {earlier.name}, not of {Location(store).label}; give "
                    "another folder, or replace it with --overwrite"
                )
        return cls(folder, name)

    def has_picture(self, name: str) -> bool:
        """Tell whether a picture is there."""
        return (self.folder / name).is_file()

    def write_picture(self, name: str, content: bytes) -> None:
        """Write a picture, whole or not at all."""
        with whole_file(self.folder / name) as partial:
            partial.write_bytes(content)

    def finish(self, cards: Iterable[SlideCard], about: dict[str, Any]) -> bool:
        """Write the data and the page, and remove pictures that it does not show.

        Parameters
        ----------
        cards
            In the order of the page.
        about
            Of all slides, JSON-ready.

        Returns
        -------
        bool
            Whether the same page was there already.
        """
        shown: set[str] = set()
        with whole_file(self.folder / DATA) as partial:
            with partial.open("w", encoding="utf-8") as file:
                file.write(f"{_BEGIN}{_script({**asdict(self.store), **about})});\n")
                for card in cards:
                    shown.add(card.picture)
                    file.write(f"preview.add({_script(card.to_json())});\n")
            is_same = (self.folder / DATA).is_file() and _same_bytes(partial, self.folder / DATA)
        source = files("featurestore.preview") / "static"
        for name in ASSETS:
            content = (source / name).read_bytes()
            is_same &= (self.folder / name).is_file() and (self.folder / name).read_bytes() == content
            with whole_file(self.folder / name) as partial:
                partial.write_bytes(content)
        for picture in (self.folder / PICTURES).glob("*.jpg"):
            if f"{PICTURES}/{picture.name}" not in shown:
                picture.unlink(missing_ok=True)
        return is_same


def _script(value: dict[str, Any]) -> str:
    """Return JSON that may stand in a script, whatever a slide's file or a failure's reason holds."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c")


def _store_of(data: Path) -> StoreName | None:
    """Return which store a page's data is of; None where that cannot be read."""
    try:
        with data.open(encoding="utf-8") as file:
            line = file.readline(1 << 20).strip()
        found = json.loads(line.removeprefix(_BEGIN).removesuffix(");"))
        return StoreName(str(found["name"]), str(found["place"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _same_bytes(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()
