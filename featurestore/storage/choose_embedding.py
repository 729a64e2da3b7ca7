"""Which of several embeddings is meant: by grid and encoder, or the only one there is. Arithmetic on names."""

from collections.abc import Iterable, Mapping

from featurestore.errors import AmbiguousSelectionError, StoreError
from featurestore.names import slug

Pair = tuple[str, str]
"""A grid key and an encoder slug."""


def choose(found: Mapping[str, Iterable[Pair]], grid: str | None, encoder: str | None, label: str) -> Pair:
    """Resolve the one embedding that is meant.

    Parameters
    ----------
    found
        Slide id -> the embeddings that it has.
    grid, encoder
        As the user named them; None leaves it open.
    label
        The store, for messages.
    """
    pairs = sorted({pair for of_slide in found.values() for pair in of_slide})
    fitting = [(g, e) for g, e in pairs if grid in (None, g) and (encoder is None or slug(encoder) == e)]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(f"--grid {g} --encoder {e}" for g, e in (fitting or pairs))
    if fitting:
        raise AmbiguousSelectionError(f"{label} holds several embeddings; name one of: {listed}")
    raise StoreError(
        f"{label} holds no embedding for grid {grid or 'any'}, encoder {encoder or 'any'}; "
        f"it has: {listed or 'nothing yet, run histosge embed'}"
    )
