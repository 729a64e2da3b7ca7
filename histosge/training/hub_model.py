"""Models on the hub: ``hf://OWNER/NAME[@REVISION][/FOLDER]`` becomes a folder of this machine; nothing is written there.

The hub's own client downloads into its cache, checks what it got, and takes tokens from the environment or its login.
Its settings hold: ``HF_ENDPOINT``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``.
"""

import os
import re
from pathlib import Path
from typing import Any

from featurestore.encoders.hub import TRANSPORTS, hub_answers
from featurestore.errors import first_line
from histosge.errors import ModelError

SCHEME = "hf://"
_PLACE = re.compile(
    r"hf:/{1,2}(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+?))?(/(?P<folder>[\w./-]*))?"
)


def is_hub_place(place: str | Path) -> bool:
    """Tell whether a model is on the hub: also where its URL was made a `Path`, which drops one of its slashes."""
    return str(place).startswith("hf:/")


def model_folder(place: str | Path, files: tuple[str, ...]) -> Path:
    """Return a model's folder on this machine; of one on the hub, the files are downloaded where they are not here.

    Parameters
    ----------
    place
        A folder, or ``hf://OWNER/NAME``, with ``@REVISION`` and a folder in the repository where needed.
    files
        Names of the files that are needed.

    Raises
    ------
    ModelError
        If the hub refuses, cannot be reached, or lacks one of the files.
    """
    if not is_hub_place(place):
        return Path(place)
    found = _PLACE.fullmatch(str(place))
    # A repository of data is named hf://datasets/OWNER/NAME: three parts, so it would be taken for a folder.
    if found is None or found["repository"].startswith(("datasets/", "spaces/")) or ".." in str(place):
        raise ModelError(
            f"{str(place)[:200]!r} names no model on the hub; give hf://OWNER/NAME, such as hf://lab/model@main"
        )
    folder = (found["folder"] or "").strip("/")
    paths = [_download(found["repository"], found["revision"], folder, file) for file in files]
    return paths[0].parent


def _download(repository: str, revision: str | None, folder: str, file: str) -> Path:
    # Inside functions: the client takes 0.3 s to import.
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    settings: dict[str, Any] = {"revision": revision, "cache_dir": os.environ.get("HF_HUB_CACHE")}
    where = f"{SCHEME}{repository}{f'@{revision}' if revision else ''}{f'/{folder}' if folder else ''}"
    unreachable = (
        f"the hub cannot be reached for {where}, and {file} is not here; download the model on a machine with network "
        f"(hf download {repository} --local-dir MODEL), and give that folder"
    )
    kept = try_to_load_from_cache(repository, f"{folder}/{file}" if folder else file, **settings)
    if not isinstance(kept, str) and not hub_answers():
        raise ModelError(unreachable)  # now: the client would try for half a minute first
    try:
        # The client reads its settings when it is imported; the endpoint may have been set since.
        endpoint = os.environ.get("HF_ENDPOINT")
        return Path(
            hf_hub_download(repository, file, subfolder=folder or None, endpoint=endpoint, **settings)
        )
    except LocalEntryNotFoundError as error:
        # The client raises it for most answers that are errors, too.
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        reason = (
            unreachable if status is None else f"the hub answered {status} for {file} of {where}; try again"
        )
        raise ModelError(reason) from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise ModelError(
            f"the hub shows no {where} to this account: check the name, and run `hf auth login` or set HF_TOKEN if it is "
            "private or gated"
        ) from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise ModelError(
            f"{where} has no {file}: it is no histosge model, or another revision or folder of the repository is"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        raise ModelError(f"the hub answered {status} for {file} of {where}; try again") from error
    # Last, as it catches most: the client lets errors of its transport through, whichever that is.
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in TRANSPORTS:
            raise
        raise ModelError(f"{file} of {where} could not be loaded ({first_line(error)}); try again") from error
