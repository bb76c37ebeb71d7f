"""The `reslora` command: LoRA files in, LoRA files and answers out.

    export RUN OUT     inspect FILE     verify FILE     merge FILE --base MODEL OUT
    resize FILE        combine A B      convert FILE    extract TUNED BASE
    methods            what can be combined in training, and why not
    chat BASE LORA     evaluate BASE LORA                   a language model with and without its adapter
    train   train-llm   glue   dpo   grpo   compare   env                 the programs, see `programs`

Each command is a thin view of the function of the same name in `reslora_diffusion.export`. Input is looked at before
torch is imported, so that `--help` and bad input answer at once.

Exit codes: 0 done, 1 a check failed (nothing was written), 2 the input cannot be used.
"""

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .choices import Modules, Precision, Target
from .commands import checking
from .export import checks
from .export.limits import CheckFailed, parse_rank
from .programs import add_commands
from .utils.problems import printable_lines

if TYPE_CHECKING:  # `--help` does not wait for it
    import torch

CHECK_FAILED, BAD_INPUT = 1, 2


class Commands(TyperGroup):
    """Turns what the library raises into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:  # a context of the click inside typer, which has no public name
        try:
            return super().invoke(ctx)
        except CheckFailed as error:
            typer.echo(printable_lines(f"reslora: {error}"), err=True)
            raise typer.Exit(CHECK_FAILED) from error
        except (ValueError, OSError) as error:
            typer.echo(printable_lines(f"reslora: {error}"), err=True)
            raise typer.Exit(BAD_INPUT) from error


app = typer.Typer(
    cls=Commands,
    help="Train, and LoRA files that provably load: export, inspect, verify, merge, resize, combine, convert.\n\n"
    "Exit codes: 0 done, 1 a check failed and nothing was written, 2 the input cannot be used.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


LoraSource = Annotated[Path, typer.Argument(metavar="FILE", help="LoRA file, or folder of an export or of PEFT")]
RANK_HELP = "full, a number, or auto: the smallest that keeps every module within 5%"
RankOption = Annotated[str, typer.Option("--rank", help=RANK_HELP)]
Lossy = Annotated[bool, typer.Option("--allow_lossy", help="write although a module loses more than 5%")]
StoredDtype = Annotated[Precision | None, typer.Option("--dtype", help="precision of the result (default: as it is)")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="OUT", help="folder, or one file if it ends in .safetensors"),
]
Variant = Annotated[str | None, typer.Option(help="of the model's weight files, such as fp16")]
AsJson = Annotated[bool, typer.Option("--json", help="as JSON, with every module")]
BASE_HELP = "folder or hub name of a diffusers pipeline or transformers model, or one file of a pipeline"
BaseConfig = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="of a base that is one file: pipeline whose configurations it has (default: the hub's)"
    ),
]


def dtype_of(precision: Precision | None) -> "torch.dtype | None":
    return None if precision is None else precision.dtype


def stem(source: Path) -> str:
    """Return a name for the result of `source`: its own, or its folder's where the file has the usual name."""
    path = source.resolve()
    generic = path.stem in ("pytorch_lora_weights", "adapter_model")
    return path.parent.name if generic else path.stem if path.is_file() else path.name


def show(reports: Iterable[object]) -> None:
    typer.echo("\n\n".join(map(str, reports)))


