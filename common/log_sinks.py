"""Log sinks: the records of a training log for TensorBoard, Weights & Biases, MLflow and Trackio.

    sinks = LogSinks(["tensorboard", "wandb"], "runs/demo", print)
    sinks.write({"run": {"first_step": 0, "flags": {...}, ...}})        # starts a run in each, or resumes it
    sinks.write({"step": 0, "loss": 2.3})
    sinks.write({"eval": "epoch 0", "knn_top1": 43.7}, draw)            # draw() -> {"attention": PIL image}
    sinks.close()

Each library follows its own environment variables; without them, all is written to local files. log_to.json holds the
id of the run in each library, and where one has failed. log.jsonl is complete whatever happens to the sinks: one that
fails is dropped, and gets what it lacks when the run resumes.
"""

import contextlib
import importlib.util
import json
import os
import time
from pathlib import Path

import numpy as np

from common.files import first_line, read_json, read_text, write_json

PROJECT = "dino"  # of W&B and Trackio, and experiment of MLflow


class LogSinks:
    """Writes the records of a log, and images, to the named libraries.

    Args:
        names: keys of SINKS.
        folder: of the run, whose name is that of the run.
        print: function for the line on a sink that fails.
    """

    def __init__(self, names, folder, print):
        self.names, self.folder, self.print = names, Path(folder).resolve(), print
        self.sinks, self.step, self.runs = {}, 0, {}

    def write(self, record, draw=None):
        """Send the numbers of a record, see `read_scalars`, and what draw() returns: {name: PIL image}."""
        if "run" in record:
            self.start(**record["run"])
            return
        values, step, self.step = read_scalars(record, self.step)
        images = {}
        if draw and self.sinks:
            try:
                images = draw()
            except Exception as error:  # of a plotting library, or of memory
                self.print(f"WARNING: no figures of {record.get('eval')}: {first_line(error)[:300]}")
        for name, sink in list(self.sinks.items()):
            with self.drop_on_error(name, step):
                sink.log_scalars(values, step)
                if images:
                    sink.log_images(images, step)

    def start(self, first_step, flags, **environment):
        """Start a run, or resume it if first_step is above 0; a library gets the records of log.jsonl that it lacks."""
        config = flags | {"environment": environment}
        path, self.step, next_step = self.folder / "log_to.json", first_step, 0
        self.runs = read_json(path) if first_step else {}
        self.sinks, past = {name: SINKS[name]() for name in self.names}, []
        for line in read_text(self.folder / "log.jsonl").splitlines():
            if "run" not in (record := json.loads(line)):
                values, step, next_step = read_scalars(record, next_step)
                past.append((values, step))
        next_step = past[-1][1] + 1 if past else first_step  # an evaluation before the first step has its number
        for name, sink in list(self.sinks.items()):
            known = self.runs.get(name, {})
            with self.drop_on_error(name, first_step):
                run_id, is_new = sink.start(self.folder, config, next_step, known.get("id"))
                failed_at = 0 if is_new else known.get("failed_at", next_step)
                self.runs[name] = {"id": run_id, "failed_at": failed_at}  # should it fail again
                for values, step in past:
                    if step >= failed_at:
                        sink.log_scalars(values, step)
                self.runs[name] = {"id": run_id}
        write_json(path, self.runs)

    @contextlib.contextmanager
    def drop_on_error(self, name, step):
        """Print an exception in one line, and go on without this sink, which then lacks the records from this step."""
        try:
            yield
        except Exception as error:  # of another library, which may raise anything
            del self.sinks[name]
            if name in self.runs:
                self.runs[name].setdefault("failed_at", step)
                write_json(self.folder / "log_to.json", self.runs)
            self.print(f"WARNING: --log_to {name}: {first_line(error)[:300]}; the run goes on without it, resuming the "
                       f"run tries it again, and log.jsonl is complete")

    def close(self, failed=False):
        """End the runs in all libraries; failed: by an error."""
        for name, sink in list(self.sinks.items()):
            with self.drop_on_error(name, self.step):
                sink.close(failed)
        self.sinks = {}


def read_scalars(record, next_step):
    """Numbers of a record of the log, {name: value} without nulls; its step, and the next one.

    Evaluations, which come between the steps, have that of the next. Those of the backbone are one curve for each
    metric, the baseline of raw pixels another.
    """
    prefix = "raw pixels/" * (record.get("eval") == "raw pixels")
    values = {prefix + key: value for key, value in record.items()
              if key != "step" and isinstance(value, (int, float))}
    return (values, next_step, next_step) if "eval" in record else (values, record["step"], record["step"] + 1)


