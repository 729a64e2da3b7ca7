"""Sums for workers, which import them by name."""

import os
import signal
import time
from collections import Counter

from featurestore.analysis.patch_stream import PatchBlock


class Reading:
    """Slow enough that a worker can be killed in the middle; counts each patch, so that one added twice shows."""

    def __init__(self) -> None:
        self.total = Counter[str]()

    def add(self, patches: PatchBlock) -> None:
        time.sleep(0.02)
        self.total[patches.slide_id] += len(patches.rows)

    def merge(self, other: "Reading") -> None:
        self.total.update(other.total)


class Killing(Reading):
    def add(self, patches: PatchBlock) -> None:
        if patches.slide_id == "S03":
            os.kill(os.getpid(), signal.SIGKILL)
