"""Expression behind a URL: fetched once, and refused in one line that names the URL."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from featurestore.slides.download_cache import ENV_FOLDER
from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame
from histosge.errors import ExpressionError

GETS: list[str] = []


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        GETS.append(self.path)
        if "denied" in self.path:
            self.send_error(403)
            return
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(ENV_FOLDER, str(tmp_path / "cache"))
    (tmp_path / "site").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(tmp_path / "site")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    GETS.clear()
    obs = pd.DataFrame({"library_id": ["C1", "C1", "C2", "C2", "C2"]}, index=list("abcde"))
    data = anndata.AnnData(np.full((5, 2), 3.0, np.float32), obs=obs, obsm={"spatial": np.ones((5, 2))})
    data.write_h5ad(tmp_path / "site" / "a.h5ad")
    (tmp_path / "site" / "cut.h5ad").write_bytes((tmp_path / "site" / "a.h5ad").read_bytes()[:900])
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def find(url: str, slide_id: str = "C2") -> LoadedExpression:
    return find_expression(url, SlideFrame(slide_id, "D", 0.5))


def test_an_h5ad_is_fetched_once_and_its_sections_can_be_named(url: str) -> None:
    assert len(find(f"{url}/a.h5ad").spots) == 3
    assert len(find(f"{url}/a.h5ad?signature=secret", "C1").spots) == 2
    assert len(find(f"{url}/a.h5ad#C1").spots) == 2
    assert GETS.count("/a.h5ad") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.h5ad?signature=secret#C3", r"/a\.h5ad holds 2 sections .*C1, C2.*such as http://.*/a\.h5ad#C1"),
        ("cut.h5ad?signature=secret", r"/cut\.h5ad cannot be read as HDF5"),
        ("gone.h5ad?signature=secret", "there is no expression at http://"),
        ("denied.h5ad?signature=secret", "answers 403"),
        ("run/outs", "copy the whole output folder"),
        ("run/outs/", "copy the whole output folder"),
        ("data.zarr", "copy the whole output folder"),
        ("filtered_feature_bc_matrix.h5?signature=secret", "copy the whole output folder"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_url(url: str, name: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message) as refused:
        find(f"{url}/{name}")
    text = str(refused.value)
    assert "\n" not in text
    assert "secret" not in text
    assert "cache" not in text
