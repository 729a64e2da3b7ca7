"""Everything that a page can request. Slides have numbers: a name in an address could become a path."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featurestore.byte_cache import ByteCache
from featurestore.slides.sample_sheet import read_samples
from featurestore.storage.store import Store
from histosge.errors import ViewError
from histosge.prediction.expression_store import ExpressionStore
from histosge.viewer.embedding_pictures import EmbeddingPictures
from histosge.viewer.gene_reader import new_gene_cache
from histosge.viewer.gene_sets import read_gene_sets
from histosge.viewer.shown_slide import ShownSlide, Sources

TILES_BYTES = 256_000_000
"""JPEG tiles held at once, over all slides."""


class Collection:
    """The slides of a page.

    Parameters
    ----------
    sources
        Where to read.
    gene_sets
        Name -> genes, of the sets that the page offers.
    slides
        Ids of the slides that are shown; all if empty.

    Raises
    ------
    ViewError
        If the store holds no slide, or not one of those that are named.
    """

    def __init__(
        self, sources: Sources, gene_sets: Mapping[str, list[str]] | None = None, slides: Sequence[str] = ()
    ) -> None:
        self.label = sources.store.location.label
        self.gene_sets = dict(gene_sets or {})
        known = sources.store.slide_ids()
        for slide_id in slides:
            if slide_id not in known:
                raise ViewError(f"{self.label} holds no slide {slide_id!r}: it has {_first_names(known)}")
        self.slides = [ShownSlide(name, sources) for name in known if not slides or name in slides]
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
        gene_sets: Path | None = None,
        slides: Sequence[str] = (),
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
        gene_sets
            GMT file with named sets of genes.
        slides
            Ids of the slides that are shown; all if empty.

        Raises
        ------
        StoreNotFoundError, StoreError
            If either store is not there, or is none.
        ViewError
            If they have no slide in common, or there is no such slide, or the gene sets cannot be read.
        """
        # First what is read at once: a mistake in it is found before stores are opened over a network.
        sets = read_gene_sets(gene_sets) if gene_sets is not None else {}
        opened = Store.open(store)
        maps = ExpressionStore.open(expression) if expression else None
        # A sheet may name slides that the store does not hold, and lack others: only what both know is shown.
        rows = {row.slide_id: row for row in read_samples(samples)} if samples else {}
        if domains is not None and not domains.is_dir():
            raise ViewError(
                f"there is no folder of domains at {domains}; make one with: histosge analyse --labels"
            )
        pictures = EmbeddingPictures(opened)
        sources = Sources(opened, maps, rows, domains, new_gene_cache(), pictures, finest_mpp)
        found = cls(sources, sets, slides)
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
            "gene_sets": len(self.gene_sets),
        }

    def describe_gene_sets(self) -> dict[str, Any]:
        """Return the named gene sets."""
        return {"sets": [{"name": name, "genes": genes} for name, genes in self.gene_sets.items()]}


def _check_common_slides(what: str, named: list[str], known: list[str], store: str) -> None:
    if not set(named) & set(known):
        raise ViewError(
            f"{what} has no slide of {store}: it has {_first_names(named)}, and the store {_first_names(known)}; "
            "give the one that was made from this store"
        )


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"
