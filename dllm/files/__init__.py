"""Bytes on disk: atomic files, and the one door to each format."""
