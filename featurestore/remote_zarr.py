"""A zarr store behind a URL whose refusals are errors of ours.

zarr's own takes every `FileNotFoundError` for an object that was not written, and fsspec raises that of a bucket that
is not there and of refused requests over http, too: blocks would read as NaN.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import AbstractContextManager, suppress
from typing import Self

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore
from zarr.storage._fsspec import _make_async

from featurestore.credentials import strip_credentials
from featurestore.file_systems import SCHEMES, check_url, is_anonymous, open_file_system
from featurestore.server_errors import ABSENT, access_as_error


class RemoteZarrStore(FsspecStore):
    """`zarr.storage.FsspecStore`, opened by `open_url`."""

    url = ""
    schemes: Collection[str] = SCHEMES

    @classmethod
    def open_url(cls, url: str, *, read_only: bool, schemes: Collection[str] = SCHEMES) -> Self:
        """Open a URL, of one of these schemes, as a zarr store."""
        # Asynchronous: zarr calls the file system from an event loop of its own.
        fs, path = open_file_system(url, schemes=schemes, asynchronous=True)
        # No exception is allowed below this class: each has to be looked at.
        store = cls(
            fs if fs.async_impl else _make_async(fs), read_only, path.rstrip("/"), allowed_exceptions=()
        )
        store.url, store.schemes = url, schemes
        return store

    def with_read_only(self, read_only: bool = False) -> Self:
        """Return the same store with another mode."""
        store = type(self)(self.fs, read_only, self.path, self.allowed_exceptions)
        store.url, store.schemes = self.url, self.schemes
        return store

    def _access(self, key: str, what: str = "cannot be read") -> AbstractContextManager[None]:
        url = f"{self.url.rstrip('/')}/{key}"
        check_url(url, self.schemes)  # a name may be too long
        label = strip_credentials(url)
        return access_as_error(label, self.url, what, is_anonymous=is_anonymous(self.url))

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object, or None where there is none."""
        try:
            with self._access(key):
                return await super().get(key, prototype, byte_range)
        except ABSENT:
            return None

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return parts of objects, or None where there is none."""
        parts = (self.get(key, prototype, byte_range) for key, byte_range in key_ranges)
        return list(await asyncio.gather(*parts))

    async def exists(self, key: str) -> bool:
        """Tell whether there is an object."""
        try:
            with self._access(key):
                await self.fs._info(f"{self.path}/{key}")
        except ABSENT:
            return False
        return True

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """Write an object."""
        with self._access(key, "cannot be written"):
            await super().set(key, value, byte_range)

    async def delete(self, key: str) -> None:
        """Remove an object, if there is one."""
        with self._access(key, "cannot be removed"):
            await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        """Remove everything below a prefix."""
        with self._access(prefix, "cannot be removed"), suppress(*ABSENT):
            await super().delete_dir(prefix)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly below."""
        with self._access(prefix, "cannot be listed"):
            async for name in super().list_dir(prefix):
                yield name
