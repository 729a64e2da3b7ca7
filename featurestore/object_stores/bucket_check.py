"""Tell an object that is not there from a bucket that is not there.

gcsfs (2026.10) and adlfs (2026.8) raise the same `FileNotFoundError` for both, or list nothing. An object that is not
there is an ordinary answer: a block that is not computed yet. In a bucket that is not there, all blocks would read as
NaN, and a mistyped name would look like an empty store.
"""

import time
from typing import Any

CHECK_S = 30.0
"""Seconds for which a bucket that was there counts as there: a first run asks for thousands of objects that are not."""


class ServerReplyError(OSError):
    """A refusal, with what the server answered, in the form of botocore's errors.

    Parameters
    ----------
    status
        Of HTTP.
    code
        The server's name of the error, or "".
    message
        In its own words.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code} {message}")
        self.response = {
            "Error": {"Code": code, "Message": message},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }


class BucketCheck:
    """Comes before an asynchronous file system of fsspec among the bases of a class.

    The class adds `_has_bucket`. What is not there raises `FileNotFoundError`, as in fsspec, and a bucket that is not
    there `ServerReplyError`.
    """

    _checked: dict[str, float]

    async def _has_bucket(self, bucket: str) -> bool:
        """Whether a bucket is there; also True where the server does not tell, since keys may be for objects alone."""
        raise NotImplementedError

    async def _check_bucket(self, path: str) -> None:
        bucket = self._strip_protocol(path).partition("/")[0]  # type: ignore[attr-defined]
        checked = vars(self).setdefault("_checked", {})
        now = time.monotonic()
        if now - checked.get(bucket, -CHECK_S) < CHECK_S:
            return
        if not await self._has_bucket(bucket):
            raise ServerReplyError(404, "NoSuchBucket", f"there is no {bucket}")
        checked[bucket] = now

    async def _cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._cat_file(path, *args, **kwargs)  # type: ignore[misc]
        except FileNotFoundError:
            await self._check_bucket(path)
            raise

    async def _info(self, path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._info(path, *args, **kwargs)  # type: ignore[misc]
        except FileNotFoundError:
            await self._check_bucket(path)
            raise

    async def _ls(self, path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._ls(path, *args, **kwargs)  # type: ignore[misc]
        except FileNotFoundError:
            await self._check_bucket(path)
            raise

    async def _pipe_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._pipe_file(path, *args, **kwargs)  # type: ignore[misc]
        except FileNotFoundError:
            await self._check_bucket(path)
            raise

    async def _find(self, path: str, *args: Any, detail: bool = False, **kwargs: Any) -> Any:
        try:
            found = await super()._find(path, *args, detail=detail, **kwargs)  # type: ignore[misc]
        except FileNotFoundError:
            found = {} if detail else []
        if not found:
            await self._check_bucket(path)
            return {} if detail else []  # adlfs gives a list for both
        return found
