"""The command line. Each command is a thin wrapper; heavy imports stand inside, so that --help is quick."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from flows import cli_explain, cli_study
from flows.terminal import print_pairs, print_prediction, screen
from tasks.errors import EXIT_INTERRUPTED, Interrupted, NightlyError, describe

if TYPE_CHECKING:
    from tasks.promote import Entry

#: Exit code of a command that a Ctrl-C ended, as shells have it.
_CTRL_C = 130
#: The result is complete, but has more failures than were allowed.
EXIT_TOO_MANY_FAILED = 3

app = typer.Typer(
    name="nightly",
    help="Retrain an image classifier every night, keep the better model in service, classify folders with it.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    """Print the version and end, if that is ``wanted``."""
    if wanted:
        from importlib.metadata import version

        print(f"nightly {version('resnet-nightly')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What comes before a command."""


@app.command(epilog="Example: nightly configure digits")
def configure(
    preset: Annotated[str | None, typer.Argument(metavar="PRESET", help="A file in presets/, without .yaml.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the presets and change nothing.")] = False,
) -> None:
    """Put a preset in place as params.yaml and show what that changes."""
    from rich.table import Table

    from flows import configure as presets
    from flows.workspace import find_workspace

    workspace, console = find_workspace(), screen()
    if show or preset is None:
        for name in presets.preset_names(workspace):
            console.print(presets.preset_summary(workspace, name) or name, soft_wrap=True, highlight=False)
        if not show:
            raise NightlyError("name a preset: nightly configure PRESET")
        return
    done = presets.configure(workspace, preset)
    if done.changes:
        table = Table("parameter", "before", "now", box=None, header_style="bold", pad_edge=False)
        for change in done.changes:
            table.add_row(change.key, change.before or "default", change.after or "default")
        console.print(table)
    console.print(f"params.yaml is preset {preset}" + ("" if done.changes else " already, in content"), highlight=False)
    if done.backup:
        console.print(f"your own edits are kept in {done.backup.name}", highlight=False)


@app.command(epilog="Example: nightly retrain --predict data/prepared/examples")
def retrain(
    predict: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to classify at the end.", show_default="data/incoming")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run every stage, also what is up to date.")] = False,
) -> None:
    """Retrain on what has changed, promote the model if it is better, classify a folder.

    Exit code 75: run it again, later if another retraining is at work, at any time if this one was interrupted.
    """
    from flows.console import calm_terminal, server_may_be_lost
    from flows.workspace import find_workspace

    workspace = find_workspace()
    folder = predict.resolve() if predict else None
    # Stages, DVC and the flow itself live at the root, wherever in the workspace this was typed.
    os.chdir(workspace.root)
    calm_terminal(who_tells="command")

    from flows import retrain as flows_retrain
    from flows.server import announce_server
    from flows.summary import Night, print_night

    announce_server()
    with server_may_be_lost():
        state = flows_retrain.retrain(predict=folder, force=force, return_state=True)
    night = state.result()
    if not isinstance(night, Night):
        print(f"skipped: {state.message}", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED)
    print_night(night, screen())


