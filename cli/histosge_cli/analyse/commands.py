"""The group `analyse`: commands on all slides of a feature store or of expression maps."""

import typer

from histosge_cli.analyse.clusters import clusters
from histosge_cli.analyse.moran import moran
from histosge_cli.analyse.pca import pca
from histosge_cli.analyse.pseudobulk import pseudobulk
from histosge_cli.analyse.signatures import signatures
from histosge_cli.analyse.similar import similar
from histosge_cli.analyse.summary import summary
from histosge_cli.shared_options import StoreArg


def register(app: typer.Typer) -> None:
    """Add these commands, as a group that takes the store first."""
    group = typer.Typer(no_args_is_help=True)
    group.callback()(analyse)
    for command in (summary, pca, clusters, similar, signatures, pseudobulk, moran):
        group.command()(command)
    app.add_typer(group, name="analyse")


def analyse(context: typer.Context, store: StoreArg) -> None:
    """Analyse all slides of a feature store: summary, principal components, clusters, similar patches.

    An expression store, as predict writes it, is analysed in the same way: genes take the place of the embedding's features.
    Of maps alone there are signatures, pseudobulk, and spatially variable genes (moran).

    The store is read where it is, local or on S3; each block is read once a pass, and memory does not grow with the slides.

    Example: histosge analyse s3://bucket/store clusters --k 8
    """
    context.obj = store
