"""Where embeddings are projected: the same values, and a device that is not there is refused before anything is read."""

from pathlib import Path

import numpy as np
import pytest
import torch

from featurestore.errors import EncoderError
from histosge.models.prediction_device import multiply_on, prediction_device, project
from histosge.prediction.predict import PredictSettings, predict


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_torch_projects_as_numpy_does() -> None:
    rng = np.random.default_rng(5)
    values, weight = rng.standard_normal((17, 29), np.float32), rng.standard_normal((29, 11), np.float32)
    # Embeddings may be a view of what was read, which torch must neither refuse nor change.
    values.flags.writeable = False
    np.testing.assert_allclose(multiply_on(torch.device("cpu"), values, weight), values @ weight, atol=1e-5)
    np.testing.assert_array_equal(project(values, weight), values @ weight)


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    values = np.ones((3, 5), np.float32)
    with prediction_device("auto"):
        np.testing.assert_array_equal(project(values, values.T), values @ values.T)


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="sees 0 CUDA devices: use auto or cpu"):
        predict(tmp_path / "store", tmp_path / "model", tmp_path / "out", PredictSettings(device="cuda"))
    with pytest.raises(EncoderError, match="unknown device 'tpu'"), prediction_device("tpu"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_gpu_projects_as_the_cpu_does() -> None:
    values = np.random.default_rng(7).standard_normal((1024, 1536), np.float32)
    weight = np.ascontiguousarray(values[:150].T)
    with prediction_device("cuda"):
        found = project(values, weight)
    np.testing.assert_allclose(found, values @ weight, rtol=1e-4, atol=1e-3)
