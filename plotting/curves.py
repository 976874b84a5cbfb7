"""Training curves and tables from log.jsonl.

    runs = {"demo": read_log("runs/demo/log.jsonl")}
    print(format_table(runs))
    print(format_time_to_accuracy(runs, 50.0))           # images and seconds until the k-NN accuracy is 50%
    plot_curves(runs, against="images").savefig("curves.png")

Runs whose names differ only in the seed, -0 to -9 or _0 to _9 at the end, form a group: they share a color, a mean and
a standard deviation. The figure needs matplotlib, the rest only Python.
"""

import json
import math
import os
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from plotting.draw import escape_text

PANELS = {  # (title, unit) -> {log key: label}; lines are solid, dashed and dotted in this order
    ("loss", "nats"): {"loss": "cross-entropy", "ln_k": "ln K"},
    ("teacher entropy", "nats"): {"teacher_entropy": "of an output", "teacher_marginal_entropy": "of the batch mean",
                                  "ln_k": "ln K"},
    ("KL(teacher || student)", "nats"): {"kl": None},
    ("top-1 accuracy of frozen features", "%"): {"knn_top1": "k-NN", "linear_top1": "linear"},
    ("learning rate", ""): {"lr": None},
    ("weight decay", ""): {"wd": None},
    ("teacher momentum", ""): {"momentum": None},
    ("throughput", "images per second"): {"images_per_sec": None},
    ("waiting for data", "% of the step time"): {"data_percent": None},
}
BASELINES = {"untrained backbone": ("-.", "k-NN, untrained"), "raw pixels": (":", "k-NN, raw pixels")}
AXES = {"step": "step", "images": "images seen", "seconds": "training time without evaluation (s)"}


class Run(NamedTuple):
    curves: dict  # log key, or "images", "seconds" and "data_percent" -> ([steps], [values])
    baselines: dict  # "raw pixels" and "untrained backbone" -> {"knn_top1": percent, ...}, if they were evaluated


def read_log(path):
    """Read the log of a run. Lines cut off while the run writes, and values that are not finite, are skipped.

    Raises:
        OSError: there is no log, or no training step in it.
    """
    curves, baselines, step, seconds = {}, {}, 0, 0.0
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            if "eval" not in record:
                before, step_time, data_time = step, record["step_time"], record["data_time"]
                step = record["step"] + 1
                seconds += (step - before) * step_time
                record |= dict(step=step, seconds=seconds, data_percent=100 * data_time / step_time,
                               images=step * step_time * record["images_per_sec"])
        except (ValueError, KeyError, TypeError):
            continue
        if record.get("eval") in BASELINES:
            baselines[record["eval"]] = record
            continue
        for key, value in record.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = curves.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    if "loss" not in curves:
        raise OSError(f"{path}: holds no training step")
    return Run(curves, baselines)


def group_seeds(runs):
    """{name: Run} -> {name without seed: [Run]}."""
    groups = {}
    for name, run in runs.items():
        groups.setdefault(re.sub(r"[-_]\d$", "", name), []).append(run)
    return groups


# ---- tables ----

def format_table(runs):
    """{name: Run} -> the last values of each run, then mean and spread of each group of seeds, best first."""
    width = max(map(len, runs))
    lines = [f"{'':{width}} {'steps':>7} {'loss':>7} {'ln K':>7} {'entropy':>7} {'KL':>7}  {'k-NN last':>9} "
             f"{'best':>9} {'untrained':>9}"]
    for name, (curves, baselines) in runs.items():
        last = {key: values[-1] for key, (_, values) in curves.items()}
        best = max(curves["knn_top1"][1]) if "knn_top1" in curves else None
        untrained = baselines.get("untrained backbone", {}).get("knn_top1")
        numbers = [format_cell(last.get(key), 7, 3) for key in ("loss", "ln_k", "teacher_entropy", "kl")]
        accuracies = [format_cell(top1, 9, 1) for top1 in (last.get("knn_top1"), best, untrained)]
        lines.append(" ".join([f"{name:{width}} {curves['loss'][0][-1]:7d}", *numbers, "", *accuracies]))
    for key, kind in (("knn_top1", "k-NN"), ("linear_top1", "linear")):
        last = {name: [run.curves[key][1][-1] for run in group if key in run.curves]
                for name, group in group_seeds(runs).items()}
        seeds = {name: values for name, values in last.items() if len(values) > 1}
        width = max(map(len, seeds), default=0)
        lines += [f"{name:{width}} {len(values):3d} runs, {kind} last {format_spread(values, '.1f')}"
                  for name, values in sorted(seeds.items(), key=lambda item: -statistics.mean(item[1]))]
    return "\n".join(lines)


