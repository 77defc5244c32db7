"""Answers over HTTP: what stands in front of the engines, and the server that has all of it."""
