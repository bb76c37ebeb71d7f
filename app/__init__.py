"""The comparison app: base, LoRA and ResLoRA side by side, on one pipeline and the same noise.

reslora-compare                    # the embedded pipeline, with the demo's results when they are there

request.py     what is asked: prompts x seeds in rows, adapters x strengths in columns; checked before anything runs
adapters.py    LoRA files on one pipeline, switched by name and read back; new_tokens.py: the tokens trained with them
compare.py     compare(request) -> an iterator of images
measures.py    figures about those images, each with n and an interval; learned.py: with a CLIP and a DINO
votes.py       blind pairs, and the statistics of votes
runs.py        what training runs left behind: adapters, losses, samples; charts.py: their curves
training.py    the training script in a process of its own
output.py      sheet and report; saved.py: a comparison as files, and back
views.py       HTML from plain values; run_views.py: that of runs
sessions.py    what is remembered of each visitor; studio.py: what all of them share
page.py        the only floor that knows gradio: build_demo(), one file for each tab in tabs/
"""
