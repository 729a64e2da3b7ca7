"""Choose one of several embeddings, by grid and encoder, or the only one that exists. Names only, no I/O."""

from collections.abc import Iterable, Mapping

from featurestore.errors import AmbiguousSelectionError, StoreError
from featurestore.names import slug
from featurestore.storage.layout import SPOTS

EmbeddingName = tuple[str, str]
"""Grid key and encoder slug: together with a slide id, where an embedding is in a store."""


def choose_embedding(
    found: Mapping[str, Iterable[EmbeddingName]], grid: str | None, encoder: str | None, label: str
) -> EmbeddingName:
    """Return the only embedding that matches.

    Parameters
    ----------
    found
        Slide id -> the embeddings that it has.
    grid, encoder
        Grid key, and encoder key or slug, as the user named them; None matches any.
    label
        The store, for messages.

    Raises
    ------
    AmbiguousSelectionError
        If several match; the message lists them.
    StoreError
        If none matches; the message lists what there is.
    """
    if grid is not None and grid.startswith(SPOTS):
        raise StoreError(
            f"{label}: the patches of {grid} lie at their own positions, and training and prediction need a grid; embed the "
            "slides with histosge embed"
        )
    names = sorted({name for of_slide in found.values() for name in of_slide})
    matching = matching_embeddings(names, grid, encoder)
    if len(matching) == 1:
        return matching[0]
    listed = as_options(matching or names)
    if matching:
        raise AmbiguousSelectionError(f"{label} holds several embeddings; name one of: {listed}")
    raise StoreError(
        f"{label} holds no embedding for grid {grid or 'any'}, encoder {encoder or 'any'}; "
        f"it has: {listed or 'nothing yet, run histosge embed'}"
    )


def matching_embeddings(
    names: Iterable[EmbeddingName], grid: str | None, encoder: str | None
) -> list[EmbeddingName]:
    """Return the embeddings of a grid key and an encoder key or slug, sorted; None matches any."""
    return [(g, e) for g, e in sorted(names) if grid in (None, g) and (encoder is None or slug(encoder) == e)]


def as_options(names: Iterable[EmbeddingName]) -> str:
    """Return embeddings as options that can be pasted into a command."""
    return "; ".join(f"--grid {g} --encoder {e}" for g, e in names)
