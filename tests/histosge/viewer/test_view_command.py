"""`histosge view` as a command: what may go wrong is one line with the fix."""

import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from viewer_world import World

from histosge.viewer.server import require_packages
from histosge_cli import main


def _run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["histosge", "view", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return int(stopped.value.code or 0), lines[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w, t: (t / "none",), "make one with: histosge embed"),
        (lambda w, t: (w.store, "--expression", t / "none"), "make one with: histosge predict"),
        (lambda w, t: (w.store, "--expression", w.store), "not a expression store"),
        (lambda w, t: (w.store, "--samples", t / "none.csv"), "there is no sample sheet"),
        (lambda w, t: (w.store, "--domains", t / "none"), "there is no folder of domains"),
        (lambda w, t: (w.store, "--genes", "A"), "--static"),
        (lambda w, t: (w.store, "--port", "70000"), "--port"),
        (lambda w, t: (w.store, "--port", "-1"), "--port"),
        (lambda w, t: (w.store, "--static", t / "o", "--tiles-mpp", 0), "give microns per pixel"),
        (lambda w, t: (w.store, "--static", t / "o", "--tiles-mpp", "nan"), "give microns per pixel"),
        (lambda w, t: (w.store, "--static", "/dev/null"), "is a file, where a folder would go"),
        (lambda w, t: (w.store, "--static", t / ("a" * 300)), "300"),
        (lambda w, t: (w.store, "--static", w.sheet / "below"), "Not a directory"),
        (lambda w, t: (w.store, "--gene-sets", t / "none.gmt"), "there is no file of gene sets"),
        (lambda w, t: (w.store, "--slide", "there"), "holds no slide 'there': it has bare, gone, here"),
        (lambda w, t: (w.store, "--static", w.sheet / "page.html"), "Not a directory"),
        (lambda w, t: (w.store, "--static", t, "--genes", "A"), "neither predicted nor measured"),
        (lambda w, t: (w.store, "--log", t), "log"),
        (lambda w, t: (w.store, "--log", t / "none" / "log"), "log"),
        (lambda w, t: (w.store, "--log", t / ("a" * 300)), "300"),
    ],
)
def test_what_is_not_there_or_makes_no_sense_is_refused(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: "object",
    message: str,
) -> None:
    code, line = _run(monkeypatch, capsys, *make(world, tmp_path))  # type: ignore[operator]
    assert code == 2
    assert message in line


def test_maps_of_other_slides_are_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from histosge.prediction.expression_store import ExpressionStore

    ExpressionStore.open_or_create(str(tmp_path / "other"))
    code, line = _run(monkeypatch, capsys, world.store, "--expression", tmp_path / "other")
    assert code == 2
    assert "has no slide of" in line
    assert "bare, gone, here" in line


def test_a_taken_port_is_said(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        code, line = _run(monkeypatch, capsys, world.store, "--no-open", "--port", other.getsockname()[1])
    assert code == 2
    assert "give another with --port, or --port 0" in line


def test_missing_packages_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"uvicorn.*pip install 'histosge\[view\]'"):
        require_packages()


def test_the_command_serves_the_page_on_a_free_port_until_it_is_interrupted(world: World) -> None:
    command = [sys.executable, "-m", "histosge_cli", "view", str(world.store), "--no-open", "--port", "0"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        address = run.stdout.readline().split()[0]
        with urllib.request.urlopen(f"{address}data/index.json", timeout=120) as answer:
            assert b"here" in answer.read()
    finally:
        run.send_signal(signal.SIGINT)
        _, remarks = run.communicate(timeout=120)
    assert (run.returncode, remarks) == (0, "")
