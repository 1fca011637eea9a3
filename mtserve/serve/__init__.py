"""Serving over HTTP. Only `service` knows BentoML; nothing here loads weights when it is imported."""
