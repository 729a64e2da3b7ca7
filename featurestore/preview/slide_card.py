"""What the page shows of one slide: plain values, no I/O."""

from dataclasses import asdict, dataclass, field
from typing import Any

STATES = ("failed", "partial", "planned", "done")
"""Worst first: a slide has the state of the worst of its embeddings."""


@dataclass(frozen=True)
class EmbeddingCard:
    """One encoder on one grid.

    Parameters
    ----------
    grid, encoder
        Grid key and encoder key.
    state
        One of `STATES`.
    done, planned
        Blocks that are stored, and those with tissue.
    unreadable
        Tissue patches without a vector.
    reason
        Why the first of them has none; empty if all have one.
    """

    grid: str
    encoder: str
    state: str
    done: int = 0
    planned: int = 0
    unreadable: int = 0
    reason: str = ""


@dataclass(frozen=True)
class SlideCard:
    """One slide.

    Parameters
    ----------
    slide_id
        Its id.
    state
        One of `STATES`.
    reason
        Why it failed; empty if it did not.
    size_px, mpp
        ``(width, height)`` and microns per pixel at level 0; None of a slide that never opened.
    grid
        Key of the grid whose tissue is outlined; empty if there is none.
    patches, tissue_share
        Tissue patches of that grid, and their share of all.
    flags
        Name of a quality flag -> share of the tissue patches that carry it, those above 0.
    embeddings
        Every encoder on every grid.
    picture, picture_of
        Path of the thumbnail below the page, empty if there is none; and what it was made of: ``slide`` or ``colours``,
        the mean colours of the patches that the store holds.
    shift
        Distance of the slide's mean embedding from the cohort's, see `featurestore.analysis.summary`; None if unknown.
    is_outlier
        Whether `shift` is far above those of the other slides.
    """

    slide_id: str
    state: str
    reason: str = ""
    size_px: tuple[int, int] | None = None
    mpp: float | None = None
    grid: str = ""
    patches: int = 0
    tissue_share: float = 0.0
    flags: dict[str, float] = field(default_factory=dict)
    embeddings: tuple[EmbeddingCard, ...] = ()
    picture: str = ""
    picture_of: str = ""
    shift: float | None = None
    is_outlier: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values; those that are empty are left out, as five thousand slides are one file."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "", (), {}, False)}


def worst_state(states: list[str]) -> str:
    """Return the state of a slide whose embeddings have these; ``planned`` if it has none."""
    return min(states, key=STATES.index, default="planned")
