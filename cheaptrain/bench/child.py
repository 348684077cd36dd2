"""A process that measures one thing: `python -m cheaptrain.bench.child JOB`, started by `runner.py`.

    imports → "ready" → waits for a line on stdin → measures → its result → ends

It prepares while another one measures, and touches no device before it is told to. What it says to its parent are lines
that begin with a mark; everything else is a library's, kept for the case that something fails. The trap: a parent that
was killed leaves nobody to stop it, so whoever waits on stdin for nothing ends the whole group when stdin ends.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

MARK = "@cheaptrain-bench "
STARTED = time.perf_counter()


def main() -> None:
    """Do the job in `sys.argv[1]`: {"do": "machine"}, or "measure" or "profile" with "work", "variant" and "device"."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    import torch

    if job["do"] == "machine":
        _say("result", machine())
        return
    from cheaptrain.bench.floor import measure_floor
    from cheaptrain.bench.measure import measure
    from cheaptrain.bench.profiling import profile
    from cheaptrain.bench.variants import prepare
    from cheaptrain.bench.works import FLOOR, find_work

    work = find_work(job["work"], job["device"])
    if job["variant"] != FLOOR:
        with contextlib.suppress(ImportError):  # said when it is measured
            prepare(job["variant"])
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    _say("ready", {"import_seconds": time.perf_counter() - STARTED})
    if not sys.stdin.readline():
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    began = time.perf_counter()
    device = torch.device(job["device"])
    if job["variant"] == FLOOR:
        result = measure_floor(work, device)
    elif job["do"] == "profile":
        result = profile(work, job["variant"], device)
    else:
        result = measure(work, job["variant"], device)
    _say("result", result | {"wall_seconds": time.perf_counter() - began})
    os._exit(0)  # at once: the next one waits for this one's memory


def machine() -> dict[str, Any]:
    """What figures depend on: the device, its peak where it is known, versions, and the code that is measured."""
    import torch

    from cheaptrain.bench.identity import code_hash, versions
    from cheaptrain.environment import environment_of
    from cheaptrain.hardware import find_gpu, visible_cores

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = environment_of(device)
    gpu = find_gpu(here["device"]) if device.type == "cuda" else None
    return {
        "type": device.type,
        "device": here["device"],
        "peak_flops": gpu.flops if gpu else None,
        "cores": visible_cores(),
        "memory_gib": round(here["memory_bytes"] / 2**30),
        "cuda": here["cuda"],
        "python": here["python"],
        "versions": versions(),
        "code": code_hash(),
        "commit": here["code"],
    }


def _say(kind: str, what: dict[str, Any]) -> None:
    print(f"\n{MARK}{json.dumps({'kind': kind} | what)}", flush=True)


def _end_with_parent() -> None:
    while sys.stdin.readline():
        pass
    os.killpg(0, signal.SIGKILL)  # compilers' workers too: they are of this group


if __name__ == "__main__":
    main()
