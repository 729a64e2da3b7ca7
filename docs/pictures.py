"""Draw the pictures of the tutorial, the viewer's page and the gallery, on three synthetic sections.

    python docs/pictures.py [--work DIR]

They are PNG files in docs/images: pages in Chromium, and what `histosge figure` draws. The sections are synthetic, as in
`histosge demo`, because the public sections of the tutorial come without a licence that permits to show them. It takes three
minutes on two cores, and needs the extras dev and view, and Chromium.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from PIL import Image

from histosge.synthetic import SyntheticSpec, make_cohort

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

IMAGES = Path(__file__).parent / "images"
SPEC = SyntheticSpec(size_px=(5200, 4900))
GENES = ("MORPH01", "MORPH02", "MORPH03", "NOISE01")
"""Of the figure: three that follow the tissue, and one that does not."""
MOST_BYTES = 130_000
MOST_PX = 1100
# A lasso over the right part of the tissue, a rectangle over the left: shares of a view's width and height.
LASSO = ((0.64, 0.34), (0.84, 0.24), (0.90, 0.46), (0.76, 0.56), (0.62, 0.50))
RECTANGLE = ((0.16, 0.30), (0.42, 0.52))
VIEWER_PX = (1120, 680)
PHONE_PX = (390, 844)
SIGNATURE = "slide=S3&gene=FollowsTissue&set=MORPH01,MORPH02,MORPH03&layout=predicted"
SHOWN = {
    "viewer": "slide=S3&gene=MORPH01",
    "viewer-two-genes": "slide=S3&gene=MORPH01&second=MORPH02&layout=pair-predicted",
    "viewer-blend": "slide=S3&gene=MORPH01&second=MORPH03&show=blend",
    "viewer-signature": SIGNATURE,
    "viewer-trust": "slide=S3&gene=NOISE01&rim=hatched&least-tissue=80",
    "viewer-link": "slide=S3&gene=MORPH09&map=magma&limits=3,1",
}
"""Picture of the viewer -> what its address says: a link restores all that is seen."""


def main() -> None:
    """Make the sections, follow the tutorial, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", metavar="DIR", type=Path, help="keep sections and results here")
    work = parser.parse_args().work
    with tempfile.TemporaryDirectory() as name:
        folder = (work or Path(name)).resolve()
        follow(folder)
        draw(folder)


def follow(folder: Path) -> None:
    """Run the commands of the tutorial on synthetic sections."""
    cohort = make_cohort(folder, SPEC, 3, sections_per_donor=3).sheet
    lines = cohort.read_text().splitlines()
    (folder / "train.csv").write_text("\n".join(lines[:3]) + "\n")
    grid = ("--mpp", "0.5", "--patch", "224", "--stride", "112")
    run(folder, "embed", "cohort.csv", "planned.zarr", *grid, "--dry-run", "--preview", "plan")
    run(folder, "embed", "cohort.csv", "store.zarr", *grid)
    run(folder, "train", "train.csv", "store.zarr", "model", "--genes", "all")
    run(folder, "evaluate", "cohort.csv", "store.zarr", "report", "--split", "section", "--genes", "all")
    run(folder, "predict", "store.zarr", "model", "maps.zarr", "--slide", "S3", "--report", "map.html")
    genes = ",".join(GENES)
    large = ("--genes", ",".join(GENES[:2]), "--report", "large.html")
    run(folder, "predict", "store.zarr", "model", "few.zarr", "--slide", "S3", *large)
    run(folder, "figure", "maps.zarr", "--slide", "S3", "--genes", genes, "figure.png", "--overwrite")
    sets = ("--set", "FollowsTissue=MORPH01,MORPH02,MORPH03", "--set", "Graded=GRAD01,GRAD02,GRAD03")
    run(folder, "analyse", "maps.zarr", "signatures", "scores", *sets)
    run(folder, "analyse", "maps.zarr", "clusters", "--k", "5", "--labels", "domains")
    run(
        folder, "view", "store.zarr", "--expression", "maps.zarr", "--samples", "cohort.csv", "--domains", "domains",
        "--slide", "S3", "--static", "page.html", "--tiles-mpp", "4", "--genes", genes, "--overwrite",
    )  # fmt: skip
    sdata = (
        "maps.sdata.zarr",
        "--to",
        "spatialdata",
        "--slide",
        "S3",
        "--store",
        "store.zarr",
        "--genes",
        genes,
    )
    run(folder, "export", "maps.zarr", *sdata, "--samples", "cohort.csv", "--overwrite")
    run(
        folder,
        "view",
        "store.zarr",
        "--slide",
        "S3",
        "--static",
        "store.html",
        "--tiles-mpp",
        "4",
        "--overwrite",
    )


