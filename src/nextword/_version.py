"""The version of nextword."""

__version__ = "0.1.0"
