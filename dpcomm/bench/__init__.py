"""The bandwidth benchmark: collectives of one or more backends, interleaved in one run.

`torchrun --standalone --nproc-per-node 2 -m dpcomm.bench --help` lists the options, which are
nccl-tests' letters where those have one. docs/benchmark.md says how to read the table.

Modules, from the inside out: units (sizes, bandwidths) < cases (what is run, on which data, and
what has to come out) < backends (how each backend runs it) < runner (the clock) < report (table,
JSON, CSV) and plot < cli.
"""
