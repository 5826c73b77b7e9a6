"""What arguments of several commands are."""

import tyro

Domains = tyro.conf.UseAppendAction[list[tuple[str, ...]]]
"""NAME=BEIR_DIR, as often as need be."""
Flat = tyro.conf.arg(name="")
"""A dataclass whose fields are flags of the command itself."""
