"""A model in MLflow's format, given to MLflow as a LoggedModel of a run, and registered under an alias if asked for."""

import shutil
import tempfile
from pathlib import Path
from typing import Any


def log(client: Any, run_id: str, folder: Path) -> str:
    """Log a model's folder and return its id. A run has one: where an answer was lost, the next call goes on with it.

    Raises what MLflow raises.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    [*begun] = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", max_results=1)
    if begun and begun[0].status == "READY":
        return str(begun[0].model_id)
    model = (
        begun[0]
        if begun
        else client.create_logged_model(experiment, name=run.info.run_name, source_run_id=run_id, model_type="mser")
    )
    with tempfile.TemporaryDirectory() as staging:
        # Files of weights are linked to, not copied, where the file system can.
        whole = Path(shutil.copytree(folder, Path(staging) / "model", copy_function=_link))
        described = Model.load(str(whole))
        described.model_id = described.model_uuid = model.model_id
        described.run_id, described.artifact_path = run_id, model.artifact_location
        (whole / "MLmodel").unlink()  # it may be a link to the folder's own
        described.save(str(whole / "MLmodel"))
        client.log_model_artifacts(model.model_id, str(whole))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, models=[LoggedModelOutput(model.model_id, step=0)])
    return str(model.model_id)


def _link(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def register(client: Any, name: str, model_id: str, run_id: str) -> None:
    """Make a logged model the newest version of a registered one, `name`, or ``name@alias``, which it then has.

    Raises what MLflow raises.
    """
    from mlflow.exceptions import MlflowException

    name, _, alias = name.partition("@")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    place = client.get_logged_model(model_id).artifact_location  # a models:/ address would be looked up elsewhere
    version = client.create_model_version(name, place, run_id=run_id, model_id=model_id)
    if alias:
        client.set_registered_model_alias(name, alias, version.version)
