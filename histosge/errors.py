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
    """Something that cannot be exported as asked."""


class MissingExtraError(HistosgeError, ImportError):
    """Something was asked for that needs an extra."""


class ViewError(HistosgeError, ValueError):
    """Something that the viewer cannot show as asked: a missing package, a taken port, an unknown gene."""
