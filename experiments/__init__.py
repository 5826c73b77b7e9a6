"""Experiments: one runnable file each, with command, expected time and expected result in its docstring."""
