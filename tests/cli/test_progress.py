"""What a person sees while a command runs: bars on a terminal, plain lines elsewhere, nothing when quiet; and the help."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main

from featurestore.events import Progress
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge_cli.console import Console
from histosge_cli.main import PANELS, app

Histosge = Callable[..., NamedTuple]
SPEC = SyntheticSpec(size_px=(2400, 2200), genes=GeneCounts(8, 4, 4, 4))
GRID = ("--patch", "112", "--encoder", "colour")
COMMANDS = typer.main.get_command(app).commands


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sections, and a slide that is none."""
    folder = tmp_path_factory.mktemp("cohort")
    sheet = make_cohort(folder, SPEC, 2).sheet
    (folder / "broken.svs").write_text("no slide")
    with sheet.open("a") as file:
        file.write("broken,broken.svs,,0.5,D9\n")
    return sheet


def on_a_terminal(*arguments: object, cwd: Path) -> tuple[int, str]:
    """Run a command whose standard error is a pseudo-terminal; return its code and what it drew."""
    leader, follower = pty.openpty()
    env = {
        **os.environ,
        "TERM": "xterm",
        "COLUMNS": "160",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "histosge_cli", *map(str, arguments)]
    running = subprocess.Popen(command, stderr=follower, stdout=subprocess.DEVNULL, cwd=cwd, env=env)
    os.close(follower)
    drawn = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        drawn += data
    os.close(leader)
    return running.wait(timeout=180), drawn.decode()


@pytest.mark.torch
def test_a_terminal_gets_bars_with_slides_blocks_pace_time_and_failures(sheet: Path, tmp_path: Path) -> None:
    code, drawn = on_a_terminal("embed", sheet, "store", *GRID, cwd=tmp_path)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    assert code == 1  # one slide failed
    assert "\x1b[" in drawn
    assert "━" in text
    assert re.search(r"all .* 3/3 +slides .*patches/s, 1 failed", text)
    assert re.search(r"S1 .* \d+/\d+ +blocks +(-:--:--|\d:\d\d:\d\d) +\d+ patches, \d+ patches/s", text)


def test_a_pipe_gets_plain_lines(histosge: Histosge, sheet: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    ran = histosge("embed", sheet, tmp_path / "store", *GRID, "--log", log)
    assert "\x1b" not in ran.err
    assert re.search(r"^S1: (\d+)/\1 blocks, \d+ patches, \d+ patches/s$", ran.err, re.MULTILINE)
    assert re.search(r"^slides: 3/3, \d+ patches/s, 1 failed, broken failed$", ran.err, re.MULTILINE)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"time", "message"} <= set(record) for record in records)
    blocks = [record for record in records if record["message"] == "progress"]
    assert {record["name"] for record in blocks} == {"S1", "S2"}
    assert [record["state"] for record in records if record["message"] == "slide"] == [
        "done",
        "done",
        "failed",
    ]


def test_many_steps_are_few_lines_and_few_steps_a_line_each(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histosge_cli.console.PLAIN_INTERVAL_S", 1e9)  # however busy the machine is
    for n, lines in ((5, [f"{i}/5 step {i}" for i in range(6)]), (139, ["work: 139/139 steps, step 139"])):
        with Console().steps("work") as on_progress:
            for i in range(n + 1):
                on_progress(Progress(i, n, f"step {i}"))
        assert [line.strip() for line in capfd.readouterr().err.splitlines()] == lines


def test_quiet_is_quiet(histosge: Histosge, sheet: Path, tmp_path: Path) -> None:
    assert histosge("embed", sheet, tmp_path / "store", *GRID, "--quiet").err == ""


@pytest.mark.e2e
def test_the_other_long_commands_tell_too(histosge: Histosge, sheet: Path, tmp_path: Path) -> None:
    (sheet.parent / "two.csv").write_text("\n".join(sheet.read_text().splitlines()[:3]) + "\n")
    two, store = sheet.parent / "two.csv", tmp_path / "store"
    log = ("--log", tmp_path / "log.jsonl")
    assert histosge("embed", two, store, *GRID, "--quiet").code == 0
    trained = histosge("train", two, store, tmp_path / "model", "--preset", "ridge", "--genes", 4, *log)
    assert (trained.code, "spots" in trained.err) == (0, True)
    predicted = histosge("predict", store, tmp_path / "model", tmp_path / "maps", *log)
    assert re.search(r"^S2: (\d+)/\1 blocks", predicted.err, re.MULTILINE)
    asked = histosge("analyse", store, "summary", *log)
    assert re.search(r"^pass 1: 2/2 slides", asked.err, re.MULTILINE)
    code, drawn = on_a_terminal(
        "evaluate", two, store, "report", "--presets", "ridge", "--genes", 4, *log, cwd=tmp_path
    )
    assert code == 0
    assert re.search(r"fits .*━", drawn)
    messages = {json.loads(line)["message"] for line in log[1].read_text().splitlines()}
    assert {"progress", "slide"} <= messages


def leaves() -> list[tuple[str, object]]:
    found = []
    for name, command in COMMANDS.items():
        inner = getattr(command, "commands", None)
        found += [(f"{name} {sub}", c) for sub, c in inner.items()] if inner else [(name, command)]
    return found


@pytest.mark.parametrize(("name", "command"), leaves(), ids=[name for name, _ in leaves()])
def test_every_command_says_what_it_does_with_one_example(name: str, command: object) -> None:
    assert command.help.count("Example: histosge ") == 1  # type: ignore[attr-defined]
    for parameter in command.params:  # type: ignore[attr-defined]
        assert parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize(
    "name", ["demo", "embed", "train", "predict", "evaluate", "analyse pca", "analyse clusters"]
)
def test_long_commands_can_be_quiet_and_logged(name: str) -> None:
    options = {flag for parameter in dict(leaves())[name].params for flag in parameter.opts}  # type: ignore[attr-defined]
    assert {"--quiet", "--log"} <= options


def test_help_shows_the_panels_in_the_order_of_use(histosge: Histosge) -> None:
    shown = histosge("--help").out
    places = [shown.index(panel) for panel in PANELS]
    assert places == sorted(places)
    assert set(COMMANDS) <= {name for names in PANELS.values() for name in names}


def test_the_shell_completes(tmp_path: Path) -> None:
    def complete(words: str, n: int) -> str:
        env = {**os.environ, "_HISTOSGE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(n)}
        code = "import sys; sys.argv = ['histosge']; from histosge_cli.main import main; main()"
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout

    assert {"predict"} <= set(complete("histosge pre", 1).split())
    assert "--stride" in complete("histosge embed --str", 2)
