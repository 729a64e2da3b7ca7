"""A network behind the protocol: arithmetic, memory that runs out, vectors that are no numbers."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from featurestore.encoders.loading import load_encoder
from featurestore.encoders.network_encoder import CPU_CHUNK, NetworkEncoder
from featurestore.encoders.precision import cpu_has_bf16, device_dtypes, pick_precision
from featurestore.encoders.preprocessing import Preprocess
from featurestore.encoders.protocol import EncoderIdentity, EncoderOptions
from featurestore.encoders.records import Preprocessing
from featurestore.errors import EncoderError

CPU = torch.device("cpu")
KEY = "timm:test_vit"
needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no bf16")


def _patches(n: int, side: int = 160) -> np.ndarray:
    coarse = np.random.default_rng(n).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((1, side // 8, side // 8, 1), np.uint8))


def _options(precision: str) -> EncoderOptions:
    return EncoderOptions(random_weights=True, device="cpu", precision=precision)


@pytest.mark.parametrize(
    ("wanted", "advised", "able", "picked"),
    [
        ("auto", "fp32", ("fp32", "bf16"), "fp32"),
        ("auto", "fp16", ("fp32", "bf16"), "bf16"),
        ("auto", "bf16", ("fp32",), "fp32"),
        ("bf16", "fp32", ("fp32", "bf16"), "bf16"),
        ("fp32", "fp16", ("fp32", "bf16"), "fp32"),
    ],
)
def test_the_arithmetic_follows_the_wish_then_the_advice_then_the_device(
    wanted: str, advised: str, able: tuple[str, ...], picked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurestore.encoders.precision.cpu_has_bf16", lambda: "bf16" in able)
    assert device_dtypes(CPU) == able
    assert pick_precision(wanted, advised, CPU) == picked


@pytest.mark.parametrize("wanted", ["fp16", "int8"])
def test_an_arithmetic_that_the_device_is_no_good_for_is_refused(wanted: str) -> None:
    with pytest.raises(EncoderError, match=f"'{wanted}'.*fp32"):
        load_encoder(KEY, _options(wanted))


@needs_bf16
def test_bf16_is_close_to_fp32_and_another_identity() -> None:
    patches = _patches(7)
    half, full = (load_encoder(KEY, _options(precision)) for precision in ("bf16", "fp32"))
    a, b = (torch.from_numpy(encoder.encode(patches)) for encoder in (half, full))
    assert not torch.equal(a, b)
    assert torch.cosine_similarity(a, b).min() > 0.999
    assert half.identity.fingerprint != full.identity.fingerprint
    assert half.identity.facts["dtype"] == "bf16"


@needs_bf16
def test_in_bf16_too_a_vector_depends_on_its_own_patch_alone_bit_for_bit() -> None:
    encoder = load_encoder(KEY, _options("bf16"))
    patches = _patches(37)
    together = encoder.encode(patches)
    for size in (1, 5, 23):
        parts = [encoder.encode(patches[i : i + size]) for i in range(0, len(patches), size)]
        assert np.array_equal(np.concatenate(parts), together), size


def _hungry(most: int, asked: list[int]) -> NetworkEncoder:
    """Return an encoder whose network has memory for so many patches."""

    def network(images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        if len(images) > most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return images.mean((2, 3))

    how = Preprocessing(32, None, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return NetworkEncoder(EncoderIdentity("hungry", 3), network, Preprocess(how, CPU), CPU, "fp32")


def test_out_of_memory_halves_the_batch_and_says_it_once() -> None:
    asked: list[int] = []
    encoder = _hungry(5, asked)
    patches = _patches(11, 32)
    with pytest.warns(UserWarning, match="out of memory, going on with") as said:
        found = encoder.encode(patches)
    assert [str(one.message).split()[-4] for one in said] == ["8", "4"]
    assert asked[:3] == [CPU_CHUNK, CPU_CHUNK // 2, CPU_CHUNK // 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = encoder.encode(patches)
    assert np.array_equal(found, again)
    expected = (patches.astype(np.float32) / 255 - 0.5).mean((1, 2)) / 0.5
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_memory_for_not_even_one_patch_is_refused() -> None:
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(EncoderError, match="too little memory for a single patch"),
    ):
        _hungry(0, []).encode(_patches(3, 32))


OUT_OF_MEMORY = """
import resource, warnings
import numpy as np
import torch
from featurestore.encoders.protocol import EncoderOptions
from featurestore.encoders.loading import load_encoder
torch.set_num_threads(1)
encoder = load_encoder("timm:vit_tiny_patch16_224", EncoderOptions(random_weights=True, device="cpu"))
patches = np.zeros((16, 224, 224, 3), np.uint8)
expected = encoder.encode(patches)
for room in range(100_000_000, 0, -4_000_000):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, -1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = encoder.encode(patches)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    if said:
        break
