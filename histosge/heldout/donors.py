"""Whose tissue sections are, as far as a sample sheet says."""

from collections.abc import Sequence
from typing import Protocol


class OfDonor(Protocol):
    """A section, as far as its donor goes."""

    @property
    def slide_id(self) -> str:
        """Return its slide."""
        ...

    @property
    def donor(self) -> str:
        """Return whose tissue it is."""
        ...


def named_donors(sections: Sequence[OfDonor]) -> list[str]:
    """Return each section's donor; none where a sample sheet names no donor of several sections."""
    return donors_if_named([(part.slide_id, part.donor) for part in sections])


def donors_if_named(sections: Sequence[tuple[str, str]]) -> list[str]:
    """Return what `named_donors` does, from each section's slide id and donor.

    A slide without a donor in the sheet bears its own id as donor. That several sections are of as many donors is not
    concluded from that: they may be neighbours from one block.
    """
    if len(sections) > 1 and all(donor == slide_id for slide_id, donor in sections):
        return []
    return [donor for _, donor in sections]
