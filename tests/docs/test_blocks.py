"""Every shell and Python block of README and the guide runs, unless the page says above it why not.

A page's blocks run in order, in a folder of their own that holds what a reader would bring: `cohort.csv`
with two small sections (C2, C4), `genes.txt`, and in place of a fresh `histosge demo` one that was made before, smaller.
A block below a file's name in bold is written to that file.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from histosge.demo import run_demo
from histosge.synthetic import GeneCounts, SyntheticSpec, make_section
from histosge_cli import main

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"analysis.md", "extending.md"}
"""Run on a real S3 server by tests/featurestore/analysis/test_analysis.py, and as a package by test_extending.py."""
SMOKE = {"SPEC.md"}
"""Run by default; the others with `pytest --e2e`."""
NOT_A_GUIDE = {"results.md"}
"""Figures on public data, with the commands that made them."""
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in NOT_A_GUIDE),
]
FENCE = re.compile(
    r"(?:^\*\*`(?P<file>\S+)`\*\*\n\n)?(?:<!-- (?P<mark>[^\n]*?) -->\n)?"
    r"^```(?P<kind>python|bash|shell|sh|console)\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
SPEC = SyntheticSpec(size_px=(2400, 2200), genes=GeneCounts(8, 4, 4, 4))
DEMO = "histosge demo"
SIMPLE = re.compile(r"^histosge [^|;&$><`(*\n]*$")


@dataclass(frozen=True)
class Block:
    kind: str
    code: str
    mark: str
    line: int
    file: str

    @property
    def is_run(self) -> bool:
        return not self.mark.startswith("not run:")


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            found["kind"],
            found["code"],
            found["mark"] or "",
            text.count("\n", 0, found.start("code")) + 1,
            found["file"] or "",
        )
        for found in FENCE.finditer(text)
    ]


def with_blocks() -> list[object]:
    pages = [page for page in PAGES if page.name not in ELSEWHERE and any(b.is_run for b in blocks_of(page))]
    e2e = pytest.mark.e2e
    return [pytest.param(page, id=page.name, marks=() if page.name in SMOKE else e2e) for page in pages]


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader would have: a cohort of two sections, a list of genes, and the demo's outputs."""
    folder = tmp_path_factory.mktemp("brought")
    rows = ["slide_id,slide,expression,mpp,donor"]
    for seed, name in enumerate(("C2", "C4")):
        spec = SyntheticSpec(size_px=SPEC.size_px, genes=SPEC.genes, seed=seed)
        section = make_section(folder / "sections", spec, slide_id=name)
        rows.append(f"{name},sections/{section.slide.name},sections/{section.expression.name},0.5,D{seed}")
    (folder / "cohort.csv").write_text("\n".join(rows) + "\n")
    (folder / "genes.txt").write_text("\n".join(SPEC.genes.names()["morphology"]) + "\n")
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "demo"
    run_demo(folder, SyntheticSpec(size_px=(3000, 2800), genes=SPEC.genes))
    return folder


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # of what other packages call within
@pytest.mark.parametrize("page", with_blocks())
def test_every_block_runs(
    page: Path, brought: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(brought, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{_command(tmp_path)}:{os.environ['PATH']}")
    # `--preset module:Class` lets modules of this folder be imported; other pages must not find them.
    monkeypatch.setattr("sys.path", list(sys.path))
    names: dict[str, object] = {"__name__": "page"}
    for block in filter(lambda b: b.is_run, blocks_of(page)):
        where = f"{page.name}:{block.line}"
        if block.file:
            (tmp_path / block.file).write_text(block.code)
            continue
        if block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
            continue
        code = re.sub(r"\\\n\s*", "", block.code)
        lines = [re.sub(r"\s+#.*", "", line) for line in code.splitlines()]
        if any(line.startswith(DEMO) for line in lines):
            shutil.copytree(request.getfixturevalue("demo"), tmp_path / "demo", dirs_exist_ok=True)
            lines = [line for line in lines if not line.startswith(DEMO)]
        lines = [line for line in lines if line and not line.startswith("#")]
        if all(SIMPLE.match(line) for line in lines):
            for line in lines:
                assert _in_process(line, monkeypatch) == 0, f"{where}: {line}"
        else:
            _in_bash("\n".join(lines), where)


def _in_process(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run one command here: a process of its own would spend seconds on imports."""
    monkeypatch.setattr("sys.argv", shlex.split(line))
    with pytest.raises(SystemExit) as stopped:
        main.main()
    return int(stopped.value.code or 0)


def _in_bash(code: str, where: str) -> None:
    done = subprocess.run(["bash", "-euc", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{where}:\n{code}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def _command(folder: Path) -> Path:
    """Put `histosge` and `python` of this interpreter on a path."""
    commands = folder / ".bin"
    commands.mkdir()
    for name, words in {"histosge": f"{sys.executable} -m histosge_cli", "python": sys.executable}.items():
        file = commands / name
        file.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        file.chmod(0o755)
    return commands


def test_what_is_not_run_says_why() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            if block.mark.startswith("not run"):
                assert re.fullmatch(r"not run: \w.{5,}", block.mark), (
                    f"{page.name}:{block.line}: {block.mark}"
                )


def test_every_fenced_block_is_seen() -> None:
    """A language that the extractor does not know would pass silently."""
    known = {"python", "bash", "shell", "sh", "console", "", "toml", "text", "json", "csv", "yaml"}
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert len(fences) % 2 == 0, page.name
        assert {fence.strip() for fence in fences} <= known, page.name


def test_only_blocks_that_need_more_than_this_machine_are_left_out() -> None:
    reasons = {b.mark for page in PAGES for b in blocks_of(page) if not b.is_run}
    allowed = ("needs a", "needs your", "needs lightning", "set-up")
    assert all(any(word in reason for word in allowed) for reason in reasons), reasons


def test_python_that_is_not_run_can_be_compiled() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            if block.kind == "python":
                compile("\n" * block.line + block.code, str(page), "exec")


def test_no_page_uses_words_that_only_the_authors_know() -> None:
    words = r"\b(honours?|leftover|lessons?|taught|shelf|believed|contestants?|surroundings|restaining)\b"
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        assert not re.search(words, page.read_text(), re.IGNORECASE), page.name


def test_no_page_holds_a_blank_to_fill_in() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert not re.search(r"@@\w+@@|TODO|FIXME", page.read_text()), page.name
