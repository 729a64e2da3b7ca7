"""A slide's group, opened by one request: the metadata of everything below it are consolidated in it."""

import warnings
from typing import Any

import zarr
from zarr.errors import ZarrUserWarning

from featurestore.documents import DocumentError
from featurestore.errors import StoreError, first_line
from featurestore.location import Location
from featurestore.storage.zarr_metadata import ZARR_ERRORS, document_label


class SlideGroup:
    """The nodes of one slide in a store; opening one of them costs no request. Make one with `open_slide_group`."""

    def __init__(self, location: Location, group: zarr.Group) -> None:
        self._location, self._group = location, group

    def paths(self) -> list[str] | None:
        """Return the paths of all nodes below the slide; None if its metadata were never consolidated."""
        consolidated = self._group.metadata.consolidated_metadata
        return None if consolidated is None else list(consolidated.flattened_metadata)

    def attrs(self, path: str) -> dict[str, Any]:
        """Return the attributes of a node.

        Raises
        ------
        StoreError
            If there is none.
        """
        return dict(self._node(path).attrs)

    def array(self, path: str) -> "zarr.Array[Any]":
        """Return an array, opened; no value is read.

        Raises
        ------
        StoreError
            If there is none.
        """
        array = self._node(path)
        if not isinstance(array, zarr.Array):
            raise StoreError(
                f"{self._label(path)} is no array; see: histosge validate {self._location.label}"
            )
        return array

    def _node(self, path: str) -> "zarr.Array[Any] | zarr.Group":
        try:
            return self._group[path]
        except KeyError as error:
            raise StoreError(
                f"{self._label(path)} is not there; see: histosge validate {self._location.label}"
            ) from error
        except StoreError:
            raise
        except ZARR_ERRORS as error:
            raise DocumentError(f"{self._label(path)}/zarr.json is damaged: {first_line(error)}") from error

    def _label(self, path: str) -> str:
        return f"{self._location.label}/{self._group.path}/{path}"


def open_slide_group(location: Location, slide_id: str, zarr_store: Any = None) -> SlideGroup | None:
    """Open a slide's group; None for a folder that is no slide, since of a remote store they are not looked for.

    Parameters
    ----------
    zarr_store
        `Location.zarr` of the store, where many slides are opened.

    Raises
    ------
    DocumentError
        If its document is damaged.
    """
    store = location.zarr(read_only=True) if zarr_store is None else zarr_store
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=ZarrUserWarning)
            return SlideGroup(location, zarr.open_group(store, path=slide_id, mode="r", zarr_format=3))
    except FileNotFoundError:
        return None
    except StoreError:
        raise
    except ZARR_ERRORS as error:
        raise DocumentError(
            f"{document_label(location, slide_id)} is damaged: {first_line(error)}"
        ) from error
