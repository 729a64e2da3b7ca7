"""Synthetic sections with a known dense truth: an H&E-like slide, spots on it, and the rates behind them.

For the demo, the tests and the benchmarks: of a real section, nobody knows whether a dense map is right.
"""

from histosge.synthetic.cohort import SyntheticCohort, SyntheticSection, make_cohort, make_section
from histosge.synthetic.spec import GeneCounts, SyntheticSpec
from histosge.synthetic.truth import Truth, load_truth, truth_at

__all__ = [
    "GeneCounts",
    "SyntheticCohort",
    "SyntheticSection",
    "SyntheticSpec",
    "Truth",
    "load_truth",
    "make_cohort",
    "make_section",
    "truth_at",
]
