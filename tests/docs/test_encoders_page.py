"""What the guide says of the encoders is what the registry holds."""

import re
from pathlib import Path

from featurestore.encoders.records import records

DOCS = Path(__file__).parents[2] / "docs"


def test_the_comparison_counts_the_records_of_the_registry() -> None:
    found = re.search(r"(\d+) records \((\d+) with variants\)", (DOCS / "comparison.md").read_text())
    assert found is not None
    assert tuple(map(int, found.groups())) == (len({r.name for r in records().values()}), len(records()))
