import json
import math

import pytest

from plotting.curves import PANELS, find_crossing, format_table, format_time_to_accuracy, plot_curves, read_log


def record(step, **more):
    values = dict(epoch=step // 4, step=step, loss=6.0 - 0.1 * step, ln_k=math.log(512), teacher_entropy=5.0,
                  teacher_marginal_entropy=5.5, kl=1.0 - 0.1 * step, lr=0.001 * step, wd=0.04, momentum=0.99,
                  images_per_sec=200.0, data_time=0.1, step_time=0.4, corrupt_images=0)
    return values | more


def evaluation(name, knn_top1, **more):
    return dict(eval=name, knn_top1=knn_top1, knn_top5=90.0) | more


def write(folder, records, end=""):
    folder.mkdir()
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + end)
    return path


@pytest.fixture
def log(tmp_path):
    """Log of two epochs of four steps; its last line is being written."""
    return write(tmp_path / "one", [
        evaluation("raw pixels", 64.0), evaluation("untrained backbone", 18.0, linear_top1=25.0, rankme=7.0),
        record(1), record(3, kl=None), evaluation("epoch 0", 50.0, rankme=9.0), record(7),
        evaluation("epoch 1", 40.0, linear_top1=60.0, rankme=8.0)], '{"epoch": 2, "ste')


def test_read_log(log):
    run = read_log(log)
    assert run["raw pixels"] == {0: 64.0} and run["untrained backbone"] == {0: 18.0}
    assert run["loss"] == {2: 5.9, 4: 5.7, 8: 5.3} and run["kl"] == {2: 0.9, 8: 1.0 - 0.1 * 7}
    assert run["knn_top1"] == {4: 50.0, 8: 40.0} and run["linear_top1"] == {8: 60.0}
    assert run["untrained backbone, rankme"] == {0: 7.0} and run["rankme"] == {4: 9.0, 8: 8.0}
    assert run["data_percent"] == {2: 25.0, 4: 25.0, 8: 25.0}
    for name, per_step in (("seconds", 0.4), ("images", 80)):
        assert run[name] == pytest.approx({step: step * per_step for step in (2, 4, 8)})


def panels_of(figure):
    return {axes.get_title().partition("\n")[0]: axes for axes in figure.axes}


def legend_of(figure_or_axes):
    legend = figure_or_axes.legends[0] if hasattr(figure_or_axes, "legends") else figure_or_axes.get_legend()
    return [text.get_text() for text in legend.get_texts()]


