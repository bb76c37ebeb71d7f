"""The stages of a race, and who runs what: methods are tuned side by side, each in a process of its own."""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from reslora_diffusion.utils.problems import Interrupted, Stopped

from . import results
from .plan import Plan
from .run import run
from .search import Setting, best_of, first_grid, key, next_setting

Job = tuple[str, str, Setting, int]  # stage, method, setting, seed


def done(plan: Plan, folder: Path, job: Job) -> dict[str, Any]:
    """The result of one run: read if it is there, else made and written."""
    stage, word, setting, seed = job
    facts = results.facts_of(plan, stage, word, setting, seed)
    path = results.path_of(folder, facts)
    if not path.exists():
        split = "validation" if stage == "tune" else "test"
        settings = plan.task.model_copy(update={"evaluations": facts["task"]["evaluations"]})
        base = plan.controls[word].of if stage == "controls" else word
        results.write(path, facts, run(settings, plan.parsed()[base], setting, seed, split))
    return results.read(path)["result"]


def tuned(plan: Plan, folder: Path, word: str, until: float = math.inf) -> list[tuple[Setting, float]]:
    """All trials of one method, `(setting, mean loss over the tuning seeds)`; fewer where the time is up."""
    options, search = plan.methods[word], plan.search
    defaults = {name: [value] for name, value in plan.parsed()[word].defaults.items()}
    options = defaults | options
    grid = first_grid(search.learning_rate, search.alpha_over_rank, options)
    tried: list[tuple[Setting, float]] = []
    while len(tried) < search.trials and time.time() < until:
        setting = next_setting(tried, grid, options)
        losses = [done(plan, folder, ("tune", word, setting, seed))["loss"] for seed in search.seeds]
        tried.append((setting, sum(losses) / len(losses)))
    return tried


def tuning_so_far(plan: Plan, folder: Path) -> dict[str, list[tuple[Setting, float]]]:
    """Trials by method, of those whose every seed was run, from the files alone."""
    losses: dict[str, dict[tuple, tuple[Setting, list[float]]]] = {}
    for content in results.all_of(folder, plan):
        if content["stage"] == "tune" and content["method"] in plan.methods:
            setting = content["setting"]
            of_method = losses.setdefault(content["method"], {})
            of_method.setdefault(key(setting), (setting, []))[1].append(content["result"]["loss"])
    wanted = len(plan.search.seeds)
    return {
        word: [(setting, sum(values) / wanted) for setting, values in found.values() if len(values) == wanted]
        for word, found in losses.items()
    }


def final_jobs(plan: Plan, best: dict[str, Setting]) -> list[Job]:
    """The best setting of each method on fresh seeds, then at other learning rates, then the controls."""
    jobs: list[Job] = [("final", word, best[word], seed) for seed in plan.final.seeds for word in best]
    for name, control in plan.controls.items():
        if control.of in best:
            jobs += [("controls", name, changed(best[control.of], control), seed) for seed in plan.final.seeds]
    for factor in plan.final.robustness:
        for word, setting in best.items():
            other = setting | {"learning_rate": setting["learning_rate"] * factor}
            jobs += [("robustness", word, other, seed) for seed in plan.final.seeds[: plan.final.robustness_seeds]]
    return jobs


def changed(setting: Setting, control: Any) -> Setting:
    found = setting | {
        "learning_rate": setting["learning_rate"] * control.learning_rate,
        "alpha_over_rank": setting["alpha_over_rank"] * control.alpha_over_rank,
    }
    rank = {"rank_factor": control.rank} if control.rank != 1 else {}
    return found | rank | ({"lr_scheduler": control.lr_scheduler} if control.lr_scheduler else {})


def race(plan: Plan, folder: Path, workers: int, hours: float = math.inf) -> bool:
    """Run what is missing, for `hours` at most; True if nothing is.

    Raises:
        BadInput: files in the folder that cannot be used, before anything runs.
        Interrupted: Ctrl-C; runs that had not ended are made again by the next call.
        Stopped: one of the processes was killed.
    """
    results.all_of(folder, plan)
    until = time.time() + 3600 * hours
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        tune_jobs = [(tuned, plan, folder, word, until) for word in plan.methods]
        wait_for(pool, tune_jobs, "tuning, methods")
        trials = tuning_so_far(plan, folder)
        if any(len(trials.get(word, ())) < plan.search.trials for word in plan.methods):
            return False
        jobs = final_jobs(plan, {word: best_of(trials[word]) for word in plan.methods})
        wait_for(pool, [(done_in_time, plan, folder, job, until) for job in jobs], "final runs")
    except KeyboardInterrupt:
        raise Interrupted("the race; the same command goes on with it") from None
    except BrokenProcessPool:
        raise Stopped(
            "a process of the race was ended from outside, perhaps for its memory (then wanted fewer --workers); the "
            "same command goes on"
        ) from None
    finally:  # results are written whole, so a run can be cut off anywhere
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown()
    return all(results.path_of(folder, results.facts_of(plan, *job)).exists() for job in jobs)


def done_in_time(plan: Plan, folder: Path, job: Job, until: float) -> None:
    if time.time() < until:
        done(plan, folder, job)


def wait_for(pool: ProcessPoolExecutor, jobs: Sequence[tuple], title: str) -> None:
    """Raises what a job raised, and leaves the others to the caller."""
    futures = [pool.submit(*job) for job in jobs]
    for future in tqdm(as_completed(futures), total=len(futures), desc=title):
        future.result()


def start_worker() -> None:
    """One thread a process: equal runs give equal bits, and processes do not get into each other's way. Ctrl-C is for
    the first process, whose end is also theirs."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which stays behind where a process is ended
    threading.Thread(target=end_with, args=[multiprocessing.parent_process()], daemon=True).start()
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
