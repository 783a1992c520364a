"""The depth study as a Prefect flow: a task for each training that is missing, then the figure, table and page."""

import os
import sys
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.states import Completed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import artifacts, child, stages
from flows.console import shorten_expected_errors
from flows.predict import run_id
from flows.reconcile import reconcile
from flows.retrain import Tonight, interrupted, stage_task
from flows.runs import recorded
from flows.settings import read_settings
from flows.workspace import Workspace, find_workspace, locked
from tasks.errors import Interrupted, NightlyError
from tasks.files import read_json, write_text
from tasks.study import StudyParams, Trial, result, trials

shorten_expected_errors()


@dataclass(frozen=True)
class Studied:
    """What a study found, in one line; how many trainings it took; and the page."""

    headline: str
    trained: str
    report: Path


@dataclass(frozen=True)
class Study:
    """What every task of one run needs to know; ``params`` is a copy that nobody edits."""

    workspace: Workspace
    run: str
    params: Path
    settings: StudyParams

    @property
    def results(self) -> Path:
        return results_folder(self.workspace) / "runs"


def results_folder(workspace: Workspace) -> Path:
    """Return where everything that a study writes stands."""
    return workspace.models / "study"


@flow(name="study", flow_run_name=lambda: f"study {datetime.now():%Y-%m-%d %H:%M:%S}", persist_result=False)
def study() -> Studied:
    """Train networks of growing depth, with and without shortcuts, and draw their training and test errors."""
    workspace = find_workspace()
    try:
        # All along: a retraining would take the processor away, and the data.
        with recorded(workspace), locked(workspace, "nightly study"):
            reconcile(workspace, get_run_logger().info)
            return carry_out(workspace)
    except Interrupted as reason:
        get_run_logger().info("interrupted: %s", reason, extra={"expected": True})
        return interrupted(reason)


def carry_out(workspace: Workspace) -> Studied:
    """Bring the data up to date, train what is missing, and report on all of it."""
    settings, run = read_settings(workspace.params), run_id()
    bring_data_up_to_date(Tonight(workspace, run, settings["retrain"]))
    params = workspace.state / "logs" / run / "params.yaml"
    write_text(params, workspace.params.read_text(encoding="utf-8"))
    now = Study(workspace, run, params, settings["study"])
    planned = trials(workspace.prepared, now.settings, settings["augment"])
    missing = [trial for trial in planned if result(now.results, trial) is None]
    logger = get_run_logger()
    logger.info("%d of %d trainings are done already", len(planned) - len(missing), len(planned))
    problems = train_missing(now, missing)
    done = [found for trial in planned if (found := result(now.results, trial)) is not None]
    if not done:
        raise NightlyError(f"no training of the study succeeded: {problems[0]}")
    studied = report(now, done, f"{len(missing) - len(problems)} of {len(planned)} in this run")
    if problems:
        raise NightlyError(
            f"{len(problems)} of {len(planned)} trainings failed ({problems[0]}); the others are in {studied.report}"
        )
    return studied


def bring_data_up_to_date(now: Tonight) -> None:
    """Run the stages up to prepare where they are out of date."""
    names = stages.stage_names(now.workspace.root)
    for name in names[: names.index(stages.DATA_STAGE) + 1]:
        state = stage_task(name, now.rules)(now, name, False, known_fresh=False, return_state=True)
        state.result()


def train_missing(now: Study, missing: list[Trial]) -> list[str]:
    """Train what is missing, some at a time; return what went wrong, a line for each that failed.

    Raises:
        Interrupted: a training was stopped; all go on from their checkpoints with the next study.
    """
    stop = threading.Event()
    problems = []
    with ThreadPoolTaskRunner(max_workers=now.settings.parallel) as runner:
        futures: list[PrefectFuture] = []
        try:
            for trial in missing:
                name = f"{trial.network} seed {trial.seed}"
                futures.append(
                    runner.submit(train.with_options(task_run_name=name), {"now": now, "trial": trial, "stop": stop})
                )
            for future in futures:
                future.wait()
        except BaseException:
            stop.set()
            raise
    for future in futures:
        problem = future.state.result(raise_on_failure=False)
        if isinstance(problem, Interrupted):
            raise problem
        if isinstance(problem, Exception):
            problems.append(" ".join(str(problem).split()))
    return problems


@task(name="train", cache_policy=NO_CACHE, persist_result=False)
def train(now: Study, trial: Trial, stop: threading.Event) -> State:
    """Train one network with one seed, in a process of its own."""
    logger = get_run_logger()
    if stop.is_set():
        raise Interrupted(f"{trial.network} had not begun")

    def emit(line: str) -> None:
        logger.info(line)
        if stop.is_set():  # ends the child, which saves
            raise Interrupted(f"{trial.network} stopped with the study")

    command = [sys.executable, "-m", "tasks.study_run", "--network", trial.network, "--seed", str(trial.seed)]
    command += ["--prepared", str(now.workspace.prepared), "--results", str(now.results)]
    command += ["--scratch", str(now.workspace.state / "study"), "--params", str(now.params)]
    if now.settings.parallel > 1:
        command += ["--threads", str(max(1, (os.cpu_count() or 1) // now.settings.parallel))]
    try:
        child.run(
            command,
            name=f"{trial.network} seed {trial.seed}",
            root=now.workspace.root,
            log=now.workspace.state / "logs" / now.run / f"{trial.network}-{trial.seed}.log",
            emit=emit,
            limit_seconds=now.settings.time_limit_hours * 3600,
        )
    except Interrupted as reason:
        return interrupted(reason)
    if result(now.results, trial) is None:
        raise NightlyError("the data or the code changed while the study went on: run 'nightly study' again")
    return Completed(message="trained")


@task(name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def report(now: Study, done: list[dict], trained: str) -> Studied:
    """Write figures, tables and the page about all trainings that are done."""
    from tasks.study_report import write_report

    folder = results_folder(now.workspace) / "report"
    source = read_json(now.workspace.prepared / "prepared.json")["source"]["source"]
    summary = write_report(done, folder, source)
    artifacts.show("study", summary.markdown, summary.headline, get_run_logger().warning)
    return Studied(summary.headline, trained, folder / "report.html")
