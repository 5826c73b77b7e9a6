"""How good a retriever is, against what it must beat."""
