"""Models on the hub: ``hf://OWNER/NAME[@REVISION][/FOLDER]`` becomes a folder of this machine; nothing is written there.

The hub's own client downloads into its cache, checks what it got, and takes tokens from the environment or its login.
Its settings hold: ``HF_ENDPOINT``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from featurestore.encoders.hub import hub_answers
from featurestore.errors import first_line
from featurestore.object_stores.hub_transport import transport_errors
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
    hub = _HubModel.parse(place)
    paths = [_download(hub, file) for file in files]
    return paths[0].parent


def whole_model_folder(place: str | Path, files: tuple[str, ...], folder: str) -> Path:
    """Return a model's folder on this machine, with a folder in it that may be absent; all of one commit.

    Parameters
    ----------
    place, files
        As in `model_folder`.
    folder
        Name of the folder below, such as that of the sums.

    Raises
    ------
    ModelError
        As `model_folder` does.
    """
    if not is_hub_place(place):
        return Path(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # re-exported without a list

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The client shows its bars also where nobody sees them, as in a job's log.
            kwargs["disable"] = not sys.stderr.isatty()
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    hub = _HubModel.parse(place)
    # First: where the repository holds no model, the client would warn that nothing matches, and return an empty folder.
    _download(hub, files[0])
    prefix = f"{hub.folder}/" if hub.folder else ""
    is_offline = not hub_answers()
    with _errors_of(hub, folder):
        found = snapshot_download(
            hub.repository,
            # Not the whole repository, which may hold anything beside the model.
            allow_patterns=[*(prefix + file for file in files), f"{prefix}{folder}/*"],
            endpoint=os.environ.get("HF_ENDPOINT"),
            # The client would try for half a minute first.
            local_files_only=is_offline,
            tqdm_class=Bar,
            **hub.settings,
        )
    local = Path(found) / hub.folder
    # Older clients return what is there of a model that was loaded without this folder.
    if is_offline and not (local / folder).is_dir():
        raise ModelError(hub.unreachable(f"{folder}/"))
    if missing := [file for file in files if not (local / file).is_file()]:
        raise ModelError(hub.lacks(missing[0]))
    return local


@dataclass(frozen=True)
class _HubModel:
    """Where a model is on the hub."""

    repository: str
    revision: str | None
    folder: str

    @classmethod
    def parse(cls, place: str | Path) -> Self:
        found = _PLACE.fullmatch(str(place))
        # A repository of data is named hf://datasets/OWNER/NAME: three parts, so it would be taken for a folder.
        if found is None or found["repository"].startswith(("datasets/", "spaces/")) or ".." in str(place):
            raise ModelError(
                f"{str(place)[:200]!r} names no model on the hub; give hf://OWNER/NAME, such as hf://lab/model@main"
            )
        return cls(found["repository"], found["revision"], (found["folder"] or "").strip("/"))

    @property
    def label(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repository}{revision}{f'/{self.folder}' if self.folder else ''}"

    @property
    def settings(self) -> dict[str, Any]:
        """What the client takes, beside the repository."""
        return {"revision": self.revision, "cache_dir": os.environ.get("HF_HUB_CACHE")}

    def unreachable(self, file: str) -> str:
        return (
            f"the hub cannot be reached for {self.label}, and {file} is not here; download the model on a machine with "
            f"network (hf download {self.repository} --local-dir MODEL), and give that folder"
        )

    def lacks(self, file: str) -> str:
        return f"{self.label} has no {file}: it is no histosge model, or another revision or folder of the repository is"


def _download(hub: _HubModel, file: str) -> Path:
    # Inside functions: the client takes 0.3 s to import.
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    name = f"{hub.folder}/{file}" if hub.folder else file
    kept = try_to_load_from_cache(hub.repository, name, **hub.settings)
    if not isinstance(kept, str) and not hub_answers():
        raise ModelError(hub.unreachable(file))  # now: the client would try for half a minute first
    with _errors_of(hub, file):
        # The client reads its settings when it is imported; the endpoint may have been set since.
        endpoint = os.environ.get("HF_ENDPOINT")
        return Path(
            hf_hub_download(
                hub.repository, file, subfolder=hub.folder or None, endpoint=endpoint, **hub.settings
            )
        )


@contextmanager
def _errors_of(hub: _HubModel, file: str) -> Iterator[None]:
    """Raise a `ModelError` for whatever the client raises."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = hub.label
    try:
        yield
    except LocalEntryNotFoundError as error:
        # The client raises it for most answers that are errors, too.
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        reason = hub.unreachable(file)
        if status is not None:
            reason = f"the hub answered {status} for {file} of {where}; try again"
        raise ModelError(reason) from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise ModelError(
            f"the hub shows no {where} to this account: check the name, and run `hf auth login` or set HF_TOKEN if it is "
            "private or gated"
        ) from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise ModelError(hub.lacks(file)) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        raise ModelError(f"the hub answered {status} for {file} of {where}; try again") from error
    # Last, since errors of the client's own derive from these.
    except transport_errors(OSError) as error:
        raise ModelError(f"{file} of {where} could not be loaded ({first_line(error)}); try again") from error