def test_every_panel_is_drawn(log):
    panels = panels_of(plot_curves({"one": read_log(log)}))
    assert list(panels) == [title for title, _ in PANELS]
    curves = {title: [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
              for title, axes in panels.items()}
    assert curves["loss"][0] == ([2, 4, 8], [5.9, 5.7, 5.3]) and curves["loss"][1][1] == [math.log(512)] * 3
    assert legend_of(panels["loss"]) == ["cross-entropy", "ln K"]
    accuracies = curves["top-1 accuracy of frozen features"]
    assert accuracies[:2] == [([4, 8], [50.0, 40.0]), ([8], [60.0])]
    assert [y for _, y in accuracies[2:]] == [[18.0] * 2, [64.0] * 2]
    ranks = panels["effective rank of features (RankMe)"]
    assert [list(line.get_ydata()) for line in ranks.lines] == [[9.0, 8.0], [7.0] * 2]
    assert [line.get_linestyle() for line in ranks.lines] == ["-", "-."] and legend_of(ranks) == ["untrained"]
    assert curves["waiting for data"][0][1] == [25.0] * 3
    assert all(curves.values()) and [axes.get_ylabel() for axes in panels.values()] == [unit for _, unit in PANELS]


def test_the_start_of_a_run_that_continues_is_drawn(tmp_path):
    """Like untrained weights; without labels there is a rank alone."""
    records = [evaluation("initial backbone", 30.0, rankme=7.0), record(1), evaluation("epoch 0", 50.0, rankme=9.0)]
    ranks = [{key: value for key, value in line.items() if "knn" not in key} for line in records]
    runs = {"a": read_log(write(tmp_path / "a", records)), "b": read_log(write(tmp_path / "b", ranks))}
    for axes, keys, curves in zip((plot_curves(runs).axes[i] for i in (3, 4)),
                                  (["k-NN", "k-NN, initial"], ["initial"]),
                                  ([[50.0], [30.0] * 2], [[9.0], [7.0] * 2] * 2)):
        assert legend_of(axes) == keys and [list(line.get_ydata()) for line in axes.lines] == curves
        assert axes.lines[1].get_linestyle() == "-."
    assert [line.split()[-3:] for line in format_table(runs).splitlines()[1:3]] == [["50.0", "50.0", "30.0"], ["-"] * 3]
    assert find_crossing(runs["a"], 40.0) == (80 * 2 / 2, 0.4 * 2 / 2) and find_crossing(runs["b"], 40.0) is None


def test_text_is_readable_and_overlaps_nothing(tmp_path, log):
    huge = write(tmp_path / "huge", [record(step) for step in (1, 12_345_678, 123_456_789)])
    for runs in ({"one": log}, {"one": log, "huge": huge}):
        figure = plot_curves({name: read_log(path) for name, path in runs.items()}, "images")
        figure.draw_without_rendering()
        for axes in figure.axes:
            legend = axes.get_legend()
            texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels(),
                     *(legend.get_texts() if legend else [])]
            assert min(text.get_fontsize() for text in texts) >= 9
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            ticks = [tick.label1 for axis, start, end in ((axes.xaxis, left, right), (axes.yaxis, low, high))
                     for tick in axis.get_major_ticks() if start <= tick.get_loc() <= end]
            boxes = [text.get_window_extent() for text in (axes.title, axes.xaxis.label, *ticks)]
            assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
            if legend:  # above the panel, so over no curve
                assert legend.get_window_extent().y0 >= axes.bbox.y1
                assert legend.get_window_extent().y1 <= axes.title.get_window_extent().y0 + 2
        bottom = min(axes.get_tightbbox().y0 for axes in figure.axes)
        assert figure.legends[0].get_window_extent().y1 < bottom
        ranges = {axes.get_xlim() for axes in figure.axes}
        assert len(ranges) == 1 and ranges.pop()[0] == 0


def test_panels_of_what_was_not_logged_are_left_out(tmp_path):
    few = ("epoch", "step", "loss", "ln_k", "images_per_sec", "data_time", "step_time", "lr")
    for keys, titles in ((few, ["loss", "learning rate", "throughput", "waiting for data"]),
                         (few[:-1], ["loss", "throughput", "waiting for data"])):
        folder = tmp_path / str(len(keys))
        log = write(folder, [{key: value for key, value in record(step).items() if key in keys} for step in (1, 3)])
        assert list(panels_of(plot_curves({"a": read_log(log)}))) == titles


def test_each_run_has_a_color(tmp_path, log):
    other = write(tmp_path / "two", [record(0), record(2)])
    figure = plot_curves({"one": read_log(log), "two": read_log(other)})
    lines = [line for line in figure.axes[0].lines if list(line.get_xdata()) in ([2, 4, 8], [1, 3])]
    assert {line.get_color() for line in lines} == {"C0", "C1"}
    assert legend_of(figure) == ["one", "two"]
    for runs in (["one", "two"], ["two", "one"]):  # what only one of them has is in the legend too
        panels = panels_of(plot_curves({name: read_log({"one": log, "two": other}[name]) for name in runs}))
        accuracy = panels["top-1 accuracy of frozen features"]
        assert legend_of(accuracy) == ["k-NN", "linear", "k-NN, untrained", "k-NN, raw pixels"]
        assert [line.get_linestyle() for line in accuracy.get_legend().get_lines()] == ["-", "--", "-.", ":"]
        assert accuracy.get_title().endswith("\nnot logged: two")
        assert panels["learning rate"].get_legend() is None and panels["learning rate"].get_xlim()[0] == 0


