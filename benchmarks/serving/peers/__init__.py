"""Servers that others make, each in a file that its own environment runs; and what they share."""
