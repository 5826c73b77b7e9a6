"""The base encoder, its experts and the router, and how texts become vectors."""