@app.command(cls=checking(checks.known_rank, checks.trained, checks.known_base))
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="output_dir of a training, or a checkpoint-N in it")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="folder, or one kohya file if it ends in .safetensors")],
    rank: Annotated[str, typer.Option("--export_rank", "--rank", help=RANK_HELP)] = "full",
    dtype: Annotated[Precision, typer.Option(help="precision of the files")] = Precision.FP16,
    name: Annotated[str | None, typer.Option(help="of the file for ComfyUI and A1111 (default: the run's)")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help=f"also check against this base: {BASE_HELP}")
    ] = None,
    allow_lossy: Lossy = False,
) -> None:
    """Write and prove a run's LoRA.

    At a rank, precision and name of your choice. A run gives its final LoRA, or that of its newest checkpoint if it
    was not finished. Where the checkpoint of that step keeps the merged factors in full precision
    (state/merged.safetensors), those are used; else the LoRA that the run or checkpoint already holds, at the
    precision it was written with. Full rank is the default: a block shortcut merges exactly only there.

    \b
    Example:
      reslora export runs/panda panda --export_rank auto
      reslora export runs/panda/checkpoint-200 panda-200 --dtype fp32
    """
    from .export.trained import export_trained

    asked = parse_rank(rank)
    show(export_trained(run, output, rank=asked, dtype=dtype.dtype, name=name, base=base, allow_lossy=allow_lossy))


@app.command(cls=checking(checks.inspectable))
def inspect(source: LoraSource, as_json: AsJson = False) -> None:
    """Say what a LoRA file is, or a file of embeddings of new tokens.

    For which model, its ranks, alphas, norms and health, and what its header says of its training. Reads any plain
    LoRA of the Stable Diffusion family and of PEFT. Exits with 1 if it holds NaN or changes nothing.

    \b
    Example:
      reslora inspect my_lora.safetensors
      reslora inspect panda --json | jq .ranks
    """
    from .export.inspection import inspect_file

    found = inspect_file(source)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))
    if not found.healthy:
        raise typer.Exit(CHECK_FAILED)


@app.command(cls=checking(checks.readable_beside, checks.known_base))
def verify(
    source: LoraSource,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help=BASE_HELP)] = None,
    base_config: BaseConfig = None,
    as_json: AsJson = False,
) -> None:
    """Check that a LoRA loads and fits its base.

    The real loaders load it, and every layer is compared with the file. Only the configurations of the base are read,
    not its weights. Without --base the file is loaded into placeholders with just the modules that it names. Of an
    export folder both files are checked. Exits with 1 if anything differs.

    \b
    Example:
      reslora verify my_lora.safetensors --base stable-diffusion-v1-5/stable-diffusion-v1-5
    """
    from .export.verify import verify_lora

    result = verify_lora(source, base, base_config)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
    if not result.passed:
        raise typer.Exit(CHECK_FAILED)


@app.command(cls=checking(checks.readable, checks.known_base, checks.mergeable, checks.fitting))
def merge(
    source: LoraSource,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the fused model")],
    base: Annotated[str, typer.Option(metavar="MODEL", help=BASE_HELP)],
    scale: Annotated[float, typer.Option(help="strength of the LoRA")] = 1.0,
    dtype: Annotated[Precision | None, typer.Option(help="precision of the result (default: the base's)")] = None,
    variant: Variant = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it holds something")] = False,
    base_config: BaseConfig = None,
) -> None:
    """Fuse a LoRA into its base: a whole model.

    \b
    Example:
      reslora merge my_lora.safetensors --base stable-diffusion-v1-5/stable-diffusion-v1-5 fused
    """
    from .export.fusing import fuse

    report = fuse(
        source,
        base,
        output,
        scale=scale,
        dtype=dtype_of(dtype),
        variant=variant,
        overwrite=overwrite,
        base_config=base_config,
    )
    typer.echo(str(report))


@app.command(cls=checking(checks.known_rank, checks.readable))
def resize(
    source: LoraSource,
    rank: RankOption,
    output: Output = None,
    dtype: StoredDtype = None,
    allow_lossy: Lossy = False,
) -> None:
    """Cut a LoRA to a rank, by singular values.

    Without --output, into FILE-rankN in the current folder.

    \b
    Example:
      reslora resize my_lora.safetensors --rank 8 --output small.safetensors --allow_lossy
    """
    from .export.tools import resize

    asked = parse_rank(rank)
    target = output or Path(f"{stem(source)}-rank{asked}")
    show(resize(source, target, asked, dtype=dtype_of(dtype), allow_lossy=allow_lossy))


