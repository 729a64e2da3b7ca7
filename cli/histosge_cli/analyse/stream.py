"""The patches that a command of `analyse` goes through: those of a feature store, or of expression maps."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featurestore.wording import counted
from histosge_cli.console import Console, resumable
from histosge_cli.worker_count import worker_count

if TYPE_CHECKING:
    from featurestore.analysis.patch_stream import PatchStream
    from featurestore.analysis.slide_source import SlideSource
    from featurestore.events import OnProgress


@dataclass(frozen=True)
class StreamChoice:
    """Which patches are read, and where: the options of these names as they were typed.

    Parameters
    ----------
    slides
        Slide ids; None or empty for all.
    workers, scheduler
        Both None: this process reads.
    """

    slides: list[str] | None
    grid: str | None
    encoder: str | None
    workers: str | None
    scheduler: str | None
    quiet: bool
    log: Path | None


@contextmanager
def open_stream(
    url: str, choice: StreamChoice, *, out_file: Path | None, folder: Path | None = None
) -> "Iterator[PatchStream]":
    """Open the store, and afterwards report what was left out; check first that the results can be written."""
    from featurestore.analysis.patch_tables import check_file, check_folder

    if out_file is not None:
        check_file(out_file)
    if folder is not None:
        check_folder(folder)
    console = Console(choice.quiet, choice.log)
    source = _source(url, choice)
    with (
        resumable(),
        console.bars("slides") as bars,
        _stream(source, choice, bars.update) as stream,
    ):
        yield stream
    what = "embedding" if stream.columns is None else "map"
    if stream.skipped:
        console.message(
            f"{counted(len(stream.skipped), 'slide')} left out, without this {what}: {first_few(stream.skipped)}"
        )
    absent = stream.counts.absent
    if absent.total():
        affected = [name for name, count in absent.items() if count]
        why = "no embedding (unreadable, or not embedded yet)" if stream.columns is None else "no prediction"
        console.message(
            f"{counted(absent.total(), 'tissue patch')} left out, with {why}: {first_few(affected)}; see: histosge ls"
        )


def _source(url: str, choice: StreamChoice) -> "SlideSource":
    """Return the embeddings of a feature store, or the maps of an expression store: whichever is there."""
    from featurestore.analysis.slide_source import EmbeddingSource
    from featurestore.errors import StoreError
    from histosge.prediction.expression_source import ExpressionSource
    from histosge.prediction.expression_store import is_expression_store

    slides = choice.slides or None
    if not is_expression_store(url):
        return EmbeddingSource(url, slides, choice.grid, choice.encoder)
    if choice.encoder is not None:
        raise StoreError(
            f"{url} holds expression maps, which have no encoder to choose: leave out --encoder {choice.encoder[:60]}"
        )
    return ExpressionSource(url, slides, choice.grid)


@contextmanager
def _stream(
    source: "SlideSource", choice: StreamChoice, on_progress: "OnProgress"
) -> "Iterator[PatchStream]":
    """Open a stream whose passes are made here, by worker processes, or by a running cluster."""
    from featurestore.analysis.patch_stream import PatchStream

    processes = worker_count(choice.workers, choice.scheduler)
    if processes is None and choice.scheduler is None:
        yield PatchStream(source, on_progress)
        return
    from featurestore.analysis.cluster_stream import ClusterStream, connect

    source.names()  # a store that is not there is refused before processes are started
    with connect(processes, choice.scheduler) as client:
        yield ClusterStream(client, source, on_progress)


def first_few(names: "list[str] | tuple[str, ...]") -> str:
    """Return names for a message, at most five of them."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
