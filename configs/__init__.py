"""What a run is: the typed config, its presets, and how files and overrides become one. Imports no torch."""
