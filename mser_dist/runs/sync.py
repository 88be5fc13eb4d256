"""What a run folder knows and MLflow does not, sent: while the run is going (`tracking`), or later (`sync`).

The run folder is the truth. What MLflow has of it is asked from MLflow itself and not written down here: a process
killed between sending and noting it down would repeat itself. A number is known by its name and step; the first one
sent stays, since MLflow cannot replace it.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from mser_dist import __version__
from mser_dist import config as cfg
from mser_dist.config.chosen import chosen_of
from mser_dist.config.file import build, read_yaml
from mser_dist.errors import UserError
from mser_dist.files import unlock_file
from mser_dist.runs import logged_model, tested
from mser_dist.runs.record import CHOSEN, HEADLINE, Record, lock, now_ms, numbers_of, redact, sqlite_file, tracking_uri
from mser_dist.tables import count

_METRICS, _ENTRIES = 1000, 100  # what MLflow takes in one request: metrics; params or tags
_NAME_LENGTH = 500  # of a data set
_PARAM_LENGTH = 6000  # characters; MLflow refuses longer ones
_HEADLINE = "mlflow.experiment.primaryMetric"  # the tags of an experiment that say so


def refused(error: Exception) -> bool:
    """Whether the server has answered, and would answer the same again."""
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return 400 <= status < 500 and status not in (408, 429, 499)  # time-out, too many requests, cancelled


def trouble(error: Exception) -> str:
    """What MLflow does wrong, in one short line without passwords."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    # MLflow wraps what the network said in paragraphs about itself, and so do the layers below it.
    root = next((e for e in reversed(chain) if isinstance(e, OSError)), error)
    lines = str(root).strip().splitlines() or [type(root).__name__]
    text = lines[0].rpartition("Caused by ")[2]
    network = any(type(e).__module__.startswith("requests.") for e in chain)
    verb = "refuses" if refused(error) else "does not answer" if network else "fails"
    return f"{verb} ({redact(text)[:300]})"


