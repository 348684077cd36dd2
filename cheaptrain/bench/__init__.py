"""Throughput, measured beside what people would otherwise use: `cheaptrain bench`."""
