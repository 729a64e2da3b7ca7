"""Which genes, and what a model predicts of them: log1p of counts per 10,000.

Genes are chosen on the spots that are handed in, and on nothing else: for held-out scores to be unbiased, hand in the
training part only. Counts stay sparse.
"""

import codecs
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.input_file import kind_of, shown
from histosge.data.sections import Spots
from histosge.errors import ExpressionError

SCALE = 1e4
"""Counts per 10,000: the default of Seurat, and usual in the field."""
MOST_LIST_BYTES = 16 << 20
"""Of a list of genes. All 60,000 of a genome with their Ensembl ids take 2 MB."""
MIN_COUNTS = 200
"""Spots with fewer counts are left out: at 200 counts one molecule is log1p 3.9, more than most genes ever vary."""


def library_size(spots: Spots) -> NDArray[np.float64]:
    """Return total counts per spot, over all genes."""
    return np.asarray(spots.counts.sum(axis=1), dtype=np.float64).ravel()


def usable(spots: Spots, min_counts: int = MIN_COUNTS) -> NDArray[np.bool_]:
    """Tell which spots have enough counts."""
    return library_size(spots) >= min_counts


def log_cp10k(spots: Spots) -> sparse.csr_matrix:
    """Return log1p of counts per 10,000 of all genes, sparse, ``(n_spots, n_genes)``."""
    # A spot without counts stays at zero.
    size = np.maximum(library_size(spots), 1)
    scaled = sparse.diags(SCALE / size).dot(spots.counts.astype(np.float64)).tocsr()
    scaled.data = np.log1p(scaled.data)
    return sparse.csr_matrix(scaled)


def select_target(spots: Spots, genes: Sequence[str]) -> NDArray[np.float32]:
    """Return log1p(CP10k) of some genes, ``(n_spots, len(genes))``; the library counts all genes.

    Raises
    ------
    ExpressionError
        If the section did not measure one of them.
    """
    chosen = spots.counts[:, gene_columns(spots, genes)].toarray().astype(np.float64)
    size = np.maximum(library_size(spots), 1)
    return np.log1p(chosen * (SCALE / size)[:, None]).astype(np.float32)


def gene_columns(spots: Spots, genes: Sequence[str]) -> list[int]:
    """Return the columns of some genes in a section's counts.

    Raises
    ------
    ExpressionError
        If the section did not measure one of them.
    """
    column = {gene: i for i, gene in enumerate(spots.genes)}
    missing = [gene for gene in genes if gene not in column]
    if missing:
        raise ExpressionError(
            f"section {spots.slide_id!r} did not measure {len(missing)} of {len(genes)} genes, such as {missing[0]!r}"
        )
    return [column[gene] for gene in genes]


def shared_genes(sections: Sequence[Spots]) -> tuple[str, ...]:
    """Return genes that every section measured, in the first one's order.

    Raises
    ------
    ExpressionError
        Naming the first section without one of those before it.
    """
    common = set(sections[0].genes)
    for spots in sections[1:]:
        before = common
        common = before & set(spots.genes)
        check_shared(common, spots.slide_id, spots.genes, before)
    return tuple(gene for gene in sections[0].genes if gene in common)


def check_shared(
    common: Collection[str], slide_id: str, own: Collection[str], before: Collection[str]
) -> None:
    """Refuse a section that has no gene in common with those before it.

    Parameters
    ----------
    common
        Genes of the section and of all before it.
    own, before
        Of the section, and of those before it.

    Raises
    ------
    ExpressionError
        With a gene of either.
    """
    if not common:
        raise ExpressionError(
            f"section {slide_id!r} shares no gene with the sections before it: it has such as {min(own, default='')!r}, "
            f"they have such as {min(before, default='')!r}; name genes alike (symbols or Ensembl ids), or leave it out"
        )


def choose_genes(sections: Sequence[Spots], n: int, *, among: Sequence[str] | None = None) -> tuple[str, ...]:
    """Choose the genes whose log1p(CP10k) varies most over all the spots handed in.

    Parameters
    ----------
    sections
        The training part only.
    n
        How many; fewer come back if fewer vary.
    among
        Genes to choose from; those that all sections share if None.

    Returns
    -------
    tuple of str
        Most variable first; ties by name, so that the choice is the same on every machine.

    Raises
    ------
    ExpressionError
        If no gene varies, or the sections share none.
    """
    variance = GeneVariance(among)
    for spots in sections:
        variance.add(spots)
    return variance.choose(n)


