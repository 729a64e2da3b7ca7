"""A sample sheet and a store -> scores and a report on disk."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from featurestore.credentials import strip_credentials
from featurestore.earlier_results import MadeWith, is_same_result
from featurestore.events import OnMessage, OnProgress, Progress, ignore_message, ignore_progress
from featurestore.slides.sample_sheet import read_samples
from featurestore.threads import keep_to_own_cores
from featurestore.wording import counted
from histosge.data.gene_choice import GeneChoice, GeneSource
from histosge.data.genes import MIN_COUNTS
from histosge.data.section_loading import LoadedSection, Selection, load_sections
from histosge.errors import HistosgeError, SplitError
from histosge.evaluation.ablation import needs_slides
from histosge.evaluation.annotated_domains import Annotation
from histosge.evaluation.encoder_comparison import keep_common_spots, merge_encoders, with_encoder
from histosge.evaluation.fine_bins import FineBins
from histosge.evaluation.hest_protocol import hest_split, score_hest
from histosge.evaluation.method_choice import find_methods
from histosge.evaluation.report_files import (
    check_report_place,
    has_evaluation,
    read_evaluation,
    write_evaluation,
)
from histosge.evaluation.results import Scores
from histosge.evaluation.runner import DEFAULT_GENES, evaluate_sections
from histosge.evaluation.unit_pooling import check_side
from histosge.heldout.splits import SPLITS
from histosge.models.estimators import ModelSource, check_numbers
from histosge.reporting.page import Block
from histosge.threads import one_blas_thread
from histosge.training.made_with import (
    describe_genes,
    describe_preset,
    describe_sections,
    describe_settings,
)
from histosge.training.reencoding import Reencoder

# What knows nothing, what the field quotes, and the default: together they take seconds.
DEFAULT_PRESETS = ("mean", "ridge", "dense")
PROTOCOLS = ("hest",)
MAX_SEEDS = 1000
"""Each repeats every fit: a spread is known to 2 % by then."""


@dataclass(frozen=True)
class EvaluateSettings:
    """What to compare, and how.

    Parameters
    ----------
    split
        ``block``, ``section``, ``donor`` or ``random``. None: block; random for an ablation, since that is the
        published code's; whole donors or sections for a protocol.
    presets
        What to compare: registered names, ``module:Class``, model classes, objects whose
        ``fit(sections, *, seed, epochs)`` returns a fitted model, and the oracle ``depth``. The noise control is
        always added.
    genes
        How many of the most variable genes of each training part, ``all``, ``seurat_v3:N``, ``N+A,B`` (the N most
        variable and the named ones), a file with one gene a line, or gene names.
    seeds
        Repeat with seeds 0 .. seeds - 1.
    epochs
        For models that iterate; None means each model's own.
    ablate
        Add the published code without a defect, with each alone and with all.
    protocol
        ``hest``: HEST-Benchmark's models, genes and targets in place of the presets; None: ours.
    selection
        Grid and encoder: needed where the store holds several.
    annotation
        A column of the expression files with a class for each spot: domains are compared with it. None: no domains.
    encoders
        Several encoders to compare: each preset is scored on each, on the same held-out spots. Empty: that of
        `selection`.
    at_um
        Side of measured bins in microns at which maps are scored, too, where the expression files measure that finely
        (Visium HD, Xenium); None: at the spots alone.
    """

    split: str | None = None
    presets: Sequence[ModelSource] = DEFAULT_PRESETS
    genes: GeneSource = 250
    # Splits by section and donor do not depend on it, and models solved in closed form hardly do.
    seeds: int = 1
    epochs: int | None = None
    ablate: bool = False
    protocol: str | None = None
    selection: Selection = field(default_factory=Selection)
    encoders: Sequence[str] = ()
    annotation: str | None = None
    at_um: float | None = None

    @property
    def default_split(self) -> str:
        """The split where none is named and no protocol has its own: the published code's for an ablation."""
        return "random" if self.ablate else "block"

    def check(self) -> None:
        """Refuse what cannot be evaluated, before any data is loaded.

        Raises
        ------
        SplitError
            If the split is unknown, or there is no seed.
        HistosgeError
            If the protocol or a preset is unknown, or epochs or genes are none.
        """
        if self.split not in (None, *SPLITS):
            raise SplitError(f"unknown split {self.split[:100]!r}: choose one of {', '.join(SPLITS)}")
        if not 1 <= self.seeds <= MAX_SEEDS:
            raise SplitError(
                f"an evaluation needs at least 1 seed and at most {MAX_SEEDS:,}, not {self.seeds}"
            )
        check_numbers(self.epochs, 0)
        if self.protocol not in (None, *PROTOCOLS):
            raise HistosgeError(f"unknown protocol {self.protocol!r}: choose one of {', '.join(PROTOCOLS)}")
        if self.annotation is not None and self.protocol is not None:
            raise HistosgeError(
                f"an annotation belongs to presets, protocol {self.protocol} has none: leave out --annotation or --protocol"
            )
        if self.at_um is not None:
            check_side(self.at_um)
            if self.protocol is not None:
                raise HistosgeError(
                    f"protocol {self.protocol} has no maps to score at {self.at_um:g} µm: leave out --at or --protocol"
                )
        GeneChoice.parse(self.genes)
        # An ablation adds methods of its own, so that no preset need be named.
        if self.protocol is None and not self.ablate:
            # Whether slides can be read is not known yet: variants that need them are checked as if they could.
            find_methods(self.presets, self.split or self.default_split, lambda sections, _: tuple(sections))


