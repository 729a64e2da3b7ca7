"""What maps are made with, as a record for pages and files that show them; nothing large is read for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featurestore.earlier_results import content_fingerprint, short_fingerprint
from featurestore.storage.store import Store
from histosge.data.section_loading import Selection
from histosge.training.made_with import RECORD_FORMAT
from histosge.training.model_files import read_fingerprint


def describe_maps(
    store: str | Path,
    model: str | Path,
    selection: Selection,
    *,
    slide_ids: Sequence[str] = (),
    genes: Sequence[str] = (),
    condition_on: str | Path | None = None,
) -> dict[str, Any]:
    """Return what `histosge.predict` would make maps with: model, genes, spots, and each slide by its fingerprint.

    Raises
    ------
    ModelError, StoreError
        If there is no such model or store. A slide that the store does not hold is left to `predict` to refuse.
    """
    opened = Store.open(str(store))
    known = opened.slide_ids()
    return {
        "format": RECORD_FORMAT,
        "model": short_fingerprint(read_fingerprint(model)),
        "genes": list(genes) or "all of the model",
        "spots": None if condition_on is None else content_fingerprint(condition_on),
        "grid": selection.grid or "the model's",
        "encoder": selection.encoder or "the model's",
        "slides": {
            slide_id: short_fingerprint(opened.slide(slide_id).fingerprint)
            for slide_id in sorted(set(slide_ids) or known)
            if slide_id in known
        },
    }
