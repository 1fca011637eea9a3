"""The demo: six small tasks on an encoder and a language model, from data that ships with the package."""