@app.command(epilog="Example: nightly predict holiday-photos/ --out labels/ --report")
def predict(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder, searched recursively; an image; a quoted pattern; a .txt of paths; a tar or zip archive; "
            "- for paths on standard input; s3://bucket/prefix.",
        ),
    ],
    out: Annotated[
        str | None, typer.Option(help="Folder or s3:// address for the result.", show_default="data/predictions/<now>")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="A model's folder.", show_default="the model in service")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, keras or openvino.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or int8.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Labels per image.")] = None,
    all_probabilities: Annotated[
        bool | None, typer.Option("--all-probabilities", help="Probabilities of every class, in place of --top-k.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Smallest confidence that is accepted, 0..1.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only files like this, such as '*.jpg'; repeatable.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No files like this; repeatable.")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="parquet (always written), csv or jsonl; repeatable.")
    ] = None,
    report: Annotated[bool | None, typer.Option("--report", help="Write report.html, a gallery to look at.")] = None,
    sort_into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Put a link to each image into a folder for each class.")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="With --sort-into: copies instead of links.")] = False,
    strict: Annotated[bool | None, typer.Option("--strict", help="Exit code 3 if any file fails.")] = None,
    max_failed: Annotated[
        str | None, typer.Option(metavar="N|N%", help="Exit code 3 if more files fail, such as 20 or 2%.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an unfinished result, take over no rows.")] = False,
    on: Annotated[
        str | None, typer.Option(metavar="threads|dask|ray", help="Classify by the Prefect flow, part by part.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="With --on: a Dask scheduler's or Ray head's.")] = None,
    workers: Annotated[int | None, typer.Option(help="With --on: how many on this machine.")] = None,
) -> None:
    """Classify images: one row for every file, whatever is wrong with some.

    A run that was stopped goes on with the same command. What is not given comes from the section 'predict' of
    params.yaml. Exit code 75: interrupted, run it again; 3: the result is there, but too many files failed.
    """
    from flows.workspace import find_workspace
    from tasks.outcome import TooManyFailed
    from tasks.params import parse_section, read_params_file
    from tasks.predict import PredictParams, choose_out
    from tasks.predict import predict as classify
    from tasks.registry import champion_path

    options = {
        "engine": engine,
        "precision": precision,
        "top_k": top_k,
        "all_probabilities": all_probabilities,
        "threshold": threshold,
        "include": include,
        "exclude": exclude,
        "formats": formats,
        "report": report,
        "strict": strict,
        "max_failed": max_failed,
    }
    given = {name: value for name, value in options.items() if value is not None and value != []}
    workspace = find_workspace()
    values = read_params_file(workspace.params).get("predict") or {}
    parse_section(values, "predict", PredictParams, workspace.params)
    params = parse_section(values | given, "predict", PredictParams, Path("nightly predict"))
    if copy and sort_into is None:
        raise typer.BadParameter("--copy needs --sort-into")
    if on is None and (address or workers):
        raise typer.BadParameter("--address and --workers need --on")
    if on is not None:
        if sort_into is not None:
            raise typer.BadParameter(
                "--sort-into works without --on: repeat the command, which classifies nothing twice"
            )
        _predict_by_flow(
            source=source, out=out, model=model, on=on, address=address, workers=workers, options=given, fresh=fresh
        )
        return
    failed = None
    try:
        summary = classify(
            source,
            out or choose_out(workspace.predictions, source),
            model or champion_path(workspace.models),
            params,
            fresh=fresh,
            names=lambda: sys.stdin.buffer,
            sort_into=sort_into,
            sort_mode="copy" if copy else "link",
        )
    except TooManyFailed as error:
        summary, failed = error.summary, error
    print_prediction(summary, workspace.shown)
    if failed:
        _fail(str(failed), EXIT_TOO_MANY_FAILED)


app.add_typer(cli_explain.app)
app.add_typer(cli_study.app)


@app.command(epilog="Example: nightly serve")
def serve() -> None:
    """Start the retraining every night, at the hour in the section 'serve' of params.yaml."""
    from flows.console import calm_terminal
    from flows.server import require_server
    from flows.settings import fire_times, read_settings
    from flows.workspace import find_workspace

    workspace = find_workspace()
    os.chdir(workspace.root)
    params = read_settings(workspace.params)["serve"]
    calm_terminal(who_tells="flow")
    url = require_server()

    from flows import serve as flows_serve

    runner, deployment_id = flows_serve.register(params)
    flows_serve.require_active(deployment_id, params)
    print_pairs(
        screen(),
        {
            "schedule": f"'{params.cron}' {params.timezone}, active on {url}",
            "next runs": ", ".join(f"{time:%a %Y-%m-%d %H:%M %Z}" for time in fire_times(params)),
            "run it now": "prefect deployment run retrain/nightly",
            "stop": "Ctrl-C; the schedule stays active, and runs that come due wait for the next 'nightly serve'",
        },
    )
    flows_serve.run_for_ever(runner)


@app.command(epilog="Example: nightly history --limit 5")
def history(
    limit: Annotated[int, typer.Option(min=1, help="Show the last so many decisions.")] = 20,
) -> None:
    """Show every promotion, hold and rollback, the newest last."""
    from datetime import datetime

    from rich.table import Table

    from flows.summary import figure
    from flows.workspace import find_workspace
    from tasks import promote as registry

    workspace, console = find_workspace(), screen()
    entries, champion = registry.history(workspace.models), registry.champion_id(workspace.models)
    if not entries:
        console.print("no decisions yet: 'nightly retrain' makes the first")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("time", "decision", "model", "accuracy", "champion's accuracy", "why"):
        table.add_column(heading, no_wrap=heading != "why", justify="right" if heading in ("accuracy",) else "left")
    # The decision that put the champion in service, and not every line about the same model.
    current = next((entry for entry in reversed(entries) if entry.action != "hold" and entry.id == champion), None)
    for entry in entries[-limit:]:
        table.add_row(
            f"{datetime.fromisoformat(entry.time).astimezone():%Y-%m-%d %H:%M}",
            entry.action,
            f"{entry.id} *" if entry is current else entry.id,
            figure(entry.challenger, "accuracy", True),
            figure(entry.champion, "accuracy", True),
            "; ".join(entry.reasons),
        )
    console.print(table)
    console.print(f"* in service: {champion or 'no model'}", highlight=False)


@app.command(epilog="Example: nightly promote 3f2a90c1b7de --reason 'new class added on purpose'")
def promote(
    model_id: Annotated[str, typer.Argument(metavar="ID", help="A registered model, or the last one trained.")],
    reason: Annotated[str, typer.Option(help="For the ledger.")] = "by hand",
) -> None:
    """Put a model in service by hand, whatever the judge thought of it."""
    from flows import champion
    from flows.workspace import find_workspace, locked

    workspace = find_workspace()
    with locked(workspace, f"nightly promote {model_id}"):
        _print_change(champion.promote_by_hand(workspace, model_id, reason, print))


@app.command(epilog="Example: nightly rollback")
def rollback(
    model_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="A registered model.", show_default="the champion before")
    ] = None,
    reason: Annotated[str, typer.Option(help="For the ledger.")] = "by hand",
) -> None:
    """Put an earlier model back in service."""
    from flows import champion
    from flows.workspace import find_workspace, locked

    workspace = find_workspace()
    with locked(workspace, "nightly rollback"):
        _print_change(champion.roll_back(workspace, model_id, reason, print))


