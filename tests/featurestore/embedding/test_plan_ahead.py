"""The next slide is planned while the present one is encoded, and nobody who looks at a run's results can tell."""

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_slides import tissue_like, write_pyramid
from numpy.typing import NDArray

from featurestore import EmbedSettings, GridSpec
from featurestore.embedding import block_reading
from featurestore.embedding import embed as embedding
from featurestore.embedding.plan_ahead import GoOn, PlanAhead, RunStoppedError
from featurestore.embedding.slide_result import SlideResult
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.events import Progress
from featurestore.slides.patch_reader import PatchBatch
from featurestore.slides.protocol import Slide
from featurestore.slides.sample_sheet import Sample

SETTINGS = EmbedSettings(("mean",), GridSpec(1.0, 32, 32), block_shape=(6, 12), tissue="none")
PATIENCE_S = 30.0


class MeanColour:
    """An encoder that calls something at its first batch."""

    identity = EncoderIdentity("mean", 3, {"algorithm": "mean"})

    def __init__(self, at_first: Callable[[], None] = lambda: None) -> None:
        self._at_first: Callable[[], None] | None = at_first

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self._at_first is not None:
            at_first, self._at_first = self._at_first, None
            at_first()
        return patches.mean(axis=(1, 2), dtype=np.float32)


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    for seed, name in enumerate("abc"):
        write_pyramid(folder / f"{name}.tif", tissue_like(400, 360, 1.0, seed), 1.0)
    return folder


def _use(monkeypatch: pytest.MonkeyPatch, encoder: MeanColour) -> None:
    monkeypatch.setattr(embedding, "load_encoders", lambda settings: {"mean": encoder})


