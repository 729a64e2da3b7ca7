"""The errors that a caller of `histosge` may meet; one tree with `featurestore`'s."""

from featurestore.errors import FeatureStoreError


class HistosgeError(FeatureStoreError):
    """Base of every error of the model toolkit that is the input's fault, not a bug."""


class ExpressionError(HistosgeError, ValueError):
    """Expression that cannot be read, or that does not fit its slide."""


class ModelError(HistosgeError, ValueError):
    """A model that cannot be loaded, or that does not fit the store."""


class SplitError(HistosgeError, ValueError):
    """A split that the sections cannot give."""


class ExportError(HistosgeError, ValueError):
    """A format, store or selection that cannot be exported."""


class MissingExtraError(HistosgeError, ImportError):
    """A feature that needs an extra which is not installed."""


class ViewError(HistosgeError, ValueError):
    """What the viewer cannot show: a missing package, a taken port, an unknown gene."""