@app.command(epilog="Example: nightly doctor --max-age 36h")
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Do what is safe to do about it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list for machines.")] = False,
    max_age: Annotated[
        str | None, typer.Option(metavar="36h", help="Fail if no night ended well within this time.")
    ] = None,
) -> None:
    """Look at everything that a night needs; exit code 1 if something is wrong, with what to do about it."""
    from flows import doctor as examination
    from flows.workspace import find_workspace

    workspace = find_workspace()
    age = examination.hours(max_age) if max_age else None
    findings = examination.examine(workspace, fix=fix, max_age_hours=age)
    if as_json:
        print(examination.as_json(findings))
    else:
        examination.show(findings, screen())
    raise typer.Exit(examination.exit_code(findings))


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr, and no traceback."""
    # typer's own base class of usage errors (typer carries its copy of click, or click itself, by version).
    usage_error = typer.BadParameter.__mro__[1]
    try:
        code = app(standalone_mode=False)
    except usage_error as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "nightly"
        if error.format_message() and type(error).__name__ != "NoArgsIsHelpError":
            _fail(f"{error.format_message().rstrip('.')}; see '{command} --help'", 2)
        error.show()
        sys.exit(2)
    except Interrupted as interruption:
        _fail(str(interruption), EXIT_INTERRUPTED, "interrupted")
    except (NightlyError, OSError) as error:
        _fail(describe(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = _CTRL_C
    if code == _CTRL_C:  # newer versions of typer return it
        _fail("interrupted", _CTRL_C)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int, kind: str = "error") -> NoReturn:
    print(f"{kind}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def _predict_by_flow(source: str, out: str | None, model: Path | None, **chosen: object) -> None:
    from flows.console import calm_terminal
    from tasks.outcome import TooManyFailed
    from tasks.predict import locate

    calm_terminal(who_tells="command")

    from flows import predict as flows_predict
    from flows.server import announce_server

    announce_server()
    # A flow's folders are the workspace's, not those where the command was typed.
    place = out if out is None or "://" in out else str(Path(out).absolute())
    try:
        done = flows_predict.predict(
            source=locate(source), out=place, model=model.absolute() if model else None, **chosen
        )
    except TooManyFailed as error:
        _fail(str(error), EXIT_TOO_MANY_FAILED)
    print_pairs(screen(), {"files": done.note, "predictions": done.table or ""})


def _print_change(entry: "Entry") -> None:
    print(f"in service: {entry.id} (before: {entry.champion_before or 'none'})")


if __name__ == "__main__":
    main()