@one_blas_thread()
def evaluate(
    samples: str | Path,
    store: str | Path,
    report_dir: str | Path,
    settings: EvaluateSettings | None = None,
    *,
    overwrite: bool = False,
    force: bool = False,
    on_message: OnMessage = ignore_message,
    on_progress: OnProgress = ignore_progress,
) -> Scores:
    """Score models on held-out spots and write report.html, scores.csv, genes.csv and differences.csv.

    With an annotation also domains.csv.

    An evaluation that is there, made with the same settings and inputs, is returned as it is, without its maps.

    Parameters
    ----------
    samples
        A sample sheet whose rows name expression.
    store
        The feature store that holds their embeddings.
    report_dir
        Folder to write.
    settings
        Split, presets, genes, seeds, grid and encoder.
    overwrite
        Evaluate in any case, and replace an evaluation that is there.
    force
        Score also on spots that do not fit their slide, with a warning, see `histosge.data.alignment_check`.
    on_message, on_progress
        Called with one line on what was found, and before each fit.

    Raises
    ------
    EarlierResultError
        If an evaluation is there that was made with something else, and `overwrite` is not set.
    SplitError
        If the sections cannot give the split.
    FeatureStoreError
        If the sections or the store are unusable.
    """
    settings = settings or EvaluateSettings()
    keep_to_own_cores()
    settings.check()
    folder, made_with = check_report_place(report_dir), _made_with(samples, store, settings)
    if not overwrite and has_evaluation(folder):
        earlier, there = read_evaluation(folder) or (None, None)
        if is_same_result(folder, earlier, made_with, overwrite=overwrite) and there is not None:
            return replace(there, was_there=True)
    # Each once: an encoder that is named twice would be compared with itself.
    keys: list[str | None] = list(dict.fromkeys(settings.encoders)) or [settings.selection.encoder]
    loaded: dict[str, list[LoadedSection]] = {}
    for key in keys:
        selection = Selection(settings.selection.grid, key)
        sections = load_sections(str(samples), str(store), selection, force=force, on_message=on_message)
        # By id, as in training: the order of the sheet's rows decides nothing.
        sections.sort(key=lambda item: item.section.slide_id)
        loaded[sections[0].slide.identity.key] = sections
    reencoders: dict[str, Reencoder | None] = {}
    # Only where something encodes patches again: it opens every slide and loads the encoder.
    if _encodes_anew(settings):
        reencoders = {
            key: Reencoder.for_sections(read_samples(str(samples)), item) for key, item in loaded.items()
        }
    if len(loaded) > 1:
        loaded = keep_common_spots(loaded)
    annotation = None
    if settings.annotation is not None:
        # Once: all encoders are scored on the same spots now.
        annotation = Annotation.read(str(samples), next(iter(loaded.values())), settings.annotation)
    bins = None
    if settings.at_um is not None:
        bins = FineBins.read(str(samples), str(store), list(loaded.values()), settings.at_um)
        for line in bins.facts.describe():
            on_message(line)
    if len(loaded) == 1:
        ((key, sections),) = loaded.items()
        return score_sections(
            sections,
            report_dir,
            settings,
            inputs=ExtraInputs(reencoders.get(key), annotation, bins),
            made_with=made_with,
            command=_command(samples, store, report_dir, settings),
            gene_command=_gene_command(samples, store, report_dir, settings),
            on_progress=on_progress,
        )
    found = {
        key: _score(
            sections,
            settings,
            ExtraInputs(reencoders.get(key), annotation, bins),
            _part_of(on_progress, i, len(loaded), key),
        )
        for i, (key, sections) in enumerate(loaded.items())
    }
    scores = merge_encoders(found)
    notes = dict.fromkeys(note for sections in loaded.values() for note in _notes(sections))
    write_evaluation(
        scores,
        report_dir,
        notes=list(notes),
        made_with=made_with,
        command=_command(samples, store, report_dir, settings),
        gene_command=_gene_command(samples, store, report_dir, settings),
    )
    return scores


