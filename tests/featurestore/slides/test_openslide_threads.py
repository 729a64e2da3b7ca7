"""One damaged tile, and threads that read the same slide through OpenSlide at the same time."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from make_slides import painted, write_pyramid

READ = """
import sys, threading
import numpy as np
from featurestore.errors import SlideError
from featurestore.slides.readers.openslide_reader import OpenSlideSlide

slide, done, wrong = OpenSlideSlide(sys.argv[1], None), threading.Event(), []
expected = np.load(sys.argv[2])

def read(seed):
    order = np.random.default_rng(seed)
    while not done.is_set():
        x, y = (int(v) for v in order.integers(64, 500, 2))
        try:
            if not np.array_equal(slide.read_level(0, x, y, 300, 300), expected[y : y + 300, x : x + 300]):
                wrong.append((x, y))
        except SlideError as error:
            wrong.append(str(error))

def fail():
    for _ in range(80):
        try:
            slide.read_level(0, 0, 0, 50, 50)
        except SlideError:
            continue
        wrong.append("the damaged tile was read")
    done.set()

threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)] + [threading.Thread(target=fail)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(wrong)
"""


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide whose first tile cannot be decoded, and its pixels beside it."""
    path = tmp_path_factory.mktemp("slide") / "a.tif"
    image = painted(800, 800)
    write_pyramid(path, image, 0.5, levels=1)
    np.save(path.with_suffix(".npy"), image)
    with tifffile.TiffFile(path) as tiff:
        start, size = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    return path


def test_a_damaged_tile_costs_no_other_thread_its_patches_and_no_process_its_life(damaged: Path) -> None:
    # In a process of its own: OpenSlide aborts where a handle is closed that another thread reads from.
    command = [sys.executable, "-c", READ, str(damaged), str(damaged.with_suffix(".npy"))]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "[]\n"), ran.stderr[-500:]
