"""Fits of a streamed training are solved side by side, as many at once as memory allows."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from _cohorts import MadeCohort, write_cohort

from histosge.training.streaming import section_tasks, solve_fits
from histosge.training.streaming.cohort import Cohort, Fit
from histosge.training.train import TrainSettings, train

MADE = MadeCohort(sections=5, shape=(23, 29), dim=7, spots=101, genes=11, block=(7, 11), frame=3)


class Concurrency:
    """A solution that waits until so many are under way, and counts how many are at most."""

    def __init__(self, expected: int) -> None:
        self.now = self.most = 0
        self._lock, self._expected, self._are_there = threading.Lock(), expected, threading.Event()

    def __call__(self, number: int, fit: Fit) -> tuple[int, Any]:
        """Solve."""
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            if self.now >= self._expected:
                self._are_there.set()
        # However slowly threads start on a busy machine; then a moment for one too many.
        self._are_there.wait(20)
        time.sleep(0.05)
        with self._lock:
            self.now -= 1
        return number, fit


def made(threads: int) -> Cohort:
    return cast(Cohort, SimpleNamespace(tasks=SimpleNamespace(threads=threads), fits=list("abcdefg")))


@pytest.mark.parametrize(
    ("threads", "n_inputs", "most"),
    [
        (1, 64, 1),
        (3, 64, 3),
        (16, 1536, 6),  # of 170 MB each
        (16, 8192, 1),  # more than all of them may take: still one
    ],
)
def test_as_many_are_solved_at_once_as_threads_and_memory_allow(
    threads: int, n_inputs: int, most: int
) -> None:
    solve = Concurrency(most)
    found = solve_fits.solve_fits(made(threads), n_inputs, 10, solve)
    assert found == [(number, fit) for number, fit in enumerate("abcdefg")]
    assert solve.most == most


@pytest.mark.parametrize("preset", ["dense", "ridge"])
def test_the_model_has_the_same_bits_whatever_the_number_of_threads(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet, store = write_cohort(tmp_path / "cohort", MADE)
    for threads in (1, 3):
        monkeypatch.setattr(section_tasks, "usable_cores", lambda n=threads: n)
        train(sheet, store, tmp_path / str(threads), TrainSettings(genes=9, preset=preset), stream=True)
    one, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("1", "3"))
    assert one == three
