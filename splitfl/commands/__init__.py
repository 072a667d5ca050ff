"""The commands both sides share, one a file."""
