"""Open a slide where a store says that it lies. The store may be from somebody else.

A URL must have an allowed scheme, as everywhere. A file of this machine is opened only if it is a regular file with the
fingerprint that the store holds: whoever wrote the store had that slide, so no other file can be shown, exported or
handed to a reader by naming it in a store.
"""

from featurestore.credentials import strip_credentials
from featurestore.errors import SlideError, SlideNotFoundError
from featurestore.slides.access_errors import check_slide_url
from featurestore.slides.download_cache import is_remote
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.slides.protocol import Slide

SHOWN_CHARS = 24
"""Of a fingerprint, in messages: the size and some digits, which tell two slides apart."""


def open_stored_slide(source: str, mpp: float, fingerprint: str) -> Slide:
    """Open the slide that a store names as its source.

    Parameters
    ----------
    source
        Path or URL, from the store.
    mpp
        Microns per pixel at level 0.
    fingerprint
        Of the slide that was embedded.

    Raises
    ------
    SlideNotFoundError
        If nothing is there.
    SlideError
        If the file is another one, or cannot be opened.
    """
    if not source:
        raise SlideNotFoundError(
            "the store names no file of this slide (it was imported, or embedded with --private elsewhere); name it in a "
            "sample sheet where the command takes --samples"
        )
    check_slide_url(source)
    # Of a remote slide the caller compares the size: a fingerprint would need its bytes once more.
    if not is_remote(source):
        # Before any reader sees the file.
        check_fingerprint(source, fingerprint)
    return open_slide(source, mpp)


def check_fingerprint(source: str, fingerprint: str) -> None:
    """Refuse a file that is not the slide with this fingerprint.

    Raises
    ------
    SlideError
        With both fingerprints.
    """
    found = slide_fingerprint(source.removeprefix("file://"))
    if found != fingerprint:
        raise not_the_embedded(source, fingerprint[:SHOWN_CHARS], found[:SHOWN_CHARS])


def not_the_embedded(source: str, stored: object, found: object) -> SlideError:
    """Return the error for a slide that differs from the store's in something."""
    return SlideError(
        f"{strip_credentials(source)} is not the slide that was embedded: {found}, in the store {stored}"
    )
