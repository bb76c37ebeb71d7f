"""The page, one file for each tab, and what they have in common: how a request is refused."""

import gradio as gr

from ..views import plain


def refusal(problem: object, title: str = "Not done") -> gr.Error:
    """To be raised: a message that stays until it is closed, and no traceback on the console."""
    return gr.Error(plain(problem), duration=None, title=title, print_exception=False)