print(len(said), encoder.chunk, np.abs(found - expected).max() < 1e-4)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_process_whose_memory_really_ends_goes_on_with_smaller_batches() -> None:
    # Else the allocator keeps what was freed, and the limit is never felt.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    said, chunk, same = done.stdout.split()
    assert int(said) >= 1
    assert int(chunk) < CPU_CHUNK
    assert same == "True"


@pytest.mark.e2e
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_openvino_gives_torch_s_vectors_under_an_identity_of_its_own(precision: str) -> None:
    patches = _patches(19)
    options = _options(precision)
    ours, theirs = (load_encoder(KEY, replace(options, engine=engine)) for engine in ("openvino", "torch"))
    a, b = (torch.from_numpy(encoder.encode(patches)) for encoder in (ours, theirs))
    assert torch.cosine_similarity(a, b).min() > (0.999999 if precision == "fp32" else 0.999)
    assert ours.identity.fingerprint != theirs.identity.fingerprint
    parts = [ours.encode(patches[i : i + 5]) for i in range(0, len(patches), 5)]
    assert np.array_equal(np.concatenate(parts), a.numpy())


def test_an_engine_that_is_not_there_is_refused() -> None:
    with pytest.raises(EncoderError, match="unknown engine 'tpu'"):
        load_encoder(KEY, replace(_options("fp32"), engine="tpu"))
    with pytest.raises(EncoderError, match="--engine torch"):
        load_encoder(KEY, replace(_options("fp32"), engine="openvino", compile=True))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch compiles with parts of its own that it deprecates
def test_a_compiled_network_gives_the_same_vectors() -> None:
    patches = _patches(19)
    compiled = load_encoder(KEY, replace(_options("fp32"), compile=True))
    a, b = (torch.from_numpy(e.encode(patches)) for e in (compiled, load_encoder(KEY, _options("fp32"))))
    assert torch.cosine_similarity(a, b).min() > 0.999999
    assert np.array_equal(compiled.encode(patches[:5]), a.numpy()[:5])


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EncoderError, match=r"needs a C\+\+ compiler"):
        load_encoder(KEY, replace(_options("fp32"), compile=True))


def test_batch_is_the_size_of_a_pass_and_what_is_handed_over_is_whole_passes() -> None:
    asked: list[int] = []

    def network(images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return images.mean((2, 3))

    how = Preprocessing(32, None, "bilinear", (0.5,) * 3, (0.5,) * 3)
    identity = EncoderIdentity("mean", 3, {})
    chosen = NetworkEncoder(identity, network, Preprocess(how, CPU), CPU, "fp32", batch=11)
    assert (chosen.chunk, chosen.batch) == (11, 55)
    patches = _patches(13, 32)
    np.testing.assert_allclose(chosen.encode(patches), patches.mean((1, 2)) / 127.5 - 1, atol=1e-5)
    assert asked == [11, 11]
    assert NetworkEncoder(identity, network, Preprocess(how, CPU), CPU, "fp32").batch == 64
    assert load_encoder(KEY, replace(_options("fp32"), batch=7)).chunk == 7  # type: ignore[attr-defined]
