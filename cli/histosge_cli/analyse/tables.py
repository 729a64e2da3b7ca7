"""Tables of `analyse`: printed, and written where an earlier result may stand."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from histosge_cli.console import err, out, table

if TYPE_CHECKING:
    import polars as pl

MAX_PRINTED_GENES = 8
"""Columns of genes that a table on a terminal has room for."""


@contextmanager
def staged_folder(folder: Path | None, *, overwrite: bool) -> "Iterator[Path | None]":
    """Yield a folder for tables of slides beside the final one, and move them when all of them may stand there."""
    from featurestore.earlier_results import check_content
    from featurestore.whole_file import put_in_place

    if folder is None:
        yield None
        return
    with TemporaryDirectory(dir=folder, prefix=".tables-", ignore_cleanup_errors=True) as beside:
        yield Path(beside)
        tables = {table_file: folder / table_file.name for table_file in sorted(Path(beside).iterdir())}
        # All are compared before the first is moved: a folder must not hold tables of two analyses.
        changed = {
            table_file: place
            for table_file, place in tables.items()
            if not check_content(table_file, place, overwrite=overwrite)
        }
        for table_file, place in changed.items():
            put_in_place(table_file, place)


def print_table(
    frame: "pl.DataFrame",
    *,
    as_json: bool,
    out_file: Path | None,
    overwrite: bool = False,
    genes: "tuple[str, ...] | None" = None,
) -> None:
    """Print a table without its columns of vectors, and of genes if they are many; the file has all columns."""
    import polars as pl

    plain = frame.select(name for name, dtype in frame.schema.items() if not isinstance(dtype, pl.Array))
    if as_json:
        out.print(json.dumps(plain.to_dicts()), markup=False)
    else:
        # The row of the whole cohort has no slide id.
        named = (
            {**row, "slide": row["slide"] or "(all)"} if "slide" in row else row for row in plain.to_dicts()
        )
        hidden = set() if genes is None else {f"sd_{gene}" for gene in genes}
        hidden |= set(genes or ()) if len(genes or ()) > MAX_PRINTED_GENES else set()
        shown = [name for name in plain.columns if name not in hidden]
        table(shown, ([_as_text(row[name]) for name in shown] for row in named))
    if out_file is not None:
        write_out(frame, out_file, overwrite=overwrite)


def write_out(frame: "pl.DataFrame", out_file: Path, *, overwrite: bool) -> None:
    """Write the table of --out; a different earlier one is refused without --overwrite."""
    from featurestore.analysis.patch_tables import write_table
    from featurestore.earlier_results import staged_result

    with staged_result(out_file, overwrite=overwrite) as staged:
        write_table(frame, staged.path)
    # On standard error: standard output is a table, or JSON for a program.
    err.print(f"{out_file}{': nothing to do' if staged.was_there else ''}", markup=False)


def _as_text(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
