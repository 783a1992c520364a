"""Which Prefect server there is, asked before a flow starts, so that its absence is one clear line."""

from tasks.errors import NightlyError

START_ONE = (
    "start one with 'prefect server start' in another terminal, then 'export PREFECT_API_URL=http://127.0.0.1:4200/api'"
)


def server_url() -> str | None:
    """Return the address of the Prefect server in the settings, None if a temporary one will be started."""
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value()


def require_answer(url: str) -> None:
    """Raise unless a Prefect server answers at ``url``."""
    import httpx

    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise NightlyError(f"no Prefect server answers at PREFECT_API_URL={url} ({reason}): {START_ONE}") from None


def require_server() -> str:
    """Return the address of a running Prefect server: a schedule needs one that stays.

    Raises:
        NightlyError: none is configured, or it does not answer.
    """
    url = server_url()
    if url is None:
        raise NightlyError(f"a schedule needs a Prefect server that stays: {START_ONE}")
    require_answer(url)
    return url


def announce_server() -> None:
    """Make sure that the configured Prefect server answers, or start one that ends with this command."""
    url = server_url()
    if url is None:
        from flows.temporary import start_temporary_server
        from flows.workspace import find_workspace

        print("starting a temporary Prefect server, about 10 s (PREFECT_API_URL names one that stays)", flush=True)
        start_temporary_server(find_workspace().state / "logs" / "server.log")
    else:
        require_answer(url)
