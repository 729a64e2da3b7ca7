"""Models: one file per preset, all behind `histosge.models.model.Model`."""
