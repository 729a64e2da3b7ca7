"""Values that no honest program writes, and what every reader owes for them: for tests that fuzz.

`run_default` is the share of the default run; the same test has a long run under the marker ``slow``.
"""

import copy
import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from featurestore.errors import FeatureStoreError
from histosge.errors import HistosgeError

MAX_SECONDS = 10.0
MAX_GROWTH_KB = 1_000_000
MAX_LINE = 2000

_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
# Derandomised, so that a default run that is red is red again.
run_default = settings(max_examples=20, derandomize=True, **_COMMON)
run_long = settings(max_examples=400, **_COMMON)

NUMBERS = [-5, -1, 0, 1, 2, 7, 10**4, 2**31, 10**9, 2**53, 2**63, 10**30]
NUMBERS += [0.5, -0.0, 1e-9, 1e-320, 1e300, math.nan, math.inf]
TEXTS = ["", "7", "..", "../..", "/", "tissue", "zarr.json", "NaN", "a\0b", "é", "x" * 5000]
TEXTS += ["os:system", "object", "|O", "pickle"]
OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [None],
    [7],
    [7, 13],
    [-1, 0, 5],
    {"name": "pickle"},
    {"a": {"b": []}},
]

values = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.sampled_from(OTHERS))
"""What may stand in place of a value of a document, an attribute or a cell."""

Path_ = tuple[str | int, ...]


def paths(document: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Yield where every value of a JSON document is, its lists and objects too."""
    entries = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in entries:
        yield (*at, key)
        yield from paths(value, (*at, key))


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document in which one to three values are replaced, removed, repeated or nested."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths(document))
        if not places:
            break
        *above, last = draw(st.sampled_from(places))
        holder = document
        for key in above:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "nest", "add"])):
            case "replace":
                holder[last] = copy.deepcopy(draw(values))
            case "remove":
                del holder[last]
            case "nest":
                holder[last] = [holder[last]]
            case "add" if isinstance(holder, list):
                holder.append(copy.deepcopy(draw(values)))
            case _:
                holder[draw(st.sampled_from(TEXTS))] = (
                    copy.deepcopy(draw(values)) if isinstance(holder, dict) else holder
                )
    return document


@st.composite
def changed_bytes(draw: st.DrawFn, document: Any) -> bytes:
    """The same as bytes: sometimes cut, with a key twice, or nested beyond reason."""
    data = json.dumps(draw(changed(document))).encode()
    match draw(st.sampled_from(["whole", "whole", "whole", "cut", "twice", "deep", "binary"])):
        case "cut":
            return data[: draw(st.integers(0, len(data)))]
        case "twice":
            return b'{"attributes": {}, ' + data[1:]
        case "deep":
            return b'{"attributes": ' + b"[" * 10**5
        case "binary":
            return data[:7] + b"\xff\x00" + data[7:]
    return data


def refuses_or_reads(call: Callable[[], object]) -> str:
    """Run what reads hostile input: it ends soon, within bounded memory, well or with one line; return that line.

    The time is that of the processor, which other processes on the machine do not prolong.
    """
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = ""
    try:
        call()
    except (FeatureStoreError, HistosgeError) as error:
        line = str(error)
    took = time.process_time() - start
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert took < MAX_SECONDS, f"{took:.1f} s"
    assert growth < MAX_GROWTH_KB, f"{growth} kB"
    assert len(line) < MAX_LINE, line
    assert len(line.splitlines()) <= 1, line
    return line


def files_around(folder: Path) -> set[Path]:
    """Every path beside a folder: unchanged if nothing was written outside."""
    return {path for path in folder.parent.rglob("*") if folder not in path.parents and path != folder}
