"""The engine's benchmark: checkpoints of holdfast, its peers, and the limits of the machine.

It uses the engine as any training loop would, through its public API. All savers save one state to
one disk, in interleaved rounds.
"""
