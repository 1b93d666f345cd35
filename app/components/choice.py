"""A dropdown whose value reaches the handler also when it is not among the choices any more, as when a button was
pressed before fresh ones arrived: then our own sentence says so, not Gradio's."""

import gradio as gr


class Choice(gr.Dropdown):
    """As gr.Dropdown. Whoever takes the value checks it, as app/choices.py does."""

    is_template = True

    def preprocess(self, payload):
        return payload
