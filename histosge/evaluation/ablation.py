"""The published code with its defects, each behind a switch: what each does to the figure that it reports.

A variant is named by its switches, such as ``paper+file_order_groups``. Comparing it with ``paper+spots``, which has no
defect, shows what that defect changes.

Terms
    spots    (switch) predicted at the spots themselves, as the released code does, in place of a map of
             patches averaged under each disc; every other switch implies it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from histosge.data.genes import choose_genes, shared_genes
from histosge.data.sections import Section
from histosge.errors import HistosgeError
from histosge.evaluation.results import VARIANT
from histosge.evaluation.tasks import Task

PAPER = "paper"
SPOTS, ALL = "spots", "all"
MODEL_SWITCHES = ("file_order_groups", "integer_coordinates")
PATCH_SWITCHES = ("bgr", "fixed_pixel_crop")
SCORE_SWITCHES = ("hvg_before_split", "all_spots_metric")
SWITCHES = (*MODEL_SWITCHES, *PATCH_SWITCHES, *SCORE_SWITCHES)
"""Defects of the released code, each by its name: of the model, of how patches are encoded, of how it is scored."""

Reencode = Callable[[Sequence[Section], frozenset[str]], tuple[Section, ...]]
"""Returns the sections with the patches under spots encoded again with some of `PATCH_SWITCHES`."""


class SpotPredictor(Protocol):
    """What `SpotModel` needs of a model."""

    def predict_spots(
        self, embedding: NDArray[np.floating], xy_um: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Return log1p(CP10k) of spots, ``(n_spots, n_genes)``."""
        ...


@dataclass(frozen=True)
class SpotModel:
    """The published network, predicting at spots."""

    model: SpotPredictor
    halo_um: float = 0.0

    def predict_spots(self, section: Section) -> NDArray[np.float32]:
        """Predict spots from the mean embedding under each."""
        embedding = section.overlap @ section.patches.embedding.astype(np.float64)
        return self.model.predict_spots(embedding, section.spots.xy_um)

    def predict_map(self, section: Section) -> None:
        """Return nothing: it is scored at spots."""
        return


@dataclass(frozen=True)
class PublishedCode:
    """The published code with some of its defects.

    Parameters
    ----------
    switches
        Of `SWITCHES`.
    reencode
        Needed by `PATCH_SWITCHES`.
    """

    switches: frozenset[str]
    reencode: Reencode | None = None
    kind: str = VARIANT

    # In a fixed order, so that one variant has one name however it was written.
    @property
    def name(self) -> str:
        """Return ``paper+`` and the switches in their fixed order; ``paper+spots`` without one."""
        if self.switches == frozenset(SWITCHES):
            return f"{PAPER}+{ALL}"
        return "+".join((PAPER, *(s for s in SWITCHES if s in self.switches))) + (
            "" if self.switches else f"+{SPOTS}"
        )

    @property
    def reports_all_spots(self) -> bool:
        """Tell whether its figure is over all spots, as the released code's is."""
        return "all_spots_metric" in self.switches

    def fit_name(self, task: Task) -> str:
        """Return the name of what is fitted: how it is scored, or how noise was encoded, makes no other fit."""
        # Random embeddings are drawn, not encoded: how patches are read makes no difference to them.
        idle = {"all_spots_metric"} | (set(PATCH_SWITCHES) if task.is_noise else set())
        return PublishedCode(self.switches - idle).name

    def prepare(self, task: Task) -> Task:
        """Choose genes on all spots, or take patches encoded in another way, where a switch says so."""
        # As many genes as the task has, so that the mean over genes differs by which they are alone.
        if "hvg_before_split" in self.switches and task.genes_are_chosen:
            spots = [section.spots for section in task.sections]
            task = task.with_genes(choose_genes(spots, len(task.genes), among=shared_genes(spots)))
        patch_switches = self.switches & set(PATCH_SWITCHES)
        if patch_switches and self.reencode is not None and not task.is_noise:
            task = task.with_sections(self.reencode(task.sections, patch_switches))
        return task

    def fit(self, task: Task, epochs: int | None) -> SpotModel:
        """Train with the defects that lie in the model."""
        # Here, since it loads torch, and most evaluations have no variant.
        from histosge.models.paper import PaperModel, PaperSwitches

        switches = PaperSwitches(**{name: True for name in MODEL_SWITCHES if name in self.switches})
        return SpotModel(PaperModel.fit_with(switches, task.training(), seed=task.seed, epochs=epochs))


def is_variant(name: str) -> bool:
    """Tell whether a name is of the published code with switches."""
    return name.startswith(f"{PAPER}+")


def needs_slides(names: Sequence[str]) -> bool:
    """Tell whether one of the variants encodes patches again."""
    return any(is_variant(name) and _switches(name) & set(PATCH_SWITCHES) for name in names)


def published_code(name: str, reencode: Reencode | None) -> PublishedCode | None:
    """Return the variant of a name; None if it encodes patches again and they cannot be.

    Raises
    ------
    HistosgeError
        If a switch is unknown.
    """
    switches = _switches(name)
    if switches & set(PATCH_SWITCHES) and reencode is None:
        return None
    return PublishedCode(switches, reencode)


def ablation_names(*, patches: bool) -> tuple[str, ...]:
    """Return the published code without a defect, with each alone, and with all.

    Parameters
    ----------
    patches
        Whether patches can be encoded again; without, `PATCH_SWITCHES` are left out.
    """
    alone = [name for name in SWITCHES if patches or name not in PATCH_SWITCHES]
    # With some switches left out, `all` would promise more than it holds.
    together = "+".join((PAPER, *alone)) if not patches else f"{PAPER}+{ALL}"
    return (f"{PAPER}+{SPOTS}", *(f"{PAPER}+{name}" for name in alone), together)


def _switches(name: str) -> frozenset[str]:
    wanted = set(name.split("+")[1:]) - {SPOTS}
    if wanted == {ALL}:
        return frozenset(SWITCHES)
    if unknown := sorted(wanted - set(SWITCHES)):
        raise HistosgeError(
            f"unknown switch {unknown[0]!r} in {name!r}: choose of {', '.join(SWITCHES)}, {ALL}"
        )
    return frozenset(wanted)
