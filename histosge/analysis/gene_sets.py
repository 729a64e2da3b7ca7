"""Sets of genes by name: from GMT files, as MSigDB offers them, or as they are typed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from featurestore.errors import first_line
from featurestore.input_file import kind_of, shown
from histosge.errors import ExportError

MAX_BYTES = 1 << 28
"""MSigDB's largest collection has 15 MB."""


def read_gmt(file: str | Path) -> dict[str, tuple[str, ...]]:
    """Return the sets of a GMT file: a line has the name, a description and the genes, separated by tabs.

    Raises
    ------
    ExportError
        If it is no such file, or names a set twice.
    """
    path = Path(file)
    if kind_of(path) != "file":
        raise ExportError(f"there is no file {shown(path)}; give a GMT file with sets of genes")
    if path.stat().st_size > MAX_BYTES:
        raise ExportError(
            f"{shown(path)} has {path.stat().st_size} bytes; a GMT file has {MAX_BYTES} at most"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ExportError(f"{shown(path)} is no text: {first_line(error)}; give a GMT file") from error
    sets: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *rest = (part.strip() for part in line.split("\t"))
        genes = tuple(dict.fromkeys(gene for gene in rest[1:] if gene))
        if not name or not genes or not name.isprintable():
            raise ExportError(
                f"line {number} of {shown(path)} is no set of genes; a line has a name, a description and genes, "
                "separated by tabs"
            )
        if name in sets:
            raise ExportError(f"{shown(path)} names the set {name[:100]!r} twice; rename one of them")
        sets[name] = genes
    if not sets:
        raise ExportError(f"{shown(path)} holds no set of genes")
    return sets


def parse_sets(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the sets of ``NAME=A,B,C``.

    Raises
    ------
    ExportError
        If a text has another form, or a name comes twice.
    """
    sets: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, found, genes = text.partition("=")
        listed = tuple(dict.fromkeys(gene.strip() for gene in genes.split(",") if gene.strip()))
        if not found or not name.strip() or not listed:
            raise ExportError(f"{text[:100]!r} is no set of genes; give NAME=A,B,C")
        if name.strip() in sets:
            raise ExportError(f"the set {name.strip()[:100]!r} is given twice; rename one of them")
        sets[name.strip()] = listed
    return sets


def present(
    sets: Mapping[str, Sequence[str]], genes: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return the genes of each set that a map holds, and a remark on each set that lacks some.

    Sets without any are left out.

    Raises
    ------
    ExportError
        If no set has a gene of the map.
    """
    known = set(genes)
    found = {name: tuple(gene for gene in listed if gene in known) for name, listed in sets.items()}
    remarks = [
        f"{name}: {len(found[name])} of {len(listed)} genes are in the map"
        + ("" if found[name] else "; the set is left out")
        for name, listed in sets.items()
        if len(found[name]) < len(listed)
    ]
    kept = {name: listed for name, listed in found.items() if listed}
    if not kept:
        raise ExportError(
            f"no gene of {len(sets)} sets is in the map, which has {len(genes)} genes such as {genes[0]!r}; are their names "
            "of one kind (symbols or Ensembl ids)?"
        )
    return kept, remarks
