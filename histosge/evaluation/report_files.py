"""Scores -> files: report.html with the tables that it can be recomputed from."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from featurestore.whole_file import whole_file
from histosge.errors import HistosgeError
from histosge.evaluation.report import evaluation_blocks
from histosge.evaluation.results import Scores
from histosge.reporting.page import Block, render_report


def write_evaluation(
    scores: Scores, out_dir: str | Path, *, notes: Sequence[str] = (), extra: Sequence[Block] = ()
) -> Path:
    """Write report.html, scores.csv, genes.csv and differences.csv; after a failure there is no report.html.

    Parameters
    ----------
    scores
        From `evaluate_sections`.
    out_dir
        Made if it is missing; files of an earlier evaluation are replaced.
    notes
        Further caveats, such as how many spots fell under the floor on counts.
    extra
        Further blocks for the page, below the scores.

    Returns
    -------
    pathlib.Path
        Of report.html.

    Raises
    ------
    HistosgeError
        If `out_dir` is a file.
    """
    folder = Path(out_dir)
    if folder.exists() and not folder.is_dir():
        raise HistosgeError(f"cannot write a report to {folder}: it is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    # What a caller adds stands below the scores and above the limitations, which close every page.
    maps, *rest = evaluation_blocks(scores, notes)
    presets = dict.fromkeys(scores.plain_name(preset) for preset in scores.presets)
    subtitle = f"split {scores.split}, {len(presets)} presets, seeds {', '.join(map(str, scores.seeds))}"
    if scores.encoders:
        subtitle += f", encoder{'s' * (len(scores.encoders) > 1)} {', '.join(scores.encoders)}"
    texts = {
        folder / "scores.csv": scores.scores.write_csv(),
        folder / "genes.csv": scores.genes.write_csv(),
        folder / "differences.csv": "" if scores.differences is None else scores.differences.write_csv(),
        page: render_report(
            "How well held-out spots are predicted",
            [maps, *rest[:-1], *extra, rest[-1]],
            subtitle=subtitle,
            footer="Recompute every number from scores.csv and genes.csv beside this page.",
        ),
    }
    # The page goes first and comes back last: whoever finds one finds the tables that belong to it.
    with ExitStack() as stack:  # files are renamed in the reverse of this order: the page last
        for path, text in reversed(texts.items()):
            stack.enter_context(whole_file(path)).write_text(text, encoding="utf-8")
        page.unlink(missing_ok=True)
    return page
