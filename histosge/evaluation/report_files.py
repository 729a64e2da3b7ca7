"""Scores -> files: report.html with the tables that it can be recomputed from; and back."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from featurestore.earlier_results import MadeWith
from featurestore.errors import first_line
from featurestore.software import version
from featurestore.whole_file import check_output, is_partial, restore_replaced, whole_file, whole_folder
from featurestore.wording import counted
from histosge.errors import HistosgeError
from histosge.evaluation.gene_lookup import lookup_block
from histosge.evaluation.report import evaluation_blocks
from histosge.evaluation.results import BinFacts, Entry, FoldCount, Scores
from histosge.reporting.page import Block, read_record, render_report

PAGE = "report.html"
TABLES = ("scores", "genes", "differences", "domains")
OPTIONAL = ("domains",)
"""Tables that are written only where there is something in them; earlier versions do not know them."""
FILES = frozenset({PAGE, *(f"{name}.csv" for name in TABLES)})
# What a table of scores is made of; a record names no other type.
_TYPES = {str(kind): kind for kind in (pl.String(), pl.Int64(), pl.Float64(), pl.Boolean())}


def check_report_place(out_dir: str | Path) -> Path:
    """Return where an evaluation can be written, before it is made.

    Raises
    ------
    OutputError
        If it is a file, or nothing can be written there.
    """
    folder = Path(out_dir)
    check_output(folder, folder=True)
    restore_replaced(folder)
    return folder


def write_evaluation(
    scores: Scores,
    out_dir: str | Path,
    *,
    notes: Sequence[str] = (),
    extra: Sequence[Block] = (),
    made_with: MadeWith | None = None,
    command: str = "",
    gene_command: str = "",
) -> Path:
    """Write report.html, its tables; after a failure there is no report.html, or the earlier one.

    Parameters
    ----------
    scores
        From `evaluate_sections`.
    out_dir
        Made if it is missing; an earlier evaluation is replaced. Where it holds nothing else, that stays until this one
        is complete.
    notes
        Further caveats, such as how many spots fell under the floor on counts.
    extra
        Further blocks for the page, below the scores.
    made_with
        Settings and inputs, by which `evaluate` recognises it; None if it need not.
    command
        That makes the same evaluation, without credentials, for the page's last line.
    gene_command
        That makes a report with the maps of a gene ``NAME``, for genes whose maps do not fit on this page.

    Returns
    -------
    pathlib.Path
        Of report.html.

    Raises
    ------
    OutputError
        If `out_dir` is a file, or nothing can be written there.
    """
    folder = check_report_place(out_dir)
    # What a caller adds stands below the scores and above the limitations, which close every page.
    maps, *rest = evaluation_blocks(scores, notes)
    presets = dict.fromkeys(scores.plain_name(preset) for preset in scores.presets)
    seeds = f"seed{'s' * (len(scores.seeds) > 1)} {', '.join(map(str, scores.seeds))}"
    subtitle = f"split {scores.split}, {counted(len(presets), 'preset')}, {seeds}"
    if scores.encoders:
        subtitle += f", encoder{'s' * (len(scores.encoders) > 1)} {', '.join(scores.encoders)}"
    tables = {name: getattr(scores, name) for name in TABLES}
    texts = {
        **{
            f"{name}.csv": "" if table is None else table.write_csv()
            for name, table in tables.items()
            if table is not None or name not in OPTIONAL
        },
        PAGE: render_report(
            "How well held-out spots are predicted",
            [maps, lookup_block(scores, gene_command), *rest[:-1], *extra, rest[-1]],
            subtitle=subtitle,
            footer=_footer(command),
            record={"made_with": made_with, "scores": _facts(scores)},
        ),
    }
    write_texts(folder, texts)
    return folder / PAGE


def _footer(command: str) -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    made = f"histosge {version('histosge')}, {now}"
    made += f": {command}" if command else ""
    return f"{made}. Recompute every number from scores.csv and genes.csv beside this page."


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write the files of an evaluation, in the place of an earlier one, so that no page stands beside another's tables.

    Parameters
    ----------
    texts
        Name of a file -> its content; the page's comes last.
    """
    if _is_replaceable(folder):
        with whole_folder(folder) as work:
            work.mkdir()
            for name, text in texts.items():
                (work / name).write_text(text, encoding="utf-8")
        return
    page = folder / PAGE
    earlier = [folder / name for name in sorted(FILES - texts.keys())]
    # The page goes first and comes back last: whoever finds one finds the tables that belong to it.
    with ExitStack() as stack:  # files are renamed in the reverse of this order: the page last
        for name, text in reversed(list(texts.items())):
            stack.enter_context(whole_file(folder / name)).write_text(text, encoding="utf-8")
        page.unlink(missing_ok=True)
        for table in earlier:  # of the earlier evaluation alone
            table.unlink(missing_ok=True)


