"""What `deploy` holds is linted, and its scripts run: with stand-ins for SLURM's and Nextflow's own part only."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from featurestore.slides.sample_sheet import read_samples
from featurestore.storage.catalogue import catalogue
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort

DEPLOY = Path(__file__).parents[2] / "deploy"
SLURM = DEPLOY / "slurm"
SHELL_SCRIPTS = sorted(SLURM.glob("*.sh"))
OPTIONS = ("--encoder", "colour", "--mpp", "0.5", "--patch", "64", "--stride", "24", "--quiet")
PROCESS = re.compile(r"^process (\w+) \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)


def _tool(name: str) -> str:
    """Return a linter that pip installs beside Python."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, f"{name} is missing: pip install -e '.[dev]'"
    return found


def _bash(code: str, folder: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-euc", code],
        cwd=folder,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides and their sheet, and `histosge`, `sheet_part.py` and SLURM's `srun` in a folder `bin`."""
    folder = tmp_path_factory.mktemp("cohort")
    spec = SyntheticSpec(size_px=(900, 800), genes=GeneCounts(2, 1, 1, 1))
    make_cohort(folder, spec, 3)
    commands = {
        "histosge": f'exec {sys.executable} -m histosge_cli "$@"',
        "python3": f'exec {sys.executable} "$@"',
        "sheet_part.py": f'exec {sys.executable} {DEPLOY / "sheet_part.py"} "$@"',
        # As in a job of two tasks.
        "srun": '"$@" & "$@" & trap "kill $(jobs -p | xargs); wait" TERM; wait',
    }
    (folder / "bin").mkdir()
    for name, line in commands.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder


@pytest.fixture
def path(cohort: Path) -> dict[str, str]:
    return {
        "PATH": f"{cohort / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


# ---------------------------------------------------------------- lint


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda script: script.name)
def test_shell_scripts_are_clean(script: Path) -> None:
    done = subprocess.run([_tool("shellcheck"), script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def test_dockerfile_is_clean() -> None:
    done = subprocess.run(
        [_tool("hadolint"), "--no-color", "--failure-threshold", "style", DEPLOY / "Dockerfile"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def _script(process: str, section: str, **values: object) -> str:
    """Return the shell code of a Nextflow process, with the values that Nextflow would put in."""
    text = dict(PROCESS.findall((DEPLOY / "nextflow" / "modules" / "histosge.nf").read_text()))[process]
    code = re.search(rf'^    {section}:\n.*?"""\n(.*?)"""', text, re.MULTILINE | re.DOTALL)
    assert code, f"{process} has no {section}"

    def fill(found: "re.Match[str]") -> str:
        return str(values[found[1]])

    return re.sub(r"(?<!\\)\$\{([\w.]+)\}", fill, code[1]).replace("\\$", "$")


PARAMS = {"params.parts": 2, "params.encoder": "colour", "params.mpp": 0.5, "params.patch": 64}


def _embed_part(part: int, samples: object, store: object) -> dict[str, object]:
    return {**PARAMS, "part": part, "samples": samples, "store": store, "args": "--stride 24"}


def test_nextflow_processes_are_complete_and_their_shell_code_clean(tmp_path: Path) -> None:
    processes = PROCESS.findall((DEPLOY / "nextflow" / "modules" / "histosge.nf").read_text())
    included = re.search(
        r"^include \{ (.+) \} from '\./modules/histosge'",
        (DEPLOY / "nextflow" / "main.nf").read_text(),
        re.MULTILINE,
    )
    assert included
    assert set(included[1].split("; ")) == {name for name, _ in processes}
    values = {**_embed_part(0, "cohort.csv", "store"), "model": "model", "maps": "maps", "task.cpus": 2}
    for name, text in processes:
        for directive in ("container ", "cpus ", "memory ", "time ", "input:", "output:", "stub:"):
            assert re.search(rf"^    {directive}", text, re.MULTILINE), f"{name} has no {directive}"
        for section in ("script", "stub"):
            code = tmp_path / f"{name}-{section}.sh"
            code.write_text("#!/usr/bin/env bash\nset -eu\n" + _script(name, section, **values))
            done = subprocess.run([_tool("shellcheck"), code], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


def test_nextflow_parameters_are_declared() -> None:
    """The braces of each file balance, and each parameter that is used has a default."""
    files = [*(DEPLOY / "nextflow").rglob("*.nf"), DEPLOY / "nextflow" / "nextflow.config"]
    text = "".join(file.read_text() for file in files)
    block = re.search(r"^params \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    assert block
    declared = set(re.findall(r"^    (\w+) +=", block[1], re.MULTILINE))
    assert set(re.findall(r"\bparams\.(\w+)", text)) == declared
    for file in files:
        assert file.read_text().count("{") == file.read_text().count("}"), file


# ---------------------------------------------------------------- the scripts run


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    """Three rows whose slides exist, which is all that a sheet is checked for."""
    for name in "abc":
        (tmp_path / f"{name}.svs").touch()
    (tmp_path / "cohort.csv").write_text("slide;mpp\na.svs;0,25\nb.svs;\nc.svs;\n")
    return tmp_path / "cohort.csv"


Part = Callable[..., tuple[int, str, str]]


@pytest.fixture
def part_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Part:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["sheet_part.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(DEPLOY / "sheet_part.py"), run_name="__main__")
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_parts_of_a_sheet_are_disjoint_and_complete(sheet: Path, part_of: Part, tmp_path: Path) -> None:
    rows = []
    for part in range(2):
        code, text, _ = part_of(sheet, part, 2)
        assert code == 0
        file = tmp_path / "elsewhere" / f"{part}.csv"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        rows.append(read_samples(file))
    assert [[row.slide_id for row in part] for part in rows] == [["a", "c"], ["b"]]
    assert sorted(rows[0] + rows[1], key=lambda row: row.slide_id) == read_samples(sheet)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("{sheet}", 3, 4), 3, ""),
        (("{sheet}", 4, 4), 2, "PART from 0 to PARTS - 1"),
        (("{sheet}",), 2, "usage:"),
        (("absent.csv", 0, 1), 2, "there is no sample sheet"),
    ],
)
def test_an_empty_part_and_wrong_arguments(
    sheet: Path, part_of: Part, arguments: tuple[object, ...], code: int, says: str
) -> None:
    done = part_of(*(str(sheet) if one == "{sheet}" else one for one in arguments))
    assert done[:2] == (code, "")
    assert says in done[2]
    assert done[2].count("\n") == bool(says)


@pytest.mark.e2e
def test_the_array_embeds_each_slide_once(cohort: Path, path: dict[str, str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    said = []
    for task in range(5, 9):  # four tasks for three slides; an array may begin at any number
        slurm = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}
        script = f"{SLURM / 'embed_array.sh'} {cohort / 'cohort.csv'} {store} {' '.join(OPTIONS)}"
        done = _bash(script, tmp_path, **path, **slurm, HISTOSGE_DEPLOY=str(DEPLOY))
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "nothing to do" in said[3]
    assert catalogue(str(store))["state"].to_list() == ["done"] * 3


@pytest.mark.e2e
def test_the_dask_job_embeds_and_leaves_no_process(
    cohort: Path, path: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    script = f"{SLURM / 'embed_dask.sh'} {cohort / 'cohort.csv'} {store} {' '.join(OPTIONS)}"
    done = _bash(script, tmp_path, **path, SLURM_CPUS_PER_TASK="1", SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert catalogue(str(store))["state"].to_list() == ["done"] * 3
    assert list(tmp_path.glob("histosge-dask-*")) == []
    listed = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    # Its scheduler file stands in the command lines of the scheduler and of all workers.
    assert str(tmp_path) not in listed


@pytest.mark.parametrize("script", ["embed_array.sh", "embed_dask.sh"])
def test_a_job_without_arguments_says_how_to_submit_it(script: str, tmp_path: Path) -> None:
    done = _bash(str(SLURM / script), tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch")


@pytest.mark.e2e
def test_nextflow_scripts_embed_and_validate(cohort: Path, path: dict[str, str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    logs = []
    for part in range(2):
        task = tmp_path / f"task{part}"
        task.mkdir()
        code = _script("HISTOSGE_EMBED", "script", **_embed_part(part, cohort / "cohort.csv", store))
        done = _bash(code, task, **path)
        assert done.returncode == 0, done.stderr
        logs.append(task / f"embed_{part}.jsonl")
    assert all(log.stat().st_size for log in logs)
    done = _bash(_script("HISTOSGE_VALIDATE", "script", store=store), tmp_path, **path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "store.txt").read_text().count("done") >= 3
    stub = _bash(_script("HISTOSGE_EMBED", "stub", **_embed_part(7, "", "")), tmp_path)
    assert stub.returncode == 0
    assert (tmp_path / "embed_7.jsonl").is_file()


# ---------------------------------------------------------------- the image


def _instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile's first stage, each with its text on one line."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line]
    stages = [at for at, (word, _) in enumerate(found) if word == "FROM"]
    return found[stages[0] + 1 : stages[1]]


class Image:
    """The first stage, carried out in a folder: an environment of this Python is the base image.

    Two things differ from a build by docker: torch's own index cannot be reached from everywhere, so its option is left
    out, and the options of uv for images (no cache, copies, bytecode) are, which cost minutes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        subprocess.run([sys.executable, "-m", "venv", root / "base"], check=True)
        self.environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("PYTHON") and name != "VIRTUAL_ENV"
        }
        self.environ["PATH"] = f"{root / 'base' / 'bin'}:{self.environ['PATH']}"
        self.environ["UV_SYSTEM_CERTS"] = "true"  # as pip does: a proxy may have a certificate of its own
        if "PIP_FIND_LINKS" in self.environ:  # where local wheels are: uv does not read pip's settings
            self.environ["UV_FIND_LINKS"] = self.environ["PIP_FIND_LINKS"]
        self.folder = root

    def path(self, text: str) -> str:
        return text.replace("/opt/histosge", str(self.root / "opt" / "histosge"))

    def carry_out(self, word: str, text: str) -> None:
        if word in ("ARG", "ENV"):
            pairs = dict(pair.split("=", 1) for pair in self.path(text).split() if "=" in pair)
            self.environ |= {name: value for name, value in pairs.items() if not name.startswith("UV_")}
        elif word == "WORKDIR":
            self.folder = self.root / text.strip("/")
            self.folder.mkdir(parents=True)
        elif word == "COPY":
            *sources, target = [self.path(part) for part in text.split() if not part.startswith("--")]
            for source in sources:
                self.copy(DEPLOY.parent / source, self.folder / target)
        elif word == "RUN":
            code = text.replace("--torch-backend cpu", "")
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code],
                cwd=self.folder,
                env=self.environ,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{text}\n{done.stderr[-2000:]}"
        else:
            assert word == "SHELL", word

    @staticmethod
    def copy(source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


@pytest.mark.slow
def test_the_steps_of_the_image_make_an_environment_that_works(
    sheet: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("image")
    image = Image(root)
    try:
        for word, text in _instructions():
            image.carry_out(word, text)
        commands = root / "opt" / "histosge" / "bin"
        doctor = subprocess.run(
            [commands / "histosge", "doctor"], cwd=root, env=image.environ, capture_output=True, text=True
        )
        assert doctor.returncode == 0, doctor.stderr
        assert re.search(r"^encoder +colour: ready", doctor.stdout, re.MULTILINE)
        assert re.search(r"^s3fs +\d", doctor.stdout, re.MULTILINE)
        where = [
            commands / "python",
            "-c",
            "import featurestore, histosge_cli; print(featurestore.__file__, histosge_cli.__file__)",
        ]
        found = subprocess.run(where, cwd=root, env=image.environ, capture_output=True, text=True, check=True)
        assert all(path.startswith(str(commands.parent)) for path in found.stdout.split())
        part = subprocess.run(
            [commands / "python", commands / "sheet_part.py", sheet, "0", "1"],
            env=image.environ,
            capture_output=True,
            text=True,
            check=True,
        )
        assert part.stdout.count("\n") == 4
        image.environ["DEVICE"] = "gpu"
        with pytest.raises(AssertionError, match="DEVICE is cpu or cuda, not gpu"):
            image.carry_out(*next(one for one in _instructions() if "DEVICE" in one[1] and one[0] == "RUN"))
    finally:
        shutil.rmtree(root)  # half a gigabyte or more


def test_what_the_image_copies_is_there_and_is_not_ignored() -> None:
    kept = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    copied = {
        source
        for word, text in _instructions()
        if word == "COPY"
        for source in [part for part in text.split() if not part.startswith("--")][:-1]
    }
    assert copied == kept
    assert all((DEPLOY.parent / source).exists() for source in copied)