def _command(
    samples: str | Path, store: str | Path, report_dir: str | Path, settings: EvaluateSettings
) -> str:
    """Return the command that makes the same evaluation, without credentials."""
    presets = [preset if isinstance(preset, str) else describe_preset(preset) for preset in settings.presets]
    genes = settings.genes if isinstance(settings.genes, (str, int, Path)) else ",".join(settings.genes)
    keys: list[str | None] = list(dict.fromkeys(settings.encoders)) or [settings.selection.encoder]
    given: list[tuple[str, object]] = [
        ("--split", settings.split),
        ("--presets", ",".join(presets)),
        ("--genes", genes),
        ("--seeds", settings.seeds),
        ("--epochs", settings.epochs),
        ("--protocol", settings.protocol),
        ("--grid", settings.selection.grid),
        *(("--encoder", key) for key in keys),
        ("--annotation", settings.annotation),
        ("--at", None if settings.at_um is None else f"{settings.at_um:g}"),
    ]
    places = [strip_credentials(str(place)) for place in (samples, store, report_dir)]
    options = [str(part) for name, value in given if value is not None for part in (name, value)]
    words = ["histosge", "evaluate", *places, *options, *(["--ablate"] if settings.ablate else [])]
    return shlex.join(words)


def _gene_command(
    samples: str | Path, store: str | Path, report_dir: str | Path, settings: EvaluateSettings
) -> str:
    """Return the command of an evaluation that keeps the maps of a gene ``NAME``, since it names the gene."""
    choice = GeneChoice.parse(settings.genes)
    # Of all genes, or of a long list, a report keeps only as many maps as fit: fewer genes, and the named one among them.
    n = DEFAULT_GENES if choice.n_variable is None or choice.is_given else choice.n_variable
    named = "" if choice.is_given else "".join(f"{gene}," for gene in choice.named)
    genes = f"{'seurat_v3:' if choice.by_seurat else ''}{n}+{named}NAME"
    folder = Path(report_dir)
    return _command(samples, store, folder.with_name(f"{folder.name}-NAME"), replace(settings, genes=genes))


def _part_of(on_progress: OnProgress, number: int, total: int, encoder: str) -> OnProgress:
    """Return a callback for one of several evaluations of the same length."""

    def report(progress: Progress) -> None:
        done, every = number * progress.total + progress.done, total * progress.total
        on_progress(replace(progress, done=done, total=every, label=f"{progress.label}, {encoder}"))

    return report


