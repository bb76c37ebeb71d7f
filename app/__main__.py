"""Open the comparison in a browser.

    reslora-compare                                     # the embedded pipeline and what `make demo` trained
    reslora-compare --base path/to/pipeline --runs runs # a pipeline of your own, and the runs to choose adapters from
    reslora-compare --server_name 0.0.0.0 --auth me:secret

It listens on this machine alone unless told otherwise, and fetches nothing. `python -m app` is the same.
"""

import argparse
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from warnings import filterwarnings

from .foreign import ALONE

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = Path("assets") / "sticker-sd"
SUBJECTS = Path("assets") / "subjects"


def beside(relative: Path) -> Path:
    """Something of the source: from the folder the command is given in, or from where this package lies."""
    return next((root / relative for root in (Path.cwd(), ROOT) if (root / relative).exists()), ROOT / relative)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reslora-compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", default=beside(EMBEDDED), help="folder of a pipeline, or its hub name if it is in the local cache")
    add(
        "--base_config",
        help="of a single-file --base: folder or hub name of its configurations (default: its family's)",
    )
    add("--bases", type=Path, nargs="+", default=[], help="folders of other pipelines and single-file checkpoints")
    add("--runs", type=Path, nargs="+", help="folders of training runs, the only ones read (default: demo and runs)")
    add("--train_dir", type=Path, default=Path("runs", "from-page"), help="for runs started from the page")
    add("--prompt", help="of the first images (default: what the first adapters were taught)")
    add("--device", default="cpu")
    add("--server_name", default="127.0.0.1", help="address to listen on")
    add("--server_port", type=int, help="(default: the first that is free from 7860 on)")
    add("--allowed_hosts", metavar="NAME", nargs="+", default=[], help="names of a proxy that passes requests on")
    add("--auth", metavar="USER:PASSWORD", help="ask for these before anything is shown")
    add("--share", action="store_true", help="publish through Gradio's relay; anybody with the link may look and train")
    add("--inbrowser", action="store_true", help="open the page in a browser")
    args = parser.parse_args(argv)
    problems = base_problems(Path(args.base))
    if args.base_config and not Path(args.base).is_file():
        problems.append(f"--base_config is for a base in a single file, and --base {args.base} is none")
    problems += [f"--runs {folder} is no folder" for folder in args.runs or () if not folder.is_dir()]
    problems += [f"--bases {folder} is no folder" for folder in args.bases if not folder.is_dir()]
    if args.auth is not None and not all(args.auth.partition(":")):
        problems.append("--auth is a user and a password with a colon between them")
    if args.server_port is not None and not 0 < args.server_port < 65536:
        problems.append(f"--server_port lies between 1 and 65535; got {args.server_port}")
    if problems:
        parser.error("; ".join(problems))
    return args


def base_problems(base: Path) -> list[str]:
    """Find what is wrong with a base before it is loaded; a hub name has to wait for that."""
    if (base / "model_index.json").is_file():
        return []
    if base.is_file():
        return single_file_problems(base)
    if not base.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)):
        return []
    if base.suffix and not base.exists():
        return [f"--base {base} does not exist"]
    if base == beside(EMBEDDED):
        return ["give --base the folder of a pipeline: the embedded one is in a clone of the source, not in the wheel"]
    return [f"--base {base} holds no pipeline (no model_index.json); give the folder of a Stable Diffusion pipeline"]


def single_file_problems(base: Path) -> list[str]:
    from reslora_diffusion.export.single_file import read_single_file
    from reslora_diffusion.utils.problems import BadInput

    try:
        read_single_file(base)
    except BadInput as problem:
        return [f"--base: {problem}"]
    return []


def warnings(args: argparse.Namespace) -> list[str]:
    """Warn of what somebody should know before others can look."""
    found = []
    if args.share:
        found.append("--share: everything here passes through a relay, to anybody who has the link.")
    if args.auth is None and (args.share or args.server_name not in ALONE):
        found.append(
            "Others can reach this page, generate images and train on this machine, and no password is asked for; "
            "--auth USER:PASSWORD asks."
        )
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # Read by the libraries when they are imported, hence before the imports below.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    filterwarnings("ignore", "Already found a `peft_config`")  # several adapters on one model are what this is about
    try:
        from gradio import Blocks  # noqa: F401
    except ImportError:
        sys.exit("The page needs Gradio: pip install 'reslora-diffusion[app]'")
    from .serve import launch, open_studio

    for warning in warnings(args):
        print(warning, file=sys.stderr)
    base = Path(args.base).resolve() if Path(args.base).exists() else args.base
    runs = tuple(folder.resolve() for folder in args.runs or (Path("demo"), Path("runs")))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves as Ctrl-C does: nothing stays
    with tempfile.TemporaryDirectory(prefix="reslora-compare-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "uploads").resolve())
        print(f"Loading {base} ...", flush=True)
        try:
            studio = open_studio(
                base,
                runs,
                Path(folder, "visitors").resolve(),
                args.prompt,
                train_dir=args.train_dir.resolve(),
                subjects_dir=beside(SUBJECTS),
                bases=[folder.resolve() for folder in args.bases],
                device=args.device,
                base_config=args.base_config,
            )
        except (OSError, ValueError) as problem:
            sys.exit(f"--base {base} cannot be loaded: {str(problem).splitlines()[0]}")
        try:
            launch(
                studio,
                allowed_hosts=args.allowed_hosts,
                server_name=args.server_name,
                server_port=args.server_port,
                auth=tuple(args.auth.split(":", 1)) if args.auth else None,
                share=args.share,
                inbrowser=args.inbrowser,
            )
        except OSError as problem:
            sys.exit(str(problem).splitlines()[0])
        finally:
            studio.trainer.close()


if __name__ == "__main__":
    main()
