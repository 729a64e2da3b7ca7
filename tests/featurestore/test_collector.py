"""The garbage collector pauses where it is told to, and what it would find later is still found.

In processes of their own: the collector is the process's, and a thread that an earlier test left behind may pause it, too.
"""

import subprocess
import sys
from textwrap import dedent

BEGIN = """
import gc
import weakref

from featurestore.collector import collector_paused

class Cyclic:
    def __init__(self):
        self.me = self
"""


def run(code: str) -> str:
    """Run code in a new process, and return what it prints."""
    command = [sys.executable, "-c", BEGIN + dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_collected_in_the_context_and_garbage_of_it_is_afterwards() -> None:
    run("""
        gc.unfreeze()  # Python 3.12 begins with some hundred frozen objects
        # No collection of everything comes in between.
        gc.set_threshold(*gc.get_threshold()[:2], 1_000_000)
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
    """)


def test_it_stays_off_for_whoever_turned_it_off_and_goes_on_after_an_error() -> None:
    run("""
        gc.disable()
        with collector_paused():
            pass
        assert not gc.isenabled()
        gc.enable()
        try:
            with collector_paused():
                raise OSError("no module")
        except OSError as error:
            assert "no module" in str(error)
        else:
            raise AssertionError("the error is lost")
        assert gc.isenabled()
    """)


def test_objects_that_somebody_froze_stay_frozen() -> None:
    run("""
        frozen = [[], [], []]
        gc.freeze()
        with collector_paused():
            young = []
        found = set(map(id, gc.get_objects()))  # those that are not frozen
        assert id(young) in found
        assert not found & set(map(id, frozen))
    """)


def test_a_process_of_ours_ends_without_a_last_collection() -> None:
    code = """
        Cyclic.__del__ = lambda self: print("collected")
        cyclic = [Cyclic()]
        {skip}
        print("end")
    """
    skip = "from featurestore.collector import skip_collection_at_exit; skip_collection_at_exit()"
    assert run(code.format(skip="")).split() == ["end", "collected"]
    assert run(code.format(skip=skip)).split() == ["end"]
