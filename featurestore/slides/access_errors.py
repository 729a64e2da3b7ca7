"""Errors of disks, servers and their client libraries, as one line about one slide."""

from collections.abc import Iterator
from contextlib import contextmanager

from featurestore.credentials import strip_credentials
from featurestore.errors import (
    AccessError,
    FeatureStoreError,
    SlideAccessError,
    SlideError,
    SlideNotFoundError,
    StoreError,
)
from featurestore.file_systems import check_url, is_anonymous
from featurestore.server_errors import access_reason, is_client_error, is_missing


def is_access_error(error: BaseException) -> bool:
    """Whether an error is a disk's, a server's, or of a library that talks to one."""
    if isinstance(error, FeatureStoreError):
        # The place of a folder slide is a `Location`, whose errors are a store's.
        return isinstance(error, StoreError)
    return isinstance(error, (OSError, ValueError, RecursionError)) or is_client_error(error)


def access_error(url: str, error: BaseException, what: str) -> SlideError:
    """Return the `SlideError` of an error for which `is_access_error` holds.

    Parameters
    ----------
    url
        The slide; its credentials do not get into the message.
    what
        What was tried, such as "cannot be fetched".

    Returns
    -------
    SlideError
        A `SlideNotFoundError` where nothing is there, a `SlideAccessError` where a server refused.
    """
    if is_missing(error):
        return SlideNotFoundError(f"there is no slide at {strip_credentials(url)}")
    if isinstance(error, StoreError) and not isinstance(error, AccessError):
        return SlideError(str(error))
    reason = access_reason(error, url, is_anonymous=is_anonymous(url))
    kind = SlideAccessError if "://" in url else SlideError
    return kind(f"{strip_credentials(url)} {what}: {reason}")


@contextmanager
def access_as_slide_error(url: str, what: str) -> Iterator[None]:
    """Raise the `SlideError` of `access_error` for an error for which `is_access_error` holds; others go through."""
    try:
        yield
    except Exception as error:
        if not is_access_error(error):
            raise
        raise access_error(url, error, what) from error


def check_slide_url(url: str) -> None:
    """Refuse a slide's URL whose scheme is not allowed, wherever it was taken from.

    Raises
    ------
    SlideError
        With the list of schemes.
    """
    try:
        check_url(url)
    except StoreError as error:
        raise SlideError(str(error)) from error
