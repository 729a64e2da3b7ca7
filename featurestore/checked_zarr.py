"""A zarr store that checks each metadata document before zarr sees it, and whole folders for readers that take a path.

Every handle that `featurestore.location` makes is one of these, so no array from elsewhere is opened unchecked.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

from featurestore.documents import MAX_DOCUMENT_BYTES, check_file
from featurestore.zarr_documents import check_document, is_document


class CheckedStore(WrapperStore[Store]):
    """A zarr store whose documents are checked when they are read.

    Parameters
    ----------
    store
        Where the bytes are.
    label
        Its path or URL without credentials, for messages.
    """

    def __init__(self, store: Store, label: str) -> None:
        super().__init__(store)
        self._label = label

    def _with_store(self, store: Store) -> "CheckedStore":
        # zarr calls this for `with_read_only`; the one of the base class knows no label.
        return type(self)(store, self._label)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object; of metadata only what passes `check_document`.

        Raises
        ------
        DocumentError
            If a document is damaged, or describes an array that may not be opened.
        """
        if isinstance(self._store, LocalStore):
            # A directory is no object, and reads as nothing; a fifo in place of any object would be waited for.
            with suppress(FileNotFoundError, NotADirectoryError):
                path = self._store.root / key
                if not path.is_dir():
                    most_bytes = MAX_DOCUMENT_BYTES if is_document(key) else None
                    check_file(path, f"{self._label}/{key}", most_bytes)
        found = await super().get(key, prototype, byte_range)
        if found is not None and is_document(key):
            check_document(key, found.to_bytes(), f"{self._label}/{key}")
        return found

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object where there is none; of metadata documents nothing.

        zarr calls this for the empty documents of an array's parent groups. Behind a URL it looks first and writes then:
        what another run wrote in between would be lost, and a refused call goes on writing after its error was raised.
        The groups of a store are written by `storage.zarr_metadata.write_group` alone.
        """
        if not is_document(key):
            await super().set_if_not_exists(key, value)


def check_tree(folder: Path) -> None:
    """Check every metadata document below a local folder, for readers that open a path by themselves.

    Raises
    ------
    DocumentError
        For the first document that is damaged, or describes an array that may not be opened.
    """
    seen: set[tuple[int, int]] = set()
    # Links are followed, as zarr follows them: a folder that is linked into the store is part of it.
    for place, folders, files in os.walk(folder, followlinks=True):
        found = Path(place).stat()
        if (found.st_dev, found.st_ino) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        documents = {name: _check_file(Path(place, name)) for name in sorted(files) if is_document(name)}
        # Below an array are its chunks alone, in most stores more folders than all others together.
        is_array = (
            documents["zarr.json"]["node_type"] == "array"
            if "zarr.json" in documents
            else ".zarray" in documents
        )
        if is_array:
            folders.clear()


def _check_file(file: Path) -> dict[str, Any]:
    check_file(file, str(file))
    return check_document(file.name, file.read_bytes(), str(file))