@app.command(
    cls=checking(checks.known_rank, checks.combinable, checks.all_readable),
    context_settings={"ignore_unknown_options": True},  # a negative weight looks like one
)
def combine(
    sources: Annotated[list[str], typer.Argument(metavar="A B ...", help="LoRAs for one base")],
    weights: Annotated[
        list[str] | None, typer.Option(help="one for each file, as 1,0.6 or 1 0.6 (default: all 1)")
    ] = None,
    output: Output = Path("combined"),
    rank: RankOption = "full",
    dtype: StoredDtype = None,
    allow_lossy: Lossy = False,
) -> None:
    """Add LoRAs up, exactly or cut to a rank.

    Exactly by concatenation: ranks add up. What one of them lacks counts as zero.

    \b
    Example:
      reslora combine subject.safetensors style.safetensors --weights 1,0.6 --output both
    """
    from .export.tools import combine

    files, factors = checks.files_and_weights(sources, weights or [])
    asked = parse_rank(rank)
    target = output or Path("combined")
    show(combine(files, target, factors, rank=asked, dtype=dtype_of(dtype), allow_lossy=allow_lossy))


@app.command(cls=checking(checks.readable, checks.known_base))
def convert(
    source: LoraSource,
    to: Annotated[Target, typer.Option(help="whose format")],
    output: Output = None,
    dtype: StoredDtype = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help=f"of a DoRA: {BASE_HELP}")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="of a DoRA, LoHa or LoKr: make a plain LoRA of this rank")
    ] = None,
    allow_lossy: Lossy = False,
) -> None:
    """Write a LoRA for another program.

    diffusers; kohya for ComfyUI, A1111, Forge and kohya's own tools; PEFT. The same LoRA, proved. Without --output,
    into FILE-diffusers, FILE-kohya.safetensors or FILE-peft in the current folder.

    A DoRA stays one: with --base its kohya file is what ComfyUI reads as it was trained, without it what LyCORIS does.
    With --base and --rank it becomes the nearest plain LoRA, which every program reads. So does a LoHa or LoKr with
    --rank.

    \b
    Example:
      reslora convert from_civitai.safetensors --to diffusers --output panda
      reslora convert panda --to kohya --output panda.safetensors
    """
    from .export.tools import convert

    suffix = ".safetensors" if to is Target.KOHYA else ""
    target = output or Path(f"{stem(source)}-{to}{suffix}")
    precision = dtype_of(dtype)
    show(convert(source, target, str(to), dtype=precision, base=base, rank=rank, allow_lossy=allow_lossy))


@app.command(cls=checking(checks.comparable))
def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help=f"fine-tuned model: {BASE_HELP}")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="what it was tuned from")],
    rank: Annotated[int, typer.Option(min=1, help="of every module")],
    output: Output = None,
    modules: Annotated[
        Modules, typer.Option(help="attention and feed-forward layers, or convolutions too")
    ] = Modules.TRANSFORMER,
    dtype: Annotated[Precision, typer.Option(help="precision of the files")] = Precision.FP16,
    variant: Variant = None,
) -> None:
    """Take a LoRA out of a fine-tuned model.

    The nearest one of that rank to the difference from the base. Without --output, into TUNED-lora.

    \b
    Example:
      reslora extract my-dreambooth-model stable-diffusion-v1-5/stable-diffusion-v1-5 --rank 16 --output extracted
    """
    from .export.extraction import extract

    target = output or Path(f"{Path(tuned).name}-lora")
    report = extract(tuned, base, target, rank, modules=str(modules), dtype=dtype.dtype, variant=variant)
    typer.echo(str(report))


@app.command()
def methods() -> None:
    """Print which schedules, optimizers, shortcuts and options can be combined.

    With the reason where they cannot; a training checks the same before it loads a model.

    \b
    Example:
      reslora methods | less
    """
    from .methods.table import table

    typer.echo(table())


add_commands(app)


def main() -> None:
    """The console script."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    app()


if __name__ == "__main__":
    main()
