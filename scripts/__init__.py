"""Developer commands."""
