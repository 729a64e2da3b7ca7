"""Google Cloud Storage: ``gs://``, with the package gcsfs (extra ``gcs``)."""

import logging
import os
from typing import Any

# Set before gcsfs is imported, which reads it once. Its other class asks each bucket's kind over gRPC, where it cannot
# reach an emulator or a proxy, and logs a warning each time (2026.10). Set it to true for zonal buckets.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

import gcsfs

from featurestore.object_stores.bucket_check import BucketCheck, ServerReplyError

# It logs a traceback for each refusal, which Python prints where nobody set up logging; we print one line.
for _name in ("gcsfs", "google"):
    logging.getLogger(_name).addHandler(logging.NullHandler())

_STATUS = {"Forbidden: ": 403, "Bad Request: ": 400}
"""What gcsfs begins the text of plain errors with; the path follows, and on the next line the server's message."""


class GoogleStorage(BucketCheck, gcsfs.GCSFileSystem):  # type: ignore[misc]  # gcsfs has no types
    """`gcsfs.GCSFileSystem` that says when a bucket is not there, and keeps the status of what is forbidden."""

    async def _has_bucket(self, bucket: str) -> bool:
        # A listing, not the bucket's description: whoever may read objects may often list them, and not describe it.
        try:
            await self._call("GET", "b/{}/o", bucket, maxResults=1)
        except FileNotFoundError:
            return False
        except (OSError, gcsfs.retry.HttpError):
            return True
        return True

    async def _call(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._call(method, path, *args, **kwargs)
        except (OSError, ValueError) as error:
            text = str(error)
            status = next((status for begin, status in _STATUS.items() if text.startswith(begin)), None)
            if status is None:
                raise
            raise ServerReplyError(status, "", text.partition("\n")[2]) from error
