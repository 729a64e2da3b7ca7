"""Optional packages: a missing one is refused in one line that names the extra to install."""

from importlib import import_module
from types import ModuleType

from histosge.errors import MissingExtraError


def load_extra(extra: str, what: str) -> ModuleType:
    """Import the package of an extra.

    Parameters
    ----------
    extra
        Its name, here also the package's.
    what
        What it is needed for, in a few words.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    try:
        return import_module(extra)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs the extra {extra!r}; install it with: pip install 'histosge[{extra}]'"
        ) from error