class Sender:
    """Sends what MLflow lacks of one run. Used by one thread. After an error the next call asks the server anew."""

    def __init__(self, run: Path, record: Record, uri: str) -> None:
        self.run, self.record, self.uri = run, record, uri
        self.numbers = self.files = 0  # sent so far
        self.done_to = 0  # bytes of log.jsonl that have been sent, or were there already
        self._client: Any = None

    def connect(self) -> None:
        """Find or make the MLflow run. Raises what MLflow raises."""
        if self._client is not None:
            return
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        client, run = MlflowClient(self.uri), None
        if self.record.run_id is not None:
            try:
                run = client.get_run(self.record.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self.record.forget_run()  # the database was removed, or is another one
        if run is not None and run.info.lifecycle_stage == "deleted":
            how = f"`mlflow runs restore --run-id {run.info.run_id}` brings it back"
            raise UserError(f"the run of {self.run} was deleted in MLflow, which takes nothing more of it: {how}")
        self._new = False
        if run is None:
            run = self._find_or_create(client)
        if (run.info.run_id, run.info.experiment_id) != (self.record.run_id, self.record.experiment_id):
            self.record.save(self.run, run_id=run.info.run_id, experiment_id=run.info.experiment_id)
        if self.record.status == "RUNNING" != run.info.status:  # it was requeued
            client.update_run(run.info.run_id, status="RUNNING")
        self._run_id = run.info.run_id
        self._status = self.record.status if self.record.status == "RUNNING" else run.info.status
        self._tags, self._params = dict(run.data.tags), dict(run.data.params)
        self._steps: dict[str, set[int]] = {}  # of each metric, those that MLflow has
        known = run.inputs.dataset_inputs if run.inputs else []
        self._datasets = {(one.dataset.name, one.dataset.digest) for one in known}
        self._tests: dict[str, set[tuple[int, int]]] = {}  # of each metric of an evaluation: step and time
        self._offset = 0
        self._client = client

    def _find_or_create(self, client: Any) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking.context.registry import resolve_tags

        name, key = self.record.experiment, self.record.key
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            place = None
            if (file := sqlite_file(self.uri)) is not None:
                place = (file.parent / "mlartifacts").as_uri()
            # The kind decides which of MLflow's pages open: without it, those for LLM agents.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            try:
                client.create_experiment(name, artifact_location=place, tags=kind)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run of a sweep was quicker
                    raise
            experiment = client.get_experiment_by_name(name)
        if f"{_HEADLINE}.name" not in experiment.tags:
            for what, value in (("name", HEADLINE), ("greaterIsBetter", "true")):
                client.set_experiment_tag(experiment.experiment_id, f"{_HEADLINE}.{what}", value)
        where = [experiment.experiment_id]
        if found := client.search_runs(where, f"tags.`mser.run_key` = '{key}'", max_results=1):
            return found[0]
        self._new = True
        tags = {**resolve_tags(), "mser.run_key": key}
        return client.create_run(where[0], self.record.started, tags, run_name=self.record.run_name)

    def send(self) -> None:
        """Send all that is there now. Raises what MLflow raises; an artifact that fails does not hold up the rest."""
        self.connect()
        status = self.record.status  # of now: a run that ends meanwhile has its last lines sent before its status
        try:
            self._send_tags_and_params()
            self._send_numbers()
            self._send_tests()
            self._send_datasets()
            failure = self._send_artifacts() or self._send_images() or self._send_model() or self._send_scores()
            if status not in ("RUNNING", self._status):
                self._client.set_terminated(self._run_id, status, self.record.ended)
                self._status = status
            if failure:
                raise failure
        except Exception:
            self._client = None
            raise

    def _send_tags_and_params(self) -> None:
        from mlflow.entities import Param, RunTag

        tags = {k: v for k, v in self.record.all_tags().items() if self._tags.get(k) != v}
        params = {k: v[:_PARAM_LENGTH] for k, v in self.record.params.items() if k not in self._params}
        for some in _chunks([RunTag(*item) for item in tags.items()], _ENTRIES):
            self._client.log_batch(self._run_id, tags=some)
        for some in _chunks([Param(*item) for item in params.items()], _ENTRIES):
            self._client.log_batch(self._run_id, params=some)
        self._tags |= tags
        self._params |= params

    def _send_numbers(self) -> None:
        from mlflow.entities import Metric

        batch: list[Any] = []
        position = self._offset
        if not (self.run / "log.jsonl").exists():
            return  # the parent of a sweep has no numbers
        with (self.run / "log.jsonl").open("rb") as log:
            log.seek(position)
            for line in log:
                if not line.endswith(b"\n"):
                    break  # being written, or cut by a kill
                position += len(line)
                for name, step, time_ms, value in numbers_of(line, self.record.started):
                    known = self._known(name)
                    if step not in known:
                        known.add(step)
                        batch.append(Metric(name, value, time_ms, step))
                if len(batch) >= _METRICS:
                    self._flush(batch, position)
                    batch = []
        self._flush(batch, position)

    def _flush(self, batch: list[Any], position: int) -> None:
        for some in _chunks(batch, _METRICS):
            self._client.log_batch(self._run_id, metrics=some, synchronous=True)
            self.numbers += len(some)
        self._offset = position
        self.done_to = max(self.done_to, position)

    def _send_tests(self) -> None:
        from mlflow.entities import Metric

        batch: list[Any] = []
        for name, step, time_ms, value in tested.points(self.run):
            if name not in self._tests:
                there = [] if self._new else self._client.get_metric_history(self._run_id, name)
                self._tests[name] = {(point.step, point.timestamp) for point in there}
            if (step, time_ms) not in self._tests[name]:
                self._tests[name].add((step, time_ms))
                batch.append(Metric(name, value, time_ms, step))
        for some in _chunks(batch, _METRICS):
            self._client.log_batch(self._run_id, metrics=some, synchronous=True)

    def _send_datasets(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        left = [one for one in self.record.datasets if (one["name"], one["digest"]) not in self._datasets]
        if not left:
            return
        inputs = []
        for one in left:
            source, profile = json.dumps({"uri": ", ".join(one["source"])}), json.dumps({"clips": one["clips"]})
            dataset = Dataset(one["name"][:_NAME_LENGTH], one["digest"], "mser shards", source, profile=profile)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", one["context"])]))
        self._client.log_inputs(self._run_id, datasets=inputs)
        self._datasets |= {(one["name"], one["digest"]) for one in left}

    def _send_scores(self) -> Exception | None:
        """Send what was found of models; the first failure, if any."""
        sent = False
        try:
            for training, entry in list(self.record.scored.items()):
                if not entry["sent"]:
                    logged_model.score(self._client, self._run_id, Path(training), entry, self.record.tracking_uri)
                    entry["sent"] = sent = True
        except Exception as error:
            return error
        finally:
            if sent:
                self.record.save(self.run)
        return None

    def _known(self, name: str) -> set[int]:
        if name not in self._steps:
            points = [] if self._new else self._client.get_metric_history(self._run_id, name)
            self._steps[name] = {point.step for point in points}
        return self._steps[name]

    def _send_artifacts(self) -> Exception | None:
        """Send the files that wait; the first failure, behind which no other is tried."""
        sent = 0
        try:
            for name, entry in list(self.record.artifacts.items()):
                if entry["sent"]:
                    continue
                path = self.run / entry["file"]
                if path.is_file():
                    self._client.log_artifact(self._run_id, str(path), entry["folder"])
                    sent += 1
                else:
                    say(f"warning: {path} is gone: MLflow does not get {name}")
                entry["sent"] = True  # of this entry: a newer one of that name was added if the file changed meanwhile
        except Exception as error:
            return error
        finally:
            self.files += sent
            if sent:
                self.record.save(self.run)
        return None

    def _send_images(self) -> Exception | None:
        """Send the pictures that wait; the first failure, if any."""
        sent = False
        try:
            for name, entry in list(self.record.images.items()):
                if not entry["sent"] and (self.run / name).is_file():
                    from PIL import Image

                    with Image.open(self.run / name) as picture:
                        told = {"key": entry["key"], "step": entry["step"], "timestamp": entry["time"]}
                        self._client.log_image(self._run_id, picture.convert("RGB"), **told, synchronous=True)
                    entry["sent"] = sent = True
        except Exception as error:
            return error
        finally:
            if sent:
                self.record.save(self.run)
        return None

    def _send_model(self) -> Exception | None:
        """Send the model that waits; the failure, if any."""
        model = self.record.model
        if model is None:
            return None
        try:
            if model["id"] is None:
                model["id"] = logged_model.log(self._client, self._run_id, self.run / model["folder"])
                self.record.save(self.run)
            if model["register"] and not model["registered"]:
                logged_model.register(self._client, model["register"], model["id"], self._run_id)
                model["registered"] = True
                self.record.save(self.run)
        except Exception as error:
            return error
        return None

    def send_live(self, values: dict[str, float], step: int) -> None:
        """Send numbers that are in no log, such as the machine's load."""
        from mlflow.entities import Metric

        now = now_ms()
        self._client.log_batch(self._run_id, metrics=[Metric(name, v, now, step) for name, v in values.items()])


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def say(text: str) -> None:
    """A line on standard error, where progress bars are too."""
    print(f"mser: {text}", file=sys.stderr, flush=True)


def prepare_mlflow(uri: str) -> None:
    """Set MLflow's defaults for an unreliable network, and import it."""
    # A request that fails is sent again by us. A telemetry of MLflow's own has no business on a cluster. The address
    # it would print after a run contains the password.
    defaults = {"HTTP_REQUEST_TIMEOUT": "10", "HTTP_REQUEST_MAX_RETRIES": "0"}
    defaults |= {"DISABLE_TELEMETRY": "true", "SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
    for name, value in defaults.items():
        os.environ.setdefault(f"MLFLOW_{name}", value)
    import mlflow.tracking.context.registry

    if "://" in uri and not uri.startswith("http"):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def sync(run: Path, uri: str | None = None) -> str:
    """Send what MLflow lacks of a run folder, tracked or not; returns a line that says what was sent.

    uri: where to, if not to where the run was tracked. A second call sends nothing. A run that was killed without a
    word is given the status KILLED. Raises `UserError` for a folder that is no run or is in use, and for a server that
    fails.
    """
    config_file = run / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run} is no run folder: it has no config.yaml: name the folder that `out` was set to")
    tree = read_yaml(config_file)
    config = build(cfg.TrackingConfig, tree.get("tracking") or {}, lambda key: str(config_file), "tracking.")
    try:
        handle = lock(run)
        if handle is None:
            raise UserError(f"{run} is in use: its training or evaluation sends by itself; run `mser sync` after it")
        try:
            return _sync(run, config, tree, uri)
        finally:
            unlock_file(handle)
    except OSError as error:
        raise UserError(
            f"{run} cannot be written ({error.strerror}): mlflow.json in it must say what was sent"
        ) from None


def _chosen(tree: dict[str, Any]) -> dict[str, str]:
    """The params of a config that was saved."""
    kind = {1: cfg.Stage1, 2: cfg.Stage2}.get(tree.get("stage", 0), cfg.Evaluation)
    return chosen_of(cfg.Baseline if "on" in tree else kind, tree)


def _sync(run: Path, config: cfg.TrackingConfig, tree: dict[str, Any], uri: str | None) -> str:
    if uri is None:
        uri = tracking_uri(config, run)
        with suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads((run / "mlflow.json").read_text(encoding="utf-8"))["tracking_uri"]
            # The environment may have changed since; where it names the same server, it may have the password to it.
            uri = uri if redact(uri) == before else str(before)
    record = Record.of(run, config, uri)
    if not record.params:  # a run of an earlier version, or one that never got so far
        record.add_params(_chosen(tree))
        record.tags = {"mser.version": __version__, "mser.out": str(run.resolve()), CHOSEN: "true"} | record.tags
        record.tags.setdefault("mser.stage", str(tree.get("stage", "eval")))
    for name in ("config.yaml", "curves.png"):
        if name not in record.artifacts and (run / name).is_file():
            record.add_artifact(run, run / name, None)
    with suppress(FileNotFoundError):
        lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    numbers = [n for line in lines if line.endswith(b"\n") for n in numbers_of(line, record.started)]
    if record.status == "RUNNING":  # nobody holds the lock, so it was killed without a word: after its end or before
        record.status = "FINISHED" if any((run / f"{n}.json").is_file() for n in ("summary", "report")) else "KILLED"
        record.ended = max((time_ms for _, _, time_ms, _ in numbers), default=now_ms())
    record.save(run)
    prepare_mlflow(uri)
    sender = Sender(run, record, uri)
    try:
        sender.send()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow at {record.tracking_uri} {trouble(error)}: mend it, or name another one with --uri"
        ) from error
    total = len({(name, step) for name, step, _, _ in numbers})
    files = f" and {count(sender.files, 'file')}" if sender.files else ""
    return (
        f"{run}: {sender.numbers} of {total} numbers{files} sent to {record.tracking_uri}, run {record.run_id}, "
        f"status {record.status}"
    )
