"""Commands that bring embeddings in from other tools and take them out: import, export."""

from pathlib import Path
from typing import Annotated

import typer

from histosge_cli.show import out
from histosge_cli.store import StoreArg


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(name="import")(import_)
    app.command()(export)


def import_(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="TRIDENT or CLAM .h5, or a raw2features .embeddings.zarr.")
    ],
    store: StoreArg,
    slide: Annotated[
        str | None, typer.Option(metavar="FILE", help="The slide: says its size, scale and fingerprint.")
    ] = None,
    slide_id: Annotated[str | None, typer.Option(metavar="ID", help="Its name in the store.")] = None,
    slide_mpp: Annotated[float | None, typer.Option(help="Microns per pixel of the slide.")] = None,
    encoder: Annotated[str | None, typer.Option(metavar="K", help="Which encoder made them.")] = None,
    mpp: Annotated[float | None, typer.Option(help="Microns per pixel of the patches.")] = None,
    patch: Annotated[int | None, typer.Option(help="Side of a patch, pixels at --mpp.")] = None,
    grid: Annotated[str | None, typer.Option(metavar="KEY", help="Of a store with several.")] = None,
) -> None:
    """Bring in embeddings of another tool, so that they can be trained and predicted on.

    Example: histosge import features/A.h5 store.zarr --slide A.svs --encoder uni
    """
    from featurestore.exchange.importing import Told, import_embeddings

    told = Told(slide, slide_id, encoder, slide_mpp, mpp, patch, grid)
    name, key, patches = import_embeddings(file, store, told)
    out.print(f"{name}: {patches} patches imported as {key}", markup=False)


def export(
    store: StoreArg,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to.")],
    to: Annotated[str, typer.Option(help="trident")],
    slide: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Only this slide; repeat for several.")
    ] = None,
    grid: Annotated[str | None, typer.Option(metavar="KEY", help="Needed when there are several.")] = None,
    encoder: Annotated[str | None, typer.Option(metavar="K", help="Needed when there are several.")] = None,
) -> None:
    """Write embeddings as other tools read them: one .h5 per slide.

    Example: histosge export store.zarr features --to trident
    """
    from featurestore.errors import StoreError
    from featurestore.exchange.h5 import write_h5
    from featurestore.store import Store

    if to != "trident":
        raise StoreError(f"cannot export to {to!r}; known: trident")
    source = Store.open(store)
    for slide_id in slide or source.slide_ids():
        grid_key, key = source.select(grid, encoder, slide_id)
        path = out_dir / f"{slide_id}.h5"
        patches = write_h5(source, slide_id, grid_key, key, path)
        out.print(f"{path}: {patches} patches", markup=False)
