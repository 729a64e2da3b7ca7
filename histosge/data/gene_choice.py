"""Which genes a user wants: the most variable ones, all, named ones, or both. The words of ``--genes``.

A choice is made of text or values before any data is read, and applied to sections afterwards: of a training set, or
of each fold's training part.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from featurestore.input_file import shown
from histosge.data.genes import GeneVariance, check_measured, read_gene_names, shared_genes
from histosge.data.sections import Spots
from histosge.data.seurat_ranks import SeuratRanks
from histosge.errors import ExpressionError

GeneSource = int | str | Path | Sequence[str]
"""A number, ``N``, ``all``, ``seurat_v3:N``, ``N+A,B``, a file with one gene a line, or gene names."""
ALL = "all"
SEURAT = "seurat_v3"
MOST_DIGITS = 9


@dataclass(frozen=True)
class GeneChoice:
    """The most variable genes, named ones, or both.

    Parameters
    ----------
    n_variable
        How many of the most variable genes; None means all that vary, 0 none.
    named
        Genes that are taken in any case.
    origin
        What the user gave, for messages.
    by_seurat
        Whether variable means `histosge.data.seurat_ranks`; else it is the variance of log1p(CP10k).
    """

    n_variable: int | None
    named: tuple[str, ...] = ()
    origin: str = "--genes"
    by_seurat: bool = False

    @classmethod
    def parse(cls, genes: GeneSource) -> Self:
        """Read a choice; a file is read now, so that it is refused before any data is loaded.

        Raises
        ------
        ExpressionError
            If it asks for no gene, or is text that is none of the forms.
        """
        if isinstance(genes, int):
            if genes < 1:
                raise ExpressionError(f"cannot choose {genes} genes; ask for at least 1")
            return cls(genes)
        if not isinstance(genes, str | Path):
            if not genes:
                raise ExpressionError("no gene is named; name at least one, or give a number")
            return cls(0, tuple(dict.fromkeys(genes)), "genes")
        # Words before files: a file that is named like one can be given as ./all.
        text = str(genes)
        if text == ALL:
            return cls(None)
        by_seurat, text = text.startswith(f"{SEURAT}:"), text.removeprefix(f"{SEURAT}:")
        if by_seurat and not re.match(r"\d+(\+|$)", text):
            raise ExpressionError(
                f"--genes {shown(str(genes))}: how many? Write {SEURAT}:N, such as {SEURAT}:1000"
            )
        number = text.partition("+")[0]
        # Nobody's genome has a billion genes, and Python refuses to read numbers of 4,300 digits.
        if number.isdecimal() and len(number) > MOST_DIGITS:
            raise ExpressionError(f"cannot choose a number of genes of {len(number)} digits; ask for fewer")
        if text.isdecimal():
            return replace(cls.parse(int(text)), by_seurat=by_seurat)
        if both := re.fullmatch(r"(\d+)\+(.+)", text):
            names = tuple(dict.fromkeys(name.strip() for name in both[2].split(",") if name.strip()))
            return cls(int(both[1]), names, f"--genes {genes}", by_seurat)
        if by_seurat:
            raise ExpressionError(f"--genes {shown(str(genes))} names no gene after the +; leave the + out")
        return cls(0, read_gene_names(text), text)

    @property
    def is_given(self) -> bool:
        """Whether the genes are the same whatever the data."""
        return self.n_variable == 0

    def choose(self, spots: Sequence[Spots], *, among: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the genes, those that vary most over all the spots handed in first.

        Parameters
        ----------
        spots
            The training part only.
        among
            Genes to choose from; those that all sections share if None.

        Raises
        ------
        ExpressionError
            If a named gene is not among them (the nearest are given), or none varies.
        """
        measured = shared_genes(spots) if among is None else tuple(among)
        # Before choosing, which reads all counts.
        check_measured(self.named, measured, self.origin)
        if self.is_given:
            return self.named
        ranking = self.new_ranking(measured)
        for section in spots:
            ranking.add(section)
        return self.choose_from(ranking)

    def new_ranking(self, among: Sequence[str] | None = None) -> GeneVariance | SeuratRanks:
        """Return what sections are handed to one after the other before `choose_from`."""
        return SeuratRanks(among) if self.by_seurat else GeneVariance(among)

    def choose_from(self, ranking: GeneVariance | SeuratRanks) -> tuple[str, ...]:
        """Return the genes by a ranking that was gathered section by section; see `choose`."""
        check_measured(self.named, ranking.genes, self.origin)
        if self.is_given:
            return self.named
        # All that vary: a gene that is constant over the training spots has no variance to explain.
        n = len(ranking.genes) if self.n_variable is None else self.n_variable
        return tuple(dict.fromkeys((*ranking.choose(n), *self.named)))

    def describe(self, part: str) -> str:
        """Return the choice as a sentence for a report, without its full stop.

        Parameters
        ----------
        part
            What it is made on, such as "each fold's training spots".
        """
        if self.is_given:
            return f"{len(self.named)} genes given by the user"
        count = (
            "all genes that vary" if self.n_variable is None else f"the {self.n_variable} most variable genes"
        )
        if self.by_seurat:
            count += f" ({SEURAT})"
        return f"{count} of {part}" + (f", and {len(self.named)} given by the user" if self.named else "")
