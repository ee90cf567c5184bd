"""Logging, errors, environment and files: standard library only, imported by every layer."""
