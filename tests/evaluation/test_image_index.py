import os
from pathlib import Path

import pytest
import torch

from data.folders import stat_file
from evaluation.image_index import load_index, update_index


class Files(torch.utils.data.Dataset):
    """Paths of the files in a folder."""

    def __init__(self, folder):
        self.folder, self.names = folder, sorted(os.listdir(folder))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return self.folder / self.names[i]

    def key(self, i):
        return self.names[i]

    def stat(self, i):
        return stat_file(self[i])


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(7):
        (root / f"{i}.jpg").write_text("x" * (i + 1))
    return root


def build_extract(requested):
    """Feature extraction in which a file's feature is its length, and files with a question mark are corrupt."""
    def extract(images):
        paths = [images[i] for i in range(len(images))]
        requested.extend(os.path.basename(path) for path in paths)
        texts = [Path(path).read_text() if os.path.exists(path) else "?" for path in paths]
        good = [i for i, text in enumerate(texts) if "?" not in text]
        features = torch.tensor([[float(len(texts[i])), 1.0] for i in good]) if good else torch.empty(0)
        return features, torch.tensor(good, dtype=torch.int64), [str(p) for p, text in zip(paths, texts) if "?" in text]
    return extract


def update(folder, requested, lines=None, **kwargs):
    images = Files(folder)
    features, indices = update_index(str(folder.parent / "g.safetensors"), images, build_extract(requested),
                                     (lines if lines is not None else []).append, **kwargs)
    assert features[:, 0].tolist() == [os.path.getsize(images[i]) for i in indices]
    return sorted(images.names[i] for i in indices)


def test_only_new_and_changed_images_are_extracted(folder):
    requested = []
    assert update(folder, requested) == [f"{i}.jpg" for i in range(7)] and len(requested) == 7
    requested.clear()
    assert len(update(folder, requested)) == 7 and requested == []
    (folder / "2.jpg").write_text("longer than before")
    (folder / "3.jpg").unlink()
    (folder / "9.jpg").write_text("new")
    assert update(folder, requested) == ["0.jpg", "1.jpg", "2.jpg", "4.jpg", "5.jpg", "6.jpg", "9.jpg"]
    assert requested == ["2.jpg", "9.jpg"]
    requested.clear()
    os.utime(folder / "0.jpg", ns=(1, 1))  # same size, another modification time
    update(folder, requested)
    assert requested == ["0.jpg"]


def test_corrupt_images_are_logged_and_skipped(folder):
    path = folder.parent / "g.safetensors"
    (folder / "1.jpg").write_text("?")
    requested, lines = [], []
    assert len(update(folder, requested, lines)) == 6
    assert lines[0] == f"{path}: 0 of 7 images indexed, 0 corrupt, 7 new" and lines[1].endswith("1.jpg")
    requested.clear(), lines.clear()
    before = path.stat().st_mtime_ns
    assert len(update(folder, requested, lines)) == 6 and requested == []  # not tried again
    assert lines == [f"{path}: 6 of 7 images indexed, 1 corrupt, 0 new"]
    assert path.stat().st_mtime_ns == before
    (folder / "1.jpg").write_text("mended")
    assert len(update(folder, requested, lines)) == 7 and requested == ["1.jpg"]
    (folder / "lost.jpg").symlink_to(folder / "nowhere.jpg")
    assert len(update(folder, requested, lines)) == 7
    (folder / "lost.jpg").unlink()
    for i in range(7):
        (folder / f"{i}.jpg").write_text("?")
    assert update(folder, requested) == []


def test_interrupted_update_resumes(folder):
    requested = []
    extract = build_extract(requested)

    def interrupted(paths):
        if len(requested) >= 4:
            raise KeyboardInterrupt
        return extract(paths)
    with pytest.raises(KeyboardInterrupt):
        update_index(str(folder.parent / "g.safetensors"), Files(folder), interrupted, lambda text: None, save_every=2)
    assert len(load_index(folder.parent / "g.safetensors")[1]) == 4
    assert len(update(folder, requested, save_every=2)) == 7
    assert sorted(requested) == [f"{i}.jpg" for i in range(7)]


def test_damaged_index_is_rebuilt(folder):
    requested = []
    update(folder, requested)
    path = folder.parent / "g.safetensors"
    intact = path.read_bytes()
    for damaged in (b"", b"x" * 100, intact[:-5], intact.replace(b'"0.jpg"', b'"0.jpg,')):
        path.write_bytes(damaged)
        requested.clear()
        assert len(update(folder, requested)) == 7 and len(requested) == 7
