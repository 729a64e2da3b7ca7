"""What stands behind a name in an evaluation: a preset, an oracle, or the published code with its defects.

A method fits on a task's training part and says what held-out spots express; how it is scored is not
its business. Names: a preset of `histosge.models.registry`, ``depth``, or ``paper`` with switches, such as
``paper+file_order_groups``.

Terms
    oracle   is told something of the held-out spots' counts: shown as a yardstick, never as a model
    spots    (switch) predicted at the spots themselves, as the released code does, in place of a map of
             patches averaged under each disc; every other switch implies it
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from histosge.calibration.conformal import predict_patches
from histosge.data.genes import choose_genes, library_size, shared_genes
from histosge.data.sections import Section
from histosge.data.spot_overlap import spots_from_patches
from histosge.errors import HistosgeError
from histosge.evaluation.results import NOISE
from histosge.evaluation.tasks import Task
from histosge.models.library_size import DepthOracle
from histosge.models.protocol import Model
from histosge.models.registry import PRESETS, load_preset

DEPTH, PAPER = "depth", "paper"
WITHIN_SECTION = ("block", "random")
"""Splits that leave part of every section to train on."""

SPOTS = "spots"
MODEL_SWITCHES = ("file_order_groups", "integer_coordinates")
PATCH_SWITCHES = ("bgr", "fixed_pixel_crop")
SCORE_SWITCHES = ("hvg_before_split", "all_spots_metric")
SWITCHES = (*MODEL_SWITCHES, *PATCH_SWITCHES, *SCORE_SWITCHES)
"""Defects of the released code, each by its name: of the model, of how patches are encoded, of how it is scored."""

Reencode = Callable[[Sequence[Section], frozenset[str]], tuple[Section, ...]]
"""Returns the sections with the patches under spots encoded anew with some of `PATCH_SWITCHES`."""


class FittedMethod(Protocol):
    """A method after training."""

    @property
    def halo_um(self) -> float:
        """Return how far beyond a patch it looks."""
        ...

    def at_spots(self, section: Section) -> NDArray[np.float32]:
        """Return log1p(CP10k) of a section's spots, ``(n_spots, n_genes)``."""
        ...

    def at_patches(self, section: Section) -> NDArray[np.float32] | None:
        """Return log1p(CP10k) of a section's patches, or None if it draws no map."""
        ...


class Method(Protocol):
    """One row of the table of scores."""

    @property
    def name(self) -> str:
        """Return the name in scores.csv."""
        ...

    def prepare(self, task: Task) -> Task:
        """Return the task that it really sees: a defect may lie in the data it is given."""
        ...

    def fit(self, task: Task, epochs: int | None) -> FittedMethod:
        """Train on a prepared task's training part."""
        ...


@dataclass(frozen=True)
class MapModel:
    """A trained preset: scored by the map that a user would get."""

    model: Model

    @property
    def halo_um(self) -> float:
        """Return the model's."""
        return self.model.halo_um

    def at_spots(self, section: Section) -> NDArray[np.float32]:
        """Average the map under each disc."""
        return spots_from_patches(section.overlap, self.model.predict(section.patches))

    def depth_at_spots(self, section: Section) -> NDArray[np.float64]:
        """Return the log of total counts that the model predicts for a section's spots, ``(n_spots,)``; NaN if none."""
        _, depth = predict_patches(self.model, section.patches)
        return np.full(len(section.spots), np.nan) if depth is None else section.overlap @ depth

    def at_patches(self, section: Section) -> NDArray[np.float32]:
        """Return the map."""
        return self.model.predict(section.patches)


@dataclass(frozen=True)
class PresetMethod:
    """A preset as `histosge train` would train it."""

    name: str
    preset: type[Model]

    def prepare(self, task: Task) -> Task:
        """Return the task as it is."""
        return task

    def fit(self, task: Task, epochs: int | None) -> MapModel:
        """Train the preset."""
        return MapModel(self.preset.fit(task.training(), seed=task.seed, epochs=epochs))


@dataclass(frozen=True)
class FittedLibrarySize:
    """The oracle, fitted."""

    oracle: DepthOracle
    halo_um: float = 0.0

    def at_spots(self, section: Section) -> NDArray[np.float32]:
        """Look up the spots' own total counts."""
        return self.oracle.predict(library_size(section.spots))

    def at_patches(self, section: Section) -> None:
        """Return nothing: no patch has counts."""
        return


@dataclass(frozen=True)
class LibrarySizeMethod:
    """Library size alone."""

    name: str = DEPTH

    def prepare(self, task: Task) -> Task:
        """Return the task as it is."""
        return task

    def fit(self, task: Task, epochs: int | None) -> FittedLibrarySize:
        """Fit on the training spots' own totals."""
        depth = np.concatenate([library_size(spots) for spots in task.training_spots()])
        target = np.concatenate([section.target for section in task.training()])
        return FittedLibrarySize(DepthOracle.fit(depth, target))


