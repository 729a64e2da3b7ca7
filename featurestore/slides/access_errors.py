"""Errors of disks, servers and their client libraries, as one line about one slide."""

import re

from featurestore.errors import FeatureStoreError, SlideError, SlideNotFoundError, first_line

# Their errors are no OSErrors, and the modules are there only where they are used: they are known by their names.
CLIENTS = ("aiohttp", "aiobotocore", "botocore", "s3fs", "gcsfs", "google", "adlfs", "azure", "fsspec")
_GONE = (404, 410)
_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]*")
_USER = re.compile(r"://[^/@\s'\"]*@")


def is_access_error(error: BaseException) -> bool:
    """Whether an error is a disk's, a server's, or of a library that talks to one."""
    if isinstance(error, FeatureStoreError):
        return False
    return isinstance(error, (OSError, ValueError)) or type(error).__module__.partition(".")[0] in CLIENTS


def access_error(label: str, error: BaseException, what: str) -> SlideError:
    """Return the `SlideError` of an error for which `is_access_error` holds.

    Parameters
    ----------
    label
        The slide, without credentials.
    what
        What was tried, such as "cannot be fetched".
    """
    if isinstance(error, FileNotFoundError):
        # fsspec makes this of every reply over http that is no success, and keeps the reply as its cause (2026.9).
        cause = error.__cause__
        if cause is None or getattr(cause, "status", None) in _GONE:
            return SlideNotFoundError(f"there is no slide at {label}")
        error = cause
    status, reason = getattr(error, "status", None), getattr(error, "message", "")
    text = f"the server answers {status} {reason}".rstrip() if isinstance(status, int) else first_line(error)
    # A library's message may repeat the URL with its signature or password.
    text = _USER.sub("://", _QUERY.sub(r"\1", text))
    return SlideError(f"{label} {what}: {text}")
