import os
from pathlib import Path

import pytest
import torch

from evaluation.image_index import load_index, update_index


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(7):
        (root / f"{i}.jpg").write_text("x" * (i + 1))
    return root


def look(asked):
    """What looks at files: a file's feature is its length; those that hold a question mark cannot be read."""
    def extract(paths):
        asked.extend(os.path.basename(path) for path in paths)
        texts = [Path(path).read_text() if os.path.exists(path) else "?" for path in paths]
        good = [i for i, text in enumerate(texts) if "?" not in text]
        features = torch.tensor([[float(len(texts[i])), 1.0] for i in good]) if good else torch.empty(0, 1)
        return features, torch.tensor(good, dtype=torch.int64), [p for p, text in zip(paths, texts) if "?" in text]
    return extract


def update(folder, asked, said=None, **kwargs):
    names = sorted(os.listdir(folder))
    features, found = update_index(str(folder.parent / "g.safetensors"), str(folder), names, look(asked),
                                       (said if said is not None else []).append, **kwargs)
    sizes = {name: os.path.getsize(folder / name) for name in found}
    assert features[:, 0].tolist() == list(sizes.values())
    return sorted(found)


def test_only_what_is_new_or_changed_is_looked_at(folder):
    asked = []
    assert update(folder, asked) == [f"{i}.jpg" for i in range(7)] and len(asked) == 7
    asked.clear()
    assert len(update(folder, asked)) == 7 and asked == []
    (folder / "2.jpg").write_text("longer than before")
    (folder / "3.jpg").unlink()
    (folder / "9.jpg").write_text("new")
    assert update(folder, asked) == ["0.jpg", "1.jpg", "2.jpg", "4.jpg", "5.jpg", "6.jpg", "9.jpg"]
    assert asked == ["2.jpg", "9.jpg"]
    asked.clear()
    os.utime(folder / "0.jpg", ns=(1, 1))  # the same size, written at another time
    update(folder, asked)
    assert asked == ["0.jpg"]


def test_what_cannot_be_read_is_named_and_left_out(folder):
    (folder / "1.jpg").write_text("?")
    asked, said = [], []
    assert len(update(folder, asked, said)) == 6
    assert said[0].endswith("has 0 of 7 pictures; looking at 7") and said[1].endswith("1.jpg")
    asked.clear(), said.clear()
    before = (folder.parent / "g.safetensors").stat().st_mtime_ns
    assert len(update(folder, asked, said)) == 6 and asked == []  # nor is it looked at again
    assert said == [f"{folder.parent / 'g.safetensors'} has 6 of 7 pictures; 1 cannot be read"]
    assert (folder.parent / "g.safetensors").stat().st_mtime_ns == before
    (folder / "1.jpg").write_text("mended")
    assert len(update(folder, asked, said)) == 7 and asked == ["1.jpg"]
    (folder / "lost.jpg").symlink_to(folder / "nowhere.jpg")
    assert len(update(folder, asked, said)) == 7
    (folder / "lost.jpg").unlink()
    for i in range(7):
        (folder / f"{i}.jpg").write_text("?")
    assert update(folder, asked) == []


def test_an_interrupted_index_is_kept(folder):
    asked = []
    extract = look(asked)

    def dies(paths):
        if len(asked) >= 4:
            raise KeyboardInterrupt
        return extract(paths)
    with pytest.raises(KeyboardInterrupt):
        update_index(str(folder.parent / "g.safetensors"), str(folder), sorted(os.listdir(folder)), dies,
                         lambda text: None, save_every=2)
    assert len(load_index(folder.parent / "g.safetensors")[1]) == 4
    assert len(update(folder, asked, save_every=2)) == 7
    assert sorted(asked) == [f"{i}.jpg" for i in range(7)]


def test_a_damaged_file_is_made_anew(folder):
    asked = []
    update(folder, asked)
    path = folder.parent / "g.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", b"x" * 100, whole[:-5], whole.replace(b'"0.jpg"', b'"0.jpg,')):
        path.write_bytes(damaged)
        asked.clear()
        assert len(update(folder, asked)) == 7 and len(asked) == 7
