"""The report's plots, as inline SVG whose colours are the page's CSS variables: one drawing for light, dark and paper.

Matplotlib draws with stand-in colours; afterwards each is replaced by `var(--name)`. Text stays text. No label is read
as mathematics.
"""

import io
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import numpy as np

STAND_IN = {  # colour that matplotlib draws with → CSS variable of the page
    "#010101": "ink",
    "#020202": "soft",
    "#030303": "line",
    "#040404": "paper",
    "#050505": "accent",
    "#060606": "part0",
    "#070707": "part1",
    "#080808": "part2",
    "#090909": "part3",
}
INK, SOFT, LINE, PAPER, ACCENT, *PARTS = STAND_IN
_SVG = "http://www.w3.org/2000/svg"
_LINK = "http://www.w3.org/1999/xlink"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "peft-engine",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
MEMORY = ("weights", "gradients", "optimizer", "activations")


def plots(table: dict[str, Any]) -> list[dict[str, str]]:
    """title, caption, svg of each plot that the table has numbers for."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        found = [
            _frontier(table, "step_seconds", "Quality against step time", "median step, ms", 1e3),
            _frontier(table, "peak_bytes", "Quality against memory", "peak memory, MiB", 2**-20),
            _frontier(table, "cost_usd", "Quality against cost", "cost of one training, USD", 1),
            _curves(table),
            _memory(table),
            _classes(table),
        ]
    return [one for one in found if one is not None]


def pareto(points: Iterable[tuple[float, float]], maximize: bool) -> list[int]:
    """Indices of the points that no other beats, cheapest first: x is a cost; y is better when higher (or lower)."""
    listed = list(points)
    order = sorted(range(len(listed)), key=lambda i: (listed[i][0], -listed[i][1] if maximize else listed[i][1]))
    front: list[int] = []
    for i in order:
        y = listed[i][1]
        if not front or (y > listed[front[-1]][1] if maximize else y < listed[front[-1]][1]):
            front.append(i)
    return front


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=72)
    FigureCanvasAgg(figure)  # measures text
    return figure


def _frontier(table: dict[str, Any], name: str, title: str, label: str, scale: float) -> dict[str, str] | None:
    points = []
    for row in table["results"]:
        cost, quality = row["train_info"][name], row["train_info"]["metrics"].get(table["primary"])
        if cost and quality:
            points.append((row["name"], {k: cost[k] * scale for k in ("median", "low", "high")}, quality))
    if len(points) < 2:
        return None
    figure = _figure(6.4, 4.0)
    axes = figure.add_axes((0.11, 0.13, 0.86, 0.84))
    xs, ys = np.array([cost["median"] for _, cost, _ in points]), np.array([q["mean"] for _, _, q in points])
    front = pareto(zip(xs, ys, strict=True), table["maximize"])
    for i, (_, cost, quality) in enumerate(points):
        colour = ACCENT if i in front else SOFT
        axes.plot([cost["low"], cost["high"]], [ys[i]] * 2, color=colour, linewidth=1.2, zorder=2)
        axes.plot([xs[i]] * 2, [quality["low"], quality["high"]], color=colour, linewidth=1.2, zorder=2)
        mark = "o" if i in front else "s"
        fill = colour if i in front else PAPER
        axes.plot(xs[i], ys[i], mark, color=colour, markerfacecolor=fill, markersize=6, zorder=3)
    steps = "steps-post"
    axes.plot(xs[front], ys[front], color=ACCENT, linewidth=1.2, linestyle=(0, (4, 3)), drawstyle=steps, zorder=1)
    if xs.min() > 0 and xs.max() / xs.min() > 20:
        axes.set_xscale("log")
    axes.margins(x=0.12, y=0.1)
    axes.set_xlabel(label)
    axes.set_ylabel(table["primary"] + ("" if table["maximize"] else " (lower is better)"))
    _label_points(axes, figure, points, front)
    where = "up and left" if table["maximize"] else "down and left"
    caption = (
        f"Better is {where}. Filled circles on the dashed Pareto front: no other method is both better and cheaper by "
        "its mean. Vertical bars: 95% interval over seeds and test items; horizontal bars: range over seeds."
    )
    return {"id": f"plot-{name}", "title": title, "caption": caption, "svg": _svg(figure, f"plot-{name}", title)}


def _label_points(axes: Any, figure: Any, points: list[tuple[str, dict[str, float], Any]], front: list[int]) -> None:
    """Each name beside its point, where it covers no other name, no bar and no piece of the Pareto front."""
    names = [name for name, _, _ in points]
    xs, ys = np.array([cost["median"] for _, cost, _ in points]), np.array([q["mean"] for _, _, q in points])
    figure.canvas.draw()
    axes.autoscale(False)
    renderer = figure.canvas.get_renderer()
    spots = axes.transData.transform(np.column_stack([xs, ys]))
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    lines = [((x, q["low"]), (x, q["high"])) for x, (_, _, q) in zip(xs, points, strict=True)]
    lines += [((cost["low"], y), (cost["high"], y)) for y, (_, cost, _) in zip(ys, points, strict=True)]
    for i, j in pairwise(front):
        lines += [((xs[i], ys[i]), (xs[j], ys[i])), ((xs[j], ys[i]), (xs[j], ys[j]))]
    for line in lines:
        (x0, y0), (x1, y1) = axes.transData.transform(line)
        taken.append((min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2))
    frame = axes.get_window_extent()
    for i in np.argsort(-ys):
        short = names[i] if len(names[i]) <= 28 else names[i][:27] + "…"
        text = axes.annotate(short, (xs[i], ys[i]), (0, 0), textcoords="offset points", fontsize=8.5)
        box = text.get_window_extent(renderer)
        width, height = box.width * 1.05, box.height
        best: tuple[float, float, float] | None = None
        for away in (8.0, 14.0, 22.0, 32.0, 44.0, 58.0, 74.0, 92.0):
            for dx, dy in ((1, 0.0), (-1, 0.0), (1, 0.8), (1, -0.8), (-1, 0.8), (-1, -0.8), (0, 1), (0, -1)):
                x = spots[i][0] + (away * dx if dx >= 0 else away * dx - width) - (width / 2 if dx == 0 else 0)
                y = spots[i][1] + away * dy - height / 2
                spot = (x, y, x + width, y + height)
                inside = x > frame.x0 and x + width < figure.bbox.x1 and y > frame.y0 and y + height < frame.y1 + 8
                if inside and not any(_overlap(spot, other) for other in taken):
                    best = (x, y, away)
                    break
            if best:
                break
        x, y, away = best or (spots[i][0] + 8, spots[i][1], 8.0)
        taken.append((x, y, x + width, y + height))
        text.set_position((x - spots[i][0], y + height * 0.22 - spots[i][1]))
        if away > 14:
            end = axes.transData.inverted().transform((min(max(spots[i][0], x), x + width), y + height / 2))
            axes.plot([xs[i], end[0]], [ys[i], end[1]], color=LINE, linewidth=0.7, zorder=0.5)


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _curves(table: dict[str, Any]) -> dict[str, str] | None:
    """A panel per method: training loss per seed, eval loss as the mean over seeds; the reference's eval behind."""
    rows = [row for row in table["results"] if any(row["train_info"]["train_curves"].values())]
    if not rows:
        return None
    across = min(3, len(rows))
    down = -(-len(rows) // across)
    figure = _figure(6.6, 0.5 + 1.75 * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    behind = next((_mean_eval(row) for row in rows if row["name"] == table["reference"]), ([], []))
    for i, axes in enumerate(grid.flat):
        if i >= len(rows):
            axes.set_visible(False)
            continue
        row = rows[i]
        for curve in row["train_info"]["train_curves"].values():
            if curve:
                axes.plot(*zip(*curve, strict=True), color=SOFT, linewidth=0.7, alpha=0.75)
        if row["name"] != table["reference"]:
            axes.plot(*behind, color=INK, linewidth=1, linestyle=(0, (1, 1.5)))
        steps, losses = _mean_eval(row)
        axes.plot(steps, losses, "o-", color=ACCENT, linewidth=1.6, markersize=3)
        axes.set_title(row["name"][:30], fontsize=9, loc="left", color=INK)
        if i + across >= len(rows):
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
        if i % across == 0:
            axes.set_ylabel("loss")
    figure.tight_layout(pad=0.4, h_pad=0.9)
    caption = (
        "Thin: training loss of each seed. Thick, with points: eval loss, mean over seeds. Dotted: the eval loss of "
        f"{table['reference']}, for comparison."
    )
    return {"id": "plot-curves", "title": "Loss curves", "caption": caption, "svg": _svg(figure, "plot-curves", "Loss")}


def _mean_eval(row: dict[str, Any]) -> tuple[list[float], list[float]]:
    by_step: dict[float, list[float]] = {}
    for curve in row["train_info"]["eval_curves"].values():
        for point in curve:
            if point.get("loss") is not None:
                by_step.setdefault(point["step"], []).append(point["loss"])
    steps = sorted(by_step)
    return steps, [sum(by_step[step]) / len(by_step[step]) for step in steps]


def _memory(table: dict[str, Any]) -> dict[str, str] | None:
    rows = [row for row in table["results"] if any(row["train_info"]["memory"][part] for part in MEMORY)]
    if not rows:
        return None
    figure = _figure(6.6, 0.7 + 0.34 * len(rows))
    axes = figure.add_subplot()
    starts = np.zeros(len(rows))
    whole = max(sum(row["train_info"]["memory"][part] or 0 for part in MEMORY) for row in rows) / 2**20
    for part, colour in zip(MEMORY, PARTS, strict=True):
        sizes = np.array([(row["train_info"]["memory"][part] or 0) / 2**20 for row in rows])
        axes.barh(range(len(rows)), sizes, left=starts, color=colour, height=0.7, edgecolor=PAPER, linewidth=0.8)
        for i, size in enumerate(sizes):
            if size > 0.075 * whole:
                axes.text(starts[i] + size / 2, i, f"{size:,.0f}", ha="center", va="center", fontsize=7.5, color=PAPER)
        starts += sizes
    for i, end in enumerate(starts):
        axes.text(end + 0.01 * whole, i, f"{end:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"][:30] for row in rows], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, whole * 1.1)
    axes.set_xlabel("MiB at the peak")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.tight_layout(pad=0.4)
    caption = "Median over seeds. Activations: the peak less the other three."
    return {
        "id": "plot-memory",
        "title": "Memory",
        "caption": caption,
        "legend": ",".join(MEMORY),
        "svg": _svg(figure, "plot-memory", "Memory by part"),
    }


