"""How far a streamed training is: sections of all passes, and the time that is left."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from featurestore.events import OnProgress, Progress


@dataclass
class Passes:
    """Count sections over all passes.

    Parameters
    ----------
    n_sections, n_passes
        Steps are sections times passes.
    on_progress
        Told before each section.
    """

    n_sections: int
    n_passes: int
    on_progress: OnProgress
    _done: int = 0
    _bound: str = ""
    _current: int = 0
    _begun: float = field(default_factory=time.monotonic)

    def begin(self, what: str, *, is_further: bool = False) -> Callable[[str], None]:
        """Begin a pass; return what is called with each section's id before it is worked on.

        Parameters
        ----------
        is_further
            Whether it comes on top of `n_passes`: how many steps an iteration takes is not known before.
        """
        self._current += 1
        self.n_passes += is_further
        self._bound = "at least " if is_further else ""
        start = (self._current - 1) * self.n_sections
        self._done = start - 1

        def step(slide_id: str) -> None:
            self._done += 1
            total = self.n_sections * self.n_passes
            label = f"pass {self._current} of {self._bound}{self.n_passes}, {what} {slide_id}"
            self.on_progress(Progress(min(self._done, total), total, label))

        return step

    def finish(self) -> None:
        """Tell that everything is done."""
        total = self.n_sections * self.n_passes
        self.on_progress(Progress(total, total, ""))
