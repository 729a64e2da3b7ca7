"""A synthetic H&E section whose true expression is known everywhere, also between spots.

For `histosge demo`, tests and benchmarks. It is no model of biology: what it offers is a truth that is
dense, gene families that a picture can and cannot tell, and pixels that pass for H&E at a glance.
"""

from histosge.synthetic.section import SyntheticSection, make_cohort, make_section
from histosge.synthetic.spec import SyntheticSpec
from histosge.synthetic.truth import Truth, load_truth, truth_at

__all__ = [
    "SyntheticSection",
    "SyntheticSpec",
    "Truth",
    "load_truth",
    "make_cohort",
    "make_section",
    "truth_at",
]
