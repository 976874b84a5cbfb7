"""Training curves and tables from log.jsonl.

    runs = {"demo": read_log("runs/demo/log.jsonl")}
    print(format_table(runs))
    print(format_time_to_accuracy(runs, 50.0))           # images and seconds until the k-NN accuracy is 50%
    plot_curves(runs, against="images").savefig("curves.png")

Runs whose names differ only in the seed, -0 to -9 or _0 to _9 at the end, form a group: they share a color, a mean and
a standard deviation. The figure needs matplotlib.
"""

import json
import math
import os
import re
import statistics

from common.files import read_text
from plotting.draw import escape_text

PANELS = {  # (title, unit) -> {log key: label}; lines are solid, dashed and dotted in this order
    ("loss", "nats"): {"loss": "cross-entropy", "ln_k": "ln K"},
    ("teacher entropy", "nats"): {"teacher_entropy": "of an output", "teacher_marginal_entropy": "of the batch mean",
                                  "ln_k": "ln K"},
    ("KL(teacher || student)", "nats"): {"kl": None},
    ("top-1 accuracy of frozen features", "%"): {"knn_top1": "k-NN", "linear_top1": "linear"},
    ("effective rank of features (RankMe)", "dimensions"): {"rankme": None},
    ("learning rate", ""): {"lr": None},
    ("weight decay", ""): {"wd": None},
    ("teacher momentum", ""): {"momentum": None},
    ("throughput", "images per second"): {"images_per_sec": None},
    ("waiting for data", "% of the step time"): {"data_percent": None},
}
BASELINES = {"untrained backbone": ("-.", "untrained"), "initial backbone": ("-.", "initial"),
             "raw pixels": (":", "raw pixels")}
AXES = {"step": "step", "images": "images seen", "seconds": "training time without evaluation (s)"}


def read_log(path):
    """Read the log of a run: {log key: {step: value}}.

    Lines cut off while the run writes, and values that are not finite, are skipped. "images", "seconds" and
    "data_percent" are computed; keys of BASELINES hold a k-NN accuracy at step 0, with ", rankme" a rank.

    Raises:
        OSError: there is no log, or no training step in it.
    """
    run, step, seconds = {}, 0, 0.0
    if not os.path.exists(path):
        raise OSError(f"{path}: no such log; name the folder of a run of train.py, or its log.jsonl")
    for line in read_text(path).splitlines():
        try:
            record = json.loads(line)
            if "eval" not in record:
                before, step_time, data_time = step, record["step_time"], record["data_time"]
                step = record["step"] + 1
                seconds += (step - before) * step_time
                record |= dict(step=step, seconds=seconds, data_percent=100 * data_time / step_time,
                               images=step * step_time * record["images_per_sec"])
            elif record["eval"] in BASELINES:
                name = record["eval"]
                record = {name: record.get("knn_top1"), f"{name}, rankme": record.get("rankme")}
        except (ValueError, KeyError, TypeError):
            continue
        for key, value in record.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                run.setdefault(key, {})[step] = value
    if "loss" not in run:
        raise OSError(f"{path}: holds no training step")
    return run


def group_seeds(runs):
    """{name: run} -> {name without seed: [run]}."""
    groups = {}
    for name, run in runs.items():
        groups.setdefault(re.sub(r"[-_]\d$", "", name), []).append(run)
    return groups


# ---- tables ----

def format_table(runs):
    """{name: run} -> the last values of each run, then mean and spread of each group of seeds, best first."""
    width = max(map(len, runs))
    lines = [" " * width + "   steps    loss    ln K entropy      KL  k-NN last      best  at start"]
    last = {name: {key: list(curve.values())[-1] for key, curve in run.items()} for name, run in runs.items()}
    for name, values in last.items():
        values["best"] = max(runs[name].get("knn_top1", {}).values(), default=None)
        values["start"] = values.get("untrained backbone", values.get("initial backbone"))
        losses = [format_number(values.get(key), 7, 3) for key in ("loss", "ln_k", "teacher_entropy", "kl")]
        accuracies = [format_number(values.get(key), 9, 1) for key in ("knn_top1", "best", "start")]
        lines.append(" ".join([f"{name:{width}} {max(runs[name]['loss']):7d}", *losses, "", *accuracies]))
    for key, kind in (("knn_top1", "k-NN"), ("linear_top1", "linear")):
        seeds = {name: [values[key] for values in group if key in values] for name, group in group_seeds(last).items()}
        seeds = {name: values for name, values in seeds.items() if len(values) > 1}
        width = max(map(len, seeds), default=0)
        lines += [f"{name:{width}} {len(values):3d} runs, {kind} last {format_spread(values, '.1f')}"
                  for name, values in sorted(seeds.items(), key=lambda item: -statistics.mean(item[1]))]
    return "\n".join(lines)