def _classes(table: dict[str, Any]) -> dict[str, str] | None:
    """F1 per class: the span of all methods, the reference and the first plain LoRA (else the best other)."""
    rows = [row for row in table["results"] if row["train_info"]["per_class"]]
    if not rows:
        return None
    whole = next((row for row in rows if row["name"] == table["reference"]), None)
    named = [line["method"] for line in table["claims"]]
    others = [row for row in rows if row is not whole]
    chosen = next((row for row in others if row["name"] in named), others[0] if others else None)
    classes = list(rows[0]["train_info"]["per_class"])
    cut = len(classes) > 30
    if cut:
        rare = sorted(classes, key=lambda one: (whole or rows[0])["train_info"]["per_class"].get(one, {}).get("f1", 0))
        classes = rare[:30]
    figure = _figure(6.6, 0.75 + 0.27 * len(classes))
    axes = figure.add_subplot()
    for i, one in enumerate(classes):
        each = [row["train_info"]["per_class"][one]["f1"] for row in rows if one in row["train_info"]["per_class"]]
        axes.plot([min(each), max(each)], [i, i], color=LINE, linewidth=5, solid_capstyle="butt", zorder=1)
        if whole:
            axes.plot(whole["train_info"]["per_class"][one]["f1"], i, "|", color=INK, markersize=13, mew=2, zorder=2)
        if chosen:
            axes.plot(chosen["train_info"]["per_class"][one]["f1"], i, "o", color=ACCENT, markersize=6, zorder=3)
    axes.set_yticks(range(len(classes)), [str(one)[:30] for one in classes], color=INK)
    axes.set_ylim(len(classes) - 0.4, -0.6)
    axes.set_xlabel("F1")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.tight_layout(pad=0.4)
    told = ["Band: from the lowest to the highest method"]
    told += [f"upright bar: {whole['name']}"] if whole else []
    told += [f"point: {chosen['name']}"] if chosen else []
    caption = "; ".join(told) + ". Means over seeds." + (" The 30 classes with the lowest F1." if cut else "")
    svg = _svg(figure, "plot-classes", "F1 by class")
    return {"id": "plot-classes", "title": "F1 by class", "caption": caption, "svg": svg}


def _svg(figure: Any, name: str, title: str) -> str:
    """The figure as an SVG element for a page: no metadata, ids of its own, colours by CSS variables."""
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(written.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{_LINK}}}href":
                element.set(key, value.replace("#", f"#{name}-", 1))
            else:
                value = re.sub(r"url\(#", f"url(#{name}-", value)
                element.set(key, re.sub(r"#0[1-9]0[1-9]0[1-9]\b", _variable, value))
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")


def _variable(match: re.Match[str]) -> str:
    return f"var(--{STAND_IN[match.group(0)]})" if match.group(0) in STAND_IN else match.group(0)