def _wait_for(is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    return is_so()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the slides that are open."""
    names: list[str] = []
    open_slide = embedding.open_slide

    def watched(path: str, *args: Any, **options: Any) -> Slide:
        slide, name = open_slide(path, *args, **options), Path(path).stem
        names.append(name)
        close = slide.close

        def close_and_note() -> None:
            close()
            names.remove(name)

        monkeypatch.setattr(slide, "close", close_and_note)
        return slide

    monkeypatch.setattr(embedding, "open_slide", watched)
    return names


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Slide]:
    """Slides of which reading has begun, once for each block."""
    slides: list[Slide] = []
    read_batches = block_reading.read_batches

    def watched(slide: Slide, *args: Any) -> Iterator[PatchBatch]:
        slides.append(slide)
        return read_batches(slide, *args)

    monkeypatch.setattr(block_reading, "read_batches", watched)
    return slides


def test_the_next_slide_is_planned_and_read_while_the_present_one_is_encoded_and_no_further_one(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], read: list[Slide]
) -> None:
    store, seen = tmp_path / "store", []

    def look() -> None:
        # Slide a is small enough to wait as a whole in the queue of what is read, so b's turn comes.
        seen.append(_wait_for(lambda: len(set(map(id, read))) == 2))
        seen.append(list(opened))

    _use(monkeypatch, MeanColour(look))
    results = embedding.embed(slides, store, SETTINGS)
    assert [result.state for result in results] == ["done"] * 3
    assert seen == [True, ["a", "b"]]
    assert opened == []
    # One slide a run has none to follow: the plain way.
    _use(monkeypatch, MeanColour())
    for name in "abc":
        embedding.embed(slides / f"{name}.tif", tmp_path / "alone", SETTINGS)
    objects = [
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("c/*/*") if file.is_file()}
        for folder in (store, tmp_path / "alone")
    ]
    assert len(objects[0]) > 3
    assert objects[0] == objects[1]


def test_results_warnings_and_progress_come_in_the_order_of_the_rows(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[Slide]
) -> None:
    (slides / "d.tif").write_bytes(b"no slide")
    sheet = slides / "sheet.csv"
    # The scale of c is another than its file states, which is worth a warning; it is planned during a.
    sheet.write_text("slide,mpp\na.tif,\nc.tif,0.8\nd.tif,1\nb.tif,\n")
    events: list[str] = []
    planned: list[bool] = []

    def note(kind: str, slide_id: str) -> None:
        if not events or events[-1] != f"{kind} {slide_id}":
            events.append(f"{kind} {slide_id}")

    def on_progress(progress: Progress) -> None:
        note("progress", progress.label)

    def on_result(result: SlideResult) -> None:
        note(result.state, result.slide_id)

    # So that c is planned for certain before a is done.
    _use(monkeypatch, MeanColour(lambda: planned.append(_wait_for(lambda: len(set(map(id, read))) == 2))))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: note("warning", str(message)[:3]))
        embedding.embed(sheet, tmp_path / "store", SETTINGS, on_progress=on_progress, on_result=on_result)
    assert planned == [True]
    warned = [event for event in events if event.startswith("warning")]
    assert len(warned) == 1, events
    assert events == [
        "progress a",
        "done a",
        warned[0],
        "progress c",
        "done c",
        "failed d",
        "progress b",
        "done b",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_ends_early_leaves_no_thread_and_no_open_slide(
    slides: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opened: list[str],
    error: type[BaseException],
) -> None:
    def stop() -> None:
        assert _wait_for(lambda: opened == ["a", "b"])
        raise error

    _use(monkeypatch, MeanColour(stop))
    before = set(threading.enumerate())
    with pytest.raises(error):
        embedding.embed(slides, tmp_path / "store", SETTINGS)
    ours = [
        thread
        for thread in set(threading.enumerate()) - before
        if thread.name.startswith(("plan", "read", "write"))
    ]
    assert ours == []
    assert opened == []
    _use(monkeypatch, MeanColour())
    results = embedding.embed(slides, tmp_path / "store", SETTINGS)
    assert [result.state for result in results] == ["done"] * 3


def _samples(names: str) -> list[Sample]:
    return [Sample(name, f"{name}.tif", None, None, "") for name in names]


def test_an_error_is_raised_at_its_turn_and_the_slides_after_it_are_planned_all_the_same() -> None:
    planned, threads = [], {}

    def plan(sample: Sample, go_on: GoOn) -> str:
        planned.append(sample.slide_id)
        threads[sample.slide_id] = threading.current_thread()
        if sample.slide_id in "bc":
            raise OSError(f"no {sample.slide_id}")
        return sample.slide_id

    taken = []
    with PlanAhead(_samples("abcde"), plan, taken.append) as ahead:
        for sample, take in ahead:
            try:
                taken.append(take())
            except OSError as error:
                taken.append(f"{error} at {sample.slide_id}")
    assert taken == ["a", "no b at b", "no c at c", "d", "e"]
    assert planned == list("abcde")
    here = {slide_id for slide_id, thread in threads.items() if thread is threading.current_thread()}
    assert here == {"a", "c", "d"}  # the first, and those after a failure, with nothing to encode meanwhile


def test_a_plan_that_nobody_takes_is_discarded_or_stopped_at_its_next_step() -> None:
    begun, stopped, discarded = threading.Event(), [], []

    def plan(sample: Sample, go_on: GoOn) -> str:
        if sample.slide_id == "b":
            begun.set()
            while True:
                try:
                    go_on()
                except RunStoppedError:
                    stopped.append(sample.slide_id)
                    raise
        return sample.slide_id

    def run(names: str, *, wait: bool) -> None:
        with PlanAhead(_samples(names), plan, discarded.append) as ahead:
            for _, take in ahead:
                take()
                assert not wait or begun.wait(PATIENCE_S)
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("ab", wait=True)
    assert (stopped, discarded) == (["b"], [])
    with pytest.raises(KeyboardInterrupt):
        run("ac", wait=False)
    assert (stopped, discarded) == (["b"], ["c"])
