"""The demo: five small tasks on one encoder, from data that ships with the package."""
