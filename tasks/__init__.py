"""The work itself, as plain functions of paths and typed parameters: no Prefect, no DVC."""
