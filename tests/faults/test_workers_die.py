"""Processes are killed for real; the next run finishes, and the store is what an undisturbed run makes."""

import os
import random
import signal
import time
from pathlib import Path

import dask
import pytest
from distributed import Client
from running import OPTIONS, Cluster, Start, blocks, contents, wait_for_blocks, wait_until

from featurestore.embedding.dask_clients import scheduler_loss_as_error
from featurestore.errors import ClusterError
from featurestore.storage.catalogue import catalogue
from featurestore.storage.validation import validate

pytestmark = pytest.mark.e2e  # tests/histosge/prediction/test_dask_cluster.py kills workers by default
CLUSTER = ("--workers", 2)
COLOUR = ("--encoder", "colour")


def test_two_workers_make_the_store_that_one_process_makes(
    start: Start, sheet: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    code, out, err = start("embed", sheet, tmp_path / "store", *OPTIONS, *CLUSTER, "--quiet").wait()
    assert (code, err) == (0, "")
    assert contents(tmp_path / "store") == undisturbed
    code, out, _ = start("embed", sheet, tmp_path / "store", *OPTIONS, *CLUSTER).wait()
    assert code == 0
    assert out.count("nothing to do") == 3


def test_a_worker_killed_in_the_middle_costs_nothing_but_time(
    start: Start, sheet: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    store = tmp_path / "store"
    run = start("embed", sheet, store, *OPTIONS, *CLUSTER)
    wait_for_blocks(run, store)
    workers = run.workers()
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    code, _, err = run.wait()
    assert code == 0, err
    assert contents(store) == undisturbed


def test_a_run_killed_whole_goes_on_with_the_missing_blocks(
    start: Start, sheet: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    store = tmp_path / "store"
    run = start("embed", sheet, store, *OPTIONS, *CLUSTER)
    wait_for_blocks(run, store, 3)
    run.kill_group()
    done = {path: path.stat().st_mtime_ns for path in blocks(store)}
    total = sum("/embedding/c/" in name for name in undisturbed)
    assert 3 <= len(done) < total
    code, out, err = start("embed", sheet, store, *OPTIONS, *CLUSTER).wait()
    assert code == 0, err
    computed = sum(int(line.split()[1]) for line in out.splitlines() if "blocks computed" in line)
    assert computed == total - len(done)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert contents(store) == undisturbed


def test_kills_at_random_moments_change_nothing(
    start: Start, sheet: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    store, moments, seen = tmp_path / "store", random.Random(5), []

    def n_files() -> int:
        return sum(path.is_file() for path in store.rglob("*"))

    for number in range(20):
        # After some more files, not after some time: how much a run writes in a second depends on the machine's load.
        wanted = n_files() + moments.randrange(6)
        run = start("embed", sheet, store, *OPTIONS, *(CLUSTER if number % 2 else ()))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and n_files() < wanted and run.process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        if run.process.poll() is not None:
            run.wait()  # it has finished the store
            break
        run.kill_group()
        seen.append(len(blocks(store)))
    assert len(seen) > 5
    assert seen[-1] > 0
    assert seen == sorted(seen)
    code, _, err = start("embed", sheet, store, *OPTIONS, *CLUSTER).wait()
    assert code == 0, err
    assert contents(store) == undisturbed
    assert validate(str(store), deep=True) == []


def test_two_runs_at_once_make_one_whole_store(
    start: Start, sheet: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    store = tmp_path / "store"
    runs = [start("embed", sheet, store, *OPTIONS) for _ in range(2)]
    for run in runs:
        code, _, err = run.wait()
        assert code == 0, err
    assert contents(store) == undisturbed


def test_leftovers_of_killed_writes_are_swept_once_they_are_old(
    start: Start, sheet: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    assert start("embed", sheet, store, *OPTIONS, *COLOUR).wait()[0] == 0
    folder = next(iter(blocks(store))).parent
    old, young = (folder / f"0.{'ab' * 16}{i}.partial" for i in range(2))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 86400,) * 2)
    assert start("embed", sheet, store, *OPTIONS, *COLOUR).wait()[0] == 0
    assert (old.exists(), young.exists()) == (False, True)


def test_clocks_and_dates_of_files_play_no_part(start: Start, sheet: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert start("embed", sheet, store, *OPTIONS, *COLOUR).wait()[0] == 0
    for number, path in enumerate([*sheet.parent.glob("*.tif"), *blocks(store)]):
        os.utime(path, ((-1) ** number * 1e9 + 1.2e9,) * 2)
    code, out, _ = start("embed", sheet, store, *OPTIONS, *COLOUR).wait()
    assert code == 0
    assert out.count("nothing to do") == 3


POISON = """
import os
import imagecodecs
honest = imagecodecs.png_decode
def deadly(data, *a, **k):
    if b"poison" in data:
        os.kill(os.getpid(), 9)
    return honest(data, *a, **k)
imagecodecs.png_decode = deadly
"""


def test_a_slide_that_kills_whoever_reads_it_is_reported_and_the_others_are_finished(
    start: Start, sheet: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(POISON)
    (tmp_path / "poison.png").write_bytes(b"\x89PNG\r\n\x1a\n poison")
    rows = [line.split(",")[1] for line in sheet.read_text().splitlines()[1:]]
    poisoned = tmp_path / "sheet.csv"
    lines = [f"S{i + 1},{sheet.parent / name},0.5" for i, name in enumerate(rows)]
    poisoned.write_text(
        "\n".join(["slide_id,slide,mpp", lines[0], f"P,{tmp_path / 'poison.png'},0.5", *lines[1:]])
    )
    store = tmp_path / "store"
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    run = start("embed", poisoned, store, *OPTIONS, *CLUSTER, PYTHONPATH=path)
    code, out, err = run.wait()
    assert code == 1, err
    assert "P: failed: " in out
    assert "kills the process that reads it" in out, out
    state = {row["slide"]: row["state"] for row in catalogue(str(store)).to_dicts()}
    assert state == {"S1": "done", "S2": "done", "S3": "done", "P": "failed"}
    whole = {name: data for name, data in contents(store).items() if "embedding/c/" in name}
    assert whole == {name: data for name, data in undisturbed.items() if "embedding/c/" in name}


def test_a_truncated_slide_costs_only_itself(
    start: Start, sheet: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    names = sorted(sheet.parent.glob("S*.tif"))
    cut = tmp_path / "cut.tif"
    whole = names[0].read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    text = "\n".join(["slide_id,slide", f"cut,{cut}", *(f"{p.stem},{p}" for p in names)])
    (tmp_path / "sheet.csv").write_text(text)
    store = tmp_path / "store"
    code, _, err = start("embed", tmp_path / "sheet.csv", store, *OPTIONS, *CLUSTER).wait()
    rows = {row["slide"]: row for row in catalogue(str(store)).to_dicts()}
    assert [rows[p.stem]["state"] for p in names] == ["done"] * 3
    lost = rows["cut"]
    assert (lost["state"], code) == ("failed", 1) or (lost["unreadable"] > 0 and code == 0), err
    assert {n: d for n, d in contents(store).items() if n.startswith("S2/")} == {
        n: d for n, d in undisturbed.items() if n.startswith("S2/")
    }


def test_a_scheduler_that_dies_is_said_in_one_line_and_the_command_repeated_goes_on(
    start: Start, sheet: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    store = tmp_path / "store"
    first = Cluster(tmp_path, threads=2)
    try:
        run = start("embed", sheet, store, *OPTIONS, "--scheduler", first.address)
        wait_for_blocks(run, store)
        first.kill()
        code, _, err = run.wait()
    finally:
        first.kill()
    assert code == 2, err
    assert err.strip().splitlines()[-1].startswith("error: the scheduler went away")
    assert "Traceback" not in err, err
    second = Cluster(tmp_path, threads=2)
    try:
        code, _, err = start("embed", sheet, store, *OPTIONS, "--scheduler", second.address).wait()
    finally:
        second.kill()
    assert code == 0, err
    assert contents(store) == undisturbed


def test_a_scheduler_without_workers_is_said_and_the_work_waits_for_one(
    start: Start, sheet: Path, tmp_path: Path
) -> None:
    store, cluster = tmp_path / "store", Cluster(tmp_path)
    try:
        cluster.processes[1].kill()
        with Client(cluster.address, timeout=120) as client:
            wait_until(lambda: not client.nthreads())
        options = (*OPTIONS, *COLOUR, "--scheduler", cluster.address)
        run = start("embed", sheet, store, *options)
        line = run.process.stderr.readline()
        assert line == (
            f"warning: the scheduler at {cluster.address} has no workers yet: the work waits until one joins\n"
        )
        assert not store.exists()
        cluster.start_worker()
        code, _, err = run.wait()
    finally:
        cluster.kill()
    assert code == 0, err
    assert validate(str(store)) == []


def test_a_scheduler_that_dies_while_a_result_is_fetched_is_said_and_a_workers_own_error_is_not_taken_for_it(
    tmp_path: Path,
) -> None:
    cluster = Cluster(tmp_path)
    try:
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
            Client(cluster.address, timeout=120) as client,
        ):
            with pytest.raises(FileNotFoundError), scheduler_loss_as_error(client):
                client.submit(open, "no such file").result()
            future = client.submit(pow, 3, 2)
            wait_until(future.done)
            cluster.kill()
            wait_until(lambda: client.status != "running")
            with (
                pytest.raises(ClusterError, match="the scheduler went away"),
                scheduler_loss_as_error(client),
            ):
                client.sync(client.scheduler.identity)
            with (
                pytest.raises(ClusterError, match="the scheduler went away"),
                scheduler_loss_as_error(client),
            ):
                future.result()
    finally:
        cluster.kill()


def test_a_scheduler_that_is_not_there_is_said(start: Start, sheet: Path, tmp_path: Path) -> None:
    code, _, err = start("embed", sheet, tmp_path / "s", *OPTIONS, "--scheduler", "tcp://127.0.0.1:9").wait()
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: no scheduler answers at tcp://127.0.0.1:9")
    assert not (tmp_path / "s").exists()