def format_number(value, width, digits):
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def format_spread(values, form):
    """Mean ± standard deviation (range) of numbers."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return (f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}} "
            f"({min(values):{form}} to {max(values):{form}})")


def format_time_to_accuracy(runs, top1):
    """{name: run} -> images and seconds until each group first has a k-NN accuracy, in percent.

    Mean times are compared between groups whose runs all have it.
    """
    lines, means, groups = [], {}, group_seeds(runs)
    width = max(map(len, groups))
    for name, group in groups.items():
        crossings = list(filter(None, (find_crossing(run, top1) for run in group)))
        lines.append(f"{name:{width}} k-NN {top1:g}%: {len(crossings)} of {len(group)} runs")
        if crossings:
            images, seconds = zip(*crossings)
            lines[-1] += f", {format_spread(images, ',.0f')} images, {format_spread(seconds, ',.0f')} seconds"
            if len(crossings) == len(group) and any(seconds):  # 0 where random weights have it
                means[name] = statistics.mean(seconds)
    slowest = max(means, key=means.get, default=None)
    return "\n".join(lines + [f"{name:{width}} {means[slowest] / mean:.2f} times as fast as {slowest}"
                              for name, mean in means.items() if name != slowest])


def find_crossing(run, top1):
    """(images, seconds) when a run first has a k-NN accuracy, interpolated between evaluations; None if never."""
    at = {0: (0.0, 0.0)} | {step: (images, run["seconds"][step]) for step, images in run["images"].items()}
    start = run.get("untrained backbone") or run.get("initial backbone") or {0: math.nan}
    evaluations = [*start.items(), *run.get("knn_top1", {}).items()]
    for (before, low), (after, high) in zip(evaluations, evaluations[1:]):
        if high >= top1 and {before, after} <= at.keys():
            share = (top1 - low) / (high - low) if low < top1 else 0.0 if low >= top1 else 1.0  # 1: low is NaN
            return tuple(x + share * (y - x) for x, y in zip(at[before], at[after]))
    return None


# ---- figure ----

def plot_curves(runs, against="step"):
    """{name: run} -> a matplotlib figure: a panel for each of PANELS that was logged, a color for each group of seeds.

    Args:
        against: the horizontal axis, one of AXES.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    groups = group_seeds(runs)
    logged = set().union(*runs.values()) - {"ln_k"}  # which is a constant
    shown = {panel: keys for panel, keys in PANELS.items() if keys.keys() & logged}
    columns = min((4, 3), key=lambda columns: -len(shown) % columns)  # few places are left empty
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.4 * rows + 0.5), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    folder = os.path.commonprefix(list(groups)).rfind(os.sep) + 1
    names = escape_text(name[folder:] for name in groups)
    # widths differ, so that both of two equal curves are visible
    styles = [dict(color=f"C{i % 10}", linewidth=(2.2, 1.2)[i % 2]) for i in range(len(groups))]
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, ((title, unit), keys) in zip(panels, shown.items()):
        for group, style in zip(groups.values(), styles):
            draw_group(axes, group, keys, against, style)
        missing = [name for name, group in zip(names, groups.values())
                   if not any(keys.keys() & logged & run.keys() for run in group)]
        title += f"\nnot logged: {', '.join(missing)}" * bool(missing)
        handles, labels = axes.get_legend_handles_labels()
        legend = dict(zip(labels, handles))  # a line of each kind, between title and curves
        axes.set_title(title, fontsize=13, pad=6 + 17 * ((len(legend) + 1) // 2))
        if legend:
            axes.legend(legend.values(), legend, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=10,
                        handlelength=3, columnspacing=1, borderaxespad=0.1, frameon=False)
            for handle in axes.get_legend().legend_handles:
                handle.set(color="0.3", linewidth=1.5)  # it explains dashes; colors are explained below the panels
        axes.set_ylabel(unit, fontsize=12)
        axes.set_xlabel(AXES[against], fontsize=12)
        axes.set_xlim(0, 1.02 * max(max(run[against].values()) for run in runs.values()))
        if unit.startswith(("images", "% of")):
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # small differences look small
        axes.locator_params(nbins=5)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # "1.5M" is short
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
    for axes in panels[len(shown):]:
        axes.remove()
    lines = [figure.axes[0].plot([], **style)[0] for style in styles]
    names = [name + f" (mean and standard deviation of {len(group)} seeds)" * (len(group) > 1)
             for name, group in zip(names, groups.values())]
    figure.legend(lines, names, loc="outside lower center", ncols=2 if max(map(len, names)) > 30 else 3, fontsize=12)
    return figure


def draw_group(axes, group, keys, against, style):
    """Draw the curves of a group of seeds, means with a band of one standard deviation, and its baselines."""
    for dashes, (key, label) in zip(("-", "--", ":"), keys.items()):
        seeds = [{step: value for step, value in run.get(key, {}).items() if step in run[against]} for run in group]
        points = []  # x, mean and standard deviation over the seeds that have a step
        for step in sorted(set().union(*seeds)):
            x, values = zip(*((run[against][step], seed[step]) for run, seed in zip(group, seeds) if step in seed))
            points.append((statistics.mean(x), statistics.mean(values), statistics.stdev(values) if len(x) > 1 else 0))
        if points:
            x, mean, spread = zip(*points)
            marker = "." if key.endswith(("top1", "rankme")) or len(points) == 1 else ""
            axes.plot(x, mean, dashes, marker=marker, label=label, **style)
            if any(spread):
                low, high = ([m + sign * s for m, s in zip(mean, spread)] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
    for name, (dashes, what) in BASELINES.items():
        for key, curve, label in (("knn_top1", name, f"k-NN, {what}"), ("rankme", f"{name}, rankme", what)):
            values = [value for run in group for value in run.get(curve, {}).values()] if key in keys else ()
            if values:
                axes.axhline(statistics.mean(values), linestyle=dashes, label=label, **style)
