import json
import math

import pytest

from plotting.curves import PANELS, crossing, format_table, format_time_to_accuracy, plot_curves, read_log


def record(step, **more):
    values = dict(epoch=step // 4, step=step, loss=6.0 - 0.1 * step, ln_k=math.log(512), teacher_entropy=5.0,
                  teacher_entropy_of_mean=5.5, kl=1.0 - 0.1 * step, lr=0.001 * step, weight_decay=0.04, momentum=0.99,
                  images_per_second=200.0, data_seconds=0.1, compute_seconds=0.3, unreadable=0)
    return values | more


def write(folder, records, end=""):
    folder.mkdir()
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + end)
    return path


@pytest.fixture
def log(tmp_path):
    """Of a run of two epochs of four steps, which is writing a line."""
    return write(tmp_path / "one", [
        dict(knn="raw pixels", top1=64.0, top5=96.0), dict(knn="untrained backbone", top1=18.0, top5=70.0, linear=25.0),
        record(1), record(3, kl=None), dict(knn="epoch 0", top1=50.0, top5=80.0), record(7),
        dict(knn="epoch 1", top1=40.0, top5=80.0, linear=60.0)], '{"epoch": 2, "ste')


def test_a_log_is_read(log):
    curves, baselines = read_log(log)
    assert baselines == {"raw pixels": {"top1": 64.0}, "untrained backbone": {"top1": 18.0, "linear": 25.0}}
    assert curves["loss"] == ([2, 4, 8], [5.9, 5.7, 5.3]) and curves["kl"] == ([2, 8], [0.9, 1.0 - 0.1 * 7])
    assert curves["top1"] == ([4, 8], [50.0, 40.0]) and curves["waiting"][1] == [25.0] * 3
    assert curves["linear"] == ([8], [60.0])
    for name, per_step in (("seconds", 0.4), ("images", 80)):
        assert curves[name] == ([2, 4, 8], pytest.approx([2 * per_step, 4 * per_step, 8 * per_step]))


