"""Text and judgments: reading, checking, tokenising, planning batches."""
