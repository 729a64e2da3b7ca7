"""The garbage collector pauses where it is told to, and what it would find later is still found."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from featurestore.collector import collector_paused


class Cyclic:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    """The test run itself has frozen what was imported; and no collection of everything comes in between."""
    was_frozen, thresholds = gc.get_freeze_count(), gc.get_threshold()
    gc.unfreeze()
    gc.set_threshold(*thresholds[:2], 1_000_000)
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()
    if was_frozen:
        gc.collect()
        gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_nothing_is_collected_in_the_context_and_garbage_of_it_is_afterwards() -> None:
    with collector_paused():
        assert not gc.isenabled()
        found = weakref.ref(Cyclic())
        for _ in range(3 * gc.get_threshold()[0]):
            Cyclic()
        assert found() is not None
    assert gc.isenabled()
    young = [[i] for i in range(2 * gc.get_threshold()[0])]
    # It is among the oldest objects: the first collection of young ones would have to go through all that was imported.
    assert found() is not None
    del young
    gc.collect()
    assert found() is None


def test_it_stays_off_for_whoever_turned_it_off_and_goes_on_after_an_error() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(OSError, match="no module"), collector_paused():
        raise OSError("no module")
    assert gc.isenabled()


@pytest.mark.usefixtures("nothing_frozen")
def test_objects_that_somebody_froze_stay_frozen() -> None:
    frozen: list[list[int]] = [[], [], []]
    gc.freeze()
    with collector_paused():
        young: list[int] = []
    found = set(map(id, gc.get_objects()))  # those that are not frozen
    assert id(young) in found
    assert not found & set(map(id, frozen))


def test_a_process_of_ours_ends_without_a_last_collection() -> None:
    code = """
class Cyclic:
    def __init__(self): self.me = self
    def __del__(self): print("collected")
cyclic = [Cyclic()]
{skip}
print("end")
"""
    skip = "from featurestore.collector import skip_collection_at_exit; skip_collection_at_exit()"

    def run(text: str) -> list[str]:
        command = [sys.executable, "-c", code.format(skip=text)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert run("") == ["end", "collected"]
    assert run(skip) == ["end"]
