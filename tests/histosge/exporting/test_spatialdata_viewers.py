"""What napari-spatialdata and spatialdata-plot make of our SpatialData, by their own code and without a display."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_maps import make_map
from scipy import sparse

from histosge.data.sections import Spots
from histosge.exporting.export_format import ExportItem
from histosge.exporting.figure import _read_panels
from histosge.exporting.formats.spatialdata_zarr import write_spatialdata
from histosge.exporting.open_tables import table_of_map
from histosge.exporting.patch_table import PatchTable
from histosge.prediction.stored_map import StoredMap


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredMap:
    return make_map(tmp_path_factory.mktemp("maps") / "maps")


@pytest.fixture(scope="module")
def table(stored: StoredMap) -> PatchTable:
    return table_of_map(stored)


@pytest.fixture(scope="module")
def spots() -> Spots:
    rng = np.random.default_rng(5)
    xy_um, counts = rng.uniform((60, 50), (220, 170), (31, 2)), rng.poisson(3.0, (31, 4)) + 1
    names = np.array([f"spot{i}" for i in range(31)])
    return Spots("A", "D", names, xy_um, 13.0, sparse.csr_matrix(counts), ("EPCAM", "CD3E", "X", "Y"))


@pytest.fixture(scope="module")
def data(table: PatchTable, spots: Spots, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sdata") / "A.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spatialdata

        write_spatialdata([ExportItem(table, "", None, spots)], folder, 8.0)
        return spatialdata.read_zarr(folder)


@pytest.fixture(scope="module")
def values(table: PatchTable) -> np.ndarray:
    return np.concatenate([values for _, values in table.chunks()])


# ---------------------------------------------------------------- napari


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies deprecate each other
        yield


@pytest.fixture(scope="module")
def desktop() -> Iterator[Any]:
    """Qt without a display: widgets exist, and nothing is drawn, so that no OpenGL is needed."""
    before = os.environ.get("QT_QPA_PLATFORM")
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from qtpy.QtWidgets import QApplication

        yield QApplication.instance() or QApplication([])
    if before is None:
        del os.environ["QT_QPA_PLATFORM"]
    else:
        os.environ["QT_QPA_PLATFORM"] = before


class Napari:
    """The parts of napari-spatialdata's plugin below its window: layers from elements, and colours from a table."""

    def __init__(self, data: Any) -> None:
        from napari.components import ViewerModel
        from napari.utils.events import EventedList
        from napari_spatialdata._viewer import SpatialDataViewer

        self.data, self.viewer = data, ViewerModel()
        self.plugin = SpatialDataViewer(self.viewer, EventedList([data]))

    def add(self, name: str, kind: str) -> Any:
        layer = getattr(self.plugin, f"get_sdata_{kind}")(self.data, name, "A", False)
        self.viewer.add_layer(layer)
        return layer

    def colour(self, layer: Any, table_name: str, gene: str) -> np.ndarray:
        """Do what a double click on a gene does; return the faces' colours, (n, 4)."""
        from napari_spatialdata._widgets import AListWidget

        model = self.plugin.model
        model.adata, model.layer = layer.metadata["adata"], layer
        model.active_table_name, model.system_name = table_name, layer.metadata["name"]
        model.cmap = "viridis"
        genes = AListWidget(self.viewer, model, attr="var")
        assert gene in [genes.item(i).text() for i in range(genes.count())]
        genes._onAction([gene])
        return np.asarray(layer.face_color)


@pytest.mark.napari
@pytest.mark.usefixtures("desktop", "quiet")
def test_napari_places_picture_patches_and_spots_in_microns_of_the_slide(
    data: Any, table: PatchTable, spots: Spots
) -> None:
    napari = Napari(data)
    picture = napari.add("A_image", "image")
    # napari's extent runs through the centres of the outer pixels.
    low, high = picture.extent.world
    pixel_um = np.diag(picture.affine.linear_matrix)[:2]
    np.testing.assert_allclose(low, pixel_um / 2)
    # The slide is 280 x 220 µm; without its file the picture shows the grid, which ends up to a patch before.
    assert np.all(np.abs(high + pixel_um / 2 - np.array([220.0, 280.0])) <= 16.0)
    assert picture.rgb
    patches = napari.add("A_patches", "shapes")
    centres = np.array([ring[:4].mean(axis=0) for ring in patches.data])
    np.testing.assert_allclose(patches.affine.linear_matrix, np.eye(2))
    # napari counts (y, x).
    np.testing.assert_allclose(centres[:, ::-1], table.xy_um)
    side = np.ptp(patches.data[0], axis=0)
    np.testing.assert_allclose(side, 8.0)
    circles = napari.add("A_spots", "circles")
    np.testing.assert_allclose(np.asarray(circles.data)[:, ::-1], spots.xy_um)
    np.testing.assert_allclose(circles.size, 13.0)


