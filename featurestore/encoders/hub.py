"""Published weights from the hub: a pinned file, resumed where a download was cut, and checked.

The hub's own client does the work; tokens come from the environment or from its login, and are never shown.
"""

import json
import os
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from featurestore.encoders.records import Published
from featurestore.encoders.weights import check_sha256
from featurestore.errors import EncoderError
from featurestore.object_stores.hub_transport import transport_errors

HUB = "https://huggingface.co"
CONFIG = "config.json"


def fetch_weights(key: str, published: Published, folder: Path | None = None) -> tuple[Path, str]:
    """Return the path of an encoder's weights file, and its sha256; it is downloaded if it is not here.

    Parameters
    ----------
    key
        The encoder's, for messages.
    published
        Where.
    folder
        Put the file there instead of into the client's cache.

    Raises
    ------
    EncoderError
        If it cannot be had, with the commands that help; or if it is not the published file.
    """
    path = _download(key, published, published.file, folder)
    return path, check_sha256(path, published.sha256, key)


def fetch_config(key: str, published: Published) -> dict[str, Any]:
    """Return the ``config.json`` beside the weights; empty if none can be had."""
    # Imported inside functions throughout: the client takes 0.3 s to import, and listing encoders needs none of it.
    from huggingface_hub import _CACHED_NO_EXIST
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # The client remembers that a repository has no such file; that needs no network either.
    known = _cached(published, CONFIG)
    if known is _CACHED_NO_EXIST or (known is None and not hub_answers()):
        return {}
    try:
        config = json.loads(_client_download(published, CONFIG, None).read_text())
    except (EntryNotFoundError, LocalEntryNotFoundError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _download(key: str, published: Published, file: str, folder: Path | None) -> Path:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{published.repository}@{(published.revision or 'main')[:12]}"
    other_ways = (
        f"on a machine with network: histosge encoders {key} --download DIR, then here: --weights DIR/{file}"
    )
    unreachable = f"the hub cannot be reached for {key}, and {file} is not here; {other_ways}"
    if (folder is not None or not in_cache(published)) and not hub_answers():
        raise EncoderError(unreachable)  # now: the client would try for half a minute first
    try:
        return _client_download(published, file, folder)
    except LocalEntryNotFoundError as error:
        raise EncoderError(unreachable) from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        status = getattr(error.response, "status_code", 401)
        raise EncoderError(_no_access(key, published, status)) from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise EncoderError(
            f"the hub has no {file} in {where}: it was moved or withdrawn; give the file as --weights FILE"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise EncoderError(_no_access(key, published, status)) from error
        raise EncoderError(
            f"the hub answered {status} for {file} of {where}; try again, or {other_ways}"
        ) from error
    # Last, since errors of the client's own derive from these.
    except transport_errors(OSError) as error:
        raise EncoderError(
            f"{file} of {key} could not be loaded to its end ({error}): repeat it, it goes on from there; or {other_ways}"
        ) from error


def in_cache(published: Published) -> bool:
    """Whether the weights file is in the client's cache already."""
    return isinstance(_cached(published, published.file), str)


def _cached(published: Published, file: str) -> Any:
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(
        published.repository, file, cache_dir=os.environ.get("HF_HUB_CACHE"), revision=published.revision
    )


def has_token() -> bool:
    """Whether the environment or a login holds a token; its value is not used."""
    from huggingface_hub import get_token

    return get_token() is not None


def hub_answers(seconds: float = 3.0) -> bool:
    """Whether the hub can be reached."""
    url = f"{_endpoint() or HUB}/api/models?limit=1"
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE", "True"):
        return False
    try:
        with urlopen(url, timeout=seconds):  # noqa: S310 -- the endpoint that the client itself would ask
            return True
    except HTTPError:  # an answer, whatever it is
        return True
    except OSError:
        return False


def _no_access(key: str, published: Published, status: int) -> str:
    page = f"{_endpoint() or HUB}/{published.repository}"
    if published.gated or status == 403:
        return (
            f"{key} is gated and this account may not read it: accept its licence at {page}, then run `hf auth login` "
            f"(or set HF_TOKEN); without network use --weights FILE"
        )
    return f"the hub refuses {published.repository} ({status}): run `hf auth login` or set HF_TOKEN, or use --weights FILE"


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")


def _client_download(published: Published, file: str, folder: Path | None) -> Path:
    from huggingface_hub import hf_hub_download

    # The client reads its settings when it is imported; these two may have been set since.
    return Path(
        hf_hub_download(
            published.repository,
            file,
            revision=published.revision,
            endpoint=_endpoint(),
            cache_dir=os.environ.get("HF_HUB_CACHE"),
            local_dir=folder,
        )
    )
