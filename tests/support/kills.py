"""Kills, full disks, folders that cannot be written, and two at once, of everything that writes:

    cd tests && python -m support.kills --kills 500 --seed 1 --out kills.json

``calibration``, ``writer``, ``compile`` and ``ranks`` send SIGKILL at random moments, until so many have hit a process
that was at work, and go on after each one. In the end the store or the plan is that of a job that nobody disturbed;
after every kill a store opens and holds what it says, and a plan is there whole or not at all. Of ``--jobs 4`` one
worker or the whole job is killed, of two ranks one. ``disk``, ``refused`` and ``pairs`` count what ended as it should:
exit code 2 with one line on a file system that is full at any of its sizes or is mounted read-only (both need root),
and one winner of two.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

from calibatt.compiler.stats import Store, StoreWriter
from support import faults, stats
from support.faults import WAIT_SECONDS, add_samplings, compilation, done

TESTS = Path(__file__).parents[1]
FORK = multiprocessing.get_context("fork")


def killed(work: Callable[[], None], after: float) -> bool:
    """Starts a process, kills it after some seconds, and waits until it has ended.

    Args:
        work: What the process does.
        after: Seconds.

    Returns:
        Whether it was still at work.
    """
    job = FORK.Process(target=work)
    job.start()
    job.join(after)
    job.kill()
    job.join()
    return job.exitcode == -signal.SIGKILL


def until(kills: int, rounds: Callable[[Path, random.Random, int], int], seed: int) -> dict[str, int]:
    """Rounds in new folders until so many kills have hit."""
    rng, hit, count = random.Random(seed), 0, 0
    while hit < kills:
        with tempfile.TemporaryDirectory() as folder:
            hit += rounds(Path(folder), rng, kills - hit)
        count += 1
        print(f"{hit} of {kills} kills", file=sys.stderr, flush=True)
    return {"kills": hit, "rounds": count}


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


# A store's writer


def writer_round(folder: Path, rng: random.Random, most: int) -> int:
    hit, path, of = 0, folder / "s", stats.manifest()
    for _ in range(min(most, 40)):
        hit += killed(partial(add_samplings, path), rng.uniform(0.0, 0.08))
        if not path.exists():
            continue
        with StoreWriter.open(path, of) as writer:
            done = writer.done()
            for place in np.ndindex(len(of.times), of.model.layers):
                assert set(done) <= set(writer.unit_samplings(*place))
        assert not list(path.glob("*/.*.tmp"))
        assert not done or Store.open(path).samplings == done
    add_samplings(path)
    add_samplings(folder / "whole")
    _same_units(Store.open(path), Store.open(folder / "whole"), 0.02)
    return hit


def _same_units(found: Store, expected: Store, tolerance: float) -> None:
    assert found.samplings == expected.samplings
    assert not found.unfinished
    for place in np.ndindex(len(found.manifest.times), found.manifest.model.layers):
        a, b = found.unit(*place), expected.unit(*place)
        assert sorted(a.samplings) == sorted(b.samplings)
        np.testing.assert_allclose(a.effect_values(), b.effect_values(), rtol=tolerance, atol=1e-9)
        np.testing.assert_allclose(a.row_effect, b.row_effect, rtol=1e-4)


# Calibration, by one process and by two


def _sampler_command(prompts: int, path: Path) -> list[str]:
    (path.parent / "prompts").write_text("\n".join("abcdefghij"[:prompts]))
    chosen = ["--model", "support.sampler:tiny_sampler", "--prompts", str(path.parent / "prompts"), "--device", "cpu"]
    return [*chosen, "--block-size", "16", "-o", str(path)]


def _calibrate(arguments: list[str]) -> None:
    from calibatt.tools.calibrate.__main__ import main

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        main(arguments, standalone_mode=True)


def calibration_round(folder: Path, rng: random.Random, most: int) -> int:
    import torch

    from support.sampler import tiny_sampler

    torch.set_num_threads(1)
    tiny_sampler(None, "cpu").run("a", 1)  # what is made at first use is made before the processes are
    hit, work = 0, partial(_calibrate, _sampler_command(6, folder / "s"))
    for _ in range(min(most, 25)):
        if not killed(work, rng.uniform(0.02, 0.6)):
            break
        hit += 1
        if (folder / "s" / "samplings").exists() and any((folder / "s" / "samplings").iterdir()):
            Store.open(folder / "s")
    _finish(work, folder)
    return hit


def _finish(work: Callable[[], None], folder: Path) -> None:
    """Goes on to the end, and compares with a store that was made without a kill."""
    for each in (work, partial(_calibrate, _sampler_command(6, folder / "whole"))):
        job = FORK.Process(target=each)
        job.start()
        job.join()
        assert job.exitcode == 0, job.exitcode
    _same_units(Store.open(folder / "s"), Store.open(folder / "whole"), 0.1)


def _rank(rank: int, meeting: Path, arguments: list[str]) -> None:
    """One of two processes as torchrun starts them; they meet at a file instead of a port."""
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    store = dist.FileStore(str(meeting), 2)
    dist.init_process_group = partial(dist.init_process_group, store=store, rank=rank, world_size=2)
    _calibrate(arguments)


def _ranks(folder: Path, number: int) -> None:
    """Two ranks as torchrun has them: where one fails the other is ended."""
    arguments = _sampler_command(6, folder / "s")
    ranks = [FORK.Process(target=_rank, args=(rank, folder / f"meeting{number}", arguments)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    while all(rank.exitcode is None for rank in ranks):
        time.sleep(0.02)
    for rank in ranks:
        if any(each.exitcode for each in ranks):
            rank.terminate()  # as torchrun does
        rank.join()
    sys.exit(max(abs(rank.exitcode or 0) for rank in ranks))


def ranks_round(folder: Path, rng: random.Random, most: int) -> int:
    import torch

    from support.sampler import tiny_sampler

    torch.set_num_threads(1)
    tiny_sampler(None, "cpu").run("a", 1)
    hit, arguments = 0, _sampler_command(6, folder / "s")
    for number in range(min(most, 8)):
        job = FORK.Process(target=_ranks, args=(folder, number))
        job.start()
        job.join(rng.uniform(0.2, 1.5))
        assert job.pid is not None
        found = children(job.pid)
        if len(found) == 2:
            os.kill(rng.choice(found), signal.SIGKILL)
            hit += 1
        job.join(WAIT_SECONDS)
        assert job.exitcode is not None, "the rank that was left did not end"
        if len(found) < 2:
            break
    for path, ranks in (("s", arguments), ("whole", _sampler_command(6, folder / "whole"))):
        job = FORK.Process(target=_calibrate, args=(ranks,))
        job.start()
        job.join()
        assert job.exitcode == 0, path
    _same_units(Store.open(folder / "s"), Store.open(folder / "whole"), 0.1)
    return hit


# The compiler


def kill_compilation(
    store: Path, plan: Path, rng: random.Random, jobs: int = 4, all_of_it: bool = False, within: float = 1.5
) -> bool:
    """Kills a compilation, or one of its processes, while they are at work; returns whether there was one to kill.

    They are at work for up to `within` seconds before.
    """
    with compilation(store, plan, jobs=jobs) as job:
        wait = time.monotonic() + rng.uniform(0.0, within)
        workers: list[int] = []
        while job.poll() is None and (not workers or time.monotonic() < wait):
            workers = [each for each in children(job.pid) if _is_worker(each)]
            time.sleep(0.01)
        if not workers or job.poll() is not None:
            assert done(job) == 0
            return False
        victim = job.pid if all_of_it else rng.choice([job.pid, *workers])
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        told = job.communicate(timeout=WAIT_SECONDS)[1]
    if victim != job.pid and job.returncode:  # Python itself prints a traceback of processes that were just starting
        assert job.returncode == 2, (job.returncode, told)
        assert sum(line.startswith("calibatt-compile: ") for line in told.splitlines()) == 1, told
    deadline = time.monotonic() + WAIT_SECONDS
    while any(map(_alive, workers)):
        assert time.monotonic() < deadline, "workers go on after their job was killed"
        time.sleep(0.01)
    return True


def compile_round(folder: Path, rng: random.Random, most: int) -> int:
    store = stats.write_store(folder / "store", stats.manifest(), closed=True)
    whole, plan, hit = folder / "whole.plan", folder / "out" / "p.plan", 0
    plan.parent.mkdir()
    assert done(compilation(store, whole)) == 0
    for _ in range(min(most, 20)):
        hit += kill_compilation(store, plan, rng)
        assert not plan.exists() or plan.read_bytes() == whole.read_bytes()
        plan.unlink(missing_ok=True)
    assert done(compilation(store, plan)) == 0
    assert plan.read_bytes() == whole.read_bytes()
    assert {path.name for path in plan.parent.iterdir()} <= {"p.plan", ".p.plan.lock"}
    return hit


def _is_worker(pid: int) -> bool:
    """Not what Python itself starts beside them."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except OSError:
        return False