def format_cell(value, width, digits):
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def format_spread(values, form):
    """Mean ± standard deviation (range) of numbers."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return (f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}} "
            f"({min(values):{form}} to {max(values):{form}})")


def format_time_to_accuracy(runs, top1):
    """{name: Run} -> images and seconds until each group first has a k-NN accuracy, in percent.

    Mean times are compared between groups whose runs all have it.
    """
    lines, means, groups = [], {}, group_seeds(runs)
    width = max(map(len, groups))
    for name, group in groups.items():
        crossings = list(filter(None, (find_crossing(*run, top1) for run in group)))
        line = f"{name:{width}} k-NN {top1:g}%: {len(crossings)} of {len(group)} runs"
        if crossings:
            images, seconds = zip(*crossings)
            line += f", {format_spread(images, ',.0f')} images, {format_spread(seconds, ',.0f')} seconds"
            if len(crossings) == len(group) and any(seconds):  # 0 where random weights have it
                means[name] = statistics.mean(seconds)
        lines.append(line)
    slowest = max(means, key=means.get, default=None)
    return "\n".join(lines + [f"{name:{width}} {means[slowest] / mean:.2f} times as fast as {slowest}"
                              for name, mean in means.items() if name != slowest])


def find_crossing(curves, baselines, top1):
    """(images, seconds) when a run first has a k-NN accuracy, interpolated between evaluations; None if never."""
    seconds = dict(zip(*curves["seconds"]))
    at = {0: (0.0, 0.0)} | {step: (images, seconds[step]) for step, images in zip(*curves.get("images", ([], [])))}
    untrained = baselines.get("untrained backbone", {}).get("knn_top1", math.nan)
    evaluations = [(0, untrained), *zip(*curves.get("knn_top1", ([], [])))]
    for (before, low), (after, high) in zip(evaluations, evaluations[1:]):
        if high >= top1 and {before, after} <= at.keys():
            share = (top1 - low) / (high - low) if low < top1 else 0.0 if low >= top1 else 1.0  # 1: low is NaN
            return tuple(x + share * (y - x) for x, y in zip(at[before], at[after]))
    return None


# ---- figure ----

def plot_curves(runs, against="step"):
    """{name: Run} -> a matplotlib figure: a panel for each of PANELS, a color for each group of seeds.

    Args:
        against: the horizontal axis, one of AXES.
    """
    from matplotlib.figure import Figure

    figure, groups = Figure(figsize=(13, 10), dpi=120, layout="constrained"), group_seeds(runs)
    folder = os.path.commonprefix(list(groups)).rfind(os.sep) + 1
    names = escape_text(name[folder:] for name in groups)
    # widths differ, so that both of two equal curves are visible
    styles = [dict(color=f"C{i % 10}", linewidth=(2.2, 1.2)[i % 2]) for i in range(len(groups))]
    panels = figure.subplots(3, 3, sharex=True)
    for axes, ((title, unit), keys) in zip(panels.flat, PANELS.items()):
        legend, missing = {}, []
        for name, group, style in zip(names, groups.values(), styles):
            draw_group(axes, group, keys, against, legend, **style)
            if not any(key in run.curves for run in group for key in keys):
                missing.append(name)
        axes.set_title(title + f"\nnot logged: {', '.join(missing)}" * bool(missing), fontsize=13)
        axes.set_ylabel(unit, fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
        legend.pop(None, None)
        if legend:
            (low, high), rows = axes.get_ylim(), (len(legend) + 1) // 2
            axes.set_ylim(low, low + (high - low) / (0.95 - 0.09 * rows))  # the legend is above the curves
            axes.legend(legend.values(), legend, loc="upper center", ncols=2, fontsize=10, handlelength=3)
            for handle in axes.get_legend().legend_handles:
                handle.set(color="0.3", linewidth=1.5)  # it explains dashes; colors are explained below the panels
    for axes in panels[-1]:
        axes.set_xlim(left=0)
        axes.set_xlabel(AXES[against], fontsize=12)
        axes.xaxis.set_major_formatter("{x:,.10g}")
    lines = [axes.plot([], **style)[0] for style in styles]
    names = [name + f" ({len(group)} seeds)" * (len(group) > 1) for name, group in zip(names, groups.values())]
    figure.legend(lines, names, loc="outside lower center", ncols=3, fontsize=12)
    return figure


def draw_group(axes, group, keys, against, legend, **style):
    """Draw the curves and baselines of a group of runs into a panel, and add a line of each kind to its legend."""
    for curves, _ in group:
        x = dict(zip(*curves[against]))
        for dashes, (key, label) in zip(("-", "--", ":"), keys.items()):
            points = [(x[step], value) for step, value in zip(*curves.get(key, ([], []))) if step in x]
            if points:
                marker = "." if key.endswith("top1") or len(points) == 1 else ""
                legend.setdefault(label, axes.plot(*zip(*points), dashes, marker=marker, **style)[0])
    for baseline, (dashes, label) in BASELINES.items() if "knn_top1" in keys else ():
        values = [run.baselines[baseline]["knn_top1"] for run in group if baseline in run.baselines]
        if values:
            legend.setdefault(label, axes.axhline(statistics.mean(values), linestyle=dashes, **style))
