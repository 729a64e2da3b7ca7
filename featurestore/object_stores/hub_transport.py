"""Errors of the transport below the hub's client, which lets them through when a connection fails for good.

Which transport it uses depends on the client's version. None is imported here: an error of one that is not loaded cannot
be raised.
"""

import sys

# Every error of httpx derives from one of these; InvalidURL is that of a redirect to an address that is none.
_HTTPX = ("HTTPError", "InvalidURL", "StreamError", "CookieConflict")
_BASES = {
    "httpx": _HTTPX,
    "httpx2": _HTTPX,
    "requests": ("RequestException",),
    "urllib3.exceptions": ("HTTPError",),
}
"""Module -> base classes of its errors."""


def transport_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the base classes of the errors of all transports that are loaded, and `others`, for an ``except``."""
    return others + tuple(
        getattr(sys.modules[module], name)
        for module, names in _BASES.items()
        if module in sys.modules
        for name in names
    )
