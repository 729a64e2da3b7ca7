"""Errors of servers, disks and the libraries that talk to them, as one line: what was answered, and what to set.

Nothing is imported for it: the libraries are there only where they are used, so their errors are known by the names
of their modules, and botocore's replies by their codes.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from featurestore.errors import AccessError, FeatureStoreError, first_line

CLIENTS = (
    "aiohttp",
    "aiobotocore",
    "aiosignal",
    "botocore",
    "s3fs",
    "gcsfs",
    "google",
    "adlfs",
    "azure",
    "fsspec",
    "yarl",
)
"""Top-level modules whose errors are a server's or a network's, also where they are no `OSError`."""
# What a client raises on a reply that is none of the protocol: half an XML document, no length, redirects without end.
_REPLY_ERRORS = (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, EOFError)

ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What `access_as_error` lets through: no object has that name."""
_GONE = (404, 410)
_TOO_MANY = 429
_GONE_CODES = ("404", "NoSuchKey", "NoSuchVersion", "BlobNotFound")
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
    # Of google.auth and azure.identity.
    "DefaultCredentialsError",
    "RefreshError",
    "ClientAuthenticationError",
)
_BUSY = (
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "OperationAborted",
    "503",
    "500",
)
_FULL = ("507", "InsufficientStorage", "QuotaExceeded", "EntityTooLarge")
_UNREACHABLE = (
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ReadTimeoutError",
    "ProxyConnectionError",
    "HTTPClientError",
    "ClientConnectorError",
    "ClientConnectionError",
    "ServerDisconnectedError",
    "ClientPayloadError",
    "FSTimeoutError",
    "IncompleteRead",
    "ResponseParserError",
    "ServiceRequestError",
    "ServiceResponseError",
)

_S3_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_S3_OTHERS = "AWS_ENDPOINT_URL for a server that is not Amazon's, --anonymous for a public bucket"
_KEYS = {
    "s3": f"{_S3_KEYS}; {_S3_OTHERS}",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or --anonymous for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING; "
    "--anonymous for a public container",
    "hf": "check the name, and run `hf auth login` or set HF_TOKEN if the repository is private or gated",
    "http": "it needs a password, a token or a signature, or the URL's has expired",
}
_AGAIN = "run the same command again, it goes on from here"
_RENEW = f"renew the credentials (AWS_SESSION_TOKEN, or log in again), then {_AGAIN}"
_CHECK_KEYS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) and AWS_ENDPOINT_URL"
_OTHER_REGION = "the bucket may be in another region: set AWS_DEFAULT_REGION, and check AWS_ENDPOINT_URL"
_MAKE_ROOM = f"make room there, then {_AGAIN}"
_ADVICE = {
    **dict.fromkeys(_BUSY, _AGAIN),
    **dict.fromkeys(_FULL, _MAKE_ROOM),
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired"),
        _RENEW,
    ),
    **dict.fromkeys(
        ("SignatureDoesNotMatch", "InvalidAccessKeyId", "AuthFailure", "InvalidSecurity"), _CHECK_KEYS
    ),
    **dict.fromkeys(
        ("301", "307", "PermanentRedirect", "TemporaryRedirect", "Redirect", "AuthorizationHeaderMalformed"),
        _OTHER_REGION,
    ),
    "IllegalLocationConstraintException": _OTHER_REGION,
    "RequestTimeTooSkewed": f"set this machine's clock, then {_AGAIN}",
    "NoSuchBucket": "check the bucket's name and AWS_ENDPOINT_URL, or make the bucket first",
}
"""What to do about a reply, by its code."""
_NO_CONTAINER = "check the container's name and the storage account's, or make the container first"
_ADVICE_OF = {
    "gs": {"NoSuchBucket": "check the bucket's name, or make the bucket first"},
    "az": dict.fromkeys(("NoSuchBucket", "ContainerNotFound"), _NO_CONTAINER),
    "hf": {
        "RepoNotFound": _KEYS["hf"],
        "RevisionNotFound": "name a branch, a tag or a commit of the repository after the @",
        "GatedRepo": "accept its terms on its page, then run `hf auth login` or set HF_TOKEN",
    },
}
"""The same, where another scheme than S3's needs other advice."""


def is_client_error(error: BaseException) -> bool:
    """Whether an error comes from a library that talks to servers."""
    return any(kind.__module__.partition(".")[0] in CLIENTS for kind in type(error).__mro__)


def is_missing(error: BaseException) -> bool:
    """Whether an error means that there is no such object, and not that a server refused, or has no such bucket."""
    if not isinstance(error, ABSENT) or isinstance(error, FeatureStoreError):
        return False
    # s3fs makes this of a bucket that is not there, too, and fsspec of every reply over http that is no success
    # (2026.9); both keep the reply as the cause.
    code, _, status = _reply(error)
    if code:
        return code in _GONE_CODES
    if status is not None:
        return status in _GONE
    return not any(map(is_client_error, _causes(error)))