def test_names_are_escaped_and_single_steps_have_a_marker(tmp_path):
    figure = plot_curves({"$x_$y^\udcff": read_log(write(tmp_path / "one", [record(0)]))})
    assert figure.axes[0].lines[0].get_marker() == "."
    assert legend_of(figure) == [r"\$x_\$y^?"]
    figure.savefig(tmp_path / "curves.png")


def test_records_that_are_not_finite_or_incomplete_are_skipped(tmp_path):
    lines = [json.dumps(record(0)), json.dumps(record(1, loss=math.nan)), json.dumps(record(2, loss=math.inf)), "12",
             json.dumps(record(5, loss=None)), '{"step": 8}', json.dumps(record(9))]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    run = read_log(tmp_path / "log.jsonl")
    assert run["loss"] == {1: 6.0, 10: 5.1}
    assert run["seconds"][10] == pytest.approx(10 * 0.4)  # steps that are not logged count like the next one


def test_format_table(tmp_path, log):
    other = write(tmp_path / "two", [record(0, loss=None), record(2, loss=None), record(3)])
    lines = format_table({"one": read_log(log), "longer": read_log(other)}).splitlines()
    assert lines[1].split() == ["one", "8", "5.300", "6.238", "5.000", "0.300", "40.0", "50.0", "18.0"]
    assert lines[2].split() == ["longer", "4", "5.700", "6.238", "5.000", "0.700", "-", "-", "-"]
    assert lines[0].split() == ["steps", "loss", "ln", "K", "entropy", "KL", "k-NN", "last", "best", "at", "start"]
    assert len({len(line) for line in lines}) == 1


def test_curves_against_images_and_seconds(log):
    for against, per_step, label in (("images", 80, "images seen"), ("seconds", 0.4, "training time")):
        panels = panels_of(plot_curves({"one": read_log(log)}, against))
        for title, steps in (("loss", [2, 4, 8]), ("top-1 accuracy of frozen features", [4, 8])):
            x = panels[title].lines[0].get_xdata()
            assert list(x) == pytest.approx([step * per_step for step in steps])
        assert label in panels["throughput"].get_xlabel()


def timed_record(step, seconds, top1=None):
    """A step that took so many seconds, and the evaluation after it."""
    test = [] if top1 is None else [evaluation(f"epoch {step // 4}", top1)]
    return [record(step, images_per_sec=32 / seconds, data_time=0.0, step_time=seconds), *test]


def test_time_to_accuracy(tmp_path):
    """Steps of 32 images; untrained 20%. Linear between evaluations; the first crossing counts."""
    untrained = evaluation("untrained backbone", 20.0)
    logs = {"slow-0": [*timed_record(9, 2.0, 30.0), *timed_record(19, 2.0, 50.0), *timed_record(29, 2.0, 35.0)],
            "slow-1": [*timed_record(4, 2.0), *timed_record(9, 4.0, 40.0), *timed_record(19, 2.0, 50.0)],
            "fast": [*timed_record(9, 1.0, 20.0), *timed_record(19, 1.0, 60.0)], "never": timed_record(9, 1.0, 39.0),
            "untested": timed_record(9, 1.0), "half-0": timed_record(9, 1.0, 60.0),
            "half-1": timed_record(9, 1.0, 30.0)}
    runs = {name: read_log(write(tmp_path / name, [untrained, *records])) for name, records in logs.items()}
    assert [find_crossing(run, 40.0) for run in runs.values()] == [
        (pytest.approx(32 * 15), pytest.approx(30)), (pytest.approx(32 * 10), pytest.approx(30)),
        (pytest.approx(32 * 15), pytest.approx(15)), None, None, (160, 5), None]
    assert find_crossing(runs["fast"], 20.0) == (0, 0)  # random weights have it
    assert find_crossing({k: v for k, v in runs["fast"].items() if k != "untrained backbone"}, 15.0) == (320, 10)
    assert "times as fast" not in format_time_to_accuracy(runs, 20.0)
    assert format_time_to_accuracy(runs, 40.0).splitlines() == [
        "slow     k-NN 40%: 2 of 2 runs, 400 ± 113 (320 to 480) images, 30 ± 0 (30 to 30) seconds",
        "fast     k-NN 40%: 1 of 1 runs, 480 images, 15 seconds", "never    k-NN 40%: 0 of 1 runs",
        "untested k-NN 40%: 0 of 1 runs", "half     k-NN 40%: 1 of 2 runs, 160 images, 5 seconds",
        "fast     2.00 times as fast as slow"]


