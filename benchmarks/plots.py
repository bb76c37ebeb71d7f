"""Images of result files, beside them."""

import json
from pathlib import Path


def plot_steps(path: str | Path) -> Path:
    """Time of a step relative to PEFT's LoRA, with quartiles, one panel for each case of a `step` result."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = Path(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    cases = content["results"]
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 4.2 * rows), squeeze=False, layout="constrained")
    for axis, (case, found) in zip(axes.flat, cases.items(), strict=False):
        names = list(found)[::-1]
        middle = [found[name]["ratio"][1] for name in names]
        spread = [[abs(found[n]["ratio"][1] - found[n]["ratio"][end]) for n in names] for end in (0, 2)]
        ours = [not name.startswith(("floor", "peft", "kohya", "paper")) for name in names]
        axis.barh(names, middle, xerr=spread, color=["tab:blue" if own else "lightgray" for own in ours])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=case, xlabel="time / PEFT LoRA", xlim=(0, None))
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    machine = content["machine"]
    figure.suptitle(f"{machine.get('device', machine['processor'])}, torch {machine['torch']}, {content['clock']}")
    image = path.with_suffix(".png")
    figure.savefig(image, dpi=110)
    plt.close(figure)
    return image