def find_missing_package(names):
    """The first of these packages that is not installed, None if all are."""
    specs = {name: importlib.util.find_spec(name) for name in names}
    # a folder ./wandb or ./mlflow without the package is found as a namespace, without a file
    return next((name for name, spec in specs.items() if spec is None or spec.origin is None), None)


# ---- the libraries ----
# Each has start(folder, config, step after the records so far, id of the run or None) -> id, whether those are to be
# sent; log_scalars({name: number}, step), log_images({name: PIL image}, step), and close(whether by an error).

class TensorBoardSink:
    """Event files in FOLDER/tensorboard."""

    def start(self, folder, config, next_step, run_id):
        from torch.utils.tensorboard import SummaryWriter

        # what a killed process wrote after its last checkpoint, or another run before, is not shown
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=next_step)
        text = json.dumps(config, indent=1)
        self.writer.add_text("flags", f"```\n{text}\n```", next_step)
        return "tensorboard", run_id is None

    def log_scalars(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_images(self, images, step):
        for name, image in images.items():
            self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        self.writer.flush()

    def close(self, failed):
        self.writer.close()


class WandbSink:
    """Weights & Biases: offline in FOLDER/wandb, unless the user is logged in or WANDB_MODE is set."""

    def start(self, folder, config, next_step, run_id):
        import wandb

        mode = None if os.environ.get("WANDB_MODE") or is_logged_in(wandb) else "offline"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.name, config=config, mode=mode, id=run_id,
            resume="allow", reinit="finish_previous", dir=os.environ.get("WANDB_DIR", str(folder)),
            settings=wandb.Settings(console=os.environ.get("WANDB_CONSOLE", "off")))
        self.build_image = wandb.Image
        # each offline file is whole, because uploading it may replace the ones before
        return self.run.id, run_id is None or self.run.offline

    def log_scalars(self, values, step):
        self.run.log(values, step=step)

    def log_images(self, images, step):
        self.run.log({name: self.build_image(image) for name, image in images.items()}, step=step)

    def close(self, failed):
        self.run.finish(exit_code=int(failed))


def is_logged_in(wandb):
    """Whether W&B has credentials, without asking for them."""
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:  # of a version before 0.31
        return bool(wandb.api.api_key)


class MLflowSink:
    """SQLite and image files in FOLDER/mlflow, or the server of MLFLOW_TRACKING_URI."""

    def start(self, folder, config, next_step, run_id):
        from mlflow import MlflowClient, entities

        uri, artifacts, self.entities = os.environ.get("MLFLOW_TRACKING_URI"), None, entities
        if not uri:
            local = folder / "mlflow"
            local.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{(local / 'mlflow.db').as_posix()}", (local / "artifacts").as_uri()
        self.client, self.run_id = MlflowClient(uri), run_id
        if run_id:
            self.client.update_run(run_id, status="RUNNING")
            return run_id, False
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name, artifacts)
        self.run_id = self.client.create_run(experiment_id, run_name=folder.name).info.run_id
        params = [entities.Param(name, str(value)) for name, value in config.items()]
        for first in range(0, len(params), 100):  # as many as a request may have
            self.client.log_batch(self.run_id, params=params[first:first + 100])
        return self.run_id, True

    def log_scalars(self, values, step):
        now = int(1000 * time.time())
        self.client.log_batch(self.run_id, [self.entities.Metric(*item, now, step) for item in values.items()])

    def log_images(self, images, step):
        for name, image in images.items():
            self.client.log_image(self.run_id, image, key=name, step=step)

    def close(self, failed):
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class TrackioSink:
    """Trackio's own folder, TRACKIO_DIR, or the Space or server of its other variables."""

    def start(self, folder, config, next_step, run_id):
        import trackio

        self.run = trackio.init(PROJECT, name=folder.name, config=config, resume="allow" if run_id else "never")
        if run_id and self.run.id != run_id:  # it resumes the newest of a name
            raise RuntimeError(f"a newer run is named {folder.name} too")
        self.build_image = trackio.Image
        return self.run.id, run_id is None

    def log_scalars(self, values, step):
        self.run.log(values, step=step)

    def log_images(self, images, step):
        self.run.log({name: self.build_image(image) for name, image in images.items()}, step=step)

    def close(self, failed):
        self.run.finish()


SINKS = {"tensorboard": TensorBoardSink, "wandb": WandbSink, "mlflow": MLflowSink, "trackio": TrackioSink}
