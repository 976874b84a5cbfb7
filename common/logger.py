"""What a run says: lines on the screen or a bar, a log that a resumed run goes on with, a trace.

    report = Report(Path("log.jsonl"), silent=rank > 0)
    report.start_bar(0, 1000, "step")
    for step in range(1000):
        batch = report.wait_for(batches)
        report.next_step()
        report.step(dict(epoch=0, step=step, loss=2.3, **report.pace(64)), 1000, "loss {loss:.3f}")
    report.close()

This file needs torch and tqdm.
"""

import json
import math
import sys
import time

import torch
from tqdm import tqdm


class Logger:
    """Lines on the screen, a bar if it is a terminal, records in a log.

    Args:
        log_file: Path of a file with one JSON object a line.
        silent: say nothing and write nothing, but for `skipped`: on all processes but the first.
    """

    def __init__(self, log_file, silent):
        self.log_file, self.silent, self.bar, self.profiler, self.unreadable = log_file, silent, None, None, set()
        self.restart_pace()

    def take_up(self, progress):
        """Go on from a saved state: what was logged after it will be logged again."""
        self.unreadable = set(progress["unreadable"])
        if not self.silent:
            with open(self.log_file, "a") as file:
                file.truncate(min(file.tell(), progress["log_bytes"]))

    def log_bytes(self):
        return self.log_file.stat().st_size

    def start_bar(self, first, total, unit):
        self.bar = tqdm(total=total, initial=first, unit=unit, disable=self.silent or not sys.stderr.isatty())

    def start_profiler(self, steps, path):
        """Record so many steps, after one to settle and one to warm up, where chrome://tracing can look."""
        path.unlink(missing_ok=True)
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1), record_shapes=True,
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)))
        self.profiler.start()

    def restart_pace(self):
        """Count steps and time from here on: what came before was no step."""
        self.since, self.steps, self.waited = time.monotonic(), 0, 0.0

    def wait_for(self, batches):
        """The next of an iterator; how long it takes is the time that `pace` says was spent on data."""
        asked = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - asked
        return batch

    def pace(self, pictures):
        """Pictures a second, seconds a step spent on data and on the rest, of the steps since it was last asked."""
        seconds, waited = (time.monotonic() - self.since) / self.steps, self.waited / self.steps
        self.restart_pace()
        return dict(images_per_second=pictures / seconds, data_seconds=waited, compute_seconds=seconds - waited)

    def next_step(self, count=1):
        """A step is done: the bar moves on by `count` of its units."""
        self.steps += 1
        self.bar.update(count)
        if self.profiler:
            self.profiler.step()

    def close(self):
        """Before the last lines; a trace of fewer steps than were asked for is written too."""
        self.bar.close()
        if self.profiler:
            self.profiler.stop()

    def say(self, text):
        if not self.silent:
            tqdm.write(text)

    def log(self, record):
        if not self.silent:
            record = {k: None if v != v or v in (math.inf, -math.inf) else v for k, v in record.items()}
            try:
                with open(self.log_file, "a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise OSError(f"{self.log_file}: cannot be written ({error.strerror})") from None

    def step(self, record, total_steps, line):
        """Log the record of a step; `line`, filled in from it, goes on the screen."""
        self.log(record)
        line = line.format(**record)
        self.bar.set_postfix_str(line)
        if self.bar.disable:
            self.say(f"epoch {record['epoch']}  step {record['step'] + 1}/{total_steps}  {line}")

    def stopped(self, signal, steps, total_steps, saved, resume):
        """The last words of a run that a signal ended: where it was saved, and how it goes on."""
        self.close()
        self.say(f"stopped by {signal} after step {steps} of {total_steps}, saved in {saved}: the same command goes on"
                 + ", without --resume none --overwrite" * (resume == "none"))

    def skipped(self, messages):
        """Name each unreadable picture once; every process speaks for the ones it met."""
        for message in set(messages) - self.unreadable:
            self.unreadable.add(message)
            tqdm.write(f"skipped unreadable picture {message}")


if __name__ == "__main__":
    import itertools
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        report = Logger(Path(folder) / "log.jsonl", silent=False)
        report.start_bar(0, 30, "step")
        batches = itertools.cycle([None])
        for step in range(30):
            report.wait_for(batches)
            report.next_step()
            if step % 10 == 9:
                report.step(dict(epoch=0, step=step, loss=1 / (step + 1), **report.pace(64)), 30, "loss {loss:.3f}")
        report.skipped(["a.jpg: cut off"])
        report.close()
        print((Path(folder) / "log.jsonl").read_text(), end="")
