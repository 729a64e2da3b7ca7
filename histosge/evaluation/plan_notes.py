"""Sentences of a report on how an evaluation was planned: genes, donors, and what methods look at."""

from collections.abc import Mapping

from featurestore.wording import counted
from histosge.data.gene_choice import GeneChoice
from histosge.evaluation.tasks import Plan
from histosge.heldout.donors import named_donors
from histosge.heldout.splits import INTERLEAVED


def gene_rule(genes: GeneChoice) -> str:
    """Return how genes were chosen, and from which spots."""
    rule = genes.describe("each fold's training spots")
    return f"{rule}, the same in every fold" if genes.is_given else f"{rule}; no held-out spot was used"


def plan_notes(plan: Plan, halo_um: Mapping[str, float]) -> tuple[str, ...]:
    """Return one sentence for each limit of what the scores mean.

    Parameters
    ----------
    halo_um
        Method -> how far beyond a patch it looked, microns.
    """
    donors = set(named_donors([section.spots for section in plan.sections]))
    n_sections = len(plan.sections)
    whose = f"of {counted(len(donors), 'donor')}" if donors else "whose donors the sample sheet does not name"
    notes = [f"{counted(n_sections, 'section')} {whose}."]
    # With one section a donor, leaving out a section leaves out its donor.
    if plan.split != "donor" and not (plan.split == "section" and len(donors) == n_sections):
        share = "share" if donors else "may share"
        notes.append(f"Training and held-out spots {share} donors: accuracy on another donor may be lower.")
    # The sections of a fold's training part are of no more donors than all are.
    if len(donors) < 2:
        within = (
            f"donor {' '.join(donors)} only" if donors else "these sections' donors only, who are not named"
        )
        notes.append(f"Intervals and trust (coverage_90, trusted_share) are measured within {within}.")
    # Whoever compares presets must know that some use image patches beyond the spot and others do not.
    wide = [f"{preset} by {halo:.0f} µm" for preset, halo in halo_um.items() if halo > 0]
    if wide and plan.split in INTERLEAVED:
        notes.append(
            f"Some presets look beyond a patch ({', '.join(wide)}), so training uses image patches around"
            " held-out spots, but never their counts."
        )
    if wide and plan.split == "block":
        notes.append(
            f"Some presets look beyond a patch ({', '.join(wide)}). Patches near the border of a block are"
            " used neither for training nor for held-out spots, so the two share no pixel (checked)."
        )
    return tuple(notes)
