"""Azure Blob Storage: ``az://``, with the package adlfs (extra ``azure``)."""

import logging
import os
from typing import Any

import adlfs
from azure.core.exceptions import HttpResponseError, ResourceNotFoundError
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from featurestore.object_stores.bucket_check import BucketCheck

# They log what they raise as well, in a dozen lines, which Python prints where nobody set up logging.
for _name in ("azure", "adlfs"):
    logging.getLogger(_name).addHandler(logging.NullHandler())

ENV_CONNECTION, ENV_ACCOUNT = "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME"


class AzureStorage(BucketCheck, adlfs.AzureBlobFileSystem):  # type: ignore[misc]  # adlfs has no types
    """`adlfs.AzureBlobFileSystem` that says when a container is not there."""

    async def _has_bucket(self, bucket: str) -> bool:
        try:
            async with self.service_client.get_container_client(container=bucket) as client:
                await client.get_container_properties()
        except ResourceNotFoundError:
            return False
        except HttpResponseError:
            return True
        return True


def open_azure(**options: Any) -> Any:
    """Return the file system of ``az://`` URLs, or with ``asynchronous`` one whose methods are coroutines.

    Raises
    ------
    ValueError
        If the environment does not name the storage account.
    """
    if not (os.environ.get(ENV_ACCOUNT) or os.environ.get(ENV_CONNECTION)):
        raise ValueError(
            f"an az:// URL does not name its storage account; set {ENV_ACCOUNT} (and AZURE_STORAGE_ACCOUNT_KEY, or log in "
            f"with az login), or {ENV_CONNECTION}"
        )
    if options.get("anon"):
        options["connection_string"] = _anonymous_connection()
    if not options.pop("asynchronous", False):
        return AzureStorage(**options)
    # Not adlfs's own asynchronous mode, which cannot close its connections when Python ends: each program would end
    # with a traceback (2026.8).
    return AsyncFileSystemWrapper(AzureStorage(**options), asynchronous=True)


def _anonymous_connection() -> str | None:
    """Return a connection string without a key, to the account that the environment names; None if it names none.

    adlfs takes keys of the environment also where it is called with ``anon=True`` (2026.8), and a container is public
    for requests without a key alone.
    """
    parts = dict(part.split("=", 1) for part in os.environ.get(ENV_CONNECTION, "").split(";") if "=" in part)
    endpoint = parts.get("BlobEndpoint", "")
    account = parts.get("AccountName") or os.environ.get(ENV_ACCOUNT)
    if not endpoint and account:
        suffix = parts.get("EndpointSuffix", "core.windows.net")
        endpoint = f"{parts.get('DefaultEndpointsProtocol', 'https')}://{account}.blob.{suffix}"
    return f"BlobEndpoint={endpoint}" if endpoint else None
