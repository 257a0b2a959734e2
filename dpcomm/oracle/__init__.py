"""The oracle: the exact bits that an execution must give, in NumPy.

Written from the specification (docs/wire_formats.md, docs/invariants.md), not from the C++ code, so
that the two can be held against each other. Slow and plain on purpose.
"""
