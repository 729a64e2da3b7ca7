"""The page of slides that are about to be embedded: what a dry run has found."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from featurestore.embedding.slide_result import SlideResult
from featurestore.errors import SlideError
from featurestore.location import PathOrUrl
from featurestore.preview.page_folder import PageFolder
from featurestore.preview.slide_card import EmbeddingCard, SlideCard
from featurestore.preview.store_preview import stored_picture
from featurestore.preview.thumbnail import slide_picture
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.protocol import Slide
from featurestore.storage.store import StoredGrid


@dataclass
class PlannedPreview:
    """A page that grows as a dry run goes through the slides. Make one with `PlannedPreview.open`.

    Parameters
    ----------
    page
        Where it goes.
    encoders
        Keys of the encoders.
    """

    page: PageFolder
    encoders: tuple[str, ...]
    _cards: dict[str, SlideCard] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        store: PathOrUrl,
        encoders: Sequence[str],
        *,
        overwrite: bool = False,
    ) -> "PlannedPreview":
        """Check that a page may be written.

        Raises
        ------
        OutputError, EarlierResultError
            If it may not.
        """
        return cls(PageFolder.open(Path(folder), store, overwrite=overwrite), tuple(encoders))

    def add_survey(self, slide: Slide, stored: StoredGrid, result: SlideResult) -> None:
        """Add a slide that was surveyed; `featurestore.embedding.embed` calls it."""
        n_blocks = result.planned // max(1, len(self.encoders))
        card = SlideCard(
            result.slide_id,
            "planned",
            size_px=slide.size_px,
            mpp=slide.mpp,
            grid=stored.grid.spec.key,
            patches=result.patches,
            tissue_share=round(float(stored.is_tissue.mean()), 4),
            flags=result.flags,
            embeddings=tuple(
                EmbeddingCard(stored.grid.spec.key, key, "planned", planned=n_blocks) for key in self.encoders
            ),
        )
        try:
            name = stored_picture(
                self.page, slide_fingerprint(slide.source), stored, lambda: slide_picture(slide)
            )
        except SlideError:  # its colours were read a moment ago, and stand for it
            name = stored_picture(self.page, "", stored, lambda: None)
        self._cards[result.slide_id] = replace(card, picture=name[0], picture_of=name[1])

    def finish(self, results: Sequence[SlideResult]) -> None:
        """Write the page, with the slides that failed.

        Parameters
        ----------
        results
            Of the dry run, in the order of the sample sheet.
        """
        for result in results:
            if result.state == "failed":
                self._cards[result.slide_id] = SlideCard(result.slide_id, "failed", reason=result.reason)
        cards = (self._cards[name] for name in sorted(self._cards))
        self.page.finish(cards, {"kind": "plan"})
