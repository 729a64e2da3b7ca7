"""Requests of several threads share one encoder, whose device is given its next batch before the last one is fetched."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from featurestore.embedding.worker import SharedEncoder
from featurestore.encoders.protocol import EncoderIdentity, PendingVectors, patches_at_once, start_encoding


class Device:
    """An encoder that computes when it is waited for, as a GPU does; it notes the order of what is done."""

    identity = EncoderIdentity("device", 2, {})
    batch = 5

    def __init__(self, fails: str = "") -> None:
        self.log: list[str] = []
        self.fails = fails
        self.go = threading.Event()

    def start(self, patches: np.ndarray) -> PendingVectors:
        self.go.wait(timeout=120)
        name = str(int(patches[0, 0, 0, 0]))
        self.log.append(f"start {name}")
        if self.fails == f"start {name}":
            raise RuntimeError(f"cannot start {name}")

        def wait() -> np.ndarray:
            self.log.append(f"wait {name}")
            if self.fails == f"wait {name}":
                raise RuntimeError(f"lost {name}")
            return patches.reshape(len(patches), -1)[:, :2].astype(np.float32)

        return wait

    def encode(self, patches: np.ndarray) -> np.ndarray:
        return self.start(patches)()


def _patches(n: int, value: int) -> np.ndarray:
    return np.full((n, 3, 3, 3), value, np.uint8)


def test_the_next_batch_is_started_before_the_last_one_is_waited_for() -> None:
    device = Device()
    shared = SharedEncoder(device)
    waiting = [shared.start(_patches(5, value)) for value in (11, 13, 17)]
    device.go.set()
    for value, vectors in zip((11, 13, 17), waiting, strict=True):
        assert (vectors() == value).all()
    assert device.log[:4] == ["start 11", "start 13", "wait 11", "start 17"]
    shared.close()


@pytest.mark.parametrize("fails", ["start 13", "wait 13"])
def test_a_batch_that_fails_fails_alone(fails: str) -> None:
    device = Device(fails)
    shared = SharedEncoder(device)
    waiting = [shared.start(_patches(5, value)) for value in (11, 13, 17)]
    device.go.set()
    assert (waiting[0]() == 11).all()
    with pytest.raises(RuntimeError, match="13"):
        waiting[1]()
    assert (waiting[2]() == 17).all()
    shared.close()


def test_what_was_started_is_delivered_though_the_encoder_is_closed() -> None:
    device = Device()
    device.go.set()
    shared = SharedEncoder(device)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda value: shared.encode(_patches(2, value)), range(40)))
    shared.close()
    assert [int(vectors[0, 0]) for vectors in found] == list(range(40))


def test_an_encoder_is_given_as_many_patches_as_it_asks_for() -> None:
    class Plain:
        identity = EncoderIdentity("plain", 1, {})

        def encode(self, patches: np.ndarray) -> np.ndarray:
            return np.zeros((len(patches), 1), np.float32)

    assert patches_at_once([Plain()]) == 64
    assert patches_at_once([Device()]) == 5
    assert patches_at_once([Plain(), Device()]) == 64
    assert start_encoding(Plain(), _patches(3, 1))().shape == (3, 1)
