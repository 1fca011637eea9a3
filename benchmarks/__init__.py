"""Measurements against peers, each one command; never run by the tests."""
