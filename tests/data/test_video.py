import wave
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data.datasets import DataError
from data.video import VideoWriter, open_video


def frame(i, size=(64, 48)):
    """Frame i of a bar that moves to the right."""
    image = Image.new("RGB", size, (30, 60, 90))
    ImageDraw.Draw(image).rectangle([4 * i, 0, 4 * i + 8, size[1]], fill=(220, 200, 40))
    return image


def write_video(path, count=12, size=(64, 48), rate=Fraction(30000, 1001)):
    with VideoWriter(path, rate) as writer:
        for i in range(count):
            writer.write(f"{i:03}.jpg", frame(i, size))
    return path


@pytest.mark.parametrize("ending", [".mp4", ".mov", ".mkv", ".webm"])
def test_round_trip_through_a_file(tmp_path, ending):
    video = open_video(write_video(tmp_path / f"clip{ending}"))
    assert abs(video.rate - Fraction(30000, 1001)) < 0.01 and video.count in (12, None, 11, 13)
    found = list(video.frames)
    assert [name for name, _ in found] == [f"{i:06}" for i in range(12)]
    for i, (_, image) in enumerate(found):
        assert image.size == (64, 48)
        assert np.abs(np.asarray(image, int) - np.asarray(frame(i), int)).mean() < 6  # neighbors differ by 15 or more


def test_odd_sizes_and_frames_of_another_size(tmp_path):
    with VideoWriter(tmp_path / "clip.mp4", 25.0) as writer:
        writer.write("a", frame(0, (65, 49)))
        writer.write("b", frame(0, (130, 49)))
    (_, first), (_, second) = open_video(tmp_path / "clip.mp4").frames
    assert first.size == second.size == (64, 48)
    assert np.asarray(second)[0].mean() < 40 < np.asarray(second)[24].mean()  # the wide one is padded above and below


def test_a_file_can_be_played_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "clip.mp4", 25) as writer:
        for i in range(5):
            writer.write(str(i), frame(i))
        raise KeyboardInterrupt
    assert len(list(open_video(tmp_path / "clip.mp4").frames)) == 5


def test_frames_of_a_folder_are_in_numeric_order(tmp_path):
    for i in (1, 2, 10, 9):
        frame(i).save(tmp_path / f"shot_{i}.png")
    (tmp_path / "shot_3.png").write_bytes(b"not an image")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_bytes(b"not a frame")
    video = open_video(tmp_path)
    assert video.rate is None and video.count == 5
    found = dict(video.frames)
    assert list(found) == [f"shot_{i}.png" for i in (1, 2, 3, 9, 10)]
    assert "shot_3.png: cannot identify" in found.pop("shot_3.png")
    with VideoWriter(tmp_path / "out", 25) as writer:
        for name, image in found.items():
            writer.write(name, image)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"shot_{i}.png" for i in (1, 10, 2, 9)]
    assert np.array_equal(Image.open(tmp_path / "out" / "shot_9.png"), frame(9))
    frame(1).save(tmp_path / "shot_9.jpg")  # whose result would have the same name
    with pytest.raises(DataError, match="two frames are named shot_9, rename one"):
        open_video(tmp_path)
    (tmp_path / "v1.5").mkdir()  # an existing folder, whatever its suffix
    with VideoWriter(tmp_path / "v1.5", 25) as writer:
        writer.write("a.jpg", frame(1))
    assert [path.name for path in (tmp_path / "v1.5").iterdir()] == ["a.png"]


def test_rotated_videos_are_upright(tmp_path):
    write_video(tmp_path / "clip.mp4", 2)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    identity = b"".join(x.to_bytes(4, "big") for x in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    rotated = b"".join(x.to_bytes(4, "big", signed=True) for x in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30))
    place = data.index(identity, data.index(b"tkhd"))  # of the track, as phones write it
    data[place:place + 36] = rotated
    (tmp_path / "rotated.mp4").write_bytes(data)
    for _, image in open_video(tmp_path / "rotated.mp4").frames:
        assert image.size == (48, 64)
    clockwise = np.asarray(frame(1).rotate(-90, expand=True), int)  # what such a matrix asks for
    assert np.abs(np.asarray(image, int) - clockwise).mean() < 6


def test_corrupt_parts_are_reported_and_skipped(tmp_path):
    data = bytearray(write_video(tmp_path / "clip.mp4", 200, (320, 240)).read_bytes())
    start = data.index(b"mdat")
    for place in range(start + 3000, start + 3400):
        data[place] ^= 0xA5
    (tmp_path / "corrupt.mp4").write_bytes(data)
    found = [item for _, item in open_video(tmp_path / "corrupt.mp4").frames]
    messages = [item for item in found if isinstance(item, str)]
    assert messages and "corrupt.mp4, after " in messages[0] and "Invalid data" in messages[0]
    assert len(found) - len(messages) >= 100


def test_videos_name_no_others(tmp_path, monkeypatch):
    """Neither URLs nor playlists are opened, which could name any file or server."""
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4", 2)
    for name in ("file:clip.mp4", "concat:clip.mp4", "http://localhost:9/clip.mp4"):
        with pytest.raises(FileNotFoundError):
            open_video(name)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    (tmp_path / "hls.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "hls.mp4"):
        with pytest.raises(DataError, match="no video stream in this file"):
            open_video(name)
    write_video(tmp_path / "a:b.mp4", 2)  # not a protocol either
    assert len(list(open_video("a:b.mp4").frames)) == 2


def test_errors_of_paths_and_sizes(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("not a video")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    for name, words in (("empty", "no image in this folder"), ("text.mp4", "not a folder of frames, and no video"),
                        ("sound.wav", "no video stream")):
        with pytest.raises(DataError, match=words):
            open_video(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent.mp4"):
        open_video(tmp_path / "absent.mp4")
    with pytest.raises(FileExistsError, match="text.mp4"):
        VideoWriter(tmp_path / "text.mp4" / "out.mp4", 25)
    with pytest.raises(DataError, match=r"expected a folder, or a file that ends with .mp4 .mov .mkv .webm"):
        VideoWriter(tmp_path / "out.doc", 25)
    with VideoWriter(tmp_path / "new" / "dot.mp4", 25) as writer:
        writer.write("0", Image.new("RGB", (1, 1)))
    assert [image.size for _, image in open_video(tmp_path / "new" / "dot.mp4").frames] == [(2, 2)]
