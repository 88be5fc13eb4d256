"""From what a user names a model by to its export: a run, an export, or a model or run of MLflow."""

from pathlib import Path

from mser_dist.errors import UserError
from mser_dist.files import file_sha256


def find_export(model: str | Path) -> Path:
    """The export folder of a model.

    model: an export, a run folder that has one, or what MLflow (at MLFLOW_TRACKING_URI) knows of a training:
    ``models:/name@alias``, ``models:/name/version``, ``models:/id``, ``runs:/id``. Raises `UserError` for what is not
    there.
    """
    name = str(model)
    if name.startswith(("models:/", "runs:/")):
        return _of_mlflow(name)
    folder = Path(name).expanduser()
    for candidate in (folder, folder / "export"):
        if (candidate / "card.json").is_file():
            return candidate
    if not folder.exists():
        raise UserError(f"{name}: there is no such model: name a run folder, an export, models:/name@alias or runs:/id")
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{name}: the run has no export yet: let it train to its end, or mser export {name} OUT")
    raise UserError(f"{name} holds no model (no card.json, no export/card.json): name a run folder or an export")


def _of_mlflow(name: str) -> Path:
    import mlflow
    from mlflow.exceptions import MlflowException

    where = mlflow.get_tracking_uri()
    try:
        if name.startswith("runs:/"):
            run = name.removeprefix("runs:/").split("/")[0]
            out = mlflow.MlflowClient().get_run(run).data.tags.get("mser.out")
            if not out:
                raise UserError(f"{name} is no run of mser: it has no tag mser.out")
            return find_export(out)
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=name))
    except (MlflowException, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} is not to be had from MLflow at {where} ({said}): see the name, and MLFLOW_TRACKING_URI"
        ) from error
    return linked_export(folder, name)


def linked_export(folder: Path, name: str) -> Path:
    """The export of a model in MLflow's format: a copy in it, or the one that it names by path."""
    from mlflow.models import Model

    kept = folder / "data" / "export"
    if (kept / "card.json").is_file():
        return kept
    flavor = Model.load(str(folder)).flavors.get("python_function", {})
    config = flavor.get("config") or {}
    if "export" not in config:
        raise UserError(f"{name} is a model that mser did not log: it names no export")
    return checked_link(config, name)


def checked_link(config: dict[str, str], name: str) -> Path:
    """The export that a logged model's config names. Raises `UserError` where it is gone, or is another one now."""
    export = Path(config["export"])
    if not (export / "card.json").is_file():
        raise UserError(
            f"{name} is the export {export}, which is not there: run where that folder is to be seen, or log the model "
            "with tracking.model=copy"
        )
    if file_sha256(export / "card.json") != config["card_sha256"]:
        raise UserError(f"{name} is the export {export}, which has since been replaced: name the run folder itself")
    return export
