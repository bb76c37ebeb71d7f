"""Serves the page for the folders of a command line."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from .bases import Bases
from .compare import Comparer, load_pipeline
from .foreign import ALONE
from .guard import guarded
from .page import build_demo
from .sessions import Sessions
from .studio import Studio, first_adapters, first_guidance, first_options, first_prompt, first_subject, subjects_in
from .style import CSS, HEAD, THEME
from .tabs.latest import drop_overtaken
from .trainer import Trainer
from .visits import Visits

MAX_UPLOAD = "2gb"
QUEUE_SIZE = 32


def open_studio(
    base: str | Path,
    runs: tuple[Path, ...],
    folder: Path,
    prompt: str | None = None,
    *,
    train_dir: Path,
    subjects_dir: Path | None = None,
    bases: Sequence[Path] = (),
    base_config: str | None = None,
    device: str = "cpu",
    first_steps: int = 25,
) -> Studio:
    """Load the pipeline, find the adapters of the runs, and generate what visitors see first.

    Args:
        base: folder of a pipeline, its single file, or its hub name where it is in the local cache.
        base_config: of a single file, see `load_pipeline`.
        folder: for the visitors' images.
        prompt: of the first images; if not given, the one that the first adapters were taught.
        train_dir: for trainings started from the page and what is kept of visits; outside of `folder`, which is served.
        bases: folders of other pipelines and checkpoints that visitors may choose.
        subjects_dir: folders of images to train and to measure on, one for each subject.
    """
    pipe = load_pipeline(base, device, base_config)
    comparer = Comparer(pipe)
    comparer.warm_up()
    if not any(train_dir.is_relative_to(root) for root in runs):
        runs = (*runs, train_dir)
    subjects = subjects_in(subjects_dir) if subjects_dir else {}
    options = first_options(runs)
    studio = Studio(
        Bases(Path(base).name, base, comparer, bases, device),
        Sessions(folder, first_adapters(runs, comparer.shelf)),
        Trainer(train_dir, str(base), comparer.resolution),
        runs,
        subjects,
        first_subject(options, subjects),
        visits=Visits(train_dir / "visits"),
    )
    studio.generate_first(prompt or first_prompt(options), first_steps, first_guidance(options))
    return studio


def launch(studio: Studio, allowed_hosts: Sequence[str] = (), **options) -> gr.Blocks:
    """Serve the page; from the disk, nothing but the visitors' own images.

    Args:
        studio: what is served.
        allowed_hosts: names beside this machine's own that requests may come under, such as a proxy's.
        options: of `gr.Blocks.launch`.
    """
    alone = options.get("server_name", ALONE[0]) in ALONE and not options.get("share")
    hosts = {*ALONE, *map(str.lower, allowed_hosts)} if alone else None
    studio.sessions.root.mkdir(parents=True, exist_ok=True)
    demo = build_demo(studio)
    demo.queue(max_size=QUEUE_SIZE, default_concurrency_limit=4)
    drop_overtaken(demo._queue, studio.sessions)
    demo.launch(
        theme=THEME,
        css=CSS,
        head=HEAD,
        allowed_paths=[str(studio.sessions.root)],
        max_file_size=MAX_UPLOAD,
        footer_links=["api"],
        ssr_mode=False,
        strict_cors=True,
        show_error=True,
        app_kwargs={"lifespan": guarded(hosts)},
        _frontend=False,  # Gradio would give the page up where a busy machine takes 3 s to answer
        **options,
    )
    return demo
