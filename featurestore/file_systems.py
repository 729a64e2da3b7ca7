"""File systems of URLs: which schemes are allowed, with which options, and with or without credentials.

The only place where fsspec makes one.
"""

import errno
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import PurePath
from typing import Any

import fsspec

from featurestore.credentials import strip_credentials
from featurestore.errors import StoreError
from featurestore.object_stores.hub_place import SCHEME as HUB
from featurestore.object_stores.hub_place import HubPlace
from featurestore.server_errors import access_as_error

PathOrUrl = str | os.PathLike[str]
"""A folder or file of this machine, or a URL as a string."""

SCHEMES = ("file", "s3", "gs", "az", "http", "https")
"""Of the URLs of slides, stores and tables. fsspec knows some thirty more, of which some run code that they name."""
STORE_SCHEMES = (*SCHEMES, "hf")
"""Of stores that the user names. Nothing that a store or a sheet names is opened on the hub: its token is a person's."""
_IN_PROCESS = "memory"
"""Also allowed, and not advertised: it holds what this process itself put there, and so nothing that a URL from elsewhere
could reach. Tests keep stores in it."""
_SHORTENED_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
S3_TRIES = 6
"""Of one request, with waits that double; s3fs repeats that a few times. It must outlast a few minutes of errors."""
S3_MAX_KEY_BYTES = 1024
"""S3's own limit of an object's name. Servers answer longer ones in ways that clients repeat for ever."""
_EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure"}
# Each library has its own word for it.
_ANONYMOUS: dict[str, dict[str, Any]] = {
    "s3": {"anon": True},
    "gs": {"token": "anon"},
    "az": {"anon": True},
    "hf": {"token": False},
}
HUB_ENDPOINT = "https://huggingface.co"
ENV_ANONYMOUS = "HISTOSGE_ANONYMOUS"
ENV_SIGNED = "HISTOSGE_SIGNED"


def as_url(place: PathOrUrl) -> str:
    """Return a path or URL as a string.

    Raises
    ------
    StoreError
        If a URL was made a `Path`, which drops one of its slashes.
    """
    url = os.fspath(place)
    if isinstance(place, PurePath) and _SHORTENED_URL.match(url):
        raise StoreError(f"{url} was a URL before it became a Path, which drops a slash; give it as a string")
    return url


def check_url(url: str, schemes: Collection[str] = SCHEMES) -> None:
    """Refuse a URL whose scheme is none of those allowed, wherever it was taken from: an argument, a sheet, a store.

    Raises
    ------
    StoreError
        With the list; also for fsspec's chained URLs, such as ``simplecache::s3://``.
    """
    scheme, found, rest = url.partition("://")
    if not found:
        return  # a path of this machine; what fsspec would make of "zip::" in it plays no part
    label = strip_credentials(url)
    if scheme not in (*schemes, _IN_PROCESS) or "::" in url:
        raise StoreError(
            f"{label} is not opened: a URL begins with one of {', '.join(f'{name}://' for name in schemes)}"
        )
    key = rest.partition("?")[0].partition("/")[2]
    if scheme == "s3" and len(key.encode()) > S3_MAX_KEY_BYTES:
        raise StoreError(
            f"{label[:80]}... cannot be on S3: its name has {len(key.encode())} bytes, S3 takes {S3_MAX_KEY_BYTES}"
        )


def fixed_url(place: PathOrUrl) -> str:
    """Return the URL of content that does not change: of a store on the hub, with the commit in place of the revision.

    Parts of a run, also in other processes, then read the same commit where a branch is pushed to. Other URLs stay.

    Raises
    ------
    StoreError
        If it is on the hub, and no repository of data.
    AccessError
        If the hub refuses, or has no such repository or revision.
    """
    url = as_url(place)
    if not url.startswith(HUB):
        return url
    hub = _hub_place(url)
    if hub.is_fixed:
        return hub.url
    label = strip_credentials(url)
    with access_as_error(label, url, is_anonymous=is_anonymous(url)):
        return hub.at(_open_cloud("hf", storage_options(url)).commit_of(hub)).url


def _hub_place(url: str) -> HubPlace:
    try:
        return HubPlace.parse(url)
    except ValueError as error:
        raise StoreError(f"{strip_credentials(url)[:200]} is not opened: {error}") from error


@contextmanager
def anonymous_access(*, signed: Sequence[str] = ()) -> Iterator[None]:
    """Read public buckets without credentials while the context lasts, in this process and those that it starts.

    The command line's ``--anonymous``. The environment variable ``HISTOSGE_ANONYMOUS=1`` does the same for good.

    Parameters
    ----------
    signed
        Places that are written: for what is below them credentials are used, where there are any.
    """
    before = {name: os.environ.get(name) for name in (ENV_ANONYMOUS, ENV_SIGNED)}
    os.environ[ENV_ANONYMOUS] = "1"
    os.environ[ENV_SIGNED] = json.dumps([url for url in signed if "://" in url])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def anonymous_settings() -> dict[str, str]:
    """Return the environment variables that give another process this one's `anonymous_access`; empty if it has none."""
    if not os.environ.get(ENV_ANONYMOUS):
        return {}
    return {name: os.environ[name] for name in (ENV_ANONYMOUS, ENV_SIGNED) if name in os.environ}


