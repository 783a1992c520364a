"""What ``nightly doctor`` asks the Prefect server: whether it answers, what it believes to be running, the schedule."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from flows.findings import Case, Finding, fail, ok, warn
from flows.reconcile import is_at_work
from flows.runs import recorded_runs
from tasks.errors import NightlyError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse

DEPLOYMENT = "retrain/nightly"
#: A run that is due for longer than this has nobody who starts it.
PATIENCE = timedelta(minutes=5)
_SECONDS = 10.0


def server(case: Case) -> Finding:
    """The server that the settings name: it answers, and is of this client's version."""
    from flows.server import START_ONE, require_answer, server_url

    url = server_url()
    if url is None:
        return warn("no Prefect server is configured: each run starts a temporary one, none by itself", START_ONE)
    try:
        require_answer(url)
    except NightlyError as error:
        return fail(str(error).removesuffix(f": {START_ONE}"), START_ONE)
    with _client() as client:
        theirs, ours = client.api_version(), client.client_version()
        loud = client.request("GET", "/admin/settings").json().get("server", {}).get("analytics_enabled")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        finding = fail if theirs.split(".")[0] != ours.split(".")[0] else warn
        return finding(f"{url} is Prefect {theirs}, this is {ours}", "install the same version for both")
    if loud:
        return warn(f"{url} reports its use to Prefect", "start it with PREFECT_SERVER_ANALYTICS_ENABLED=false")
    return ok(f"{url}, Prefect {theirs}")


def zombies(case: Case) -> Finding:
    """Retrainings that the server believes to be at work, and the processes they should be."""

    def look(client: "SyncPrefectClient") -> Finding:
        running = [run for run in _runs_at_work(client) if run.state and is_at_work(run.state)]
        known = {run.id: run for run in recorded_runs(case.workspace).values()}
        dead = [run for run in running if (noted := known.get(str(run.id))) and noted.fate() == "dead"]
        if dead:
            noted = known[str(dead[0].id)]
            text = f"'{dead[0].name}' is {dead[0].state_name}, but process {noted.pid} is dead{_more(dead)}"
            return fail(text, "nightly doctor --fix, or the next night")
        strangers = [run for run in running if str(run.id) not in known]
        if strangers:
            text = f"'{strangers[0].name}' is {strangers[0].state_name}, and not known here{_more(strangers)}"
            return warn(
                text, "if no other machine or workspace runs it: prefect flow-run delete " + str(strangers[0].id)
            )
        return ok(f"{len(running)} runs at work" if running else "no run is at work, and none claims to be")

    return _asked(look)


def slots(case: Case) -> Finding:
    """Concurrency slots of the deployment that no run occupies any more."""

    def look(client: "SyncPrefectClient") -> Finding:
        deployment = _deployment(client)
        limit = deployment.global_concurrency_limit if deployment else None
        if deployment is None or limit is None:
            return ok("the deployment has no limit, so that none can leak")
        occupied = [run for run in _runs_at_work(client) if run.deployment_id == deployment.id]
        if limit.active_slots > len(occupied):
            text = f"{limit.active_slots} of {limit.limit} slots are taken, but {len(occupied)} runs are at work"
            return fail(text, "nightly doctor --fix")
        return ok(f"{limit.active_slots} of {limit.limit} slots are taken")

    return _asked(look)


def schedule(case: Case) -> Finding:
    """The schedule: there, active, and somebody starts its runs."""

    def look(client: "SyncPrefectClient") -> Finding:
        from prefect.client.schemas.filters import (
            FlowRunFilter,
            FlowRunFilterDeploymentId,
            FlowRunFilterState,
            FlowRunFilterStateName,
        )

        deployment = _deployment(client)
        if deployment is None or not deployment.schedules:
            return warn("the server has no schedule for retraining", "nightly serve")
        if deployment.paused or not any(entry.active for entry in deployment.schedules):
            state = "paused" if deployment.paused else "inactive"
            return fail(f"the schedule is {state}", "nightly doctor --fix")
        late = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
                state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Late", "Scheduled"])),
            ),
            limit=100,
        )
        due = [
            run for run in late if run.expected_start_time and run.expected_start_time + PATIENCE < datetime.now(UTC)
        ]
        if due:
            text = f"{len(due)} runs are due and nobody starts them, the first since {min(map(_due, due))}"
            return fail(text, "start 'nightly serve', or a worker of the deployment's pool")
        starts = sorted(_due(run) for run in late)
        return ok(f"active{f', the next run at {starts[0]}' if starts else ''}")

    return _asked(look)


def resume_schedule() -> str:
    """Let the server start runs again; return what was done."""
    with _client() as client:
        deployment = _deployment(client)
        assert deployment
        client.resume_deployment(deployment.id)
        for entry in deployment.schedules:
            client.update_deployment_schedule(deployment.id, entry.id, active=True)
    return "resumed the schedule"


def free_slots() -> str:
    """Give the slots back that no run occupies; return what was done."""
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

    with _client() as client:
        deployment = _deployment(client)
        assert deployment
        assert deployment.global_concurrency_limit
        occupied = [run for run in _runs_at_work(client) if run.deployment_id == deployment.id]
        limit = deployment.global_concurrency_limit
        update = GlobalConcurrencyLimitUpdate(active_slots=len(occupied))
        client.update_global_concurrency_limit(limit.name, update)
    return f"gave {limit.active_slots - len(occupied)} slots back"


def _asked(look: "Callable[[SyncPrefectClient], Finding]") -> Finding:
    """Return what the server says; that it is missing or silent is the finding of another check."""
    import httpx

    from flows.server import server_url

    if server_url() is None:
        return ok("no Prefect server is configured")
    try:
        with _client() as client:
            return look(client)
    except httpx.TransportError:
        return warn("not looked at: the server does not answer", "see 'server'")


def _client() -> "SyncPrefectClient":
    from prefect.client.orchestration import get_client

    return get_client(httpx_settings={"timeout": _SECONDS}, sync_client=True)


def _deployment(client: "SyncPrefectClient") -> "DeploymentResponse | None":
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(DEPLOYMENT)
    except ObjectNotFound:
        return None


def _runs_at_work(client: "SyncPrefectClient") -> "list[FlowRun]":
    """Return the retrainings that the server believes to be at work or about to be."""
    from prefect.client.schemas.filters import (
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType

    at_work = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    return client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[DEPLOYMENT.partition("/")[0]])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=at_work))),
        limit=200,
    )


def _due(run: "FlowRun") -> str:
    assert run.expected_start_time
    return f"{run.expected_start_time.astimezone():%Y-%m-%d %H:%M}"


def _more(runs: list) -> str:
    return f" (and {len(runs) - 1} more)" if len(runs) > 1 else ""
