"""Donors that a sample sheet does not name."""

from dataclasses import dataclass

import pytest

from histosge.heldout.donors import named_donors
from histosge.training.model_card import ModelCard


@dataclass(frozen=True)
class _Section:
    slide_id: str
    donor: str


UNNAMED = [_Section("A", "A"), _Section("B", "B")]


def test_slides_without_a_named_donor_are_not_taken_for_as_many_donors() -> None:
    assert named_donors([_Section("A", "d1"), _Section("B", "d1")]) == ["d1", "d1"]
    assert named_donors(UNNAMED) == []
    assert named_donors(UNNAMED[:1]) == ["A"]


@pytest.mark.parametrize(
    ("sections", "donors"),
    [
        (UNNAMED, set()),
        ([_Section("A", "d1"), _Section("B", "d2")], {"d1", "d2"}),
        ([_Section("A", "d1"), _Section("B", "")], set()),  # one of an imported model may not say
    ],
)
def test_a_models_card_counts_named_donors_alone(sections: list[_Section], donors: set[str]) -> None:
    facts = tuple({"slide_id": section.slide_id, "donor": section.donor} for section in sections)
    assert ModelCard("ridge", ("G",), {}, {}, {}, facts, 0).donors == donors
