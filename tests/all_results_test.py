"""The page of `make test-all`: what is counted, and what the committed page says."""

import pathlib

import all_results

REPORT = """<testsuites><testsuite timestamp="2026-11-0{day}T10:00:00">
<testcase classname="tests.b_test" name="one[1]" time="1.5"/>
<testcase classname="tests.b_test" name="two" time="0.5"><failure message="x"/></testcase>
<testcase classname="tests.a_test" name="three" time="2"><skipped/></testcase>
{more}</testsuite></testsuites>"""


def test_reports_are_joined(tmp_path):
    first, second = tmp_path / "first.xml", tmp_path / "second.xml"
    first.write_text(REPORT.format(day=1, more=""))
    again = '<testcase classname="tests.b_test" name="two" time="4"/>'
    second.write_text(REPORT.format(day=2, more=again))
    assert "| `b_test.py` | 1 | 1 | 0 | 2 |" in all_results.text([first])
    page = all_results.text([first, second])
    assert "2026-11-01 to 2026-11-02" in page
    assert page.index("a_test") < page.index("b_test")
    assert "| `a_test.py` | 0 | 0 | 1 | 2 |" in page
    assert "| `b_test.py` | 2 | 0 | 0 | 6 |" in page
    assert page.endswith("| all | 2 | 0 | 1 | 8 |\n")


def test_the_committed_page_has_no_failure():
    page = pathlib.Path(all_results.__file__).with_suffix(".md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    assert rows and all(int(row[2]) == 0 for row in rows)
