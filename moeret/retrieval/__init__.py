"""Indexes of an expert's documents, and search over all of them."""
