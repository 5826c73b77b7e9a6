"""The command line: a thin shell over the library. Flags are the fields of its classes and of moeret.config's."""

from moeret.cli.app import main

__all__ = ["main"]
