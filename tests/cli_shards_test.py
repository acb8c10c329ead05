"""`gna-jax simulate --shards` and `--plan`: their numbers are the library's, they fit a terminal, and bad cuts end with one line."""

import json
import pathlib

import pytest
from typer.testing import CliRunner

from gna_jax.cli import app
from gna_jax.cli.shard_report import size
from gna_jax.neighborhood import Neighborhood, by
from gna_jax.simulator import PRESETS, best_tiles
from gna_jax.simulator.estimate import Setting
from gna_jax.simulator.shard_times import estimate_shards


def run(*arguments, width=80):
    """Exit code, standard output, and standard error as one line without the frame drawn around it."""
    environment = {"COLUMNS": str(width), "NO_COLOR": "1"}
    result = CliRunner().invoke(app, ["simulate", *arguments], env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.replace("│", "").split())


def cuts_of(text):
    """The cuts of `--json`."""
    code, out, error = run(*text.split(), "--json")
    assert (code, error) == (0, "")
    return json.loads(out)["cuts"]


def test_one_cut_is_the_librarys_estimate():
    (row,) = cuts_of("256x256 -w 32 -s 8 --shards 8 --axis 1 --device h100 --heads 4 -b 2")
    rule = Neighborhood.of(2, window_size=32, stride=8)
    tiles = best_tiles(rule, (256, 256), 128, 128, dynamic=True)
    setting = Setting("h100", batch=2, heads=4, kv_heads=4)
    one = estimate_shards(rule, (256, 256), (1, 8), tiles, setting)
    assert row["shards"] == [1, 8] and row["halo"]["forward_total"] == one.halo.forward_total
    assert [times["seconds"] for times in row["links"]] == [times.seconds for times in one.links]
    assert row["ulysses"] is None and row["interior_share"] == one.interior_share


def test_a_number_of_devices_is_cut_in_every_way_fastest_first():
    rows = cuts_of("64x64 -w 16 --shards 8 --device h100")
    assert sorted(row["shards"] for row in rows) == [[1, 8], [2, 4], [4, 2], [8, 1]]
    seconds = [row["links"][0]["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    rows = cuts_of("16x64x64 -w 8 --shards 4x2,8 --axis 1,2 --device h100")
    assert rows[0]["shards"] == [1, 4, 2]
    assert rows[1]["devices"] == 8 and rows[1]["shards"][0] == 1


def test_a_plan_doubles_the_devices_and_takes_the_fastest_cut():
    rows = cuts_of("-p hunyuan-91 --plan")
    assert [row["devices"] for row in rows] == [2, 4, 8, 16, 32, 64, 128, 256, 512]
    (best, *_) = cuts_of("-p hunyuan-91 --shards 8")
    assert rows[2] == best
    # The fastest of the preset's rules on one device; any by its stride.
    (named,) = cuts_of("-p hunyuan-91 -s 16x8x8 --shards 2x2x2")
    assert named == next(
        row for row in cuts_of("-p hunyuan-91 --shards 8") if row["shards"] == [2, 2, 2]
    )


QUICK = "hunyuan-91", "cosmos-predict2-2b"


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS],
)
def test_every_preset_is_planned_in_80_columns(name):
    code, out, error = run("-p", name, "--plan")
    assert (code, error) == (0, "")
    heading, table = out.split("\n\n", 1)
    assert PRESETS[name].title in heading and "predicted, not measured" in heading
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table
    most = max(PRESETS[name].rules, key=lambda rule: len(rule.layers)).neighborhood
    assert f"window {by(most.window_size)}, stride" in heading


def test_the_page_shows_what_the_command_prints():
    page = (pathlib.Path(__file__).parents[1] / "docs/sharding.md").read_text()
    _, out, _ = run("-p", "hunyuan-91", "--plan")
    rows = [line.strip() for line in out.splitlines() if " ms " in line or "GB" in line]
    shown = [line.strip() for line in page.splitlines()]
    assert len(rows) == 18 and not set(rows) - set(shown)


def test_one_cut_in_full_fits_80_columns():
    code, out, _ = run(*"-p flux-4k --shards 4x2".split())
    assert code == 0 and max(map(len, out.split("\n\n", 1)[1].splitlines())) <= 80
    for word in ("halo exchange", "ring attention", "Ulysses", "NVLink 5", "XDR", "overlapped"):
        assert word in out
    assert "devices must be" not in out
    _, out, _ = run(*"-p flux-4k --shards 4x4".split())
    assert "devices must be 1, 2, 3, 4, 6, 8, 12, 24" in " ".join(out.split())


def test_sizes_for_people():
    sizes = {0: "0 B", 999: "999 B", 999_600: "1 MB", 678_297_600: "678 MB", 1.2e12: "1,200 GB"}
    assert {number: size(int(number)) for number in sizes} == sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-p hunyuan-91 --shards 8 --axis 0", "cut it into 1, 2, 3, 5, 6, 10, 15, 30"),
        ("-p hunyuan-91 --shards 7", "got 7 devices for layout 30x48x80; devices may be 1, 2, 3"),
        ("-p hunyuan-91 --shards 7 --axis 0,1", "for layout 30x48x80 along axis 0, 1; devices may"),
        ("27x27 -w 3 --plan", "got 2, 4, 8 .. devices for layout 27x27; devices may be 1, 3, 9"),
        ("64x64 -w 3 --shards 4x2x2", "a number of devices, or one number per axis; got '4x2x2'"),
        ("64x64 -w 3 --shards 4x0", "shards must be at least 1 on every axis; got shards 4x0"),
        ("64x64 -w 3 --shards many", "--shards must be integers joined by x"),
        ("64x64 -w 3 --shards 4 --axis 2", "different axes from 0 to 1; got '2' for layout 64x64"),
        ("64x64 -w 3 --axis 0", "--axis says what --shards or --plan cut; got --axis 0 alone"),
        ("64x64 -w 3 --plan --shards 4", "--plan chooses the numbers of devices itself"),
        ("64x64 --shards 4", "name its --window, and at most one --stride; got --window None"),
        ("64x64 -w 3 -s 1 -s 2 --plan", "got --window 3, --stride 1, 2"),
        ("64x64 -w 3 --shards 4 --device cpu", "shards are planned for the devices ['a100'"),
    ],
)
def test_bad_cuts_end_with_code_2_and_say_what_is_legal(arguments, message):
    code, out, error = run(*arguments.split())
    assert (code, out) == (2, "")
    assert message in error
