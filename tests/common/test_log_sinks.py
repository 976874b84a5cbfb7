"""Each library reads back what a run has logged to it, also of one that was killed and resumed."""

import json
import os
import struct
import sys
import time

import numpy as np
import pytest
from PIL import Image

import train
from common.log_sinks import LogSinks, find_missing_package
from data.shapes import Shapes

TINY = ("--arch vit_tiny --patch_size 8 --embed_dim 32 --depth 2 --num_heads 2 --out_dim 64 --hidden_dim 32 "
        "--drop_path_rate 0 --global_crops_size 32 --local_crops_size 16 --local_crops_number 2 --warmup_epochs 0 "
        "--device cpu --num_workers 0 --precision fp32 --knn_every 1 --log_every 1 --saveckp_freq 1").split()
MEASURED = {"images_per_sec", "data_time", "step_time", "eta"}  # times, which differ between equal runs


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """Folders of this test only, nobody logged in, and no reports to the authors of the libraries."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
            patch.delenv(name)
        folder = tmp_path_factory.mktemp("home")
        for name, value in {"TRACKIO_DIR": folder / "trackio", "WANDB_CONFIG_DIR": folder, "NETRC": folder / "netrc",
                            "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
            patch.setenv(name, str(value))  # Trackio reads its folder once, when it is imported
        yield


def run(folder, *flags):
    train.main(train.parse_args([*TINY, "--output_dir", str(folder), *flags]))


def read_log(folder):
    """{name: {step: number}} of log.jsonl."""
    found, completed = {}, 0
    for record in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        step = record.get("step", completed)
        completed = step + 1 if "step" in record else completed
        for key, value in record.items():
            if isinstance(value, (int, float)) and key != "step":
                found.setdefault("raw pixels/" * (record.get("eval") == "raw pixels") + key, {})[step] = value
    return found


def read_tensorboard(folder, run_id):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), dict(scalars=0, images=0, tensors=0)).Reload()
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    for values in scalars.values():
        assert len(values) == len(dict(values))  # what the killed process wrote is not shown a second time
    images = {name: [event.step for event in events.Images(name)] for name in events.Tags()["images"]}
    flags = events.Tensors("flags/text_summary")[-1].tensor_proto.string_val[0].decode()
    return {name: dict(values) for name, values in scalars.items()}, images, json.loads(flags.strip("`\n"))


def read_wandb_file(path):
    """Yield the records of an offline run: W&B's messages in the format of LevelDB's log, after a header."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, message = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # the rest of a block
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", content, place)
        message += content[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            yield Record.FromString(message)
            message = b""


def read_wandb(folder, run_id):
    scalars, images, flags = {}, {}, {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        scalars.clear()  # each file is whole
        records = []
        while not any(record.HasField("exit") for record in records):  # W&B's own process may still be writing
            time.sleep(0.1)
            records = list(read_wandb_file(path))
        for record in records:
            if record.HasField("run"):
                assert record.run.run_id == run_id and record.run.display_name == folder.name
                flags = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            for item in record.history.item:
                (name, *rest), step = item.nested_key, record.history.step.num
                if rest:
                    images.setdefault(name, set()).add(step)
                elif not name.startswith("_"):
                    scalars.setdefault(name, {})[step] = json.loads(item.value_json)
    return scalars, images, flags


def read_mlflow(folder, run_id):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    run, = client.search_runs([client.get_experiment_by_name("dino").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, folder.name, "FINISHED")
    scalars = {name: {metric.step: metric.value for metric in client.get_metric_history(run_id, name)}
               for name in run.data.metrics}
    images = {}
    for file in client.list_artifacts(run_id, "images"):
        name, _, step, *_ = file.path.removeprefix("images/").split("+")
        images.setdefault(name, set()).add(int(step))
    return scalars, {name: sorted(steps) for name, steps in images.items()}, run.data.params


def read_trackio(folder, run_id):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    run, = (run for run in trackio.Api().runs("dino") if run.name == folder.name)
    assert run.id == run_id
    scalars, images = {}, {}
    for record in SQLiteStorage.get_logs("dino", run.name, run_id=run_id):
        for name, value in record.items():
            if isinstance(value, dict):
                images.setdefault(name, []).append(record["step"])
            elif name not in ("step", "timestamp"):
                scalars.setdefault(name, {})[record["step"]] = value
    return scalars, images, run.config


READERS = dict(tensorboard=read_tensorboard, wandb=read_wandb, mlflow=read_mlflow, trackio=read_trackio)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_killed_and_resumed_run_is_one_run_that_equals_the_log(small_shapes, tmp_path, name):
    folder = tmp_path / f"run of {name}"
    run(folder, "--epochs", "2", "--log_to", name)
    os.replace(folder / "checkpoint0000.pth", folder / "checkpoint.pth")  # as if killed before the next save
    (folder / "checkpoint.pth.1").unlink()
    (run_id,) = (run["id"] for run in json.loads((folder / "log_to.json").read_text()).values())
    run(folder, "--epochs", "2", "--log_to", name, "--save_every_minutes", "5")
    assert json.loads((folder / "log_to.json").read_text()) == {name: {"id": run_id}}

    scalars, images, flags = READERS[name](folder, run_id)
    expected = read_log(folder)
    assert expected["loss"].keys() == set(range(8)) and expected["knn_top1"].keys() == {0, 4, 8}
    assert expected["raw pixels/knn_top1"].keys() == {0} and len(expected) > 20
    for key, values in expected.items():
        assert scalars[key].keys() == values.keys(), key
        for step, value in values.items():
            assert scalars[key][step] == (np.float32(value) if name == "tensorboard" else value), (key, step)
    assert images.keys() == {"attention", "embedding"}
    assert {step for steps in images.values() for step in steps} == {0, 4, 8}
    assert str(flags["embed_dim"]) == "32" and str(flags["output_dir"]) == str(folder) and "commit" in str(flags)

    if name == "tensorboard":
        run(tmp_path / "plain", "--epochs", "2")  # drawing changes nothing
        plain = read_log(tmp_path / "plain")
        assert plain.keys() == expected.keys() and all(plain[key] == expected[key] for key in plain.keys() - MEASURED)


def test_a_sink_that_does_not_start_or_fails_is_one_line(small_shapes, tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    run(tmp_path, "--epochs", "1", "--log_to", "tensorboard")
    lines = [line for line in capsys.readouterr().out.splitlines() if "WARNING: --log_to" in line]
    assert len(lines) == 1 and "tensorboard" in lines[0] and "log.jsonl is complete" in lines[0]
    assert read_log(tmp_path)["loss"].keys() == set(range(4))
    assert train.parse_args([f"@{tmp_path / 'flags.txt'}"]).log_to == ("tensorboard",)


def start(folder, names, printed, first_step=0, records=()):
    """LogSinks on a log with a header and records."""
    folder.mkdir(parents=True, exist_ok=True)
    header = dict(run=dict(first_step=first_step, flags=dict(lr=0.1)))
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (*records, header)))
    sinks = LogSinks(names, folder, printed.append)
    sinks.write(header)
    return sinks


def test_the_others_go_on_when_one_fails(tmp_path):
    class Broken:
        def start(self, *args):
            return "id", True

        def log_scalars(self, values, step):
            raise ConnectionError("no route to host\nand more")

    printed = []
    sinks = start(tmp_path, ["tensorboard"], printed)
    sinks.sinks = {"broken": Broken()} | sinks.sinks
    for step in range(3):
        sinks.write(dict(step=step, loss=step + 0.5))
    record = {"eval": "epoch 0", "knn_top1": None, "rankme": 7.5}
    sinks.write(record, lambda: {"embedding": Image.new("RGB", (9, 5), "red")})
    sinks.write(dict(step=3, loss=0.0), lambda: 1 / 0)  # a figure that cannot be drawn
    sinks.close()
    assert len(printed) == 2 and "--log_to broken: no route to host; " in printed[0] and "division" in printed[1]
    scalars, images, _ = read_tensorboard(tmp_path, None)
    assert scalars == dict(loss={0: 0.5, 1: 1.5, 2: 2.5, 3: 0.0}, rankme={3: 7.5}) and images == dict(embedding=[3])


def test_a_sink_that_failed_gets_what_it_lacks(tmp_path):
    records = [dict(step=step, loss=step + 0.5) for step in range(4)]
    sinks = start(tmp_path, ["tensorboard"], printed := [])
    for step, record in enumerate(records):
        if step == 2:
            sinks.sinks["tensorboard"].log_scalars = None  # called, a TypeError
        sinks.write(record)
    sinks.close()
    assert len(printed) == 1 and set(read_tensorboard(tmp_path, None)[0]["loss"]) == {0, 1}
    for _ in range(2):  # the second time nothing is missing
        start(tmp_path, ["tensorboard"], printed, first_step=4, records=records).close()
        assert read_tensorboard(tmp_path, None)[0]["loss"] == {0: 0.5, 1: 1.5, 2: 2.5, 3: 3.5}


def test_a_run_that_goes_on_after_its_end_keeps_the_evaluation_between(small_shapes, tmp_path):
    for epochs in "12":
        run(tmp_path, "--epochs", epochs, "--log_to", "tensorboard")
    scalars, images, _ = read_tensorboard(tmp_path, None)
    assert scalars["knn_top1"].keys() == {0, 4, 8} and images == dict(attention=[0, 4, 8], embedding=[0, 4, 8])


def test_a_sink_added_to_a_running_run_gets_its_past(tmp_path):
    past = [dict(step=0, loss=3.5), {"eval": "epoch 0", "knn_top1": 43.75}, dict(step=1, loss=2.5)]
    sinks = start(tmp_path, ["tensorboard"], printed := [], first_step=2, records=past)
    sinks.write({"eval": "epoch 1", "knn_top1": 50.5})  # due before the first step
    sinks.write(dict(step=2, loss=1.5))
    sinks.close()
    assert printed == []
    assert read_tensorboard(tmp_path, None)[0] == dict(loss={0: 3.5, 1: 2.5, 2: 1.5}, knn_top1={1: 43.75, 2: 50.5})
    start(tmp_path, ["tensorboard"], printed).close()  # another run in the folder
    assert set(map(len, read_tensorboard(tmp_path, None)[0].values())) == {0}


@pytest.mark.slow
def test_a_trackio_run_of_the_same_name_is_not_resumed(tmp_path):
    printed = []
    for parent in "ab":
        start(tmp_path / parent / "same", ["trackio"], printed).close()
    assert printed == []
    start(tmp_path / "a" / "same", ["trackio"], printed, first_step=1)
    assert len(printed) == 1 and "a newer run is named same too" in printed[0]


def test_a_missing_package_is_one_line_before_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "no_such_package").mkdir()  # as ./wandb of offline runs
    monkeypatch.syspath_prepend(tmp_path)
    assert find_missing_package(["json", "no_such_package", "neither"]) == "no_such_package"
    for package, *flags in (("wandb", "--log_to", "tensorboard", "wandb"), ("matplotlib", "--log_to", "tensorboard")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)  # as if it were not installed
            with pytest.raises(SystemExit) as stop:
                train.parse_args([*TINY, *flags])
            assert stop.value.code == 2
            assert f"{package} is not installed: pip install {package}" in capsys.readouterr().err
            assert train.parse_args([*TINY, *flags[:2], "--knn_every", "0"]).log_to == ("tensorboard",)
    assert train.parse_args([*TINY, "--log_to", "tensorboard", "--dry_run"]).log_to is None


@pytest.mark.slow
def test_one_of_two_processes_writes(tmp_path, run_torchrun):
    shapes, folder = Shapes("train", 40, 32), tmp_path / "run"
    (tmp_path / "images").mkdir()
    for i in range(40):
        shapes[i][0].save(tmp_path / "images" / f"{i:02}.png")
    flags = [*TINY, "--epochs", "1", "--output_dir", str(folder), "--log_to", "tensorboard", "--data_path",
             str(tmp_path / "images"), "--batch_size_per_gpu", "4"]
    run_torchrun(2, f"import train; train.main(train.parse_args({flags!r}))")
    assert len(list((folder / "tensorboard").iterdir())) == 1
    scalars, images, _ = read_tensorboard(folder, None)
    assert scalars["loss"] == {step: np.float32(loss) for step, loss in read_log(folder)["loss"].items()}
    assert images == dict(attention=[0, 5], embedding=[0, 5]) and len(scalars["loss"]) == 5