def _made_with(samples: str | Path, store: str | Path, settings: EvaluateSettings) -> MadeWith:
    presets = [describe_preset(p) if not isinstance(p, str) else p for p in settings.presets]
    own = {"presets": presets, "genes": describe_genes(settings.genes)}
    described = dict(describe_settings(settings, **own))
    # Evaluations of earlier versions have no such entries.
    for name in ("annotation", "at_um"):
        if described[name] is None:
            described.pop(name)
    keys: list[str | None] = list(dict.fromkeys(settings.encoders)) or [settings.selection.encoder]
    for key in keys:
        found = describe_sections(samples, store, Selection(settings.selection.grid, key))
        # One encoder is described as ever; of several, each under its key.
        described |= (
            found if len(settings.encoders) < 2 else {f"{name} of {key}": v for name, v in found.items()}
        )
    return described


@dataclass(frozen=True)
class ExtraInputs:
    """What an evaluation reads besides sections.

    Parameters
    ----------
    reencoder
        Encodes the patches under spots again, for the defects of an ablation that lie there.
    annotation
        Labels of spots, with which domains are compared.
    bins
        Measured bins finer than the spots, at which maps are scored, too.
    """

    reencoder: Reencoder | None = None
    annotation: Annotation | None = None
    bins: FineBins | None = None


def score_sections(
    loaded: Sequence[LoadedSection],
    report_dir: str | Path,
    settings: EvaluateSettings,
    *,
    extra: Sequence[Block] = (),
    inputs: ExtraInputs | None = None,
    made_with: MadeWith | None = None,
    command: str = "",
    gene_command: str = "",
    on_progress: OnProgress = ignore_progress,
) -> Scores:
    """Score loaded sections and write the report, in the place of an earlier one; `extra` blocks stand below the scores.

    Without `inputs` spots alone are scored, and an ablation leaves out the defects that concern how patches are encoded.
    """
    # Again: the demo, and notebooks, come here without `evaluate`.
    settings.check()
    scores = with_encoder(
        _score(loaded, settings, inputs or ExtraInputs(), on_progress), loaded[0].slide.identity.key
    )
    write_evaluation(
        scores,
        report_dir,
        notes=_notes(loaded),
        extra=extra,
        made_with=made_with,
        command=command,
        gene_command=gene_command,
    )
    return scores


def _score(
    loaded: Sequence[LoadedSection],
    settings: EvaluateSettings,
    inputs: ExtraInputs,
    on_progress: OnProgress,
) -> Scores:
    sections = [item.section for item in loaded]
    if settings.protocol == "hest":
        return score_hest(sections, settings.split or hest_split(sections), on_progress=on_progress)
    return evaluate_sections(
        sections,
        settings.presets,
        split=settings.split or settings.default_split,
        genes=settings.genes,
        seeds=range(settings.seeds),
        epochs=settings.epochs,
        ablate=settings.ablate,
        reencode=inputs.reencoder,
        annotation=inputs.annotation,
        bins=inputs.bins,
        on_progress=on_progress,
    )


def _encodes_anew(settings: EvaluateSettings) -> bool:
    """Tell whether a defect is scored that lies in how patches are encoded."""
    return settings.ablate or needs_slides([p for p in settings.presets if isinstance(p, str)])


def _notes(loaded: Sequence[LoadedSection]) -> list[str]:
    few = sum(item.n_under_min_counts for item in loaded)
    off = sum(len(item.uncovered) for item in loaded)
    used = sum(len(item.section.spots) for item in loaded)
    identity, grid = loaded[0].slide.identity, loaded[0].slide.stored.grid
    left_out = f"{few} with fewer than {MIN_COUNTS} counts and {off} without an embedded patch left out"
    notes = [
        f"{counted(used, 'spot')} used; {left_out}.",
        f"{identity.key} embeddings ({identity.dim} dims, fingerprint {identity.fingerprint[:16]}).",
        f"{grid.description}.",
    ]
    return notes + [
        f"{item.section.slide_id}: {item.alignment.message}"
        for item in loaded
        if item.alignment.verdict == "warn"
    ]
