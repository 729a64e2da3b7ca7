"""Several threads read where an encoder wants them: also the first block, or an only one."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_slides import tissue_like, write_pyramid
from numpy.typing import NDArray

from featurestore import EmbedSettings, GridSpec
from featurestore.embedding import block_reading
from featurestore.embedding import embed as embedding
from featurestore.embedding.block_reading import split_positions
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.slides.patch_reader import PatchBatch
from featurestore.storage.validation import validate

SETTINGS = EmbedSettings(("mean",), GridSpec(1.0, 16, 16), tissue="none")


@dataclass
class MeanColour:
    """An encoder of the mean colour, which is fed by several threads."""

    reading_threads: int
    batch: int = 40
    sizes: list[int] = field(default_factory=list)
    identity: EncoderIdentity = field(
        default_factory=lambda: EncoderIdentity("mean", 3, {"algorithm": "mean"})
    )

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.sizes.append(len(patches))
        return patches.mean(axis=(1, 2), dtype=np.float32)


def test_threads_share_the_first_block_and_the_store_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = write_pyramid(tmp_path / "a.tif", tissue_like(400, 360, 1.0), 1.0)
    # The first three parts of the block are read at the same time, or this would wait in vain.
    together, first = threading.Barrier(3), iter(range(3))
    read = block_reading.read_batches

    def watched(*args: Any) -> Iterator[PatchBatch]:
        if next(first, None) is not None:
            together.wait(timeout=30)
        return read(*args)

    objects = {}
    for threads in (1, 3):
        encoder = MeanColour(threads)
        monkeypatch.setattr(embedding, "load_encoders", lambda settings, encoder=encoder: {"mean": encoder})
        if threads > 1:
            monkeypatch.setattr(block_reading, "read_batches", watched)
        (result,) = embedding.embed(slide, tmp_path / str(threads), SETTINGS)
        assert result.state == "done"
        assert validate(tmp_path / str(threads), deep=True) == []
        objects[threads] = [f.read_bytes() for f in sorted((tmp_path / str(threads)).rglob("c/*/*/0"))]
        assert sum(encoder.sizes) == result.patches == 22 * 25
    assert len(objects[1]) == 2
    assert objects[1] == objects[3]


def test_positions_are_split_in_their_order() -> None:
    wanted = np.random.default_rng(3).random((7, 9)) < 0.6
    parts = split_positions(wanted, 10)
    np.testing.assert_array_equal(
        np.concatenate([np.flatnonzero(part) for part, _ in parts]), np.flatnonzero(wanted)
    )
    assert [part.sum() for part, _ in parts[:-1]] == [10] * (len(parts) - 1)
    assert [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True]
    ((none, ends),) = split_positions(np.zeros((2, 3), bool), 10)
    assert (none.shape, none.any(), ends) == ((2, 3), False, True)
