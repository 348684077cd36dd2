"""One of the processes that try out communication: it joins as training joins, measures, reports, and leaves.

The doctor starts it on this machine. For several machines, any launcher does, and process 0 prints what was found:

    accelerate launch --num_machines 2 … -m cheaptrain.doctor.probe

It never hangs for long: after `--seconds` (30), counted from the end of the imports, it prints where it is and ends.
"""

import argparse
import os
import sys
import traceback
from dataclasses import asdict

from cheaptrain.doctor.children import REPORT, STARTED, end_after, end_with_parent, report

SECONDS = 30.0
COMMAND = (sys.executable, "-m", "cheaptrain.doctor.probe")
JOINING = "making the process group"

_OF_WAITING = 0.8  # of the time, before a message that nobody answers is an error with a name
_OF_MEASURING = 0.4


def main() -> None:
    """Join, compare clocks, measure, leave."""
    end_with_parent()  # before the imports, which take longest
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=float, default=SECONDS)
    seconds = arguments.parse_args().seconds
    from cheaptrain.doctor.collectives import compare_clocks, measure
    from cheaptrain.parallel.processes import join, leave

    started_by_the_doctor = REPORT in os.environ
    report(phase=STARTED)
    end_after(seconds + 5 if started_by_the_doctor else seconds)  # the doctor itself comes first
    try:
        report(phase=JOINING)
        processes = join(seconds * _OF_WAITING)
        report(phase="comparing clocks")
        clocks = compare_clocks(processes)
        report(clocks=asdict(clocks))
        timings = []
        if processes.size > 1:
            for timing in measure(processes, seconds * _OF_MEASURING, lambda what: report(phase=what)):
                report(timing=asdict(timing))
                timings.append(timing)
        report(phase="leaving")
        if processes.is_main and not started_by_the_doctor:
            from cheaptrain.console import lasting_console
            from cheaptrain.doctor.communication import clock_finding, timing_findings
            from cheaptrain.doctor.view import print_section

            findings = [*timing_findings(timings, processes.size, str(processes.device.type)), clock_finding(clocks)]
            print_section(f"communication, {processes.size} processes", findings, lasting_console(emoji=False))
        leave()
        report(phase="done")
    except Exception as error:
        report(error=f"{type(error).__name__}: {error}")
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # threads of a broken process group can hold up an orderly end


if __name__ == "__main__":
    main()