@pytest.mark.napari
@pytest.mark.usefixtures("desktop", "quiet")
@pytest.mark.parametrize(("gene", "column"), [("EPCAM", 0), ("CD3E", 1)])
def test_napari_colours_each_patch_by_its_own_value(
    data: Any, table: PatchTable, values: np.ndarray, gene: str, column: int
) -> None:
    from matplotlib import colormaps

    napari = Napari(data)
    patches = napari.add("A_patches", "shapes")
    held = patches.metadata
    assert held["table_names"] == ["A_expression"]
    assert held["indices"] == (table.rows * table.grid.n_cols + table.cols).tolist()
    assert held["adata"].obs[held["instance_key"]].tolist() == held["indices"]
    found = napari.colour(patches, "A_expression", gene)
    own = values[:, column]
    scaled = (own - own.min()) / (own.max() - own.min())
    np.testing.assert_allclose(found, colormaps["viridis"](scaled), atol=1e-6)


@pytest.mark.napari
@pytest.mark.usefixtures("desktop", "quiet")
def test_napari_colours_measured_spots_by_a_table_of_their_own(data: Any, spots: Spots) -> None:
    from matplotlib import colormaps

    napari = Napari(data)
    circles = napari.add("A_spots", "circles")
    assert circles.metadata["table_names"] == ["A_measured"]
    found = napari.colour(circles, "A_measured", "CD3E")
    counts = spots.counts.toarray()
    own = np.log1p(counts[:, 1] / counts.sum(axis=1) * 1e4)
    np.testing.assert_allclose(
        found, colormaps["viridis"]((own - own.min()) / (own.max() - own.min())), atol=1e-5
    )


# ---------------------------------------------------------------- spatialdata-plot


@pytest.mark.spatialdata_plot
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("gene", ["EPCAM", "CD3E"])
def test_spatialdata_plot_draws_the_picture_of_our_own_figure(
    data: Any, stored: StoredMap, gene: str, tmp_path: Path
) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import spatialdata_plot  # noqa: F401  # it adds `pl` to SpatialData
    from matplotlib import pyplot as plt
    from matplotlib.collections import PatchCollection

    page, axes = plt.subplots()
    try:
        shown = data.pl.render_images("A_image").pl.render_shapes(
            "A_patches", color=gene, method="matplotlib"
        )
        shown.pl.show(coordinate_systems="A", ax=axes)
        page.canvas.draw()
        (squares,) = [each for each in axes.collections if isinstance(each, PatchCollection)]
        centres = np.array([path.vertices[:4].mean(axis=0) for path in squares.get_paths()])
        faces = squares.get_facecolor()
        page.savefig(tmp_path / "plot.png")
        corners = axes.images[0].get_extent()
    finally:
        plt.close(page)
    assert (tmp_path / "plot.png").stat().st_size > 5_000
    panels = _read_panels(stored, [gene])
    col, row = np.floor((centres - panels.corner_um) / panels.step_um).astype(int).T
    # Each of our figure's cells with a value is one square, at its place.
    drawn = np.zeros(panels.tissue.shape, bool)
    drawn[row, col] = True
    np.testing.assert_array_equal(drawn, np.isfinite(panels.values[0]))
    own = panels.values[0, row, col]
    expected = mpl.colormaps["viridis"]((own - own.min()) / (own.max() - own.min()))
    np.testing.assert_allclose(faces[:, :3], expected[:, :3], atol=0.01)
    # The picture lies under them on the same axes, whose y grows downwards as on the slide.
    assert axes.yaxis_inverted()
    assert corners is not None
