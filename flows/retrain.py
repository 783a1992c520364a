"""The nightly flow: every stage of DVC's graph, then the verdict, then a folder of images."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import prefect.runtime
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.states import Completed, Crashed, State

from flows import artifacts, inbox, stages
from flows.champion import Judgement, carry_out, judge_exported, require_known_classes
from flows.child import StageFailed
from flows.console import shorten_expected_errors
from flows.night import tell
from flows.notify import WELL, nights
from flows.predict import classify, nothing_to_classify, obstacle, run_id
from flows.prune import prune
from flows.publish import Published, publish
from flows.reconcile import reconcile
from flows.runs import recorded
from flows.settings import RetrainParams, fire_times, read_settings
from flows.stages import Outcome
from flows.summary import Night, Predictions, StageRun, duration, markdown
from flows.workspace import Busy, Workspace, find_workspace, locked
from tasks.errors import Interrupted, NightlyError, describe
from tasks.inbox import Intake
from tasks.promote import champion_id

shorten_expected_errors()


class TooLate(NightlyError):
    """A scheduled run whose time is long past, or that another night has made up for."""


@dataclass(frozen=True)
class Tonight:
    """What every step of one run needs to know."""

    workspace: Workspace
    run: str
    rules: RetrainParams

    @property
    def logs(self) -> Path:
        return self.workspace.state / "logs" / self.run

    @property
    def limit_seconds(self) -> float:
        return self.rules.stage_time_limit_hours * 3600

    @property
    def patience_seconds(self) -> float:
        return self.rules.dvc_patience_minutes * 60


@flow(name="retrain", flow_run_name=lambda: f"retrain {datetime.now():%Y-%m-%d %H:%M:%S}", persist_result=False)
def retrain(predict: Path | None = None, force: bool = False) -> Night:
    """Retrain the classifier on what has changed, promote it if it beats the model in service, classify a folder.

    Args:
        predict: the folder to classify at the end; data/incoming unless another is given.
        force: run every stage, also those that are up to date.
    """
    workspace, logger = find_workspace(), get_run_logger()
    night = Night(run=run_id())
    try:
        # The record is the first thing, so that a run that is killed at any later moment can be proven dead.
        with recorded(workspace, night.run):
            refuse_lateness(workspace)
            with locked(workspace, "nightly retrain"):
                refuse_repetition(workspace)
                return carry_through(workspace, night, predict, force)
    except (Busy, TooLate) as reason:
        logger.info("skipped: %s", reason, extra={"expected": True})
        night.stopped, night.reason = "skipped", describe(reason)
        night.run += "-skipped"  # the night that is in its way may have begun in the same second
        tell(workspace, night, logger.warning)
        return Completed(name="Skipped", message=str(reason))
    except Interrupted as reason:
        logger.info("interrupted: %s", reason, extra={"expected": True})
        return interrupted(reason)
    except (NightlyError, OSError) as error:
        if night.stopped is None:  # before the night began, by wrong parameters for one
            night.stopped, night.reason = "failed", describe(error)
            tell(workspace, night, logger.warning)
        raise


def carry_through(workspace: Workspace, night: Night, predict: Path | None, force: bool) -> Night | State:
    """Do the night's work and tell how it ended, however it did; a night without anything new is a skipped one."""
    try:
        work(Tonight(workspace, night.run, read_rules(workspace)), night, predict, force)
    except BaseException as error:
        # A cancel from the UI and a signal are no exceptions of the ordinary kind.
        stopped = isinstance(error, Interrupted) or not isinstance(error, Exception)
        night.stopped = "interrupted" if stopped else "failed"
        night.reason = describe(error)
        raise
    finally:
        tell(workspace, night, get_run_logger().warning)
        artifacts.show("night", markdown(night), night.headline, get_run_logger().warning)
    if night.state == "unchanged" and not night.built:
        return Completed(name="Skipped", message=f"nothing new: {night.headline}", data=night)
    return night