def _is_replaceable(folder: Path) -> bool:
    """Tell whether a folder can be replaced as a whole: it holds an evaluation alone, and nobody works in it."""
    if not folder.exists():
        return True
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents) or folder.is_symlink():
        return False
    return all(
        (entry.name in FILES and entry.is_file()) or is_partial(entry.name) for entry in folder.iterdir()
    )


def read_evaluation(out_dir: str | Path) -> tuple[MadeWith, Scores] | None:
    """Return what an evaluation was made with and its scores, without maps; None if there is no complete one with both.

    Raises
    ------
    HistosgeError
        If its files are damaged.
    """
    folder = Path(out_dir)
    record = read_record(folder / PAGE) if (folder / PAGE).is_file() else {}
    if not record.get("made_with"):
        return None
    try:
        facts: dict[str, Any] = record["scores"]
        tables: dict[str, Any] = {
            name: _read_table(
                folder / f"{name}.csv", facts.pop(name, None) if name in OPTIONAL else facts.pop(name)
            )
            for name in TABLES
        }
        facts["folds"] = tuple(FoldCount(**fold) for fold in facts["folds"])
        facts["entries"] = {name: Entry(**entry) for name, entry in facts.get("entries", {}).items()}
        bins = facts.pop("bins", None)
        facts["bins"] = None if bins is None else BinFacts.from_json(bins)
        # JSON knows no tuples.
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
        scores = Scores(**tables, **plain)
        return record["made_with"], scores
    except (KeyError, TypeError, ValueError, OSError, pl.exceptions.PolarsError) as error:
        raise HistosgeError(
            f"{folder} holds a damaged evaluation ({first_line(error)}); replace it with --overwrite"
        ) from error


def has_evaluation(folder: Path) -> bool:
    """Tell whether a folder holds files that an evaluation would replace."""
    return any((folder / name).exists() for name in FILES)


def _facts(scores: Scores) -> dict[str, Any]:
    """Return what is known of scores beside their tables and maps, JSON-ready; of the tables their types."""
    facts = {
        name: getattr(scores, name)
        for name in scores.__dataclass_fields__
        if name not in (*TABLES, "maps", "section_maps", "bootstrap")
    }
    schemas = {name: _schema(getattr(scores, name)) for name in TABLES}
    plain = {
        "folds": [asdict(fold) for fold in scores.folds],
        "kinds": dict(scores.kinds),
        "entries": {name: asdict(entry) for name, entry in scores.entries.items()},
        "bins": None if scores.bins is None else asdict(scores.bins),
    }
    return facts | schemas | plain


def _schema(table: pl.DataFrame | None) -> dict[str, str] | None:
    # Without it a fold that is called 1 would come back as a number.
    return None if table is None else {name: str(kind) for name, kind in table.schema.items()}


def _read_table(path: Path, schema: dict[str, str] | None) -> pl.DataFrame | None:
    if schema is None:
        return None
    return pl.read_csv(path, schema={name: _TYPES[kind] for name, kind in schema.items()})
