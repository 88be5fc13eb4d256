"""A model in MLflow's format, given to MLflow as a LoggedModel of a run, and registered under an alias if asked for.

One that was evaluated has the metrics of each data set: ``search_logged_models("metrics.ua > 0.75", datasets=[…])``.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_BARE = "mser.bare"  # the tag of one that was evaluated before it was given to MLflow: it has no files


def log(client: Any, run_id: str, folder: Path) -> str:
    """Log a model's folder and return its id. A run has one: where an answer was lost, the next call goes on with it.

    Raises what MLflow raises.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    [*begun] = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", max_results=1)
    bare = bool(begun) and _BARE in begun[0].tags
    if begun and begun[0].status == "READY" and not bare:
        return str(begun[0].model_id)
    model = (
        begun[0]
        if begun
        else client.create_logged_model(
            experiment, name=_plain(run.info.run_name), source_run_id=run_id, model_type="mser"
        )
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
    if bare:
        client.delete_logged_model_tag(model.model_id, _BARE)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, models=[LoggedModelOutput(model.model_id, step=0)])
    return str(model.model_id)


def score(client: Any, run_id: str, training: Path, found: Mapping[str, Any], uri: str) -> None:
    """Log to the model of a training what the evaluation `run_id` found of it: metrics for each data set.

    found: ``step`` and ``scores``, each with name and digest of a data set and its ``metrics``; the last set's also
    stand on the run. Raises what MLflow raises.
    """
    from mlflow.entities import Metric

    model_id = _scored(client, run_id, training, int(found["step"]), uri)
    there = client.get_logged_model(model_id).metrics or []
    sent = {(point.key, point.timestamp) for point in there if point.run_id == run_id}
    batch = [  # a millisecond for each set: MLflow keeps one value of a metric, run, step and time
        Metric(name, value, int(found["time"]) + number, 0, model_id, one["name"], one["digest"], run_id)
        for number, one in enumerate(found["scores"])
        for name, value in one["metrics"].items()
        if (name, int(found["time"]) + number) not in sent
    ]
    client.log_batch(run_id, metrics=batch)


def _scored(client: Any, run_id: str, training: Path, step: int, uri: str) -> str:
    """The LoggedModel of a training's export: its run's, where that is in this store and was not deleted; else one that
    stands for it.
    """
    from mlflow.entities import LoggedModelOutput

    record: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        record = json.loads((training / "mlflow.json").read_text(encoding="utf-8"))
    source = record.get("run_id") if record.get("tracking_uri") == uri else None
    source = source if source is not None and _is_there(client, source) else None
    tags = {"mser.out": str(training), "mser.step": str(step), _BARE: "true"}
    if source is None:
        experiment = client.get_run(run_id).info.experiment_id
        where = f"tags.`mser.out` = '{str(training).replace(chr(39), '')}'"
    else:
        experiment = client.get_run(source).info.experiment_id
        where = f"source_run_id = '{source}'"
    if there := [*client.search_logged_models([experiment], where, max_results=1)]:
        return str(there[0].model_id)
    made = client.create_logged_model(
        experiment, name=_plain(training.name), source_run_id=source, tags=tags, params={}, model_type="mser"
    )
    client.finalize_logged_model(made.model_id, "READY")
    if source is not None:
        client.log_outputs(source, models=[LoggedModelOutput(made.model_id, step=0)])
    return str(made.model_id)


def _is_there(client: Any, run_id: str) -> bool:
    """Whether the store has a run, which was not deleted: a deleted one takes nothing."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _plain(name: str) -> str:
    """A name as MLflow takes it for a model."""
    return re.sub(r"[/:.%\"']", "_", name) or "model"


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
