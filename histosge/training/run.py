"""The arguments of one training, as its ways share them: in memory, streamed, and going on from a model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from featurestore.earlier_results import MadeWith
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.events import OnMessage, OnProgress
from featurestore.grid import GridSpec
from featurestore.slides.sample_sheet import Sample, read_samples
from featurestore.storage.store import Store
from featurestore.storage.stored_documents import identity_attrs
from featurestore.wording import counted
from histosge.calibration.conformal import Intervals
from histosge.data.gene_choice import GeneChoice
from histosge.data.genes import MIN_COUNTS
from histosge.training.kept_sums import KeptSection, KeptSums, SumsToKeep
from histosge.training.model_card import ModelCard
from histosge.training.settings import TrainSettings
from histosge.training.streaming.fit_streamed import (
    StreamedInputs,
)
from histosge.training.streaming.section_tasks import SectionTasks
from histosge.training.streaming.start import StartFromWeights
from histosge.training.streaming.work_folder import WorkFolder


@dataclass(frozen=True)
class Run:
    """The arguments of `train` that its two ways share."""

    samples: str | Path
    store: str | Path
    model: str | Path
    settings: TrainSettings
    made_with: MadeWith
    on_message: OnMessage
    on_progress: OnProgress
    force: bool
    keep_sums: bool

    def unseen_by(self, start: StartFromWeights) -> list[Sample]:
        """Return the rows of the sheet that a model was trained without, after a look at their encoder and grid.

        Raises
        ------
        ModelError
            If encoder or grid are others, with both values; or there is no such row.
        """
        new = start.unseen(read_samples(str(self.samples)), self.made_with["sections"], self.on_message)
        first = self.settings.selection.open(Store.open(str(self.store)), new[0].slide_id)
        start.saved.check_fits(first.identity, first.stored.grid)
        self.on_message(
            f"{start.origin} is adapted to {counted(len(new), 'new section')}; "
            f"its own {len(start.saved.card.sections)} are not read"
        )
        return new

    def inputs(
        self, samples: Sequence[Sample], choice: GeneChoice, tasks: SectionTasks, *, calibrated: bool
    ) -> StreamedInputs:
        """Return what a streamed training works on; its work folder is made."""
        return StreamedInputs(
            samples,
            str(self.store),
            self.settings.selection,
            choice,
            WorkFolder.open(self.model, self.made_with),
            calibrated,
            self.force,
            tasks,
        )

    def writing(
        self, sums: SumsToKeep | None, sections: Sequence[str], earlier: Sequence[KeptSection] = ()
    ) -> Callable[[Path], None] | None:
        """Return what writes the sums beside the model; None if they are not kept."""
        if sums is None or not self.keep_sums:
            return None
        facts = self.made_with["sections"]
        kept = [KeptSection(name, facts[name]["slide"], facts[name]["expression"]) for name in sections]
        return partial(sums.write, sections=[*earlier, *kept])

    @property
    def is_calibrated(self) -> bool:
        """Whether intervals are measured."""
        wanted = self.settings.intervals
        return self.settings.checked().capabilities.calibrated_by_default if wanted is None else wanted


def report_kept_sums(run: Run) -> None:
    """Send a message on the sums that a model keeps and their size; none where it keeps none."""
    kept = KeptSums.open(run.model)
    if kept is not None:
        run.on_message(
            f"sums for further sections: {kept.n_bytes / 1e6:.1f} MB in {kept.folder} (--from; --no-stats leaves them out)"
        )


def describe_intervals(intervals: Intervals | None) -> str:
    """Return one line on how prediction intervals were calibrated."""
    if intervals is None:
        return "no prediction intervals: too few spots to hold some out"
    level, strata = round(100 * intervals.level), intervals.strata
    by_size = f" ({len(strata.half_width)} strata by predicted library size)" if strata else ""
    return f"{level} % prediction intervals, calibrated on {intervals.n_spots} held-out spots{by_size}; {intervals.claim}"


def model_card(
    settings: TrainSettings,
    preset: str,
    genes: tuple[str, ...],
    identity: EncoderIdentity,
    spec: GridSpec,
    sections: tuple[dict[str, object], ...],
    origin: dict[str, object] | None = None,
) -> ModelCard:
    """Return the card of a model; `sections` is what it holds on each section, `origin` on the model it was adapted from."""
    # All sections share encoder and grid: loading has checked that.
    return ModelCard(
        preset=preset,
        genes=genes,
        encoder=identity_attrs(identity),
        grid=asdict(spec),
        normalisation={
            "target": "log1p of counts per 10,000",
            "library": "all genes",
            "min_counts": MIN_COUNTS,
        },
        sections=sections,
        seed=settings.seed,
        origin=origin,
    )
