"""The maps of an expression store one after another, as tables: one slide is open at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from featurestore.events import OnProgress, Progress, ignore_progress
from histosge.errors import ExportError
from histosge.exporting.open_tables import open_map, table_of_map
from histosge.exporting.patch_table import PatchTable
from histosge.prediction.expression_store import ExpressionStore


class CohortMaps:
    """The maps of some slides, by one model.

    Parameters
    ----------
    url
        Expression store, a folder or URL.
    slide_ids
        Only these; all if empty.
    grid
        Needed where a slide has several maps.

    Raises
    ------
    ExportError, StoreError
        If there is no store, or no map; while tables are read also where a slide lacks a map or a gene, or another model
        predicted it.
    """

    def __init__(
        self,
        url: str | Path,
        slide_ids: Sequence[str] = (),
        grid: str | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> None:
        self._url, self._grid, self._on_progress = str(url), grid, on_progress
        known = dict.fromkeys(slide_id for slide_id, _ in ExpressionStore.open(self._url).maps())
        self.slide_ids = list(dict.fromkeys(slide_ids)) or sorted(known)
        if not known:
            raise ExportError(f"{self._url} holds no map; make one with: histosge predict")
        # The first also now, so that an unknown slide or a grid that is not named is refused before anything is computed.
        self.first = open_map(self._url, self.slide_ids[0], self._grid)

    @property
    def genes(self) -> tuple[str, ...]:
        """Genes of the first map."""
        return self.first.genes

    def tables(self, genes: Sequence[str] = ()) -> Iterator[PatchTable]:
        """Yield each slide's map with some genes; with all of the first map's if none is named."""
        model = self.first.array.attrs.get("made_by", {}).get("model")
        for number, slide_id in enumerate(self.slide_ids, start=1):
            stored = open_map(self._url, slide_id, self._grid)
            if stored.array.attrs.get("made_by", {}).get("model") != model:
                raise ExportError(
                    f"the maps of {self.first.slide_id!r} and {slide_id!r} were predicted by different models; name slides "
                    "of one of them with --slide"
                )
            yield table_of_map(stored, genes or self.genes)
            self._on_progress(Progress(number, len(self.slide_ids), slide_id))
