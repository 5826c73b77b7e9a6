"""moeret as other libraries know retrievers and embeddings. Each file needs its library, which is an extra of its name."""
