import io
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hqclip_jax.curves import (
    COLORS,
    GROUPS,
    View,
    draw,
    draw_shares,
    heading,
    picture,
    short,
    smoothed,
    style,
    timed,
)
from hqclip_jax.runs import Run, RunError
from hqclip_jax.telemetry import KINDS

LOSS, SPEED = GROUPS[0], next(g for g in GROUPS if g.title == "Speed")


def run(name: str = "a", **metrics: list[float]) -> Run:
    count = len(next(iter(metrics.values())))
    rows = [{"step": 10.0 * (k + 1)} | {m: v[k] for m, v in metrics.items()} for k in range(count)]
    return Run(name, rows, {})


def drawn(view: View, group=LOSS, metric: str = "loss"):
    axes = Figure().subplots()
    draw(axes, view, group, metric)
    return axes


def test_every_metric_is_in_one_group():
    names = (
        "loss", "loss/hni", "accuracy", "hni_accuracy", "tag_recall", "grad_norm/text", "lr",
        "logit_scale", "hni_logit_scale", "images_per_s", "tflops_per_chip", "mfu", "data_wait",
        "text_cut", "replaced", "epoch/web", "samples/web", "samples", "seconds", "goodput",
        "time/lost", "surprise",
    )  # fmt: skip
    groups = View([run(**{name: [1.0] for name in names})]).groups()
    assert sorted(n for _, found in groups for n in found) == sorted(names)
    found = {group.title: names for group, names in groups}
    assert found["Loss"] == ["loss", "loss/hni"]
    assert found["Optimizer"] == ["lr", "logit_scale", "hni_logit_scale"]
    assert found["Data"] == ["text_cut", "replaced", "epoch/web", "samples", "samples/web"]
    assert found["Other"] == ["surprise"]
    shown = {n for _, names in View([run(**{n: [1.0] for n in names})]).panels() for n in names}
    assert shown == set(names) - {"samples", "seconds", "time/lost"}


def test_only_what_is_asked_for_is_shown():
    view = View([run(loss=[1.0], lr=[1.0], samples=[1.0])], ["l*s", "samples"])
    assert [names for _, names in view.panels()] == [["loss"], ["samples"]]
    with pytest.raises(RunError, match=r"--metrics: 'mfu' fits none of: loss"):
        View([run(loss=[1.0])], ["loss", "mfu"])
    with pytest.raises(RunError, match=r"--x=seconds: no run reports it; there is: step, samples"):
        View([run(loss=[1.0], samples=[2.0])], x="seconds")


def test_a_line_per_run_in_its_own_colour():
    runs = [run("a", loss=[3.0, 2.0]), run("b", lr=[1.0]), run("c", loss=[5.0, 4.0])]
    lines = drawn(View(runs)).get_lines()
    assert [line.get_color() for line in lines] == [COLORS[0], COLORS[2]]
    np.testing.assert_array_equal(lines[1].get_xydata(), [[10, 5], [20, 4]])


def test_many_runs_look_different():
    looks = [tuple(style(i).values()) for i in range(3 * len(COLORS))]
    assert len(set(looks)) == len(looks)


def test_gaps_stay_gaps_and_a_value_between_two_is_a_dot():
    view = View([run(loss=[3.0, 2.0, math.nan, 1.0, math.nan, 2.0, 2.0])])
    (line,) = drawn(view).get_lines()
    np.testing.assert_array_equal(line.get_ydata(), [3, 2, math.nan, 1, math.nan, 2, 2])
    assert line.get_markevery() == [3]
    assert heading(view, "loss") == "loss: weighted sum of its parts (2 × no number)"
    assert heading(View([run(x=[1.0])]), "x") == "x"


@pytest.mark.parametrize("values", [[1.0], [math.nan], [0.0, 0.0], [math.nan, 1.0]])
def test_little_to_draw_is_drawn(values):
    axes = drawn(View([run(loss=values)], smooth=3))
    axes.figure.savefig(io.BytesIO())
    assert axes.get_yscale() == "linear"


def test_a_log_scale_where_values_spread_far():
    far, near = [100.0, 10.0, 1.0], [3.0, 2.0, 1.0]
    assert drawn(View([run(loss=far)])).get_yscale() == "log"
    assert drawn(View([run(loss=near)])).get_yscale() == "linear"
    assert drawn(View([run(loss=[*far, 0.0])])).get_yscale() == "linear"
    assert drawn(View([run(mfu=far)]), SPEED, "mfu").get_ylim()[0] == 0


def test_restarts_are_marked_on_the_axis_at_hand():
    rows = [
        {"step": 10.0, "seconds": 7200.0, "loss": 2.0},
        {"step": 20.0, "seconds": 14400.0, "loss": 1.0, "resumed_from": 10.0},
    ]
    line, mark = drawn(View([Run("a", rows, {})])).get_lines()
    assert set(mark.get_xdata()) == {10}
    axes = drawn(View([Run("a", rows, {})], x="seconds"))
    line, mark = axes.get_lines()
    assert axes.get_xlabel() == "hours" and set(mark.get_xdata()) == {2}
    assert list(line.get_xdata()) == [2, 4]


def test_smoothing_leaves_gaps_and_does_not_look_ahead():
    ys = np.array([4.0, 2.0, math.nan, 6.0, 0.0])
    np.testing.assert_allclose(smoothed(ys, 3), [4, 3, math.nan, 4, 3])
    np.testing.assert_array_equal(smoothed(ys, 1), ys)
    assert smoothed(np.array([1.0]), 5) == [1]
    raw, mean = drawn(View([run(loss=[4.0, 2.0])], smooth=2)).get_lines()
    assert raw.get_alpha() < 1 and list(mean.get_ydata()) == [4, 3]


def test_bars_add_up_to_the_whole():
    seconds = {f"time/{kind}": [float(k)] for k, kind in enumerate(KINDS)}
    view = View([run("a", **seconds), run("b", loss=[1.0])])
    assert [r.name for r in timed(view)] == ["a"]
    axes = Figure().subplots()
    draw_shares(axes, timed(view))
    bars = [(p.get_x(), p.get_width()) for p in axes.patches]
    assert len(bars) == len(KINDS) and sum(width for _, width in bars) == pytest.approx(1)
    assert bars[-1] == (pytest.approx(15 / 21), pytest.approx(6 / 21))
    assert not timed(View(view.runs, ["loss"]))


@pytest.mark.parametrize("metrics", [(), ("loss",), ("time/*",)])
def test_the_picture_is_white_and_holds_ink(metrics):
    runs = [
        run("_a $x", loss=[3.0, 2.0], lr=[1.0, 1.0], **{"time/step": [1.0, 2.0]}),
        Run("empty", [], {}),
    ]
    image = np.array(Image.open(io.BytesIO(picture(View(runs, metrics)))).convert("RGB"))
    assert image.shape[1] == 1400 and tuple(image[-1, -1]) == (255, 255, 255)
    blue = tuple(int(COLORS[0][i : i + 2], 16) for i in (1, 3, 5))
    assert (image == blue).all(axis=2).sum() > 20  # of the key alone, or of a curve


def test_ticks_are_short_and_exact():
    assert [short(v) for v in (0, 0.0005, 1500, 51_250, 12.8e9, -2e6)] == [
        "0", "0.0005", "1.5K", "51.25K", "12.8B", "-2M",
    ]  # fmt: skip
