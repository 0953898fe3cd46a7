"""What the command line runs; the library imports none of it."""
