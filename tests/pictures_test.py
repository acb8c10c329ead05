"""Pictures show what the geometry and the tile plans say, in figures and in terminals, and are drawn the same every time."""

import dataclasses
import io
import itertools
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from gna_jax import pictures
from gna_jax.neighborhood import Neighborhood
from gna_jax.pictures import (
    gallery,
    mask,
    palette,
    panels,
    seen,
    shard_halo,
    stride_groups,
    tile_walk,
    tile_work,
)
from gna_jax.simulator import simulate
from gna_jax.tiling import QueryTilePlan

ROOT = pathlib.Path(__file__).parents[1]
SEEDS = range(25)


def random_rule(seed, rank, longest):
    """A layout and a rule that fits it."""
    rng = np.random.default_rng(seed)
    layout, rule = [], {"window_size": [], "stride": [], "dilation": [], "is_causal": []}
    for _ in range(rank):
        length = int(rng.integers(1, longest + 1))
        dilation = int(rng.integers(1, min(3, length) + 1))
        window = int(rng.integers(1, length // dilation + 1))
        rule["window_size"].append(window)
        rule["stride"].append(int(rng.integers(1, window + 1)))
        rule["dilation"].append(dilation)
        rule["is_causal"].append(bool(rng.integers(2)))
        layout.append(length)
    return tuple(layout), {name: tuple(values) for name, values in rule.items()}


def group_and_leader(i, length, stride, dilation, is_causal):
    """From the definition: the number of a token's stride group, and the position of its leader."""
    residue, place = i % dilation, i // dilation
    number = place // stride
    last = len(range(residue, length, dilation)) - 1
    leader = min(number * stride + (stride - 1 if is_causal else stride // 2), last)
    return (residue, number), residue + leader * dilation


def groups_and_leaders(layout, rule):
    axes = zip(layout, rule["stride"], rule["dilation"], rule["is_causal"], strict=True)
    return [[group_and_leader(i, axis[0], *axis[1:]) for i in range(axis[0])] for axis in axes]


def written(picture):
    """Per panel, the two characters of every cell in a terminal: `[rows, columns, 2]`."""
    # Panels below each other, whatever their arrangement.
    picture = dataclasses.replace(picture, rows=tuple((panel,) for panel in picture.panels))
    lines = iter(picture.text(width=1000).plain.split("\n")[2:])
    for panel in picture.panels:
        rows, columns = panel.cells.shape
        title = [next(lines) for _ in panel.title.splitlines()]
        assert [line.rstrip() for line in title] == panel.title.splitlines()
        body = [list(next(lines)[: 2 * columns]) for _ in range(rows)]
        assert next(lines) == ""
        yield np.array(body).reshape(rows, columns, 2)


def whole(picture, field="cells"):
    """The panels of a picture stacked to the layout's planes."""
    return np.stack([getattr(panel, field) for panel in picture.panels])


# --- who sees whom --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_shows_every_seen_pair_in_the_turn_of_its_stride_group(seed):
    layout, rule = random_rule(seed, 1, 30)
    picture = pictures.mask_1d(*layout, **rule)
    truth = Neighborhood.of(1, **rule).mask(layout)
    (axis,) = groups_and_leaders(layout, rule)
    turns = np.array([number % 2 for (_, number), _ in axis])
    np.testing.assert_array_equal(picture.panels[0].cells, truth * (1 + turns)[:, None])
    (signs,) = written(picture)
    for turn in (0, 1):
        shown = signs[..., 0] == mask.KINDS[1 + turn].text[0]
        expected = np.where(turns == turn, truth.sum(axis=1), 0)
        np.testing.assert_array_equal(shown.sum(axis=1), expected)
    leads = np.array([leader for _, leader in axis]) == np.arange(*layout)
    np.testing.assert_array_equal(signs[..., 1] == "L", np.diag(leads))
    np.testing.assert_array_equal(signs[..., 1] == "o", np.diag(~leads))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_window_shows_keys_stride_group_and_leader_of_its_query(seed, rank):
    layout, rule = random_rule(100 * rank + seed, rank, (40, 12, 7)[rank - 1])
    query = tuple(int(i) for i in np.random.default_rng(seed).integers(0, layout))
    picture = pictures.window(layout, **rule, query=query)
    truth = Neighborhood.of(rank, **rule).mask(layout)[query]
    np.testing.assert_array_equal(whole(picture).reshape(layout), truth)
    axes = groups_and_leaders(layout, rule)
    group, leader = zip(*(axis[i] for axis, i in zip(axes, query, strict=True)), strict=True)
    marks = np.zeros(layout, int)
    for token in np.ndindex(layout):
        of_token, _ = zip(*(axis[i] for axis, i in zip(axes, token, strict=True)), strict=True)
        marks[token] = of_token == group
    marks[leader] = 2
    marks[query] = 3
    np.testing.assert_array_equal(whole(picture, "marks").reshape(layout), marks)
    signs = np.stack(list(written(picture))).reshape(*layout, 2)
    assert np.count_nonzero(signs[..., 0] == seen.KINDS[1].text[0]) == truth.sum()
    np.testing.assert_array_equal(signs[..., 1] == "Q", marks == 3)
    np.testing.assert_array_equal(signs[..., 1] == "L", marks == 2)
    np.testing.assert_array_equal(signs[..., 1] == "o", marks == 1)
    assert f"sees {truth.sum()} of {truth.size} tokens" in picture.title


@pytest.mark.parametrize("seed", SEEDS)
def test_planes_of_a_deep_layout_that_look_the_same_are_drawn_once(seed):
    (depth, *plane), rule = random_rule(seed, 3, 5)
    deep = (depth + 9, *plane)
    picture = pictures.window(deep, **rule)
    middle = tuple(length // 2 for length in deep)
    truth = Neighborhood.of(3, **rule).mask(deep)[middle]
    shown = {}
    for panel in picture.panels:
        assert "…" not in panel.title  # few enough planes to be named one by one
        for run in panel.title.split(" ", 1)[1].split(", "):
            first, _, last = run.partition("–")
            shown |= dict.fromkeys(range(int(first), int(last or first) + 1), panel.cells)
    assert len({panel.cells.tobytes() + panel.marks.tobytes() for panel in picture.panels}) == len(
        picture.panels
    )
    for number, keys in enumerate(truth):
        np.testing.assert_array_equal(shown.get(number, np.zeros(plane)), keys)


# --- stride ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_strides_move_the_window_of_the_next_group_by_the_stride(stride):
    picture = pictures.strides((24, 24), window_size=8, strides=(1, 2, 4, 8))
    panel = picture.rows[0][(1, 2, 4, 8).index(stride)]
    one, both, following = (panel.cells == 1, panel.cells == 3, panel.cells == 2)
    assert one.sum() == following.sum() == 8 * stride and both.sum() == 8 * (8 - stride)
    assert (panel.marks == 1).sum() == (panel.marks == 2).sum() == stride**2
    left, right = (np.argwhere(panel.marks == n).min(axis=0) for n in (1, 2))
    assert (right - left).tolist() == [0, stride]
    # At stride = window the queries and their keys are the same tokens: blocks.
    assert (stride == 8) == np.array_equal(panel.marks == 1, one | both)
    frames = [(frame.left, frame.right - frame.left) for frame in panel.outlines]
    assert frames[1][0] - frames[0][0] == stride and frames[0][1] == frames[1][1] == 8


@pytest.mark.parametrize("seed", SEEDS)
def test_strides_show_two_neighbouring_groups_and_all_that_they_see(seed):
    layout, rule = random_rule(seed, 2, 14)
    compared = {name: values for name, values in rule.items() if name != "stride"}
    picture = pictures.strides(layout, **compared, strides=[rule["stride"]])
    above, below = picture.panels
    truth = Neighborhood.of(2, **rule).mask(layout)
    axes = groups_and_leaders(layout, rule)
    groups = []
    for number in (1, 2):
        tokens = np.argwhere(above.marks == number)
        if len(tokens):
            groups.append({(axes[0][y][0], axes[1][x][0]) for y, x in tokens})
            keys = truth[tuple(tokens.T)].any(axis=0)
            np.testing.assert_array_equal((above.cells & number) > 0, keys)
    assert all(len(group) == 1 for group in groups)  # tokens of one mark are one stride group
    if len(groups) == 2:
        ((rows, first),), ((other_rows, second),) = groups
        assert rows == other_rows and first[0] == second[0] and second[1] == first[1] + 1
    else:
        assert all(number == 0 for (_, number), _ in axes[1][:: rule["dilation"][1]])
    one_axis = {name: values[1] for name, values in rule.items()}
    np.testing.assert_array_equal(below.cells > 0, Neighborhood.of(1, **one_axis).mask(layout[1:]))


def test_strides_of_one_axis_are_masks_side_by_side():
    picture = pictures.strides(24, window_size=6, strides=(1, 3, 6), dilation=2)
    (row,) = picture.rows
    for panel, stride in zip(row, (1, 3, 6), strict=True):
        truth = Neighborhood.of(1, window_size=6, stride=stride, dilation=2).mask((24,))
        np.testing.assert_array_equal(panel.cells > 0, truth)
    assert "stride 6 = window" in row[-1].title


# --- tiles ----------------------------------------------------------------------------------------------------


def random_tiles(seed, layout, rule):
    rng = np.random.default_rng(1000 + seed)
    group = tuple(int(rng.integers(d)) for d in rule["dilation"])
    tokens = [len(range(r, n, d)) for r, n, d in zip(group, layout, rule["dilation"], strict=True)]
    q_tile, kv_tile = (tuple(int(t) for t in rng.integers(1, 6, len(layout))) for _ in range(2))
    q_start = tuple(
        int(rng.integers(0, -(-n // q)) * q) for n, q in zip(tokens, q_tile, strict=True)
    )
    return {"q_tile": q_tile, "kv_tile": kv_tile, "group": group}, q_start, tuple(tokens)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_tile_map_shows_what_the_plan_visits_masks_and_wastes(seed, rank):
    layout, rule = random_rule(200 * rank + seed, rank, (40, 14, 4)[rank - 1])
    tiles, q_start, tokens = random_tiles(seed, layout, rule)
    picture = pictures.tile_map(layout, **rule, **tiles, q_start=q_start)
    axes = zip(tiles["group"], layout, rule["dilation"], strict=True)
    grid = np.ix_(*(range(residue, length, step) for residue, length, step in axes))
    flat = np.arange(np.prod(layout)).reshape(layout)[grid].ravel()
    pairs = Neighborhood.of(rank, **rule).mask(layout).reshape(np.prod(layout), -1)
    pairs = pairs[np.ix_(flat, flat)].reshape(*tokens, *tokens)
    tile = tuple(slice(i, i + q) for i, q in zip(q_start, tiles["q_tile"], strict=True))
    by_any, by_all = (see(pairs[tile].reshape(-1, *tokens), axis=0) for see in (np.any, np.all))
    inside = tuple(slice(length) for length in tokens)
    (first_dynamic,) = (n for n, p in enumerate(picture.panels) if p.title.startswith("dynamic"))
    for dynamic, shown in enumerate(
        (picture.panels[:first_dynamic], picture.panels[first_dynamic:])
    ):
        plan = QueryTilePlan(
            Neighborhood.of(rank, **rule), layout, q_start=q_start, dynamic=bool(dynamic), **tiles
        )
        volume = np.stack([panel.cells for panel in shown])
        cells = volume.reshape(volume.shape[3 - rank :])
        count = {name: np.count_nonzero(cells == getattr(tile_walk, name)) for name in KIND_NAMES}
        of_tile = np.prod(tiles["kv_tile"])
        assert count["FULL"] + count["SHELL"] + count["WASTED"] + count["PADDING"] == (
            plan.num_visits * of_tile
        )
        real = cells[inside]
        assert count["PADDING"] == count_tokens(cells) - count_tokens(real)
        assert plan.num_full * of_tile >= count["FULL"]
        # What is drawn without a mask needs none, what is wasted is seen by no query, and nothing seen is left out.
        assert by_all[real == tile_walk.FULL].all()
        assert not by_any[real == tile_walk.WASTED].any()
        assert by_any[real == tile_walk.SHELL].all()
        np.testing.assert_array_equal(np.isin(real, (tile_walk.FULL, tile_walk.SHELL)), by_any)
        for start, is_full in plan.visits():
            box = tuple(slice(i, i + kv) for i, kv in zip(start, tiles["kv_tile"], strict=True))
            assert (cells[inside][box] == tile_walk.FULL).all() == is_full
        marks = np.stack([panel.marks for panel in shown]).reshape(cells.shape)
        expected = np.zeros(cells.shape, int)
        expected[inside][tile] = 1
        np.testing.assert_array_equal(marks > 0, expected)
        np.testing.assert_array_equal(marks == 2, expected * (cells == tile_walk.FULL))
        assert f"{plan.num_visits} tiles, {plan.num_full} without mask" in shown[0].title


KIND_NAMES = ("FULL", "SHELL", "WASTED", "PADDING")


def count_tokens(cells):
    return np.count_nonzero(np.isin(cells, [getattr(tile_walk, name) for name in KIND_NAMES]))


def test_tile_map_in_a_terminal_counts_the_same():
    picture = pictures.tile_map((44, 50), window_size=20, stride=4, q_tile=8, kv_tile=8, q_start=40)
    for panel, signs in zip(picture.panels, written(picture), strict=True):
        for number, kind in enumerate(tile_walk.KINDS):
            expected = np.count_nonzero(panel.cells == number)
            assert np.count_nonzero(signs[..., 0] == kind.text[0]) == expected
        assert {sign for sign in signs[panel.marks == 1, 1]} <= {"o"}
        assert {sign for sign in signs[panel.marks == 2, 1]} <= {"O"}
    assert "12 tiles, 9 without mask, 48% wasted" in picture.panels[0].title
    assert "9 tiles, 9 without mask, 31% wasted" in picture.panels[1].title


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS[:8])
def test_work_map_counts_the_visits_of_every_q_tile(seed, rank):
    layout, rule = random_rule(300 * rank + seed, rank, (40, 14, 7)[rank - 1])
    tiles, _, tokens = random_tiles(seed, layout, rule)
    tiles["q_tile"] = (tokens[0], *tiles["q_tile"][1:]) if rank == 3 else tiles["q_tile"]
    picture = pictures.work_map(layout, **rule, **tiles)
    assert len(picture.panels) == 2  # one plane of Q tiles each
    for panel, dynamic in zip(picture.panels, (False, True), strict=True):
        starts = [range(0, n, q) for n, q in zip(tokens, tiles["q_tile"], strict=True)]
        visits = np.array(
            [
                QueryTilePlan(
                    Neighborhood.of(rank, **rule), layout, q_start=start, dynamic=dynamic, **tiles
                ).num_visits
                for start in itertools.product(*starts)
            ]
        ).reshape([len(axis) for axis in starts][-2:])
        np.testing.assert_array_equal(panel.cells, np.atleast_2d(visits))
        assert f"mean {visits.mean():.1f}, most {visits.max()} tiles" in panel.title
        alone = dataclasses.replace(picture, rows=((panel,),)).text(1000).plain.split("\n")
        table = alone[2 + len(panel.title.splitlines()) :][: len(panel.cells)]
        assert [int(n) for n in " ".join(table).split()] == visits.ravel().tolist()


def test_work_map_without_room_for_numbers_is_shaded_and_says_what_shades_mean():
    picture = pictures.work_map(4096, window_size=512, q_tile=64, kv_tile=64)
    text = picture.text(80).plain
    assert max(map(len, text.split("\n"))) <= 80
    static = text.split("\n")[3]
    assert len(static) == 64 and set(static) <= set(tile_work.SHADES)
    (cells,) = picture.panels[0].cells
    assert (np.array(list(static)) == tile_work.SHADES[-1]).sum() == (cells == cells.max()).sum()
    # Dynamic tiles, below, are all 8 or fewer, of the first shade.
    assert f"\n{tile_work.SHADES[0]} 8   {tile_work.SHADES[-1]} 9   KV tiles" in text


# --- speedup --------------------------------------------------------------------------------------------------


def test_speedups_come_from_the_simulator():
    rule = {"window_size": (18, 24, 24), "q_tile": (4, 8, 8), "kv_tile": (2, 8, 8)}
    points = pictures.simulated_speedups((30, 48, 80), **rule, strides=[1, (16, 8, 8)])
    for point, stride in zip(points, [(1, 1, 1), (16, 8, 8)], strict=True):
        simulation = simulate((30, 48, 80), **rule, stride=stride)
        assert point == pictures.SpeedupPoint(
            stride=stride,
            flop=simulation.flop_speedup,
            worst_tile=simulation.worst_tile_speedup,
            total_work=simulation.total_work_speedup,
        )
    # The paper's printed 3.3x and 11.1x.
    assert [round(point.worst_tile, 1) for point in points] == [3.3, 11.1]


def test_speedup_curve_draws_and_writes_its_points():
    rng = np.random.default_rng(5)
    values = np.sort(rng.uniform(1, 20, (6, 3)))
    points = [
        pictures.SpeedupPoint((1, n + 1), flop, worst_tile, total_work)
        for n, (worst_tile, total_work, flop) in enumerate(values)
    ]
    picture = pictures.speedup_curve(points, "random")
    (ax,) = picture.figure().axes
    heights = {tuple(line.get_ydata()[1:-1].tolist()) for line in ax.lines}
    assert heights == {tuple(column.tolist()) for column in values.T}
    lines = picture.text(100).plain.split("\n")[2:14]
    for n, point in enumerate(points):
        total_work, worst_tile = lines[2 * n : 2 * n + 2]
        assert total_work.startswith(f"1x{n + 1} ") and total_work.endswith(
            f"{point.total_work:.2f}x"
        )
        assert worst_tile.endswith(f" {point.worst_tile:.2f}x")
        bars = total_work.count("▒") / worst_tile.count("█")
        assert bars == pytest.approx(point.total_work / point.worst_tile, rel=0.35)
        assert total_work.index("|") == worst_tile.index("|") or total_work.count("|") == 0
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("cut", [(1, 3), (4, 1), (2, 3)])
def test_shards_show_the_keys_that_arrive_and_the_queries_that_wait(cut):
    rng = np.random.default_rng(cut)
    layout = (12, 15)
    window = rng.integers(2, 8, 2).tolist()
    rule = {"window_size": window, "stride": [int(rng.integers(1, w + 1)) for w in window]}
    see = Neighborhood.of(2, **rule).mask(layout)
    rows = [length // count for length, count in zip(layout, cut, strict=True)]
    own = {
        place: tuple(slice(n * r, (n + 1) * r) for n, r in zip(place, rows, strict=True))
        for place in itertools.product(*map(range, cut))
    }
    # Needed by all shards: a query is interior if it needs no other shard, whichever shard it is in.
    inside = np.ones(rows, bool)
    for box in own.values():
        others = see[box].copy()
        others[:, :, *box] = False
        inside &= ~others.any(axis=(2, 3))
    for place, box in own.items():
        (panel,) = pictures.shards(layout, **rule, cuts=[cut], shard=place).panels
        seen_by_any = see[box].any(axis=(0, 1))
        assert np.array_equal(panel.cells[box] == shard_halo.INTERIOR, inside)
        assert (panel.cells[box] >= shard_halo.BORDER).all()
        outside = np.ones(layout, bool)
        outside[box] = False
        assert np.array_equal((panel.cells == shard_halo.HALO)[outside], seen_by_any[outside])
        keys, queries = np.count_nonzero(seen_by_any & outside), math.prod(rows)
        assert panel.title == f"{cut[0]}x{cut[1]} shards: {keys} keys for {queries} queries"


# --- figures, files, terminals --------------------------------------------------------------------------------


def test_figures_show_the_same_cells_as_the_panels():
    rule = {"window_size": (3, 5, 4), "stride": (1, 2, 4), "dilation": (2, 1, 1)}
    tiles = {"q_tile": (2, 4, 4), "kv_tile": (1, 4, 4)}
    for picture in (
        pictures.mask_1d(20, window_size=6, stride=3),
        pictures.window((6, 9, 8), **rule),
        pictures.strides((12, 12), window_size=4, strides=(1, 4)),
        pictures.shards((6, 9, 8), **rule, cuts=((2, 3, 1),)),
        pictures.tile_map((6, 9, 8), **rule, **tiles),
        pictures.work_map((6, 9, 8), **rule, **tiles),
    ):
        images = [np.asarray(ax.images[0].get_array()) for ax in picture.figure().axes if ax.images]
        assert len(images) == len(picture.panels)
        for image, panel in zip(images, picture.panels, strict=True):
            np.testing.assert_array_equal(image, panel.cells)


def test_cells_and_marks_have_the_colours_of_their_kinds(tmp_path):
    from PIL import Image

    picture = pictures.mask_1d(8, window_size=4, stride=4)
    picture.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as file:
        image = file.convert("RGB")
    colours = {colour: count for count, colour in image.getcolors(2**24)}

    def pixels(colour):
        red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
        close = [c for c in colours if max(map(abs, np.subtract(c, (red, green, blue)))) <= 2]
        return sum(colours[c] for c in close)

    # Two blocks of 16 cells each, less the discs of four queries, of which one is the leader.
    blue, orange = (pixels(kind.colour) for kind in mask.KINDS[1:])
    assert blue == pytest.approx(orange, rel=0.05)
    query, next_query = (pixels(mark.colour) for mark in mask.MARKS[:2])
    assert query == pytest.approx(next_query, rel=0.4)  # the first also in the legend
    assert 6 * next_query < orange


@pytest.mark.parametrize(
    "module", [mask, seen, shard_halo, stride_groups, tile_walk], ids=lambda m: m.__name__
)
def test_without_colours_every_kind_and_mark_has_a_character_of_its_own(module):
    kinds = [kind.text[0] for kind in module.KINDS]
    marks = {mark.character for mark in getattr(module, "MARKS", ())}
    assert len(set(kinds)) == len(kinds) and not marks & set(kinds)
    assert all(len(kind.text) == 2 for kind in module.KINDS)


def test_a_terminal_picture_fits_its_width_or_says_so():
    picture = pictures.strides((24, 24), window_size=8, strides=(1, 2, 4, 8))
    for width in (30, 52, 80, 110, 200, 300):
        assert max(map(len, picture.text(width).plain.split("\n"))) <= width
    with pytest.raises(ValueError, match="needs lines of 24 characters; got width=20; use a wider"):
        picture.text(20)
    curve = pictures.speedup_curve([pictures.SpeedupPoint((1,), 2.0, 1.0, 1.5)])
    with pytest.raises(ValueError, match="got width=20; use a wider terminal"):
        curve.text(20)


def test_rich_prints_a_picture_in_the_width_of_its_console():
    picture = pictures.window((6, 12, 30), window_size=(3, 5, 7))
    console = Console(width=70, record=True, file=io.StringIO())
    console.print(picture)
    lines = [line.rstrip() for line in console.export_text().rstrip().split("\n")]
    assert lines == [line.rstrip() for line in picture.text(70).plain.rstrip().split("\n")]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_files_are_the_same_every_time(tmp_path, suffix):
    files = [tmp_path / f"{n}{suffix}" for n in range(2)]
    for file in files:
        pictures.tile_map(24, window_size=8, q_tile=4, kv_tile=4).save(file)
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert b"<dc:date>" not in first and b"Matplotlib" not in first[:2000]


def test_files_hold_the_picture_in_characters_or_its_title(tmp_path):
    from PIL import Image

    for length in (30, 400):
        picture = pictures.mask_1d(length, window_size=8, stride=4)
        picture.save(tmp_path / "mask.png")
        with Image.open(tmp_path / "mask.png") as image:
            description = image.info["Description"]
        text = picture.text(1000).plain
        assert description == (text if length == 30 else picture.title)
        picture.save(tmp_path / "mask.svg")
        assert picture.title in (tmp_path / "mask.svg").read_text()


def test_another_file_type_is_refused(tmp_path):
    figure = pictures.mask_1d(4, window_size=2).figure()
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg; got path='.*mask\.pdf'"):
        pictures.save(figure, tmp_path / "mask.pdf")
    assert not list(tmp_path.iterdir())


def test_pictures_of_the_documentation_are_as_the_gallery_draws_them(tmp_path):
    from PIL import Image

    files = gallery.write_gallery(tmp_path)
    assert [file.stem for file in files] == list(gallery.PICTURES)
    for file in files:
        kept = ROOT / "docs/pictures" / file.name
        assert max(file.stat().st_size, kept.stat().st_size) < 150_000
        with Image.open(file) as new, Image.open(kept) as old:
            assert new.info["Description"] == old.info["Description"]
            # Other versions of matplotlib place letters a little differently.
            small = [np.asarray(image.convert("L").resize((60, 40)), int) for image in (new, old)]
        assert np.abs(small[0] - small[1]).mean() < 1


WITHOUT_MATPLOTLIB = """
import sys
from gna_jax import pictures
picture = pictures.strides(16, window_size=4, strides=(1, 4))
assert "stride 4 = window" in picture.text().plain
assert "matplotlib" not in sys.modules
import matplotlib
matplotlib.rcParams["font.size"] = 17.0
before = matplotlib.rcParams.copy()
figure = picture.figure()
picture.save(sys.argv[1])
assert matplotlib.rcParams.copy() == before and figure.get_suptitle()
assert "matplotlib.pyplot" not in sys.modules
sys.modules["matplotlib"] = sys.modules["matplotlib.style"] = None
for draw in (picture.figure, lambda: pictures.save(figure, "x.png")):
    try:
        draw()
    except RuntimeError as error:
        assert "not installed: pip install gna-jax[draw]" in str(error)
    else:
        raise AssertionError
assert "stride 4 = window" in picture.text().plain
print("done")
"""


def test_figures_leave_matplotlib_as_it_was_and_terminals_do_without(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_MATPLOTLIB, tmp_path / "picture.png"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


# --- what cannot be drawn -------------------------------------------------------------------------------------

TILES = {"q_tile": 2, "kv_tile": 2}


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: pictures.mask_1d(513, window_size=3), "at most 512 tokens along a side.*got 513"),
        (lambda: pictures.window((4, 1024), window_size=3), "got 4x1024 tokens; divide layout"),
        (lambda: pictures.window((64, 512, 512), window_size=3), "4194304 in all"),
        (lambda: pictures.window((4, 4), window_size=3, query=(1, 4)), "query must lie inside"),
        (lambda: pictures.window((4,) * 4, window_size=3), "one to three axes; got layout="),
        (lambda: pictures.window((4, 4), window_size=5), "window_size must not exceed the layout"),
        (lambda: pictures.strides((8, 8), window_size=4, strides=()), "at least one stride"),
        (lambda: pictures.strides((8, 8, 8), window_size=4, strides=(1,)), "one or two axes"),
        (lambda: pictures.strides(65, window_size=4, strides=(1,)), "at most 64 tokens along"),
        (lambda: pictures.strides(8, window_size=4, strides=(5,)), "stride must not exceed"),
        (lambda: pictures.tile_map(600, window_size=4, **TILES), "got 600 tokens"),
        (lambda: pictures.tile_map(8, window_size=4, q_tile=2, kv_tile=999), "got 999 tokens"),
        (lambda: pictures.tile_map(8, window_size=4, **TILES, q_start=8), "q_start must lie"),
        (lambda: pictures.tile_map(8, window_size=4, **TILES, group=1), "group must hold"),
        (lambda: pictures.tile_map(8, window_size=4, q_tile=0, kv_tile=2), "q_tile must be"),
        (lambda: pictures.work_map(2000, window_size=4, **TILES), "512 Q tiles along a side"),
        (lambda: pictures.work_map(8, window_size=4, q_tile=2, kv_tile=0), "kv_tile must be"),
        (lambda: pictures.shards((8, 6), window_size=3, cuts=()), "at least one number of shards"),
        (lambda: pictures.shards((8, 6), window_size=3, cuts=[(3, 1)]), "cut it into 1, 2, 4, 8"),
        (lambda: pictures.shards(8, window_size=3, cuts=[2], shard=2), "shard must lie inside"),
        (lambda: pictures.speedup_curve([]), "at least one stride's speedups; got none"),
    ],
)
def test_what_cannot_be_drawn_says_why(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_more_planes_than_a_person_can_compare_are_refused():
    panel = pictures.mask_1d(4, window_size=2).panels[0]
    with pytest.raises(ValueError, match="at most 24 panels; got 25 different planes"):
        panels.rows_of([panel] * 25)
    assert [len(row) for row in panels.rows_of([panel] * 9)] == [3, 3, 3]


def test_traced_and_fractional_sizes_are_type_errors():
    with pytest.raises(TypeError, match="window_size must be an integer"):
        pictures.mask_1d(8, window_size=2.5)
    with pytest.raises(TypeError, match="layout must be an integer"):
        pictures.window("16", window_size=1)


def test_colours_differ_in_lightness():
    def lightness(colour):
        red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    ramp = [lightness(colour) for colour in palette.RAMP]
    assert ramp == sorted(ramp, reverse=True)
    tiles = sorted(lightness(kind.colour) for kind in tile_walk.KINDS)
    assert np.diff(tiles).min() > 8
    assert palette.tint("#000000", 0.0) == "#ffffff" and palette.tint("#123456", 1.0) == "#123456"
