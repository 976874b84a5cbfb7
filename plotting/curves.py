"""The curves of runs, from their log.jsonl: on one page, and as a table.

    runs = {"demo": read_log("runs/demo/log.jsonl")}
    print(table(runs))
    print(first_reached(runs, 50.0))                     # with how many images, in how many seconds
    page(runs, against="images").savefig("curves.png")

Runs that are named alike but for -0 to -9 or _0 to _9 at the end, the seed, belong together: they have one colour,
a mean and a spread. The page needs matplotlib, the rest nothing.
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
    "k-NN and linear top-1, %": {"top1": "k-NN", "linear": "linear"},
    "learning rate": {"lr": None},
    "weight decay, teacher momentum": {"weight_decay": "weight decay", "momentum": "teacher momentum"},
    "images a second": {"images_per_second": None},
    "waiting for data, % of the time": {"waiting": None},
}
BASELINES = {"untrained backbone": "-.", "raw pixels": ":"}
AXES = {"step": "step", "images": "images seen", "seconds": "seconds of training, tests and saves not counted"}


def read_log(path):
    """A run's log: {name: ([steps], [values])} of what was logged, and the accuracies of what was not trained.

    A line that is cut off, as of a run that is writing it, is passed over; so is a value that was not finite.

    Returns:
        curves, among them "images" and "seconds" up to a step, and {"raw pixels": {"top1": percent}, "untrained
        backbone": {"top1": percent, "linear": percent}} as far as they were measured.

    Raises:
        OSError: there is no log, or no step in it.
    """
    curves, baselines, step, total = {}, {}, 0, 0.0
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror}); expected the folder of a run") from None
    for line in lines:
        try:
            record = json.loads(line)
            if "knn" in record:
                scores = {name: float(record[name]) for name in ("top1", "linear") if name in record}
                if record["knn"] in BASELINES:
                    baselines[record["knn"]] = scores
                    continue
            else:
                seconds = record["data_seconds"] + record["compute_seconds"]
                before, step = step, int(record["step"]) + 1
                total += (step - before) * seconds
                waiting = 100 * record["data_seconds"] / seconds if seconds else 0.0
                record |= dict(waiting=waiting, step=step, seconds=total,
                               images=step * seconds * record.get("images_per_second", math.nan))
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


def format_table(runs):
    """{name: what read_log gives} -> lines on how each run ended."""
    width = max(map(len, runs))
    lines = [f"{'':{width}} {'steps':>7} {'loss':>7} {'ln K':>7} {'entropy':>7} {'KL':>7}  {'k-NN last':>9} "
             f"{'best':>9} {'untrained':>9}"]
    for name, (curves, baselines) in runs.items():
        last = {key: values[-1] for key, (_, values) in curves.items()}
        numbers = [f"{curves['loss'][0][-1]:7d}"] + [f"{last[key]:7.3f}" if key in last else f"{'-':>7}" for key in
                                                     ("loss", "ln_k", "teacher_entropy", "kl")]
        knn = [last.get("top1"), max(curves["top1"][1], default=None) if "top1" in curves else None,
               baselines.get("untrained backbone", {}).get("top1")]
        lines.append(f"{name:{width}} " + " ".join(numbers) + "  " + " ".join(
            f"{x:9.1f}" if x is not None else f"{'-':>9}" for x in knn))
    return "\n".join(lines + spread(runs))


def spread(runs):
    """Lines on the last accuracies of runs that belong together, best first."""
    lines = []
    for key, what in (("top1", "k-NN"), ("linear", "linear")):
        several = {}
        for name, group in groups(runs).items():
            values = [curves[key][1][-1] for curves, _ in group if key in curves]
            if len(values) > 1:
                several[name] = values
        width = max(map(len, several), default=0)
        lines += [f"{name:{width}} {len(values):3d} runs, {what} last {in_short(values, '.1f')}"
                  for name, values in sorted(several.items(), key=lambda item: -statistics.mean(item[1]))]
    return lines


def groups(runs):
    """{name: what read_log gives} -> {name without seed: [what read_log gives]}."""
    together = {}
    for name, run in runs.items():
        together.setdefault(seedless(name), []).append(run)
    return together


def seedless(name):
    return re.sub(r"[-_]\d$", "", name)


def in_short(values, form):
    """Mean, standard deviation and range of numbers."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return (f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}} "
            f"({min(values):{form}} to {max(values):{form}})")