def is_anonymous(url: str) -> bool:
    """Whether a URL is read without credentials, see `anonymous_access`."""
    if os.environ.get(ENV_ANONYMOUS, "").lower() not in ("1", "true", "yes"):
        return False
    signed = json.loads(os.environ.get(ENV_SIGNED) or "[]")
    if not any(url == place or url.startswith(f"{place.rstrip('/')}/") for place in signed):
        return True
    return url.startswith("s3://") and not _has_s3_credentials()


def _has_s3_credentials() -> bool:
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        return Session().get_credentials() is not None
    except BotoCoreError:  # a profile that is not there: the request itself says so better
        return True


def storage_options(url: str) -> dict[str, Any]:
    """Return the options to open a URL with fsspec: with retries, since a run of days meets failing requests."""
    # fsspec's cached listings would hide what other workers have written.
    options: dict[str, Any] = {"use_listings_cache": False}
    scheme = url.partition("://")[0]
    if scheme == "s3":
        options["max_concurrency"] = 1  # with more, s3fs requests each object's size before its bytes
        options["config_kwargs"] = {
            "retries": {"max_attempts": S3_TRIES, "mode": "standard"},
            "connect_timeout": 10,
            "read_timeout": 60,
        }
    if scheme == "hf":
        # Read here, as the client reads it once, when it is imported.
        options = {"endpoint": os.environ.get("HF_ENDPOINT") or HUB_ENDPOINT}
    if is_anonymous(url):
        options |= _ANONYMOUS.get(scheme, {})
    return options


def open_file_system(url: str, *, schemes: Collection[str] = SCHEMES, **options: Any) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it: the only place where one is made.

    Parameters
    ----------
    schemes
        Of URLs that may be opened.
    options
        For fsspec, beside `storage_options`.

    Raises
    ------
    StoreError
        If the scheme is not allowed, or needs a package that is not installed.
    """
    check_url(url, schemes)
    label = strip_credentials(url)
    scheme = url.partition("://")[0]
    try:
        if "://" not in url:
            # Not by its name: fsspec takes "zip::x" for a chain of file systems.
            fs = fsspec.filesystem("file", use_listings_cache=False)
            return fs, fs._strip_protocol(url)
        if scheme in ("gs", "az"):
            fs = _open_cloud(scheme, storage_options(url) | options)
            return fs, url.partition("://")[2].rstrip("/")
        if scheme == "hf":
            place = _hub_place(fixed_url(url))
            return _open_cloud(scheme, storage_options(url) | options), place.path
        fs, path = fsspec.core.url_to_fs(url, **storage_options(url), **options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme, "s3")
        raise StoreError(
            f"{label} needs an extra package ({error}); install it with: pip install 'histosge[{extra}]'"
        ) from error
    except StoreError:
        raise
    except ValueError as error:
        raise StoreError(f"{label} cannot be opened: {error}") from error
    if url.startswith("s3://"):
        _check_listings(fs)
    return fs, path


def _open_cloud(scheme: str, options: dict[str, Any]) -> Any:
    # Imported here: each needs an extra, and takes half a second.
    if scheme == "gs":
        from featurestore.object_stores.gcs import GoogleStorage

        return GoogleStorage(**options)
    if scheme == "hf":
        from featurestore.object_stores.hub import open_hub

        return open_hub(**options)
    from featurestore.object_stores.azure import open_azure

    return open_azure(**options)


def _check_listings(fs: Any) -> None:
    """Refuse a listing that is no S3 listing: a reply that was cut to nothing would be an empty store."""
    if "set_session" in vars(fs):  # fsspec keeps file systems, so it may be done
        return
    set_session = fs.set_session

    async def set_checked_session(*args: Any, **kwargs: Any) -> Any:
        client = await set_session(*args, **kwargs)
        for operation in ("ListObjectsV2", "ListObjects"):
            event = f"after-call.s3.{operation}"
            client.meta.events.register(event, _check_listing, unique_id=f"histosge-{operation}")
        return client

    # On the instance, not in a class of our own: s3fs makes its client late and again, and offers no hook for it (2026.9).
    fs.set_session = set_checked_session


def _check_listing(http_response: Any, parsed: dict[str, Any], **_: Any) -> None:
    # Every listing names its bucket, also an empty one.
    if http_response.status_code == HTTPStatus.OK and not {"Name", "KeyCount", "Contents"} & set(parsed):
        raise OSError(errno.EIO, "the server's listing came empty or cut")
