"""A sample sheet and a store -> scores on disk: loads the sections, scores them, writes the report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from featurestore.errors import FeatureStoreError
from featurestore.samples import read_samples
from histosge.ablation import ENCODING, Encoded, ablate
from histosge.errors import HistosgeError, SplitError
from histosge.genes import MIN_COUNTS, read_gene_list
from histosge.protocol_hest import HestResult, score_hest
from histosge.reencoding import encode_anew, store_encoder
from histosge.report import Block, render_report
from histosge.report_blocks import ablation_block, hest_blocks
from histosge.scores import Scores
from histosge.scoring import evaluate_sections, write_evaluation
from histosge.sections import Section
from histosge.stream import LoadedSection
from histosge.training import Selection, load_sections

Say = Callable[[str], None]
DEFAULT_PRESETS = ("mean", "ridge", "dense")


def _silent(message: str) -> None:
    pass


@dataclass(frozen=True)
class EvaluateSettings:
    """What to compare, and how.

    Parameters
    ----------
    split
        ``block``, ``section``, ``donor`` or ``random``.
    presets
        Models; the noise control is always added.
    genes
        How many of the most variable genes of each training part, or a file that lists them.
    seeds
        Repeat with seeds 0 .. seeds - 1.
    epochs
        For presets that iterate; None means each preset's own.
    ablate
        Also score `paper` with each defect of the released code switched on.
    """

    split: str = "block"
    presets: tuple[str, ...] = DEFAULT_PRESETS
    genes: int | str = 250
    seeds: int = 1
    epochs: int | None = None
    ablate: bool = False


def evaluate(
    samples: str,
    store: str,
    report_dir: str | Path,
    settings: EvaluateSettings | None = None,
    *,
    grid: str | None = None,
    encoder: str | None = None,
    say: Say = _silent,
) -> Scores:
    """Score presets on held-out spots and write report.html, scores.csv, genes.csv and differences.csv.

    Parameters
    ----------
    samples
        A sample sheet whose rows name expression.
    store
        The feature store that holds their embeddings.
    report_dir
        Folder to write.
    settings
        Split, presets, genes, seeds.
    grid, encoder
        Needed where the store holds several.
    say
        Called with one line on what is being done.

    Raises
    ------
    SplitError
        If the sections cannot give the split.
    FeatureStoreError
        If the sections or the store are unusable.
    """
    loaded = load_sections(samples, store, Selection(grid, encoder), say=say)
    settings = settings or EvaluateSettings()
    encoded, left_out = _encoded(samples, loaded, say) if settings.ablate else ({}, [])
    return score_sections(loaded, report_dir, settings, encoded=encoded, left_out=left_out, say=say)


def evaluate_hest(
    samples: str,
    store: str,
    report_dir: str | Path,
    *,
    grid: str | None = None,
    encoder: str | None = None,
    say: Say = _silent,
) -> HestResult:
    """Score a store's encoder by the HEST-Benchmark's protocol, and write report.html and scores.csv."""
    loaded = load_sections(samples, store, Selection(grid, encoder), say=say)
    result = score_hest([item.section for item in loaded])
    folder = Path(report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    result.scores.write_csv(folder / "scores.csv")
    page = render_report("HEST-Benchmark's protocol", hest_blocks(result, _notes(loaded)))
    (folder / "report.html").write_text(page, encoding="utf-8")
    return result


def score_sections(
    loaded: Sequence[LoadedSection],
    report_dir: str | Path,
    settings: EvaluateSettings,
    *,
    extra: Sequence[Block] = (),
    encoded: Encoded | None = None,
    left_out: Sequence[str] = (),
    say: Say = _silent,
) -> Scores:
    """Score loaded sections and write the report; `extra` blocks are shown below the scores.

    With `settings.ablate`, `encoded` holds the sections with embeddings of changed pixels, and `left_out`
    says which switches could not be tried.
    """
    if settings.seeds < 1:
        raise SplitError(f"an evaluation needs at least 1 seed, not {settings.seeds}")
    sections = [item.section for item in loaded]
    genes: int | Sequence[str] = (
        settings.genes
        if isinstance(settings.genes, int)
        else read_gene_list(settings.genes, [section.spots for section in sections])
    )
    scores = evaluate_sections(
        sections,
        settings.presets,
        split=settings.split,
        genes=genes,
        seeds=range(settings.seeds),
        epochs=settings.epochs,
        progress=lambda done, total, what: say(f"{done}/{total} {what}"),
    )
    blocks = list(extra)
    if settings.ablate:
        found = ablate(
            encoded or {frozenset(): sections},
            split=settings.split,
            genes=genes,
            seeds=range(settings.seeds),
            epochs=settings.epochs,
            left_out=left_out,
            say=say,
        )
        blocks.insert(0, ablation_block(found))
        keys = ["preset", "fold", "seed", "metric"]
        new = found.scores.join(scores.scores, on=keys, how="anti")
        scores = replace(
            scores, scores=pl.concat([scores.scores, new.cast(scores.scores.schema)]), ablation=found
        )
    write_evaluation(scores, report_dir, notes=_notes(loaded), extra=blocks)
    return scores


def _encoded(
    samples: str, loaded: Sequence[LoadedSection], say: Say
) -> tuple[dict[frozenset[str], list[Section]], list[str]]:
    """Encode all sections anew with each defect of the encoding, and with both; say what cannot be had."""
    encoded = {frozenset[str](): [item.section for item in loaded]}
    rows = {sample.slide_id: sample for sample in read_samples(samples)}
    left_out: list[str] = []
    try:
        encoder = store_encoder(loaded[0])
    except (FeatureStoreError, HistosgeError) as error:
        return encoded, [f"{', '.join(ENCODING)}: {error}"]
    usable: list[str] = []
    for switches in (*((switch,) for switch in ENCODING), ENCODING):
        if not set(switches) <= {*usable, *switches[:1]}:
            continue
        say(f"encoding patches anew: {' and '.join(switches)}")
        wanted = {switch: switch in switches for switch in ENCODING}
        try:
            encoded[frozenset(switches)] = [
                encode_anew(item, rows[item.section.slide_id], encoder, **wanted) for item in loaded
            ]
            usable += switches
        except (FeatureStoreError, HistosgeError) as error:
            left_out.append(f"{' and '.join(switches)}: {error}")
    return encoded, left_out


def _notes(loaded: Sequence[LoadedSection]) -> list[str]:
    few, off = sum(item.few_counts for item in loaded), sum(item.off_tissue for item in loaded)
    used = sum(len(item.section.spots) for item in loaded)
    identity, grid = loaded[0].slide.identity, loaded[0].slide.stored.grid
    notes = [
        f"{used} spots used; {few} with fewer than {MIN_COUNTS} counts and {off} without an embedded patch left out.",
        f"{identity.key} embeddings ({identity.dim} dims, fingerprint {identity.fingerprint[:16]}).",
        f"{grid.patch_um:.0f} µm patches every {grid.stride_um:.0f} µm.",
    ]
    return notes + [
        f"{item.section.slide_id}: {item.fit.message}" for item in loaded if item.fit.verdict == "warn"
    ]