def format_time_to_accuracy(runs, top1):
    """Lines on when runs first had a k-NN accuracy: images seen and seconds of training, linear between two tests.

    Means of several runs are compared where each of them had it.
    """
    lines, means, width = [], {}, max(map(len, groups(runs)))
    for name, group in groups(runs).items():
        when = [crossing(*run, top1) for run in group]
        there = [pair for pair in when if pair]
        line = f"{name:{width}} k-NN {top1:g}%: {len(there)} of {len(group)} runs"
        if there:
            images, seconds = zip(*there)
            line += f", {in_short(images, ',.0f')} images, {in_short(seconds, ',.0f')} seconds"
            if all(when) and any(seconds):  # not where random weights had it
                means[name] = statistics.mean(seconds)
        lines.append(line)
    if len(means) > 1:
        slowest = max(means, key=means.get)
        lines += [f"{name:{width}} {means[slowest] / mean:.2f} times as fast as {slowest}"
                  for name, mean in means.items() if name != slowest]
    return "\n".join(lines)


def crossing(curves, baselines, top1):
    """(images, seconds) when one run first had a k-NN accuracy; None if it never had."""
    seconds = dict(zip(*curves.get("seconds", ([], []))))
    at = {step: (images, seconds[step]) for step, images in zip(*curves.get("images", ([], [])))} | {0: (0.0, 0.0)}
    tests = [(0, baselines.get("untrained backbone", {}).get("top1", math.nan)), *zip(*curves.get("top1", ([], [])))]
    for (before, low), (after, high) in zip(tests, tests[1:]):
        if high >= top1 and {before, after} <= at.keys():
            share = (top1 - low) / (high - low) if low < top1 else 0.0 if low >= top1 else 1.0  # NaN: not tested
            return tuple(x + share * (y - x) for x, y in zip(at[before], at[after]))
    return None


def plot_curves(runs, against="step"):
    """{name: what read_log gives} -> a matplotlib figure: a panel for each of PANELS, a colour for runs of one kind.

    Args:
        against: the horizontal axis, one of AXES.

    Raises:
        OSError: a log does not say how many images were seen.
    """
    from matplotlib.figure import Figure

    for name, (curves, _) in runs.items():
        if against not in curves:
            raise OSError(f"{name}: its log does not say how many {AXES[against]}")
    figure = Figure(figsize=(12.5, 6), dpi=150, layout="constrained")
    kinds = list(groups(runs))
    for axes, (title, names) in zip(figure.subplots(2, 4).flat, PANELS.items()):
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.set_xlabel(AXES[against], fontsize=8)
        axes.grid(alpha=0.3)
        shown = {}  # what is in the legend: one line for each kind
        for run, (curves, baselines) in runs.items():
            color = f"C{kinds.index(seedless(run)) % 10}"
            place = dict(zip(*curves[against]))
            for style, (name, label) in zip(("-", "--", ":"), names.items()):
                points = [(place[step], value) for step, value in zip(*curves.get(name, ([], []))) if step in place]
                if points:
                    dots = "." * (name in ("top1", "linear") or len(points) == 1)
                    line, = axes.plot(*zip(*points), style, color=color, marker=dots)
                    shown.setdefault(label, line)
            for name, style in BASELINES.items():
                if "top1" in names and "top1" in baselines.get(name, {}):
                    line = axes.axhline(baselines[name]["top1"], linestyle=style, color=color, linewidth=1)
                    shown.setdefault(f"k-NN of {name}", line)
        axes.set_xlim(left=0)
        if shown.keys() - {None}:
            axes.legend(shown.values(), shown, fontsize=8, framealpha=0.6)
    names = [name.replace("$", r"\$").encode(errors="replace").decode() for name in kinds]  # "$" begins a formula
    if len(kinds) > 1:
        lines = [figure.axes[0].plot([], color=f"C{i % 10}")[0] for i in range(len(kinds))]
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
        print(format_table({"training": read_log(log)}))