def access_reason(error: BaseException, url: str, *, is_anonymous: bool = False) -> str:
    """Return what a server or disk answered, and what to set, for a message of ours.

    Parameters
    ----------
    url
        What was requested: its scheme decides which settings are named.
    is_anonymous
        Whether the request was made without credentials.
    """
    if isinstance(error, AccessError):
        return error.reason
    advice = _advice(error, url, is_anonymous=is_anonymous)
    return f"{_answer(error)}; {advice}" if advice else _answer(error)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later without any change."""
    if isinstance(error, AccessError):
        return error.is_transient
    code, _, status = _reply(error)
    if code in _FULL or status == 507:
        return False
    return code in _BUSY or (status or 0) >= 500 or status == _TOO_MANY or _is_unreachable(error)


@contextmanager
def access_as_error(
    label: str, url: str, what: str = "cannot be read", *, is_anonymous: bool = False
) -> Iterator[None]:
    """Raise an `AccessError` for whatever a file system's client raises, except that an object is not there.

    Parameters
    ----------
    label
        What was requested, without credentials.
    url
        The same as it was requested.
    what
        What was tried.

    Raises
    ------
    AccessError
        With what the server answered.
    FileNotFoundError, NotADirectoryError, IsADirectoryError
        If there is no such object.
    """
    try:
        yield
    except FeatureStoreError:
        raise
    except Exception as error:
        if is_missing(error) or not (is_client_error(error) or isinstance(error, _REPLY_ERRORS)):
            raise
        reason = access_reason(error, url, is_anonymous=is_anonymous)
        message = f"{label} {what}: {reason}"
        raise AccessError(message, reason, is_transient=is_transient(error)) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    # A few steps: chains of causes may be circular.
    found: BaseException | None = error
    for _ in range(8):
        if found is None:
            return
        yield found
        found = found.__cause__


def _reply(error: BaseException) -> tuple[str, str, int | None]:
    """Return ``(code, message, HTTP status)`` of the reply behind an error; empty where there was none."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and isinstance(response.get("Error"), dict):
            status = (response.get("ResponseMetadata") or {}).get("HTTPStatusCode")
            details = response["Error"]
            code, message = str(details.get("Code") or status or ""), str(details.get("Message") or "")
            return code, message, status
        status = getattr(cause, "status", None)
        if isinstance(status, int):
            return "", str(getattr(cause, "message", "")), status
        if is_client_error(cause) and (reply := _cloud_reply(cause)):
            return reply
    return "", "", None


def _cloud_reply(error: BaseException) -> tuple[str, str, int | None] | None:
    """Return ``(code, message, HTTP status)`` of an error of Azure's or Google's client; None if it holds no reply."""
    # Azure's message goes on with the request's id and the whole document.
    message = str(getattr(error, "message", "")).partition("\n")[0]
    status, code = getattr(error, "status_code", None), getattr(error, "code", None)
    if isinstance(status, int):
        return str(getattr(error, "error_code", None) or ""), message, status
    if isinstance(code, int):  # gcsfs puts it at the end of the message as well
        return "", message.removesuffix(f", {code}"), code
    return None


def _answer(error: BaseException) -> str:
    code, message, status = _reply(error)
    if isinstance(error, RecursionError):
        return "the server redirects without end"
    if code or status:
        message = _one_line(message)
        if code and message and message != code:
            message = f"({message})"
        number = str(status) if status and str(status) != code else ""
        # A refused HEAD has no body: its code is the number.
        return "the server answers " + " ".join(word for word in (number, code, message) if word)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _one_line(first_line(error)) if str(error) else type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _is_unreachable(error: BaseException) -> bool:
    return any(
        isinstance(cause, (ConnectionError, TimeoutError))
        or any(kind.__name__ in _UNREACHABLE for kind in type(cause).__mro__)
        for cause in _causes(error)
    )


def _advice(error: BaseException, url: str, *, is_anonymous: bool) -> str:
    scheme = url.partition("://")[0].removesuffix("s") if url.startswith("http") else url.partition("://")[0]
    if scheme not in _KEYS:  # a folder of this machine
        return ""
    code, _, status = _reply(error)
    if advice := _ADVICE_OF.get(scheme, {}).get(code) or _ADVICE.get(code):
        return advice
    if isinstance(error, RecursionError):
        return _OTHER_REGION
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    if (
        (status is None and isinstance(error, PermissionError))
        or status in (401, 403)
        or names & set(_NO_CREDENTIALS)
    ):
        if is_anonymous:
            return (
                f"it is not public, leave --anonymous out and {_S3_KEYS if scheme == 's3' else _KEYS[scheme]}"
            )
        return _KEYS[scheme]
    if status == 507 or getattr(error, "errno", None) == errno.ENOSPC:
        return _MAKE_ROOM
    if (status or 0) >= 500 or status == _TOO_MANY:
        return _AGAIN
    if _is_unreachable(error):
        where = {"s3": "AWS_ENDPOINT_URL", "hf": "HF_ENDPOINT"}.get(scheme, "the address")
        return f"check {where} and the network, then {_AGAIN}"
    return ""
