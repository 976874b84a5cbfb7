import json

from benchmarks import reading
from data.datasets import ImageFolder
from data.shapes import Shapes
from data.shards import ShardDataset


def test_rows_read_the_same_images(tmp_path, capsys, monkeypatch):
    shapes = Shapes("train", 4, 32)
    for i in range(4):
        (tmp_path / "photos" / f"{i % 2}").mkdir(exist_ok=True, parents=True)
        shapes[i][0].save(tmp_path / "photos" / f"{i % 2}" / f"{i}.jpg")
    monkeypatch.setattr(reading, "SHARD_SIZE", 3)
    reading.copy_images(ImageFolder(str(tmp_path / "photos")), tmp_path, 7)
    shards = ShardDataset([str(tmp_path / "shards")], cache_dir=str(tmp_path / "cache"))
    folder = ImageFolder(str(tmp_path / "folder"))
    assert sorted((image.tobytes(), label) for image, label in shards) == \
        sorted((image.tobytes(), label) for image, label in folder)
    assert len(shards) == 7 and len(list((tmp_path / "shards").iterdir())) == 3

    reading.main(reading.parse_args(["--data_path", str(tmp_path / "photos"), "--num_images", "7",
                                     "--images_per_turn", "10", "--runs", "2"]))
    rows = {row["row"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {"folder", "shards", "shards, blocks", "shards, in order"} <= rows.keys()
    assert rows["folder"]["ratio"] == 1 and all(row["min"] <= row["images_per_sec"] <= row["max"]
                                                for row in rows.values())
