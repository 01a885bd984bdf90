"""The benchmark: our checkpoints beside everybody else's and beside the limits of the machine.

Nobody depends on this room. It uses the engine as a stranger's training loop would, through its
public API, and measures everybody's saves, interleaved, on one state and one disk.
"""
