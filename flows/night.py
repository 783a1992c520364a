"""The end of a night: its record, its page, its notifications. No Prefect in here."""

import shutil
import socket

from flows import notify
from flows.changes import changes
from flows.nightpage import write_night_page
from flows.notify import Record
from flows.stages import Emit
from flows.summary import Night, duration, moment
from flows.workspace import Workspace
from tasks.errors import NightlyError, describe
from tasks.files import publish_file
from tasks.registry import champion_id


def tell(workspace: Workspace, night: Night, emit: Emit) -> None:
    """Write the record and the page of a night that has ended, however it did, and notify whoever wants to know.

    What goes wrong here is a line for ``emit``: it takes nothing back of what the night has done.
    """
    earlier: list[Record] = []
    try:
        earlier = notify.nights(workspace)
        record = notify.record_night(workspace, night.run, night.state, night.started, night.headline)
        night.seconds = night.seconds or record.seconds
        night.champion = night.champion or champion_id(workspace.models)
        logs = workspace.state / "logs" / night.run
        night.logs = night.logs or (workspace.shown(logs) if logs.is_dir() else "")
        if night.state != "skipped":  # the data may be another run's, at work on it just now
            night.changes = changes(workspace, night.judgement, night.champion)
        page = workspace.state / "nights" / f"{night.run}.html"
        write_night_page(page, workspace, night, [*earlier, record])
        if night.state != "skipped":  # that page says less than the one of the night that is at work
            with publish_file(page.with_name("latest.html")) as latest:
                shutil.copyfile(page, latest)
        night.page = workspace.shown(page)
    except Exception as error:  # whatever it is, the model is in service and the notification goes out
        emit(f"the page of this night could not be written: {describe(error)}")
    events = notify.events_of(night.state, earlier)
    if night.stopped and night.promoted:  # it was stopped, or failed, at a later step
        events.append("promote")
    if not events:
        return
    try:
        addresses = notify.read_addresses(workspace.params)
    except (NightlyError, OSError) as error:
        emit(f"nobody could be notified: {describe(error)}")
        return
    for trouble in notify.notify(addresses, events, *message(night, "recovery" in events)):
        emit(trouble)


def message(night: Night, recovered: bool) -> tuple[str, str]:
    """Return title and text of a notification."""
    title = f"nightly on {socket.gethostname()}: {night.state}"
    if recovered:
        title += ", well again after a failure" if night.state == "unchanged" else " after a failure"
    lines = [f"{night.headline[0].upper()}{night.headline[1:]}", f"In service: {night.champion or 'no model yet'}"]
    lines += [f"Before it: {line}" for line in night.mended]
    if night.predictions:
        lines += [f"Predictions: {night.predictions.note}", *night.drift["sentences"]]
    if night.intake and any(vars(night.intake).values()):
        lines.append(f"Inbox: {' '.join(night.intake.sentences())}")
    if night.published:
        lines.append(f"Published: {night.published.sentence}")
    lines.append(f"Run {night.run}, {duration(night.seconds)}")
    if night.next_run:
        lines.append(f"Next run: {moment(night.next_run)}")
    if night.page:
        lines.append(f"Page: {night.page}")
    return title, "\n".join(lines)
