"""Throughput beside what people would otherwise use: `python benchmarks/throughput.py`, the same as `cheaptrain bench`.

Its samples are kept in `results/<machine>/throughput.json`, one file a machine; every run adds to it.
"""

import sys

from cheaptrain.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
