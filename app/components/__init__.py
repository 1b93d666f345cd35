"""The two hot paths as gr.HTML components, each a Python file beside its .js and .css."""
