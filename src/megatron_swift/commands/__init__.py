"""The commands: the only code that sees whole argument objects."""
