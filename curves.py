"""The curves of runs, from their log.jsonl: on one page, and as a table.

    runs = {"demo": read_log("runs/demo/log.jsonl")}
    print(table(runs))
    page(runs).savefig("curves.png")

The page needs matplotlib, the rest nothing.
"""

import json
import math
import re
import statistics
from pathlib import Path

PANELS = {  # title -> {name in the log: what it is}, the first drawn as a line, the second dashed, the third dotted
    "loss, nats": {"loss": "loss", "ln_k": "ln K"},
    "teacher entropy, nats": {"teacher_entropy": "of an output", "teacher_entropy_of_mean": "of the mean output",
                              "ln_k": "ln K"},
    "KL of teacher and student, nats": {"kl": None},
    "k-NN top-1, %": {"top1": "teacher"},
    "learning rate": {"lr": None},
    "weight decay": {"weight_decay": None},
    "teacher momentum": {"momentum": None},
    "images a second": {"images_per_second": None},
    "waiting for data, % of the time": {"waiting": None},
}
BASELINES = {"untrained backbone": "--", "raw pixels": ":"}


def read_log(path):
    """A run's log: {name: ([steps], [values])} of what was logged, and k-NN top-1 of what was not trained.

    A line that is cut off, as of a run that is writing it, is passed over; so is a value that was not finite.

    Returns:
        curves, and {"raw pixels": top-1, "untrained backbone": top-1} in percent as far as they were measured.

    Raises:
        OSError: there is no log, or no step in it.
    """
    curves, baselines, step = {}, {}, 0
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror}); expected the folder of a run") from None
    for line in lines:
        try:
            record = json.loads(line)
            if "knn" in record:
                if record["knn"] in BASELINES:
                    baselines[record["knn"]] = float(record["top1"])
                    continue
            else:
                step = int(record["step"]) + 1
                seconds = record["data_seconds"] + record["compute_seconds"]
                record["waiting"] = 100 * record["data_seconds"] / seconds if seconds else 0.0
            values = {name: float(value) for name, value in record.items() if isinstance(value, (int, float))}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        for name, value in values.items():
            if math.isfinite(value):
                for kept, new in zip(curves.setdefault(name, ([], [])), (step, value)):
                    kept.append(new)
    if "loss" not in curves:
        raise OSError(f"{path}: holds no step of a training")
    return curves, baselines


def table(runs):
    """{name: what read_log gives} -> lines on how each run ended."""
    width = max(map(len, runs))
    lines = [f"{'':{width}} {'steps':>7} {'loss':>7} {'ln K':>7} {'entropy':>7} {'KL':>7}  {'k-NN last':>9} "
             f"{'best':>9} {'untrained':>9}"]
    for name, (curves, baselines) in runs.items():
        last = {key: values[-1] for key, (_, values) in curves.items()}
        numbers = [f"{curves['loss'][0][-1]:7d}"] + [f"{last[key]:7.3f}" if key in last else f"{'-':>7}" for key in
                                                     ("loss", "ln_k", "teacher_entropy", "kl")]
        knn = [last.get("top1"), max(curves["top1"][1], default=None) if "top1" in curves else None,
               baselines.get("untrained backbone")]
        lines.append(f"{name:{width}} " + " ".join(numbers) + "  " + " ".join(
            f"{x:9.1f}" if x is not None else f"{'-':>9}" for x in knn))
    return "\n".join(lines + spread(runs))


def spread(runs):
    """Of runs named alike but for -0 to -9 or _0 to _9 at the end, the seed: lines on their last k-NN, best first."""
    groups = {}
    for name, (curves, _) in runs.items():
        if "top1" in curves:
            groups.setdefault(re.sub(r"[-_]\d$", "", name), []).append(curves["top1"][1][-1])
    several = {name: values for name, values in groups.items() if len(values) > 1}
    width = max(map(len, several), default=0)
    return [f"{name:{width}} {len(values):3d} runs, k-NN last {statistics.mean(values):5.1f} ± "
            f"{statistics.stdev(values):.1f} ({min(values):.1f} to {max(values):.1f})"
            for name, values in sorted(several.items(), key=lambda item: -statistics.mean(item[1]))]


def page(runs):
    """{name: what read_log gives} -> a matplotlib figure: a panel for each of PANELS, a colour for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.5), dpi=150, layout="constrained")
    for axes, (title, names) in zip(figure.subplots(3, 3).flat, PANELS.items()):
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
        shown = {}  # what is in the legend: one line for each kind
        for i, (curves, baselines) in enumerate(runs.values()):
            for style, (name, label) in zip(("-", "--", ":"), names.items()):
                if name in curves:
                    dots = "." * (name == "top1" or len(curves[name][0]) == 1)
                    line, = axes.plot(*curves[name], style, color=f"C{i % 10}", marker=dots)
                    shown.setdefault(label, line)
            for name, style in BASELINES.items():
                if "top1" in names and name in baselines:
                    line = axes.axhline(baselines[name], linestyle=style, color=f"C{i % 10}", linewidth=1)
                    shown.setdefault(name, line)
        axes.set_xlim(left=0)
        if shown.keys() - {None}:
            axes.legend(shown.values(), shown, fontsize=8, framealpha=0.6)
    names = [name.replace("$", r"\$").encode(errors="replace").decode() for name in runs]  # "$" begins a formula
    if len(runs) > 1:
        lines = [figure.axes[0].plot([], color=f"C{i % 10}")[0] for i in range(len(runs))]
        figure.legend(lines, names, loc="outside lower center", ncols=3, fontsize=9)
    else:
        figure.suptitle(names[0], fontsize=11)
    return figure


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log.jsonl")
        records = [dict(step=step, loss=6.2 + 2 / (step + 1) ** 2, data_seconds=0.0, compute_seconds=0.1)
                   for step in range(200)]
        log.write_text("\n".join(map(json.dumps, records)))
        print(table({"training": read_log(log)}))