def run(folder: Path, *words: str) -> None:
    """Run a command in a process of its own, as a reader does."""
    subprocess.run([sys.executable, "-m", "histosge_cli", *words], cwd=folder, check=True)


def draw(folder: Path) -> None:
    """Draw everything from what the commands wrote."""
    with chromium() as browser:
        shot(browser, folder / "plan/index.html", (1000, 540), "tutorial-plan")
        shot(browser, folder / "report/report.html", (1000, 620), "tutorial-report")
        look_up(browser, folder / "report/report.html", GENES[1], "tutorial-genes")
        shot(browser, folder / "map.html", (1000, 660), "tutorial-map")
        shot(browser, folder / "large.html", (1000, 780), "report-genes")
        page = open_viewer(browser, folder / "page.html", f"slide=S3&gene={GENES[0]}")
        compare_regions(page)
        save(page, "tutorial-regions")
        for name, state in SHOWN.items():
            save(open_viewer(browser, folder / "page.html", state), name)
        save(
            open_viewer(browser, folder / "page.html", "slide=S3&show=domains", theme="dark"),
            "viewer-domains",
        )
        save(open_viewer(browser, folder / "store.html", "slide=S3&show=components"), "viewer-store")
        save(
            open_viewer(browser, folder / "store.html", "slide=S3&show=quality&lines=on"),
            "viewer-quality",
        )
        phone = open_viewer(browser, folder / "page.html", f"slide=S3&gene={GENES[0]}", size_px=PHONE_PX)
        save(phone, "viewer-phone")
        save_picture(
            open_viewer(browser, folder / "page.html", "slide=S3&gene=MORPH01"), folder, "viewer-saved"
        )
    keep(narrowed(Image.open(folder / "figure.png").convert("RGB")), "tutorial-figure")
    draw_signatures(folder)
    draw_spatialdata(folder)


def open_viewer(
    browser: "Browser",
    file: Path,
    state: str,
    *,
    theme: Literal["light", "dark"] = "light",
    size_px: tuple[int, int] = VIEWER_PX,
) -> "Page":
    """Open a page that `view --static` wrote, at what a link names."""
    width, height = size_px
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
    page.goto(f"file://{file}#{state}")
    page.wait_for_selector("body[data-state=ready]")
    return page


def save_picture(page: "Page", folder: Path, name: str) -> None:
    """Keep the picture that *Save PNG* writes."""
    page.wait_for_timeout(1500)  # tiles fade in
    page.locator("#save-tools").evaluate("tools => { tools.open = true; }")
    with page.expect_download() as downloaded:
        page.get_by_role("button", name="Save PNG").click()
    downloaded.value.save_as(folder / "saved.png")
    keep(narrowed(Image.open(folder / "saved.png").convert("RGB")), name)


def compare_regions(page: "Page") -> None:
    """Draw two regions on the prediction, and compare them."""
    page.locator("#region-tools").evaluate("tools => { tools.open = true; }")
    page.get_by_role("button", name="Lasso").click()
    drag(page, LASSO)
    page.wait_for_selector("body[data-regions]")
    page.get_by_role("button", name="Rectangle").click()
    drag(page, RECTANGLE)
    page.locator("#region-counts", has_text="in region 2").wait_for()
    page.locator("#region-other").select_option(label="region 1")
    page.locator("#region-counts", has_text="in region 1").wait_for()
    page.locator("#region-tools").evaluate("tools => tools.scrollIntoView()")
    page.mouse.move(1, 1)


def drag(page: "Page", places: tuple[tuple[float, float], ...]) -> None:
    """Draw with the mouse through places that are shares of the right view's sides."""
    box = page.locator("#predicted").bounding_box()
    assert box is not None
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=6)
    page.mouse.up()


