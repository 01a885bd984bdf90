"""The fault matrix: every fault we owe an answer to, injected, counted, and beside us the peers.

`python -m tests.faults` (or `make faults`) runs it and prints the table; the tests here run a short
form of each part. How a fault is injected is `inject.py`; who is put to it is `savers.py`; what is
counted and how it is judged is `tally.py`; each kind of fault has a module of its own.
"""
