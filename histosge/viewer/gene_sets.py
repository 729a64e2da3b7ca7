"""Named gene sets from GMT files, as MSigDB and Enrichr give them: a line each of name, description and genes, by tabs."""

from pathlib import Path

from histosge.errors import ViewError

MAX_BYTES = 50_000_000
"""All of MSigDB is 30 MB."""


def read_gene_sets(file: Path) -> dict[str, list[str]]:
    """Return name -> genes, each gene once, in the file's order.

    Raises
    ------
    ViewError
        If the file is not there, too large, no text, or a line of it has no genes.
    """
    if not file.is_file():
        raise ViewError(f"there is no file of gene sets at {file}; give a GMT file, such as one of MSigDB")
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ViewError(
            f"{file} has {size} bytes; gene sets may have {MAX_BYTES}: give the collection that you need"
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ViewError(f"{file} cannot be read as text: {error}") from error
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        # The second column is a description, often an address.
        genes = list(dict.fromkeys(gene.strip() for gene in rest[1:] if gene.strip()))
        if not name.strip() or not genes:
            raise ViewError(
                f"line {number} of {file} is no gene set: give name, description and genes, separated by tabs"
            )
        found[name.strip()] = genes
    if not found:
        raise ViewError(f"{file} holds no gene set; give name, description and genes, separated by tabs")
    return found
