"""Everything that a page can request. Slides have numbers: a name in an address could become a path."""

from pathlib import Path
from typing import Any

from featurestore.byte_cache import ByteCache
from featurestore.slides.sample_sheet import read_samples
from featurestore.storage.store import Store
from histosge.errors import ViewError
from histosge.prediction.expression_store import ExpressionStore
from histosge.viewer.gene_reader import new_gene_cache
from histosge.viewer.shown_slide import ShownSlide, Sources

TILES_BYTES = 256_000_000
"""JPEG tiles held at once, over all slides."""


class Collection:
    """The slides of a page.

    Parameters
    ----------
    sources
        Where to read.
    """

    def __init__(self, sources: Sources) -> None:
        self.label = sources.store.location.label
        self.slides = [ShownSlide(slide_id, sources) for slide_id in sources.store.slide_ids()]
        self._tiles: ByteCache[bytes] = ByteCache(TILES_BYTES, len)
        if not self.slides:
            raise ViewError(f"{self.label} holds no slide; fill it with: histosge embed")

    @classmethod
    def open(
        cls,
        store: str,
        expression: str | None = None,
        samples: str | None = None,
        domains: Path | None = None,
        finest_mpp: float = 0.0,
    ) -> "Collection":
        """Open a feature store, and what is shown on its slides.

        Parameters
        ----------
        store
            Folder or URL of the feature store.
        expression
            Folder or URL of an expression store.
        samples
            Sample sheet whose rows name the measured spots, and where slides lie now.
        domains
            Folder with ``<slide id>.parquet``, one row per patch, as ``histosge analyse STORE clusters --labels`` writes.
        finest_mpp
            Leave out tiles finer than this.

        Raises
        ------
        StoreNotFoundError, StoreError
            If either store is not there, or is none.
        ViewError
            If they have no slide in common.
        """
        opened = Store.open(store)
        maps = ExpressionStore.open(expression) if expression else None
        rows = {row.slide_id: row for row in read_samples(samples)} if samples else {}
        if domains is not None and not domains.is_dir():
            raise ViewError(
                f"there is no folder of domains at {domains}; make one with: histosge analyse --labels"
            )
        found = cls(Sources(opened, maps, rows, domains, new_gene_cache(), finest_mpp))
        # Maps or a sheet of another cohort would open without an error, and show nothing.
        ids = [slide.slide_id for slide in found.slides]
        if maps is not None:
            _check_common_slides(maps.location.label, maps.location.folders(), ids, found.label)
        if samples is not None:
            _check_common_slides(samples, sorted(rows), ids, found.label)
        return found

    def slide(self, number: int) -> ShownSlide:
        """Return a slide by its number.

        Raises
        ------
        LookupError
            If there is no such slide.
        """
        if not 0 <= number < len(self.slides):
            raise LookupError(f"there is no slide {number}")
        return self.slides[number]

    def tile(self, number: int, level: int, col: int, row: int) -> bytes:
        """Return a tile of a slide as JPEG."""
        picture = self.slide(number).picture
        return self._tiles.get((number, level, col, row), lambda: picture.tile(level, col, row))

    def describe(self) -> dict[str, Any]:
        """Return the list of slides."""
        # Its name without its path, which would tell visitors of a hosted page about this machine.
        return {
            "title": self.label.rstrip("/").rsplit("/", 1)[-1],
            "slides": [slide.slide_id for slide in self.slides],
        }


def _check_common_slides(what: str, named: list[str], known: list[str], store: str) -> None:
    if not set(named) & set(known):
        raise ViewError(
            f"{what} has no slide of {store}: it has {_first_names(named)}, and the store {_first_names(known)}; "
            "give the one that was made from this store"
        )


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"
