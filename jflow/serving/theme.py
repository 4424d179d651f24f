"""The colors, fonts and style sheet of the page; nothing of it comes from the network."""

import gradio as gr

_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "DejaVu Sans", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"]
STYLE = """
.gradio-container { max-width: 1080px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container > main { padding: 16px 24px !important; }
#gallery { min-height: 330px; }
#tabs { width: 100%; }
#head { border: 0; background: none; padding: 0; }
#head header { display: flex; align-items: baseline; gap: 16px; }
#head h1 { font-size: 26px; font-weight: 700; letter-spacing: -0.02em; margin: 0; color: #4f46e5; }
#head p { margin: 0; color: #64748b; font-size: 14px; }
#head b { color: #334155; font-weight: 600; }
#below { align-items: flex-start; }
#seeds { align-items: center; }
#below_gallery { align-items: center; }
#note p { color: #64748b; font-size: 13px; margin: 0; }
#go, #stop { font-weight: 600; font-size: 15px; }
#fresh { font-weight: 500; font-size: 14px; white-space: nowrap; }
#chat img { max-height: 190px; width: auto; border-radius: 8px; }
#chat button[aria-label="Share"], #chat button[title="Share"] { display: none; }
#gallery .caption-label { font-size: 12px; }
"""


def theme() -> gr.themes.Base:
  """The theme of the page."""
  return gr.themes.Base(primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=_FONT, font_mono=_MONO).set(
    body_background_fill="#f7f7fb",
    block_border_width="1px",
    block_shadow="none",
    block_label_text_size="12px",
    button_primary_background_fill="#4f46e5",
    button_primary_background_fill_hover="#4338ca",
    button_primary_text_color="white",
    button_secondary_background_fill="white",
    button_secondary_border_color="#cbd5e1",
    button_border_width="1px",
  )
