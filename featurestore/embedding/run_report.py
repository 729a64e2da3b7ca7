"""What a run has done, as JSON-ready values: slides, failures, speed, where the time went, what it was made with."""

import datetime as dt
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from operator import add
from typing import Any

from featurestore.credentials import redact
from featurestore.embedding.costs import Costs
from featurestore.embedding.plan import software_versions
from featurestore.embedding.settings import EmbedSettings
from featurestore.embedding.slide_result import SlideResult
from featurestore.encoders.loading import canonical_key
from featurestore.errors import StoreError
from featurestore.location import Location, PathOrUrl
from featurestore.storage.store import Store

SPEC = "histosge-embed-report"
VERSION = 1


@dataclass(frozen=True)
class RunReport:
    """One run of `featurestore.embedding.embed`.

    Parameters
    ----------
    store
        Where it wrote, without credentials.
    begun
        When it started (UTC).
    seconds
        On the clock.
    settings
        Grid, tissue and encoders as they were given.
    encoders
        Identity of each encoder, as the store holds it; without ``fingerprint`` where no slide was stored.
    results
        One per slide, those that were finished.
    is_complete
        Whether the run came to its end.
    """

    store: str
    begun: dt.datetime
    seconds: float
    settings: dict[str, Any]
    encoders: tuple[dict[str, Any], ...]
    results: tuple[SlideResult, ...]
    is_complete: bool = True
    software: dict[str, str] = field(default_factory=dict)

    @property
    def costs(self) -> Costs:
        """Costs of all slides."""
        return reduce(add, (result.costs for result in self.results), Costs())

    @property
    def failed(self) -> tuple[SlideResult, ...]:
        """The slides that failed."""
        return tuple(result for result in self.results if result.state == "failed")

    def to_json(self) -> dict[str, Any]:
        """Return all of it, JSON-ready."""
        costs = self.costs
        states = [result.state for result in self.results]
        return {
            "spec": SPEC,
            "version": VERSION,
            "store": self.store,
            "begun": self.begun.isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 3),
            "complete": self.is_complete,
            "slides": {name: states.count(name) for name in ("done", "failed", "planned")},
            "patches": costs.patches,
            "patches_per_second": round(costs.patches / self.seconds, 2) if self.seconds else 0.0,
            "unreadable_patches": sum(result.unreadable for result in self.results),
            # Of all threads and processes: together more than `seconds`.
            "stage_seconds": {
                "plan": round(costs.plan_seconds, 3),
                "read": round(costs.read_seconds, 3),
                "decode": round(max(0.0, costs.decode_seconds), 3),
                "encode": round(costs.encode_seconds, 3),
                "write": round(costs.write_seconds, 3),
            },
            # Null where no reader counts them.
            "bytes_read": costs.bytes_read or None,
            "requests": costs.requests or None,
            "bytes_written": costs.bytes_written,
            "objects_written": costs.objects,
            "failures": [
                {"slide_id": r.slide_id, "reason": redact(r.reason)}
                for r in self.results
                if r.state == "failed"
            ],
            "per_slide": [
                {
                    "slide_id": r.slide_id,
                    "state": r.state,
                    "patches": r.patches,
                    "encoded": r.costs.patches,
                    "objects": r.computed,
                    "planned": r.planned,
                    "unreadable": r.unreadable,
                    "skipped": r.skipped,
                }
                for r in self.results
            ],
            "settings": self.settings,
            "encoders": list(self.encoders),
            "software": self.software,
        }


def describe_run(
    store: PathOrUrl,
    settings: EmbedSettings,
    results: Sequence[SlideResult],
    begun: dt.datetime,
    seconds: float,
    *,
    is_complete: bool = True,
) -> RunReport:
    """Describe a run that is over.

    Parameters
    ----------
    begun, seconds
        When it started, and for how long it ran.
    is_complete
        Whether every slide had its turn.
    """
    keys = tuple(dict.fromkeys(canonical_key(key) for key in settings.encoders))
    stored = next((result.slide_id for result in results if result.state == "done"), None)
    return RunReport(
        Location(store).label,
        begun,
        seconds,
        {
            "grid": settings.spec.key,
            "tissue": settings.tissue or "the mask of a slide that has one, else texture",
            "skip": ",".join(settings.skip) or "none",
            "store_as": settings.store_as or "float16",
            "device": settings.options.device,
            "precision": settings.options.precision,
            "engine": settings.options.engine,
        },
        tuple(_identity(store, stored, settings.spec.key, key) for key in keys),
        tuple(results),
        is_complete,
        _software(),
    )


def _software() -> dict[str, str]:
    found = {"python": platform.python_version(), **software_versions()}
    with suppress(PackageNotFoundError):  # handcrafted encoders need no torch
        found["torch"] = version("torch")
    return {**found, "machine": platform.platform()}


def _identity(store: PathOrUrl, slide_id: str | None, grid_key: str, key: str) -> dict[str, Any]:
    """Return what a store holds of an encoder's identity, from one of the slides."""
    if slide_id is None:
        return {"key": key}
    try:
        found = Store.open(store).identity(slide_id, grid_key, key)
    except StoreError:  # removed since, or a server that refuses now: the report is written all the same
        return {"key": key}
    return {"key": found.key, "dim": found.dim, "fingerprint": found.fingerprint, "facts": found.facts}
