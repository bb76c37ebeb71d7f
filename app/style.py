"""The page's looks: one theme, in the light and the dark, with nothing fetched from anywhere."""

from pathlib import Path

import gradio as gr

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")

THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="stone",
    radius_size="md",
    spacing_size="md",
    text_size="md",
    font=SANS,
    font_mono=MONO,
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    block_background_fill="white",
    block_background_fill_dark="*neutral_900",
    block_border_width="1px",
    block_label_text_weight="600",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    input_background_fill="*neutral_100",
    block_title_text_weight="600",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
)

STATIC = Path(__file__).with_name("static")


def text_of(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


CSS = text_of("page.css")
HEAD = "".join(f"<script>{text_of(name)}</script>" for name in ("page.js", "viewer.js"))
HEAD += f"<style>{text_of('viewer.css')}</style>"
