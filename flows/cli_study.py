"""``nightly study``."""

import os

import typer

app = typer.Typer()


@app.command(epilog="Example: nightly study, after nightly configure study-quick")
def study() -> None:
    """Train plain and residual networks of growing depth and draw their errors, as in the ResNet paper's figure 6.

    The section 'study' of params.yaml says which. Only what is missing is trained. Exit code 75: interrupted, run it
    again.
    """
    from flows.console import calm_terminal
    from flows.terminal import print_pairs, screen
    from flows.workspace import find_workspace

    workspace = find_workspace()
    os.chdir(workspace.root)
    calm_terminal(who_tells="command")

    from flows import study as flows_study
    from flows.server import announce_server

    announce_server()
    done = flows_study.study(return_state=True).result()
    print_pairs(screen(), {"study": done.headline, "trained": done.trained, "report": workspace.shown(done.report)})
