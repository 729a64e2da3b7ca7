"""Models: one file per preset, all behind `histosge.models.protocol.Model`."""
