"""HEST-Benchmark's own code beside `evaluate --protocol hest --bench`, on one synthetic task and the same embeddings.

    python benchmarks/hest_bench.py [--authors CHECKOUT] [--quick] [--json FILE]

CHECKOUT is a clone of the public repository mahmoodlab/HEST: its own functions (``src/hest/bench/benchmark.py``:
`predict_folds`, with what they import from its folder) are run on the published layout. Only what they import and do
not need here is stood in for: the model zoo, logging and the downloads. Without it, ours alone. The tasks are the one of
the tests (tests/histosge/make_hest.py), and a larger one with embeddings of 600 numbers.
"""

import argparse
import sys
import tempfile
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from _common import Result, report
from numpy.typing import NDArray

from histosge.evaluation.hest_bench import BenchTask, read_sample, read_task
from histosge.evaluation.hest_evaluation import PUBLISHED, score_task

# The task of the tests, in whose folder its writer is.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "histosge"))
from make_hest import colour_vectors, write_bench


def authors_scores(checkout: Path, task: Path, embeddings: Path) -> list[float]:
    """Return the mean Pearson of each split by the authors' own code.

    Parameters
    ----------
    embeddings
        Folder of ``ID.h5`` with `embeddings` and `barcodes`: where their code looks before it encodes.
    """
    benchmark = _authors_module(checkout)
    # What their command line would give: see `BenchmarkConfig` in their file. Their PCA refuses more components than
    # there are numbers.
    with h5py.File(next(embeddings.iterdir())) as file:
        width = int(file["embeddings"].shape[1])
    settings = benchmark.BenchmarkConfig(
        bench_data_root=str(task.parent),
        embed_dataroot=str(embeddings.parents[1]),
        weights_root="",
        latent_dim=min(256, width),
    )
    args = Namespace(**vars(settings))
    benchmark.get_bench_weights = lambda *_: None
    benchmark.inf_encoder_factory = lambda *_: (
        lambda *_: types.SimpleNamespace(precision=None, eval=lambda: None, to=lambda *_: None)
    )
    results = embeddings.parents[1] / "results"
    results.mkdir(exist_ok=True)
    found = benchmark.predict_folds(args, str(results), embeddings.name, task.name, "cpu", str(task), None)
    return [float(value) for value in found["mean_per_split"]]


def _authors_module(checkout: Path) -> Any:
    """Import their module; packages of theirs that only download or load networks are empty here."""
    empty: dict[str, tuple[str, ...]] = {
        "hestcore": (),
        "hestcore.segmentation": ("get_path_relative",),
        "hestcore.datasets": ("H5HESTDataset",),
        "huggingface_hub": ("snapshot_download",),
        "loguru": (),
        "hest": (),
        "hest.bench": (),
        "hest.bench.cpath_model_zoo": (),
        "hest.bench.cpath_model_zoo.inference_models": (
            *("CustomInferenceEncoder", "InferenceEncoder", "inf_encoder_factory"),
        ),
    }
    for name, attributes in empty.items():
        module = types.ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, lambda *_, **__: "")
        sys.modules[name] = module
    sys.modules["loguru"].logger = types.SimpleNamespace(info=print)  # type: ignore[attr-defined]
    source = checkout / "src" / "hest"
    sys.modules["hest"].__path__ = [str(source)]
    sys.modules["hest.bench"].__path__ = [str(source / "bench")]
    import torch.utils.data

    benchmark = types.ModuleType("hest.bench.benchmark")
    # Their annotations name it without importing it.
    benchmark.DataLoader = torch.utils.data.DataLoader  # type: ignore[attr-defined]
    sys.modules[benchmark.__name__] = benchmark
    code = (source / "bench" / "benchmark.py").read_text()
    exec(compile(code, "benchmark.py", "exec"), benchmark.__dict__)  # the authors' own module
    # Their paths are below the checkout; ours are absolute.
    benchmark.get_path = lambda path: path  # type: ignore[attr-defined]
    return benchmark


def write_embeddings(task: BenchTask, vectors: dict[str, NDArray[np.float32]], folder: Path) -> None:
    """Write embeddings where the authors' code looks for them."""
    folder.mkdir(parents=True)
    for sample_id, sample in task.samples.items():
        with h5py.File(folder / f"{sample_id}.h5", "w") as file:
            file["embeddings"] = vectors[sample_id]
            file["barcodes"] = read_sample(sample).barcodes[:, None].astype("S")


def embed(task: BenchTask, *, wide: bool) -> dict[str, NDArray[np.float32]]:
    """Return vectors of the patches: mean and spread of their colours, or these widened to 600 numbers.

    By no encoder, so that no change of one moves the values that the tests compare with. So wide that scikit-learn takes
    its randomised principal components, as with the networks of the benchmark's table.
    """
    rng = np.random.default_rng(1)
    mix, found = rng.standard_normal((6, 600)), {}
    for sample_id, sample in task.samples.items():
        colours = colour_vectors(sample.patches)
        noise = rng.standard_normal((len(colours), 600))
        found[sample_id] = (colours / 30 @ mix + noise).astype(np.float32) if wide else colours
    return found


def main() -> None:
    """Score both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--authors", metavar="CHECKOUT", type=Path, help="clone of mahmoodlab/HEST")
    parser.add_argument("--quick", action="store_true", help="the small task alone")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures here")
    given = parser.parse_args()
    results: list[Result] = []
    cases: dict[str, dict[str, int]] = {"IDC": {}}
    if not given.quick:
        cases["LARGE"] = {"n_spots": 397, "patients": 4}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, size in cases.items():
            task = read_task(write_bench(folder / "bench" / name, **size).parent, name)
            vectors = embed(task, wide=name == "LARGE")
            spots = {sample_id: read_sample(sample) for sample_id, sample in task.samples.items()}
            scores = score_task(task, spots, vectors).scores
            ours = scores.filter(scores["metric"] == PUBLISHED)["value"].to_list()
            results += [Result(f"{name}, split {i}: ours", value) for i, value in enumerate(ours)]
            if given.authors:
                place = folder / "embeddings" / name / "colour"
                write_embeddings(task, vectors, place)
                theirs = authors_scores(given.authors, task.folder, place)
                results += [Result(f"{name}, split {i}: authors'", value) for i, value in enumerate(theirs)]
                print(name, theirs)  # all digits, for the tests
                worst = float(np.max(np.abs(np.subtract(ours, theirs))))
                results.append(Result(f"max_difference_{name}", worst, "", "<= 1e-06"))
    report("hest_bench", results, given)


if __name__ == "__main__":
    main()
