"""Every figure and test of the project that needs a GPU, in one command."""
