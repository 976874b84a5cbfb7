"""Video input and output, frame by frame: files (PyAV) or folders of frames. One frame is in memory at a time.

    video = open_video("in.mp4")                                # or a folder of images
    with VideoWriter("out.mp4", video.rate) as writer:          # or a folder
        for name, frame in video.frames:
            writer.write(name, process(frame))

Files need PyAV (pip install av).
"""

import os
import re
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from common.files import check_file, create_folder
from data.datasets import DataError
from data.images import EXTENSIONS, find_common_range, read_image, read_or_message

WRITABLE = (".mp4", ".mov", ".mkv", ".webm")


class Video(NamedTuple):
    frames: object  # yields (name, RGB image), or (name, message) for a corrupt frame
    rate: Fraction  # frames per second, the average if it varies; None for a folder
    count: int  # number of frames; None if the file does not state it


def open_video(path):
    """Open a video file, its frames rotated upright, or a folder of images, in the order of the numbers in their names.

    Raises:
        OSError: no such file or folder.
        DataError: no video in the file, or no image in the folder.
    """
    if os.path.isdir(path):
        files = [file for file in Path(path).glob("[!.]*") if file.suffix.lower() in EXTENSIONS]
        if not files:
            raise DataError(f"{path}: no image in this folder")
        files.sort(key=lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)])
        if repeated := next((stem for stem, n in Counter(file.stem for file in files).items() if n > 1), None):
            raise DataError(f"{path}: two frames are named {repeated}, rename one")
        read = partial(read_image, value_range=find_common_range(files))
        return Video(((file.name, read_or_message(read, file)) for file in files), None, len(files))
    import av

    file = open(check_file(path), "rb")  # noqa: SIM115  opened here: of a name, FFmpeg would open a URL too
    try:
        container = av.open(file, options={"protocol_whitelist": "none"})  # a playlist may name others
        stream = container.streams.video[0]
    except Exception:  # FFmpeg's errors are of many types
        raise DataError(f"{path}: not a folder of frames, and no video stream in this file") from None
    stream.thread_type = "AUTO"
    return Video(decode_frames(container, stream), stream.average_rate, stream.frames or None)


def decode_frames(container, stream):
    """Yield (number, frame); a corrupt part of the stream yields a message and is skipped."""
    number, packets = 0, container.demux(stream)
    with container:
        while True:
            try:
                for frame in next(packets).decode():
                    image = frame.to_image()
                    yield f"{number:06}", image.rotate(frame.rotation, expand=True) if frame.rotation else image
                    number += 1
            except StopIteration:
                return
            except Exception as error:  # FFmpeg's are of many types
                reason = getattr(error, "strerror", None) or error
                yield f"{number:06}", f"{container.name}, after {number} frames: {reason}"


class VideoWriter:
    """Write frames to a video file, or to a folder as PNG under their own names.

    A file has the size of its first frame, rounded down to even numbers; other frames are padded to it. A file that is
    closed early, on an error or Ctrl-C, can be played up to there.

    Args:
        rate: frames per second of a file.

    Raises:
        DataError: no video of this type can be written there.
    """

    def __init__(self, path, rate):
        self.path, self.rate, self.container = Path(path), Fraction(rate).limit_denominator(1001), None
        self.is_folder = self.path.is_dir() or not self.path.suffix
        if self.path.is_file() and self.is_folder:
            raise DataError(f"{path}: is a file, expected a folder or {' '.join(WRITABLE)}")
        if not self.is_folder:
            if self.path.suffix.lower() not in WRITABLE:
                raise DataError(f"{path}: expected a folder, or a file that ends with {' '.join(WRITABLE)}")
            import av  # noqa: F401  if it is missing, that is found before the work
        create_folder(self.path if self.is_folder else self.path.parent)

    def __enter__(self):
        return self

    def write(self, name, image):
        if self.is_folder:
            image.save(self.path / f"{Path(name).stem}.png", compress_level=1)  # four times as fast as the default
            return
        import av

        if self.container is None:
            self.container = av.open(f"file:{self.path}", "w")
            self.stream = self.container.add_stream(self.container.default_video_codec, rate=self.rate)
            self.stream.width, self.stream.height = (max(2, side // 2 * 2) for side in image.size)
            self.stream.pix_fmt = "yuv420p"  # the format that every player supports
        image = ImageOps.pad(image, (self.stream.width, self.stream.height), Image.Resampling.LANCZOS)
        self.container.mux(self.stream.encode(av.VideoFrame.from_image(image)))

    def __exit__(self, *error):
        if self.container:
            self.container.mux(self.stream.encode())
            self.container.close()
