"""The page of a store: what is embedded, what is not, and why.

A slide costs its tissue map, and its picture once: a picture stays as long as the slide's file and its tissue do.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.cores import count_cores
from featurestore.errors import AccessError, SlideError, StoreError
from featurestore.events import OnMessage, OnProgress, Progress, ignore_message, ignore_progress
from featurestore.location import PathOrUrl
from featurestore.preview.outliers import commonest_embedding, far_slides, slide_shifts
from featurestore.preview.page_folder import PICTURES, PageFolder
from featurestore.preview.slide_card import EmbeddingCard, SlideCard, worst_state
from featurestore.preview.thumbnail import VERSION, colours_picture, jpeg, outlined, slide_picture
from featurestore.slides.download_cache import is_remote
from featurestore.slides.stored_source import open_stored_slide
from featurestore.storage.catalogue import catalogue
from featurestore.storage.store import SlideRecord, Store, StoredGrid
from featurestore.tissue.flags import flag_shares

AHEAD = 64
"""Slides whose pictures are asked for at once: a part of the cohort, so that memory does not grow with it."""


@dataclass(frozen=True)
class WrittenPreview:
    """What was written.

    Parameters
    ----------
    slides, failed, outliers
        Counts.
    was_there
        Whether the same page was there already.
    """

    slides: int
    failed: int
    outliers: int
    was_there: bool


def write_preview(
    store: PathOrUrl,
    folder: str | os.PathLike[str],
    *,
    outliers: bool = True,
    overwrite: bool = False,
    on_progress: OnProgress = ignore_progress,
    on_message: OnMessage = ignore_message,
) -> WrittenPreview:
    """Write the page of a store's slides.

    Parameters
    ----------
    store
        Folder or URL.
    folder
        Where the page goes; its ``index.html`` opens without a server.
    outliers
        Read every embedding once, to find slides that look unlike the others.
    overwrite
        Replace the page of another store.
    on_progress, on_message
        Called after each slide, and with what could not be done.

    Raises
    ------
    StoreNotFoundError, StoreError
        If there is no store.
    OutputError, EarlierResultError
        If the page cannot be written there.
    """
    opened = Store.open(store)
    page = PageFolder.open(Path(folder), store, overwrite=overwrite)
    rows = catalogue(store).to_dicts()
    about: dict[str, Any] = {"kind": "store"}
    shifts: dict[str, float] = {}
    compared = commonest_embedding((r["grid"], r["encoder"]) for r in rows if r["encoder"] and r["done"])
    if outliers and compared is not None:
        try:
            shifts = slide_shifts(store, *compared, on_progress)
        except StoreError as error:
            if isinstance(error, AccessError):
                raise
            on_message(f"slides are not compared by their embeddings: {error}")
        else:
            about["compared"] = {"grid": compared[0], "encoder": compared[1]}
    far = far_slides(shifts)
    named = [(name, list(found)) for name, found in groupby(rows, key=lambda row: row["slide"])]

    def card(item: tuple[str, list[dict[str, Any]]]) -> SlideCard:
        made = _card(opened, page, *item)
        return replace(made, shift=shifts.get(item[0]), is_outlier=item[0] in far)

    counts = {"failed": 0}

    def cards() -> Iterator[SlideCard]:
        with ThreadPoolExecutor(max(1, count_cores().cores)) as threads:
            for first in range(0, len(named), AHEAD):
                for number, made in enumerate(
                    threads.map(card, named[first : first + AHEAD]), start=first + 1
                ):
                    counts["failed"] += made.state == "failed"
                    yield made
                    on_progress(Progress(number, len(named), "pictures"))

    was_there = page.finish(cards(), about)
    return WrittenPreview(len(named), counts["failed"], len(far), was_there)


def _card(store: Store, page: PageFolder, slide_id: str, rows: list[dict[str, Any]]) -> SlideCard:
    embeddings = tuple(
        EmbeddingCard(
            row["grid"],
            row["encoder"],
            row["state"],
            row["done"],
            row["planned"],
            row["unreadable"] or 0,
            row["reason"] or "",
        )
        for row in rows
        if row["encoder"]
    )
    # The rows without an encoder say why a slide failed, or that nothing of it is embedded yet.
    reason = next((row["reason"] for row in rows if not row["encoder"] and row["reason"]), "")
    card = SlideCard(
        slide_id, worst_state([row["state"] for row in rows]), reason or "", embeddings=embeddings
    )
    try:
        record = store.slide(slide_id)
        keys = store.grid_keys(slide_id)
    except StoreError as error:
        if isinstance(error, AccessError):
            raise
        return card  # it never opened
    card = replace(card, size_px=record.size_px, mpp=record.mpp)
    # The grid of most embeddings; of as many the first.
    wanted = [e.grid for e in embeddings if e.grid in keys] or keys
    if not wanted:
        return card
    key = min(set(wanted), key=lambda name: (-wanted.count(name), name))
    stored = store.grid(slide_id, key)
    quality = store.quality(slide_id, key, stored.grid.shape)
    name, made_of = stored_picture(page, record.fingerprint, stored, lambda: _read_slide(record))
    return replace(
        card,
        grid=key,
        patches=int(stored.is_tissue.sum()),
        tissue_share=round(float(stored.is_tissue.mean()), 4),
        flags={} if quality is None else flag_shares(quality, stored.is_tissue),
        picture=name,
        picture_of=made_of,
    )


Picture = tuple[NDArray[np.uint8], float]
"""RGB, and its microns per pixel."""


def stored_picture(
    page: PageFolder, fingerprint: str, stored: StoredGrid, read: Callable[[], Picture | None]
) -> tuple[str, str]:
    """Return the name of a slide's picture below the page, and what it is of; it is drawn if it is not there.

    Parameters
    ----------
    fingerprint
        Of the slide's file: another one is another picture.
    read
        Reads the slide; None where that is not possible, and the mean colours of its patches stand for it.
    """
    digest = hashlib.sha256(f"{VERSION} {fingerprint} {stored.grid.spec.key} ".encode())
    digest.update(np.packbits(stored.is_tissue).tobytes())
    base = f"{PICTURES}/{stored.slide_id}-{digest.hexdigest()[:12]}"
    of_slide, of_colours = f"{base}-s.jpg", f"{base}-c.jpg"
    if page.has_picture(of_slide):
        return of_slide, "slide"
    found = read()
    picture, mpp = found or colours_picture(stored.rgb, stored.grid)
    name = of_slide if found else of_colours
    page.write_picture(name, jpeg(outlined(picture, mpp, stored.grid, stored.is_tissue)))
    return name, "slide" if found else "colours"


def _read_slide(record: SlideRecord) -> Picture | None:
    """Read a slide coarsely; None if its file is not here, is another one by now, or cannot be read."""
    # A slide behind a URL would have to be fetched for a picture: the store's own colours are at hand.
    if is_remote(record.source):
        return None
    try:
        slide = open_stored_slide(record.source, record.mpp, record.fingerprint)
    except SlideError:
        return None
    try:
        return slide_picture(slide)
    except SlideError:
        return None
    finally:
        slide.close()
