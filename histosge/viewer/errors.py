"""What the viewer refuses."""

from histosge.errors import HistosgeError


class ViewError(HistosgeError, ValueError):
    """Something that cannot be shown as asked: a missing package, a taken port, an unknown gene."""