def test_a_page_shows_all_of_it(log):
    figure = plot_curves({"one": read_log(log)})
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == list(PANELS)
    curves = {title: [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
              for title, axes in panels.items()}
    assert curves["loss, nats"][0][1:] == ([2, 4, 8], [5.9, 5.7, 5.3])
    assert curves["loss, nats"][1][2] == [math.log(512)] * 3
    assert [text.get_text() for text in panels["loss, nats"].get_legend().get_texts()] == ["loss", "ln K"]
    accuracies = [points for _, *points in curves["k-NN and linear top-1, %"]]
    assert accuracies[:2] == [[[4, 8], [50.0, 40.0]], [[8], [60.0]]]
    assert [y for _, y in accuracies[2:]] == [[18.0] * 2, [64.0] * 2]
    schedules = panels["weight decay, teacher momentum"].get_legend()
    assert [text.get_text() for text in schedules.get_texts()] == ["weight decay", "teacher momentum"]
    assert curves["waiting for data, % of the time"][0][2] == [25.0] * 3
    assert all(lines for lines in curves.values())


def test_several_runs_have_a_color_each(tmp_path, log):
    other = write(tmp_path / "two", [record(0), record(2)])
    figure = plot_curves({"one": read_log(log), "two": read_log(other)})
    lines = [line for line in figure.axes[0].lines if list(line.get_xdata()) in ([2, 4, 8], [1, 3])]
    assert {line.get_color() for line in lines} == {"C0", "C1"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    for runs in (["one", "two"], ["two", "one"]):  # what only one of them has is in the legend too
        figure = plot_curves({name: read_log({"one": log, "two": other}[name]) for name in runs})
        panels = {axes.get_title(): axes for axes in figure.axes}
        legend = panels["k-NN and linear top-1, %"].get_legend()
        assert [text.get_text() for text in legend.get_texts()] == [
            "k-NN", "linear", "k-NN of untrained backbone", "k-NN of raw pixels"]
        assert [line.get_linestyle() for line in legend.get_lines()] == ["-", "--", "-.", ":"]
        assert panels["learning rate"].get_legend() is None and panels["learning rate"].get_xlim()[0] == 0


def test_names_and_single_steps_are_seen(tmp_path):
    figure = plot_curves({"$x_$y^\udcff": read_log(write(tmp_path / "one", [record(0)]))})
    assert figure.axes[0].lines[0].get_marker() == "."
    assert figure.get_suptitle() == r"\$x_\$y^?"
    figure.savefig(tmp_path / "curves.png")


def test_values_that_are_none(tmp_path):
    lines = [json.dumps(record(0)), json.dumps(record(1, loss=math.nan)), json.dumps(record(2, loss=math.inf)),
             json.dumps(record(3)).replace('"step": 3', '"step": Infinity'), "[" * 10**5,
             json.dumps(record(4)).replace('"loss": 5.6', '"loss": ' + "9" * 400), json.dumps(record(5))]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 8}', json.dumps(record(9))]))
    curves, _ = read_log(tmp_path / "log.jsonl")
    assert curves["loss"] == ([1, 6, 10], [6.0, 5.5, 5.1])
    assert curves["seconds"][1][-1] == pytest.approx(10 * 0.4)  # what is lost counts like what comes next


def test_the_table(tmp_path, log):
    other = write(tmp_path / "two", [record(0, loss=None), record(2, loss=None), record(3)])
    lines = format_table({"one": read_log(log), "longer": read_log(other)}).splitlines()
    assert lines[1].split() == ["one", "8", "5.300", "6.238", "5.000", "0.300", "40.0", "50.0", "18.0"]
    assert lines[2].split() == ["longer", "4", "5.700", "6.238", "5.000", "0.700", "-", "-", "-"]
    assert lines[0].split() == ["steps", "loss", "ln", "K", "entropy", "KL", "k-NN", "last", "best", "untrained"]
    assert len({len(line) for line in lines}) == 1


def test_curves_against_images_and_time(log):
    for against, per_step in (("images", 80), ("seconds", 0.4)):
        panels = {axes.get_title(): axes for axes in plot_curves({"one": read_log(log)}, against).axes}
        for title, steps in (("loss, nats", [2, 4, 8]), ("k-NN and linear top-1, %", [4, 8])):
            x = panels[title].lines[0].get_xdata()
            assert list(x) == pytest.approx([step * per_step for step in steps])
        assert against in panels["loss, nats"].get_xlabel()


def test_a_log_without_images_is_not_drawn_against_them(tmp_path):
    run = read_log(write(tmp_path / "one", [{k: v for k, v in record(0).items() if k != "images_per_second"}]))
    with pytest.raises(OSError, match="one: its log does not say how many images seen"):
        plot_curves({"one": run}, "images")


def pace(step, seconds, top1=None):
    """A step that took so long, and the k-NN test after it."""
    test = [] if top1 is None else [dict(knn=f"epoch {step // 4}", top1=top1, top5=90.0)]
    return [record(step, images_per_second=32 / seconds, data_seconds=0.0, compute_seconds=seconds), *test]


def test_when_an_accuracy_is_first_reached(tmp_path):
    """Steps of 32 pictures; untrained 20%. Between two tests the way is straight; the first time counts."""
    untrained = dict(knn="untrained backbone", top1=20.0, top5=60.0)
    logs = {"slow-0": [*pace(9, 2.0, 30.0), *pace(19, 2.0, 50.0), *pace(29, 2.0, 35.0)],
            "slow-1": [*pace(4, 2.0), *pace(9, 4.0, 40.0), *pace(19, 2.0, 50.0)],
            "fast": [*pace(9, 1.0, 20.0), *pace(19, 1.0, 60.0)], "never": pace(9, 1.0, 39.0),
            "untested": pace(9, 1.0), "half-0": pace(9, 1.0, 60.0), "half-1": pace(9, 1.0, 30.0)}
    runs = {name: read_log(write(tmp_path / name, [untrained, *records])) for name, records in logs.items()}
    assert [crossing(*run, 40.0) for run in runs.values()] == [
        (pytest.approx(32 * 15), pytest.approx(30)), (pytest.approx(32 * 10), pytest.approx(30)),
        (pytest.approx(32 * 15), pytest.approx(15)), None, None, (160, 5), None]
    assert crossing(*runs["fast"], 20.0) == (0, 0)  # before it learnt anything
    assert crossing(runs["fast"][0], {}, 15.0) == (320, 10)  # nobody knows from where
    assert "times as fast" not in format_time_to_accuracy(runs, 20.0)
    assert format_time_to_accuracy(runs, 40.0).splitlines() == [
        "slow     k-NN 40%: 2 of 2 runs, 400 ± 113 (320 to 480) images, 30 ± 0 (30 to 30) seconds",
        "fast     k-NN 40%: 1 of 1 runs, 480 images, 15 seconds", "never    k-NN 40%: 0 of 1 runs",
        "untested k-NN 40%: 0 of 1 runs", "half     k-NN 40%: 1 of 2 runs, 160 images, 5 seconds",
        "fast     2.00 times as fast as slow"]


def test_seeds_share_a_color_and_a_name(tmp_path):
    runs = {name: read_log(write(tmp_path / name, [record(0), record(2)])) for name in ("a-0", "b", "a-1")}
    figure = plot_curves(runs)
    assert [line.get_color() for line in figure.axes[0].lines if len(line.get_xdata()) == 2][::2] == ["C0", "C1", "C0"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_seeds_of_a_run_have_a_mean_and_a_spread(tmp_path):
    runs = {}
    for name, top1 in (("a-0", 50.0), ("a-1", 52.0), ("a-2", 57.0), ("b_0", 60.0), ("b_1", 61.0), ("c", 9.0)):
        runs[name] = read_log(write(tmp_path / name, [record(1), dict(knn="epoch 0", top1=10.0, top5=80.0), record(2),
                                                      dict(knn="epoch 1", top1=top1, top5=80.0, linear=top1 + 5)]))
    lines = format_table(runs).splitlines()
    assert len(lines) == 11 and [" ".join(line.split()) for line in lines[7:]] == [
        "b 2 runs, k-NN last 60.5 ± 0.7 (60.0 to 61.0)", "a 3 runs, k-NN last 53.0 ± 3.6 (50.0 to 57.0)",
        "b 2 runs, linear last 65.5 ± 0.7 (65.0 to 66.0)", "a 3 runs, linear last 58.0 ± 3.6 (55.0 to 62.0)"]


def test_what_is_no_log(tmp_path):
    with pytest.raises(OSError, match="cannot be read .*expected the folder of a run"):
        read_log(tmp_path / "log.jsonl")
    for text in ("", "no JSON\n", '{"knn": "epoch 0", "top1": 3}\n', "[1]\n", "{}\n", "\x00\xff"):
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(OSError, match="holds no step of a training"):
            read_log(tmp_path / "log.jsonl")
