"""Compare checkpoints: by what their manifests record, and by their weights.

`__all__` names the modules that other rooms may import.
"""

__all__ = ["drift", "drift_table", "manifests"]
