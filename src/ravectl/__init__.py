"""ravectl: build, boot, verify and maintain RAVE machines."""

__version__ = "0.1.0"
