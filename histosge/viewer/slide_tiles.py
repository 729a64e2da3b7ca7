"""The H&E of one slide as JPEG tiles, read from its source; or the reason why there are none."""

import threading
from typing import Any

import simplejpeg

from featurestore.credentials import strip_credentials
from featurestore.errors import FeatureStoreError
from featurestore.slides.download_cache import is_remote
from featurestore.slides.open_slide import open_slide
from featurestore.slides.protocol import Slide
from featurestore.slides.stored_source import check_fingerprint, not_the_embedded, open_stored_slide
from featurestore.storage.store import SlideRecord
from histosge.viewer.tile_pyramid import TilePyramid

QUALITY = 85
"""Of the tiles' JPEG: no visible difference, and a tenth of the bytes of lossless files."""


class SlideTiles:
    """One slide's pixels. A remote slide is fetched whole, so opening goes on in the background.

    Parameters
    ----------
    record
        Of the store.
    source
        Where the slide lies now, if elsewhere than in the record.
    finest_mpp
        Leave out tiles finer than this.
    """

    def __init__(self, record: SlideRecord, source: str | None = None, finest_mpp: float = 0.0) -> None:
        self._record, self._source, self._finest_mpp = record, source or record.source, finest_mpp
        self._opened: tuple[Slide, TilePyramid] | None = None
        self._reason = ""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def describe(self, wait_s: float | None = 1.0) -> dict[str, Any]:
        """Return ``state`` (``ready``, ``opening`` or ``absent``), the ``reason`` of absence, and the tiles.

        Parameters
        ----------
        wait_s
            How long to wait for a slide that is being opened; None means until it is.
        """
        # One thread opens the slide, however many requests ask for its state meanwhile.
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._open, name="open-slide", daemon=True)
                self._thread.start()
        self._thread.join(wait_s)
        if self._thread.is_alive():
            return {"state": "opening", "reason": f"fetching {strip_credentials(self._source)}"}
        if self._opened is None:
            return {"state": "absent", "reason": self._reason}
        return {"state": "ready", "version": self._record.fingerprint[-16:], **self._opened[1].to_json()}

    def _open_slide(self) -> Slide:
        if self._source == self._record.source:
            return open_stored_slide(self._source, self._record.mpp, self._record.fingerprint)
        # The user named it.
        slide = open_slide(self._source, self._record.mpp)
        # Of a remote slide the size has to do: a fingerprint would need its bytes once more.
        if not is_remote(self._source):
            check_fingerprint(self._source, self._record.fingerprint)
        return slide

    def _open(self) -> None:
        try:
            slide = self._open_slide()
            if slide.size_px != self._record.size_px:
                raise not_the_embedded(self._source, self._record.size_px, slide.size_px)
            tiles = TilePyramid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, self._finest_mpp)
            self._opened = (slide, tiles)
        # In a thread nobody would see the error: it becomes the reason that the page shows.
        except (FeatureStoreError, OSError) as error:
            self._reason = str(error)

    def tiles(self) -> TilePyramid | None:
        """Return which tiles there are; None if the slide cannot be reached. Waits until that is known."""
        self.describe(None)
        return self._opened[1] if self._opened else None

    def tile(self, level: int, col: int, row: int) -> bytes:
        """Return a tile as JPEG.

        Raises
        ------
        LookupError
            If there is no such tile, or no picture.
        SlideError
            If the file cannot be read there.
        """
        if self._opened is None and self.describe()["state"] != "ready":
            raise LookupError("the slide is not open")
        assert self._opened is not None
        slide, tiles = self._opened
        pixels = slide.read_region(*tiles.region_px(level, col, row), tiles.level_mpp(level))
        return bytes(simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorspace="RGB"))