def work(tonight: Tonight, night: Night, predict: Path | None, force: bool) -> None:
    """Do all that a night consists of, writing down in ``night`` what came of it as soon as it is known."""
    workspace, started = tonight.workspace, time.monotonic()
    run = FlowRunContext.get().flow_run  # what is known without asking a server that may be away
    if run.deployment_id is not None and run.work_pool_name is None:  # a worker's schedule is that of prefect.yaml
        night.next_run = fire_times(read_settings(workspace.params)["serve"])[0]
    night.mended = reconcile(workspace, get_run_logger().info)
    night.logs = workspace.shown(tonight.logs)
    night.intake = take_in(tonight)
    bring_up_to_date(tonight, force, night.stages)
    night.report = workspace.shown(workspace.evaluation / "report.html")
    night.judgement = judge(tonight)
    promote_or_hold(tonight, night.judgement)
    night.champion = champion_id(workspace.models)
    failure = None
    try:
        night.predictions = classify_folder(tonight, predict)
    except (StageFailed, Interrupted) as error:  # of one bad file perhaps, or of the time limit, night after night
        failure = error
    # Last: following the upstream branch may bring other code into the workspace.
    night.published = make_public(tonight, night.headline)
    night.seconds = time.monotonic() - started
    if failure:
        raise failure


def interrupted(reason: Interrupted) -> State:
    """Return the state of a run that a signal stopped and that the next one continues.

    It is what Prefect itself makes of a signal: no failure, so nothing is retried, and no success either.
    """
    return Crashed(name="Interrupted", message=str(reason), data=reason)


def read_rules(workspace: Workspace) -> RetrainParams:
    """Return the ``retrain`` section after checking all of ``params.yaml``: better now than after the training."""
    return read_settings(workspace.params)["retrain"]


def refuse_lateness(workspace: Workspace) -> None:
    """Skip a scheduled run that is long overdue, so that nights without power are not made up for in a row."""
    run = prefect.runtime.flow_run
    late = datetime.now(UTC) - run.scheduled_start_time
    limit = timedelta(hours=read_rules(workspace).maximum_lateness_hours)
    # A run that is started again by hand keeps its old time, and is meant.
    if late > limit and run.run_count <= 1:
        raise TooLate(
            f"this run was due {duration(late.total_seconds())} ago, longer than retrain.maximum_lateness_hours"
        )


def refuse_repetition(workspace: Workspace) -> None:
    """Skip a run of the schedule that started only after a later night had ended: once is enough for what was missed.

    The caller holds the workspace lock, so that no night ends meanwhile.
    """
    run, due = FlowRunContext.get().flow_run, prefect.runtime.flow_run.scheduled_start_time
    if not run.auto_scheduled or run.run_count > 1:  # somebody asked for it
        return
    for night in nights(workspace):
        started = datetime.fromisoformat(night.started)
        # One that is still to come was noted by a clock that was ahead.
        if due < started <= datetime.now(UTC) and night.state in (*WELL, "failed"):
            which = f"the night that started {started:%Y-%m-%d %H:%M} UTC"
            raise TooLate(f"{which} has made up for this run, which was due {due:%Y-%m-%d %H:%M} UTC: {night.headline}")


def take_in(tonight: Tonight) -> Intake:
    """Pack new labeled images out of the inbox into an addition, and see that no addition is missing.

    A task run of its own if there is anything to do.
    """
    return take_in_inbox(tonight) if inbox.is_due(tonight.workspace) else Intake()


@task(name="inbox", task_run_name="inbox", cache_policy=NO_CACHE, persist_result=False)
def take_in_inbox(tonight: Tonight) -> Intake:
    """Validate, pack and version what lies in ``data/inbox``."""
    rules, emit = tonight.rules, get_run_logger().info
    limits = {"limit_seconds": tonight.limit_seconds, "grace_seconds": rules.stop_grace_seconds}
    return inbox.take_in(tonight.workspace, tonight.logs, tonight.patience_seconds, emit, **limits)


def bring_up_to_date(tonight: Tonight, force: bool, runs: list[StageRun]) -> None:
    """Run DVC's stages in DVC's order, each as a task run of its own; ``runs`` grows by each that has ended."""
    root = tonight.workspace.root
    logger = get_run_logger()
    names = stages.stage_names(root)
    stale = stages.stale_stages(root, names, tonight.patience_seconds, logger.info)
    # What stands before the first stale stage is up to date for certain; from there on DVC is asked one by one.
    first = 0 if force else next((number for number, name in enumerate(names) if name in stale), len(names))
    for number, name in enumerate(names):
        started = time.monotonic()
        state = stage_task(name, tonight.rules)(tonight, name, force, known_fresh=number < first, return_state=True)
        runs.append(StageRun(name, state.name, state.message or "", time.monotonic() - started))
        state.result()  # raises what the task raised
        if name == stages.DATA_STAGE:
            require_known_classes(tonight.workspace, tonight.rules, tonight.logs / "judge.log", logger.info)
    if first < len(names) and (changed := stages.stale_stages(root, names, tonight.patience_seconds, logger.info)):
        logger.warning("changed while the run went on, to be rebuilt next time: %s", ", ".join(sorted(changed)))