def test_seeds_share_a_color_and_a_name(tmp_path):
    runs = {f"runs/{name}": read_log(write(tmp_path / name, [record(0), record(2)])) for name in ("a-0", "b", "a-1")}
    figure = plot_curves(runs)
    losses = [line for line in figure.axes[0].lines if list(line.get_ydata()) == [6.0, 5.8]]
    assert [line.get_color() for line in losses] == ["C0", "C1"]
    assert legend_of(figure) == ["a (mean and standard deviation of 2 seeds)", "b"]


def test_seeds_are_drawn_as_mean_and_band(tmp_path):
    """Losses 1, 2, 6: mean 3, standard deviation sqrt(7); the last step is of one seed alone."""
    runs = {}
    for seed, loss in enumerate((1.0, 2.0, 6.0)):
        records = [record(0, loss=loss), record(4, loss=2 * loss)] + [record(8, loss=9.0)] * (seed == 1)
        runs[f"a_{seed}"] = read_log(write(tmp_path / str(seed), records))
    axes = plot_curves(runs).axes[0]
    line = axes.lines[0]
    assert list(line.get_xdata()) == [1, 5, 9] and list(line.get_ydata()) == pytest.approx([3, 6, 9])
    (band,) = axes.collections
    corners = {(round(x), round(y, 6)) for x, y in band.get_paths()[0].vertices}
    s = 7 ** 0.5
    assert corners == {(1, round(3 - s, 6)), (1, round(3 + s, 6)), (5, round(6 - 2 * s, 6)), (5, round(6 + 2 * s, 6)),
                       (9, 9.0)}
    assert band.get_facecolor()[0][3] == pytest.approx(0.2) and line.get_color() == "C0"


def test_mean_and_spread_of_seeds(tmp_path):
    runs = {}
    for name, top1 in (("a-0", 50.0), ("a-1", 52.0), ("a-2", 57.0), ("b_0", 60.0), ("b_1", 61.0), ("c", 9.0)):
        runs[name] = read_log(write(tmp_path / name, [record(1), evaluation("epoch 0", 10.0), record(2),
                                                      evaluation("epoch 1", top1, linear_top1=top1 + 5)]))
    lines = format_table(runs).splitlines()
    assert len(lines) == 11 and [" ".join(line.split()) for line in lines[7:]] == [
        "b 2 runs, k-NN last 60.5 ± 0.7 (60.0 to 61.0)", "a 3 runs, k-NN last 53.0 ± 3.6 (50.0 to 57.0)",
        "b 2 runs, linear last 65.5 ± 0.7 (65.0 to 66.0)", "a 3 runs, linear last 58.0 ± 3.6 (55.0 to 62.0)"]


def test_errors_of_a_missing_or_empty_log(tmp_path):
    with pytest.raises(OSError, match="log.jsonl: no such log; name the folder of a run of train.py"):
        read_log(tmp_path / "log.jsonl")
    for text in ("", "no JSON\n", '{"eval": "epoch 0", "knn_top1": 3}\n', "[1]\n", "{}\n", "\x00\xff"):
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(OSError, match="holds no training step"):
            read_log(tmp_path / "log.jsonl")
