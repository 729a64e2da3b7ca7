import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["featurestore", "histosge", "histosge_cli"])
def test_importing_a_package_loads_neither_torch_nor_dask(package: str) -> None:
    code = f"import sys, {package}; print([m for m in ('torch', 'dask', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_that_a_package_offers_can_be_imported() -> None:
    import featurestore
    import histosge

    for package in (featurestore, histosge):
        for name in package.__all__:
            assert callable(getattr(package, name)), name
