"""The playground: a page at /ui that asks the running server. Only here is Gradio imported, and only where it is on."""

PATH = "/ui"