def stage_task(name: str, rules: RetrainParams):
    """Return the task for one stage. Only the network is retried: a training that failed once fails again."""
    retries = rules.download_retries if name == "download" else 0
    return run_stage.with_options(
        name=name, task_run_name=name, retries=retries, retry_delay_seconds=rules.download_retry_delay_seconds
    )


@task(cache_policy=NO_CACHE, persist_result=False)
def run_stage(tonight: Tonight, stage: str, force: bool, known_fresh: bool) -> State:
    """Bring one stage up to date; Prefect's state says Cached where there was nothing to do."""
    logger = get_run_logger()
    started = time.monotonic()
    outcome = Outcome.unchanged
    progress = artifacts.Progress(stage, logger.warning)

    def emit(line: str) -> None:
        logger.info(line)
        progress.hear(line)

    try:
        if not known_fresh:
            outcome = stages.reproduce(
                tonight.workspace.root,
                stage,
                log=tonight.logs / f"{stage}.log",
                emit=emit,
                limit_seconds=tonight.limit_seconds,
                grace_seconds=tonight.rules.stop_grace_seconds,
                patience_seconds=tonight.patience_seconds,
                force=force,
            )
    except Interrupted as reason:
        return interrupted(reason)
    if outcome is Outcome.ran:
        progress.done()
        logger.info("done in %s", duration(time.monotonic() - started))
        return Completed(message="ran")
    logger.info("cached: %s", outcome)
    return Completed(name="Cached", message=str(outcome))


@task(task_run_name="judge", cache_policy=NO_CACHE, persist_result=False)
def judge(tonight: Tonight) -> Judgement:
    """Compare tonight's model with the one in service."""
    logger = get_run_logger()
    judgement = judge_exported(tonight.workspace, tonight.rules, tonight.logs / "judge.log", logger.info)
    logger.info("%s: %s", judgement.verdict.action, "; ".join(judgement.verdict.reasons))
    return judgement


@task(task_run_name="promote", cache_policy=NO_CACHE, persist_result=False)
def promote_or_hold(tonight: Tonight, judgement: Judgement) -> State:
    """Put tonight's model in service or write down why not."""
    logger = get_run_logger()
    carry_out(tonight.workspace, judgement, tonight.patience_seconds, logger.info)
    in_service = champion_id(tonight.workspace.models) or "no model yet"
    logger.info("in service: %s", in_service)
    name = "Promoted" if judgement.verdict.action == "promote" else "Held"
    return Completed(name=name, message="; ".join(judgement.verdict.reasons))


def classify_folder(tonight: Tonight, chosen: Path | None) -> Predictions:
    """Classify the folder that was asked for, or what lies in ``data/incoming``."""
    folder = tonight.workspace.root / (chosen or tonight.workspace.incoming)
    if reason := obstacle(tonight.workspace, folder, chosen is not None):
        nothing_to_classify(reason)
        return Predictions(note=reason)
    rules = tonight.rules
    limits = {"limit_hours": rules.stage_time_limit_hours, "grace_seconds": rules.stop_grace_seconds}
    return classify(tonight.workspace, tonight.run, folder, **limits)


def make_public(tonight: Tonight, headline: str) -> Published:
    """Publish the night as ``retrain.publish`` says, then prune as ``retrain.keep`` says; neither fails a night."""
    if tonight.rules.publish == "none" and tonight.rules.keep is None:
        return Published()
    return publish_results(tonight, headline)


@task(name="publish", task_run_name="publish", cache_policy=NO_CACHE, persist_result=False)
def publish_results(tonight: Tonight, headline: str) -> Published:
    """Push data to DVC's remote, commit the night to git and push it, remove old models' local copies."""
    logger = get_run_logger()
    common = {
        "emit": logger.info,
        "limit_seconds": tonight.limit_seconds,
        "patience_seconds": tonight.patience_seconds,
    }
    published = publish(
        tonight.workspace, tonight.rules.publish, f"nightly: {headline}", log=tonight.logs / "publish.log", **common
    )
    for line in (published.sentence, *published.notes):
        if line:
            logger.info(line)
    if removed := prune(tonight.workspace, tonight.rules.keep, log=tonight.logs / "prune.log", **common):
        logger.info("pruned, and kept by DVC: %s", ", ".join(removed))
    return published