class GeneVariance:
    """Variance of each gene's log1p(CP10k) over spots that are handed in section by section.

    It keeps two sums per gene, so that genes can be chosen on more sections than fit into memory.

    Parameters
    ----------
    among
        Genes to choose from; those that all sections share if None.
    """

    def __init__(self, among: Sequence[str] | None = None) -> None:
        self._is_given = among is not None
        self._genes = tuple(among or ())
        self._total, self._squares = np.zeros(len(self._genes)), np.zeros(len(self._genes))
        self._n_spots = 0

    @property
    def genes(self) -> tuple[str, ...]:
        """Genes that can be chosen: those of `among`, or those that all sections so far share."""
        return self._genes

    def add(self, spots: Spots) -> None:
        """Count the spots of one section."""
        column = {gene: i for i, gene in enumerate(spots.genes)}
        if not self._is_given:
            self._keep_shared(spots.genes)
        # Sums of values and squares, in float64: enough for a variance whose mean is at most log1p(1e4), about 9.
        values = log_cp10k(spots)[:, [column[gene] for gene in self._genes]]
        self._total += np.asarray(values.sum(axis=0)).ravel()
        self._squares += np.asarray(values.multiply(values).sum(axis=0)).ravel()
        self._n_spots += len(spots)

    def merge(self, other: "GeneVariance") -> None:
        """Count what another one counted, as `add` does for one section; it may be of another process."""
        if not self._is_given:
            self._keep_shared(other._genes)
        column = {gene: i for i, gene in enumerate(other._genes)}
        columns = [column[gene] for gene in self._genes]
        self._total += other._total[columns]
        self._squares += other._squares[columns]
        self._n_spots += other._n_spots

    def _keep_shared(self, genes: tuple[str, ...]) -> None:
        """Drop what this section did not measure; the first section's genes give the order."""
        if self._n_spots == 0:
            self._genes = genes
            self._total, self._squares = np.zeros(len(genes)), np.zeros(len(genes))
            return
        # A set, as the genes of two sections are compared: tens of thousands each.
        measured = set(genes)
        kept = [i for i, gene in enumerate(self._genes) if gene in measured]
        self._genes = tuple(self._genes[i] for i in kept)
        self._total, self._squares = self._total[kept], self._squares[kept]

    def choose(self, n: int) -> tuple[str, ...]:
        """Return the `n` genes that vary most: see `choose_genes`."""
        if n < 1:
            raise ExpressionError(f"cannot choose {n} genes; ask for at least 1")
        genes, count = self._genes, max(self._n_spots, 1)
        if not genes:
            raise ExpressionError(
                "the sections share no gene; are their names of one kind (symbols or Ensembl ids)?"
            )
        variance = (self._squares / count - (self._total / count) ** 2).tolist()
        # Rounded, so that the order of equal variances does not hang on the last bit of a machine's sums.
        order = sorted(range(len(genes)), key=lambda i: (-round(variance[i], 12), genes[i]))
        # Below this a variance is rounding: the gene is constant over these spots.
        varying = tuple(genes[i] for i in order if variance[i] > 1e-9)
        if not varying:
            raise ExpressionError(f"none of {len(genes)} genes varies over {self._n_spots} spots")
        return varying[:n]


def read_gene_list(path: str | Path, sections: Sequence[Spots]) -> tuple[str, ...]:
    """Read gene names, one a line; ``#`` begins a remark.

    Raises
    ------
    ExpressionError
        If the file is missing or empty, or a gene is not in all sections (the nearest names are given).
    """
    genes = read_gene_names(path)
    check_measured(genes, shared_genes(sections), str(path))
    return genes


def read_gene_names(path: str | Path) -> tuple[str, ...]:
    """Read gene names, one a line, each once; ``#`` begins a remark, and quotes around a name are left out.

    Raises
    ------
    ExpressionError
        If the file is missing, empty or no text.
    """
    if kind_of(path) != "file":
        raise ExpressionError(
            f"--genes {shown(path)}: neither a number, all, seurat_v3:N, N+A,B, nor a file with one gene a line"
        )
    lines = (line.partition("#")[0].strip() for line in _read_text(Path(path)).splitlines())
    genes = tuple(
        dict.fromkeys(name for line in lines if (name := line.rstrip(",;\t ").strip("\"'").strip()))
    )
    if not genes:
        raise ExpressionError(f"{path} names no gene; write one a line")
    return genes


def _read_text(file: Path) -> str:
    """Return the text of a list, in UTF-8, UTF-16 or, if it is in no UTF-8, Latin-1."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_LIST_BYTES + 1)
    except OSError as error:
        raise ExpressionError(f"{shown(file)} cannot be read: {error.strerror or error}") from error
    if len(data) > MOST_LIST_BYTES:
        raise ExpressionError(
            f"{shown(file)} is no list of genes: it has more than {MOST_LIST_BYTES >> 20} MB"
        )
    # Excel's "Unicode text" is UTF-16. Windows PowerShell writes it, too, always with a mark at the start.
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # Latin-1 last: it decodes anything. A gene's name has no letters beyond ASCII, only remarks have.
    for encoding in ("utf-16",) if is_utf16 else ("utf-8-sig", "latin-1"):
        try:
            text = data.decode(encoding)
            break
        except UnicodeDecodeError:
            continue
    else:
        raise ExpressionError(f"{shown(file)} is no list of genes: it is cut in the middle of a letter")
    if "\0" in text:
        raise ExpressionError(
            f"{shown(file)} is no list of genes: it holds binary data; write one a line as text"
        )
    return text


def check_measured(genes: Sequence[str], measured: Sequence[str], origin: str) -> None:
    """Refuse genes that are not among those that all sections measured.

    Parameters
    ----------
    origin
        Where the names come from, for the message.

    Raises
    ------
    ExpressionError
        Naming the first such gene and the nearest ones.
    """
    known = set(measured)
    for gene in genes:
        if gene not in known:
            near = get_close_matches(gene, measured, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else "it is not in all sections"
            raise ExpressionError(f"{origin} names gene {gene!r}: {hint}")