@dataclass(frozen=True)
class SpotModel:
    """The published network, asked at spots."""

    model: "PaperLike"
    halo_um: float = 0.0

    def at_spots(self, section: Section) -> NDArray[np.float32]:
        """Predict spots from the mean embedding under each."""
        embedding = section.overlap @ section.patches.embedding.astype(np.float64)
        return self.model.predict_spots(embedding, section.spots.xy_um)

    def at_patches(self, section: Section) -> None:
        """Return nothing: it is scored at spots."""
        return


class PaperLike(Protocol):
    """What `SpotModel` needs of a model."""

    def predict_spots(
        self, embedding: NDArray[np.floating], xy_um: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Return log1p(CP10k) of spots."""
        ...


@dataclass(frozen=True)
class PaperMethod:
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

    @property
    def name(self) -> str:
        """Return ``paper+`` and the switches in their fixed order; ``paper+spots`` without one."""
        if self.switches == frozenset(SWITCHES):
            return f"{PAPER}+all"
        return "+".join((PAPER, *(s for s in SWITCHES if s in self.switches))) + (
            "" if self.switches else f"+{SPOTS}"
        )

    def fit_name(self, task: Task) -> str:
        """Return the name of what is fitted: how it is scored, or how noise was encoded, makes no other fit."""
        idle = {"all_spots_metric"} | (set(PATCH_SWITCHES) if task.noise else set())
        return PaperMethod(self.switches - idle).name

    def prepare(self, task: Task) -> Task:
        """Choose genes on all spots, or take patches encoded in another way, where a switch says so."""
        if "hvg_before_split" in self.switches and task.chosen:
            spots = [section.spots for section in task.sections]
            task = task.with_genes(choose_genes(spots, len(task.genes), among=shared_genes(spots)))
        patch_switches = self.switches & set(PATCH_SWITCHES)
        if patch_switches and self.reencode is not None and not task.noise:
            task = task.with_sections(self.reencode(task.sections, patch_switches))
        return task

    def fit(self, task: Task, epochs: int | None) -> SpotModel:
        """Train with the defects that lie in the model."""
        from histosge.models.presets.paper import PaperModel, PaperSwitches

        switches = PaperSwitches(**{name: True for name in MODEL_SWITCHES if name in self.switches})
        return SpotModel(PaperModel.fit_with(switches, task.training(), seed=task.seed, epochs=epochs))


def resolve(
    names: Sequence[str], split: str, reencode: Reencode | None = None
) -> tuple[tuple[Method, ...], tuple[str, ...]]:
    """Find what stands behind names.

    Parameters
    ----------
    names
        Repeated ones count once, and `noise` is always there anyway.
    split
        Presets that know only slides they were trained on are left out where whole slides are held out.
    reencode
        None where patches cannot be encoded anew: switches that need it are left out.

    Returns
    -------
    methods, left_out
        The latter one sentence each.

    Raises
    ------
    HistosgeError
        If a name is unknown, or nothing is left.
    """
    found: list[Method] = []
    left_out: list[str] = []
    for name in dict.fromkeys(name for name in names if name != NOISE):
        if name == DEPTH:
            found.append(LibrarySizeMethod())
        elif name.startswith(f"{PAPER}+"):
            switches = _switches(name)
            if switches & set(PATCH_SWITCHES) and reencode is None:
                left_out.append(
                    f"{name} is left out: the slides cannot be read here, and it encodes their patches anew."
                )
            else:
                found.append(PaperMethod(switches, reencode))
        else:
            preset = load_preset(name) if name in PRESETS else _unknown(name)
            if preset.needs_position_on_slide and split not in WITHIN_SECTION:
                left_out.append(
                    f"{name} is left out: it only knows slides that it was trained on; split {split} holds out whole ones."
                )
            else:
                found.append(PresetMethod(name, preset))
    if not found:
        reason = " ".join(left_out) or "no preset is named"
        raise HistosgeError(f"nothing to evaluate: {reason}; add one, such as --presets ridge,dense")
    return tuple(found), tuple(left_out)


def ablation_names(*, patches: bool) -> tuple[str, ...]:
    """Return the published code without a defect, with each alone, and with all.

    Parameters
    ----------
    patches
        Whether patches can be encoded anew; without, `PATCH_SWITCHES` are left out.
    """
    alone = [name for name in SWITCHES if patches or name not in PATCH_SWITCHES]
    together = "+".join((PAPER, *alone)) if not patches else f"{PAPER}+all"
    return (f"{PAPER}+{SPOTS}", *(f"{PAPER}+{name}" for name in alone), together)


def _switches(name: str) -> frozenset[str]:
    wanted = set(name.split("+")[1:]) - {SPOTS}
    if wanted == {"all"}:
        return frozenset(SWITCHES)
    if unknown := sorted(wanted - set(SWITCHES)):
        raise HistosgeError(
            f"unknown switch {unknown[0]!r} in {name!r}: choose of {', '.join(SWITCHES)}, all"
        )
    return frozenset(wanted)


def _unknown(name: str) -> type[Model]:
    raise HistosgeError(f"unknown preset {name!r}: choose of {', '.join((*PRESETS, DEPTH))}, paper+SWITCH")
