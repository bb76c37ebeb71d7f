"""The end of a run: the merge is measured, the LoRA exported, and the files that show the run are written."""

import json

from reslora_diffusion.export import ExportReport

from ...utils.files import write_text
from ...utils.problems import refuse
from ..data.examples import prompts_of
from .history import LOSS_PLOT, plot_losses
from .merging import MergeReport, merge_report
from .model_card import model_card
from .pruning import PruningReport, export_pruned
from .session import Run
from .validation import SHEET

MERGE_REPORT = "merge_report.json"


def finish(run: Run, step: int) -> tuple[MergeReport | PruningReport, ExportReport | PruningReport | None]:
    """Measure the merge, export, and write the files that show the run; processes but the main one get no report
    of the export. A run that prunes leaves the smaller model instead."""
    run.schedule.finish()
    problem = run.adapters.health_problem()
    refuse([f"nothing was exported: {problem}"] if problem else [])
    if not run.schedule.leaves_lora:
        with run.averaged():
            pruned = export_pruned(run, step)
        return pruned, pruned if run.accelerator.is_main_process else None
    with run.averaged():
        run.calibrate(run.options.distillation_steps or 0)
        changing = run.options.schedule or run.options.handover  # which may have changed the adapters just now
        trained = None if changing else run.history.validated(step)
        merged = merge_report(run.adapters, run.denoiser, run.evaluation, run.loss_base, **run.method, trained=trained)
        if not run.accelerator.is_main_process:
            return merged, None
        factors, new_tokens = run.factors(), run.adapters.new_tokens()
        if run.best and run.best.step != step:
            was = f"{merged.loss_merged:.5f} at step {step}"
            step, factors, merged = run.best.step, run.best.factors, run.best.report(merged)
            new_tokens = run.best.new_tokens
            run.accelerator.print(f"exported is step {step}: held-out loss {merged.loss_merged:.5f}, {was}")
        exported = run.export(run.output, factors, step, merged, new_tokens)
    write_text(run.output / MERGE_REPORT, json.dumps(merged.to_dict() | {"step": step}, indent=2))
    plot_losses({run.options.method: run.history.rows}, run.output / LOSS_PLOT)
    base, prompt = run.plan.base, run.options.instance_prompt or prompts_of(run.plan.concepts)[0]
    images = [name for name in (SHEET, LOSS_PLOT) if (run.output / name).is_file()]
    lines = str(merged).splitlines()
    card = model_card(run.options, base.family.tag, prompt, lines, images, base.family.vae_class, base)
    write_text(run.output / "README.md", card)
    return merged, exported
