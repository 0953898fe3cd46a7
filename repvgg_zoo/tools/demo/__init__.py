"""The demo: a model learns what it did not know, in both forms."""
