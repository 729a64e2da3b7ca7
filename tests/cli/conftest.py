"""The command line in this process: exit code, standard output, standard error."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from histosge_cli import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Histosge = Callable[..., Ran]


@pytest.fixture
def histosge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Histosge:
    def run(*arguments: object) -> Ran:
        monkeypatch.setattr("sys.argv", ["histosge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main.main()
        code = stopped.value.code
        return Ran(int(code or 0), *capsys.readouterr())

    return run
