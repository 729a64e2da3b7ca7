"""The errors that `featurestore` raises for a caller.

One tree, so that `except FeatureStoreError` catches all of it. Each class is also the builtin
that a caller expects. A message is one line: what was refused, the numbers, and the fix.
"""

from featurestore.credentials import redact


class FeatureStoreError(Exception):
    """Base of every error that is the input's or the environment's fault, not a bug.

    Its message holds no credentials, whatever it was made from.
    """

    def __init__(self, *args: object) -> None:
        # Here, since a message may quote another library's, and that the URL with its signature: whoever prints,
        # logs or stores an error of ours need not think of it.
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class SlideError(FeatureStoreError, ValueError):
    """A slide that cannot be opened or read."""


class SlideNotFoundError(SlideError, FileNotFoundError):
    """There is no slide at that path."""


class SlideAccessError(SlideError):
    """A server or network refused a slide that may be whole: another run may read it."""


class MppError(SlideError):
    """A slide without microns per pixel, or with an absurd value."""


class UpsamplingError(SlideError):
    """A region was requested at a finer scale than the slide holds."""


class SampleSheetError(FeatureStoreError, ValueError):
    """A sample sheet with unknown columns, missing files or repeated slides."""


class TissueError(FeatureStoreError, ValueError):
    """An unknown tissue method, or one that cannot be loaded."""


class MaskError(SlideError):
    """A mask or annotation file that cannot be used for its slide."""


class EncoderError(FeatureStoreError, ValueError):
    """An unknown encoder, or weights that do not fit it."""


class StoreError(FeatureStoreError, ValueError):
    """A store, or a location for one, that cannot be used in this way."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store at that URL."""


class AccessError(StoreError, OSError):
    """A server, network or disk refused; the message holds what it answered and what to set.

    Parameters
    ----------
    message
        One line.
    reason
        The part of it that says why, without the place.
    is_transient
        Whether the same request may succeed later without any change: a busy server, a broken connection.
    """

    def __init__(self, message: str, reason: str = "", *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.reason = redact(reason or message)
        self.is_transient = is_transient


class ClusterError(FeatureStoreError, ConnectionError):
    """A scheduler that does not answer, or went away."""


class IdentityMismatchError(StoreError):
    """The store holds something that was made from another slide, grid or encoder than this run's."""


class AmbiguousSelectionError(StoreError):
    """The store holds several grids or encoders that match, and the caller named none of them."""


class OutputError(FeatureStoreError, OSError):
    """A place that nothing can be written to, or that holds something of another kind."""


class EarlierResultError(FeatureStoreError, FileExistsError):
    """An earlier result that was made with something else, and that only `overwrite` replaces."""


class SlideWarning(UserWarning):
    """What a user should know of the slides of a run: two scales that differ, or files that were left out."""


class ClusterWarning(UserWarning):
    """A dask cluster that is reachable and cannot work yet."""


class ExtensionWarning(UserWarning):
    """Another package's extension that cannot be used; everything else works without it."""


MAX_LINE = 600
"""Letters that are shown of another library's message."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, for a message of ours; its class if it says nothing."""
    return shorten(redact((str(error).strip().splitlines() or [type(error).__name__])[0]))


def shorten(line: str) -> str:
    """Return another library's line at a length for a message: some repeat a value, such as a name of a megabyte."""
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."