def draw_signatures(folder: Path) -> None:
    """Draw the scores of two gene sets, from the table that `analyse signatures` wrote."""
    mpl.use("agg")
    scores = pl.read_parquet(folder / "scores/S3.parquet")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    row, col = scores["row"].to_numpy(), scores["col"].to_numpy()
    for axis, name in zip(axes, ("FollowsTissue", "Graded"), strict=True):
        values = np.full((row.max() + 1, col.max() + 1), np.nan)
        values[row, col] = scores[name].to_numpy()
        drawn = axis.imshow(values, cmap="viridis")
        axis.set_title(name)
        axis.set_axis_off()
        figure.colorbar(drawn, ax=axis, label="mean z-score")
    file = folder / "signatures.png"
    figure.savefig(file, dpi=110)
    keep(Image.open(file).convert("RGB"), "tutorial-signatures")


def draw_spatialdata(folder: Path) -> None:
    """Draw a gene of the exported SpatialData by spatialdata-plot: predicted patches, and measured spots over the slide."""
    import spatialdata
    import spatialdata_plot  # noqa: F401  # it adds `pl` to SpatialData

    data = spatialdata.read_zarr(folder / "maps.sdata.zarr")
    parts = []
    for shapes, table in (("S3_spots", "S3_measured"), ("S3_patches", "S3_expression")):
        # A figure each: it puts its colour bars where a second panel would be.
        figure, axes = plt.subplots(figsize=(4.6, 3.6))
        drawn = data.pl.render_images("S3_image").pl.render_shapes(
            shapes, color=GENES[0], table_name=table, method="matplotlib"
        )
        drawn.pl.show(coordinate_systems="S3", ax=axes, title=f"{shapes}, {GENES[0]}")
        file = folder / f"{shapes}.png"
        figure.savefig(file, dpi=110, bbox_inches="tight")
        parts.append(Image.open(file).convert("RGB"))
    both = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
    for part, left in zip(parts, (0, parts[0].width), strict=True):
        both.paste(part, (left, 0))
    keep(both, "gallery-spatialdata")


@contextmanager
def chromium() -> "Iterator[Browser]":
    """Open the machine's Chromium."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        raise SystemExit("the pictures are drawn in Chromium; put chromium or google-chrome on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def shot(browser: "Browser", file: Path, size_px: tuple[int, int], name: str) -> None:
    """Draw the top of a page."""
    page = browser.new_page(viewport={"width": size_px[0], "height": size_px[1]})
    page.goto(f"file://{file}")
    save(page, name)


def look_up(browser: "Browser", file: Path, gene: str, name: str) -> None:
    """Type a gene into the search box of an evaluation's page, and draw its maps."""
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    page.goto(f"file://{file}")
    page.get_by_label("Find a gene").fill(gene)
    page.locator(".maps figure").first.wait_for()
    page.locator(".lookup").evaluate("box => box.scrollIntoView()")
    save(page, name)


def save(page: "Page", name: str) -> None:
    """Draw what a page shows."""
    page.wait_for_timeout(1500)  # tiles fade in
    file = IMAGES / f"{name}.png"
    page.screenshot(path=file)
    keep(Image.open(file).convert("RGB"), name)


def narrowed(picture: Image.Image) -> Image.Image:
    """Return a picture as wide as a page of the documentation."""
    width = min(MOST_PX, picture.width)
    return picture.resize((width, picture.height * width // picture.width), Image.Resampling.LANCZOS)


def keep(picture: Image.Image, name: str) -> None:
    """Write a picture with as many of 256 colours as fit into the limit."""
    file = IMAGES / f"{name}.png"
    # Fewer colours compress better: text and maps stay clear with 64. With 32 the colour bars become steps, and regions
    # lose their colours.
    for colours in (256, 128, 64):
        # Median cut alone gives nearly all colours to the pink of the slide, and the colour bars become steps.
        few = picture.quantize(colours, method=Image.Quantize.MEDIANCUT, kmeans=4, dither=Image.Dither.NONE)
        few.save(file, optimize=True)
        if file.stat().st_size < MOST_BYTES:
            break
    print(
        f"{file}: {picture.width} x {picture.height}, {file.stat().st_size / 1000:.0f} kB, {colours} colours"
    )


if __name__ == "__main__":
    main()
