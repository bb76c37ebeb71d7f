"""Open the comparison in a browser.

    python -m app                                       # the embedded pipeline and what `make demo` trained
    python -m app --base path/to/pipeline --runs runs   # a pipeline of your own, and the runs to choose adapters from
    python -m app --server_name 0.0.0.0 --auth me:secret

It listens on this machine alone unless told otherwise, and fetches nothing.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reslora-compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=ROOT / "assets" / "sticker-sd", help="folder of a pipeline")
    parser.add_argument("--runs", type=Path, nargs="*", default=[Path("demo"), Path("runs")],
                        help="folders of training runs: the only ones that are read")  # fmt: skip
    parser.add_argument(
        "--prompt", default="a sticker of sks animal on a blue background", help="of the first pictures"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--server_name", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--server_port", type=int, default=7860)
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for these before anything is shown")
    parser.add_argument(
        "--share", action="store_true", help="publish through Gradio's relay; anybody with the link may look"
    )
    parser.add_argument("--inbrowser", action="store_true", help="open the page in a browser")
    args = parser.parse_args(argv)
    problems = []
    if not (args.base / "model_index.json").is_file():
        problems.append(f"--base {args.base} holds no pipeline (no model_index.json)")
    if args.auth is not None and not all(args.auth.partition(":")):
        problems.append("--auth is a user and a password with a colon between them")
    if not 0 <= args.server_port < 65536:
        problems.append(f"--server_port lies between 0 and 65535; got {args.server_port}")
    if problems:
        parser.error("; ".join(problems))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # Read by gradio and the hub when they are imported, hence before the imports below.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    from .serve import launch, open_studio

    if args.share:
        print("--share: everything here passes through a relay, to anybody who has the link.", file=sys.stderr)
    if args.auth is None and (args.share or args.server_name not in ("127.0.0.1", "localhost")):
        print("Others can reach this page, and no password is asked for; --auth USER:PASSWORD asks.", file=sys.stderr)
    runs = tuple(folder.resolve() for folder in args.runs if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix="reslora-compare-") as folder:
        studio = open_studio(args.base, runs, Path(folder).resolve(), args.prompt, args.device)
        launch(
            studio,
            server_name=args.server_name,
            server_port=args.server_port,
            auth=tuple(args.auth.split(":", 1)) if args.auth else None,
            share=args.share,
            inbrowser=args.inbrowser,
        )


if __name__ == "__main__":
    main()