ROUNDS = {"writer": writer_round, "calibration": calibration_round, "compile": compile_round, "ranks": ranks_round}
SHARES = {"writer": 0.4, "calibration": 0.3, "compile": 0.2, "ranks": 0.1}
"""Of all kills."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills whatever writes, and looks at what is left.")
    parser.add_argument("kinds", nargs="*", default=[*ROUNDS, "disk", "refused", "pairs"])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kills.json"), help="JSON; runs are added to those in it")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    versions = {"python": platform.python_version(), "torch": metadata.version("torch")}
    for kind in chosen.kinds:
        start = time.monotonic()
        if kind in ROUNDS:
            found = until(round(chosen.kills * SHARES[kind]), ROUNDS[kind], chosen.seed)
        else:
            with tempfile.TemporaryDirectory() as folder:
                more = {"disk": (24,), "pairs": (25,)}.get(kind, ())
                found = getattr(faults, kind)(Path(folder), *more)
        facts = {"kind": kind, "seed": chosen.seed, "seconds": round(time.monotonic() - start, 1)}
        known = json.loads(chosen.out.read_text()) if chosen.out.exists() else {"runs": []}
        known["runs"].append(facts | found | {"date": str(date.today()), "versions": versions})
        chosen.out.write_text(json.dumps(known, indent=1) + "\n")
        print(json.dumps(known["runs"][-1]), flush=True)


if __name__ == "__main__":
    main()
