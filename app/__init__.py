"""The comparison app: base, LoRA and ResLoRA side by side, on one pipeline and the same noise.

python -m app                      # the embedded pipeline, with the demo's results when they are there

request.py     what is asked: prompts x seeds in rows, adapters x strengths in columns; checked before anything runs
adapters.py    LoRA files on one pipeline, switched by name and read back
compare.py     compare(request) -> an iterator of pictures
measures.py    figures about those pictures, each with n and an interval
votes.py       blind pairs, and the statistics of votes
runs.py        what training runs left behind: adapters, losses, samples
training.py    the training script in a process of its own
output.py      sheet, ZIP, report
page.py        the only floor that knows gradio: build_demo(), one file for each tab in tabs/
"""
