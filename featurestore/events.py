"""What a long run says of itself while it goes on: values for whoever listens, never text to be parsed.

A caller passes callbacks; each has a default that ignores what it is given. Nothing is printed here.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Parameters
    ----------
    done, total
        Steps; what a step is, the function that reports it says.
    label
        The step that is about to begin, or the slide that the steps belong to.
    patches
        Patches done so far, where steps hold patches.
    """

    done: int
    total: int
    label: str = ""
    patches: int = 0


OnMessage = Callable[[str], None]
"""Called with one line on what was found or decided."""
OnProgress = Callable[[Progress], None]


def ignore_message(message: str) -> None:
    """Ignore a message."""


def ignore_progress(progress: Progress) -> None:
    """Ignore progress."""
