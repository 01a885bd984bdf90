"""Options of a training: their definition, and the sources that set them.

`config` defines every option once. `presets.resolve` makes a checked `Config` of flags, config file
and preset. No torch, no training. `__all__` names the modules that other rooms may import.
"""

__all__ = ["config", "config_files", "fields", "presets"]
