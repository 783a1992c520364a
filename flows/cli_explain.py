"""``nightly explain``: why the model says what it says of a picture."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command(epilog="Example: nightly explain cat.jpg --class dog")
def explain(
    sources: Annotated[
        list[str], typer.Argument(metavar="PICTURE|FOLDER", help="Pictures, folders, or what else 'predict' takes.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for explain.html, .png and .json.", show_default="data/explanations/<now>"),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="A model's folder.", show_default="the model in service")] = None,
    wanted: Annotated[
        str | None,
        typer.Option("--class", metavar="NAME", help="Explain this class.", show_default="what the model says"),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Labels per picture.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many files, the first ones.")] = 100,
) -> None:
    """Show which parts of a picture speak for its label (Grad-CAM), beside its probabilities.

    Labels and probabilities are those of 'nightly predict'; a file that is no picture is listed with its reason.
    """
    from datetime import datetime

    from flows.terminal import print_pairs, screen
    from flows.workspace import find_workspace
    from tasks.explain import PAGE, SHEET
    from tasks.explain import explain as explain_pictures
    from tasks.outcome import PredictParams
    from tasks.params import read_section
    from tasks.registry import champion_path

    workspace = find_workspace()
    params = read_section(workspace.params, "predict", PredictParams)
    if top_k is not None:
        params = params.changed(top_k=top_k)
    folder = out or workspace.explanations / f"{datetime.now():%Y%m%d-%H%M%S}"
    found = explain_pictures(
        sources, folder, model or champion_path(workspace.models), params, wanted=wanted, limit=limit
    )
    pairs = {"pictures": f"{len(found.pictures):,}"}
    if len(found.pictures) == 1:
        picture = found.pictures[0]
        answers = ", ".join(f"{name} {share:.1%}" for name, share in picture.shown(params.top_k))
        pairs = {"label": f"{picture.row['label']} ({answers})", "explained": picture.explained}
    if found.failed:
        pairs["failed"] = "; ".join(f"{row['path']} is {row['status']}" for row in found.failed[:5])
        pairs["failed"] += f" and {len(found.failed) - 5:,} more" if len(found.failed) > 5 else ""
    if found.left_out:
        pairs["left out"] = f"{found.left_out:,} more: --limit takes them in"
    pairs["model"] = f"{found.bundle.id}, {found.engine}; heat of {found.cells[0]} × {found.cells[1]} cells"
    pairs |= {name: workspace.shown((folder / file).resolve()) for name, file in (("page", PAGE), ("picture", SHEET))}
    print_pairs(screen(), pairs)
