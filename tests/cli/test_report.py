"""`iql-plugins report`: what the page says of runs, and how it looks in a browser."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import short_pendulum  # noqa: F401 - registers the environment
from browser import Page, browser
from requirements import browser_program

from iql_plugins import read_dataset
from iql_plugins.cli import main, report, training
from iql_plugins.cli.figures import THEME, Line
from iql_plugins.cli.statistics import Curve, estimate, metric_curve, return_curve

ENV = "short_pendulum:ShortPendulum-v0"
#: Small, so that a run takes no second.
TINY = [
    *("--n-steps", "40", "--hidden-sizes", "8", "--batch-size", "16", "--evaluate-every", "10", "--log-every", "5"),
    *("--episodes", "2", "--evaluation-episodes", "2", "--workers", "1", "--compile", "no"),
]
#: Names that are markup, and what matplotlib takes for mathematics.
HOSTILE, MATHEMATICS = "<img src=x onerror=alert(1)> & 'b\"", "$x_1$ {{ 7 * 7 }}"
FILM = b"\0\0\0\x18ftypmp42"

Report = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs: one with a baseline and a film, one without, one that was stopped, and one without an environment."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    ends = np.tile([0.0] * 9 + [1.0], 10)
    columns = {
        "observations": random.normal(size=(100, 3)).astype(np.float32),
        "next_observations": random.normal(size=(100, 3)).astype(np.float32),
        "actions": random.uniform(-1, 1, size=(100, 1)).astype(np.float32),
        "rewards": random.normal(size=100).astype(np.float32),
        "terminals": ends,
        "timeouts": 0.0 * ends,
    }
    np.savez(folder / "plain.npz", **columns)
    sha256 = read_dataset(folder / "plain.npz").sha256
    metadata = {"recipe": f"<b>{MATHEMATICS}", "versions": {"numpy": "2"}, "sha256": sha256}
    np.savez(folder / "data.npz", **columns, metadata=np.array(json.dumps(metadata)))  # type: ignore[arg-type]
    data = ["--dataset", str(folder / "data.npz"), *TINY]
    first = ["train", *data, "--env", ENV, "--seeds", "2"]
    assert main([*first, "--run-dir", str(folder / HOSTILE)]) == 0
    (folder / HOSTILE / "film.mp4").write_bytes(FILM)
    second = ["train", *data, "--env", ENV, "--baseline", "none", "--expectile", "0.9"]
    assert main([*second, "--run-dir", str(folder / MATHEMATICS)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(35, patch)
        assert main([*second, "--run-dir", str(folder / "stopped")]) == 130
    assert main(["train", *data, "--baseline", "none", "--run-dir", str(folder / "blind")]) == 0
    return folder


def stop_after(wanted: int, patch: pytest.MonkeyPatch) -> None:
    """Makes trainings end with Ctrl-C after a gradient step."""
    after_step = training._Trainer.after_step

    def interrupted(self: Any, step: int) -> None:
        after_step(self, step)
        if step == wanted:
            raise KeyboardInterrupt

    patch.setattr(training._Trainer, "after_step", interrupted)


@pytest.fixture
def reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Report:
    """The document that is printed, and the page."""

    def call(*runs: Path | str) -> tuple[dict[str, Any], str]:
        capfd.readouterr()
        output = tmp_path / "report.html"
        assert main(["report", *map(str, runs), "-o", str(output), "--json"]) == 0
        return json.loads(capfd.readouterr().out), output.read_text()

    return call


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that is said of runs that make no report."""

    def call(*arguments: Path | str) -> str:
        before = sorted(tmp_path.rglob("*.html"))
        capfd.readouterr()
        assert main(["report", *map(str, arguments), "--json"]) == 2
        assert sorted(tmp_path.rglob("*.html")) == before
        error: str = json.loads(capfd.readouterr().out)["error"]
        assert "\n" not in error
        return error

    return call


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A run that a test may spoil."""
    return Path(shutil.copytree(folder / MATHEMATICS, tmp_path / "copied"))


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def words(page: str) -> str:
    """What people read of a page."""
    text = re.sub(r"<style>.*?</style>|<(br|small|td|th|dt|dd|p|li|h\d)[ >]", r" \g<0>", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]*>", "", text, flags=re.DOTALL)).split())


# What it says


def test_a_report_says_what_the_runs_came_to(folder: Path, reported: Report) -> None:
    document, page = reported(folder / HOSTILE, folder / MATHEMATICS)
    assert [(run["finished"], run["steps"], run["n_steps"]) for run in document["runs"]] == [(True, 40, 40)] * 2
    text = words(page)
    for name in (HOSTILE, MATHEMATICS):
        results = json.loads((folder / name / "results.json").read_text())["results"]
        assert len(results) == (4 if name == HOSTILE else 3)
        for result in results.values():
            mean, low, high = (f"{value:,.1f}" for value in (result["mean_return"], *result["confidence_95"]))
            assert f"{mean} {low} to {high}".replace("-", "−") in text
        for warning in json.loads((folder / name / "results.json").read_text())["warnings"]:
            assert warning["message"] in text
    assert "expectile 0.7 0.9" in text
    # What is the same is in the fold alone.
    assert text.count("batch_size 16 16") == 1
    for metric in ("loss_qvalue", "mean_value", "effective_sample_size"):
        assert text.count(metric) >= 2


def test_names_are_text_whatever_is_in_them(folder: Path, reported: Report) -> None:
    _, page = reported(folder / HOSTILE, folder / MATHEMATICS)
    assert "<img" not in page
    assert "<script" not in page
    text = words(page)
    assert HOSTILE in text
    assert f"recipe <b>{MATHEMATICS} versions.numpy 2" in text


@pytest.mark.slow
def test_the_same_runs_make_the_same_bytes(folder: Path, reported: Report, tmp_path: Path) -> None:
    runs = [folder / HOSTILE, folder / MATHEMATICS]
    _, page = reported(*runs)
    other = tmp_path / "again.html"
    subprocess.run([sys.executable, "-m", "iql_plugins.cli", "report", *runs, "-o", other], check=True)
    assert other.read_text() == page


def test_data_are_described_once_with_the_runs_that_took_them(folder: Path, copied: Path, reported: Report) -> None:
    described = json.loads((folder / MATHEMATICS / "config.json").read_text())["data"]
    assert described["provenance"]["recipe"] == f"<b>{MATHEMATICS}"
    returns = described["returns"]
    text = words(reported(folder / HOSTILE, folder / MATHEMATICS)[1])
    assert text.count("SHA-256 of the content") == 1
    line = f"Episodes 10 Return {returns['mean']:.1f} ({returns['min']:.1f} to {returns['max']:.1f})"
    assert line.replace("-", "−") in text
    assert "of other data" not in text
    changed(copied / "config.json", lambda document: document["settings"].update(dataset_sha256="0" * 64))
    text = words(reported(folder / HOSTILE, copied)[1])
    assert text.count("SHA-256 of the content") == 2
    assert "of other data: the SHA-256 there is another one" in text


def test_returns_of_different_environments_stand_apart(folder: Path, reported: Report) -> None:
    text = words(reported(folder / HOSTILE, folder / "blind")[1])
    assert f"Returns in {ENV}" in text
    assert "No policy was evaluated" in text


def test_a_run_that_is_unfinished_is_shown_as_that(folder: Path, reported: Report, tmp_path: Path) -> None:
    stopped = Path(shutil.copytree(folder / "stopped", tmp_path / "stopped"))
    document, page = reported(folder / HOSTILE, stopped)
    assert document["runs"][1] == {"run": str(stopped), "finished": False, "steps": 30, "n_steps": 40}
    assert "unfinished: 30 of 40 steps" in words(page)
    # Rows beyond the checkpoint are trained again: whether they are there does not matter.
    path = stopped / "metrics.csv"
    rows = path.read_text().splitlines(keepends=True)
    assert len(rows) == 8
    for lines in (rows[:7], [*rows, "40,1e9"]):
        path.write_text("".join(lines))
        assert reported(folder / HOSTILE, stopped)[1] == page
    (stopped / "checkpoint.safetensors").unlink()
    document, page = reported(stopped)
    assert document["runs"][0]["steps"] == 0
    assert "No evaluation has been made yet" in words(page)


def test_a_run_that_stopped_among_its_seeds_says_which_the_curve_is_of(
    folder: Path, reported: Report, tmp_path: Path
) -> None:
    command = ["train", "--dataset", str(folder / "data.npz"), *TINY, "--env", ENV, "--seeds", "2", "--stack", "1"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(25, patch)
        assert main([*command, "--run-dir", str(tmp_path / "among")]) == 130
    text = words(reported(tmp_path / "among")[1])
    assert "unfinished: 0 to 20 of 40 steps" in text
    assert "among, IQL: so far 1 of 2 seeds." in text
    assert "What the data return" in text
    assert "Final results" not in text
    assert "so far" not in words(reported(folder / HOSTILE)[1])


def test_a_run_without_an_environment_does_not_speak_of_returns_that_it_has_not(folder: Path, reported: Report) -> None:
    text = words(reported(folder / "blind")[1])
    assert "neither the command line nor the dataset named an environment that could be made" in text
    assert "What the data return Mean return with a 95% interval." in text
    assert "There were no returns to look at." in text
    text = words(reported(folder / "blind", folder / HOSTILE)[1])
    assert "There were no returns to look at in blind." in text
    assert "Final results Mean return with a 95% interval; that of a policy is of other episodes" in text


def test_a_run_that_goes_on_to_another_end_is_unfinished(copied: Path, reported: Report) -> None:
    changed(copied / "config.json", lambda document: document["settings"]["hyperparameters"].update(n_steps=80))
    document, page = reported(copied)
    assert document["runs"] == [{"run": str(copied), "finished": False, "steps": 40, "n_steps": 80}]
    assert "unfinished: 40 of 80 steps" in words(page)


def test_runs_of_earlier_releases_are_read(copied: Path, reported: Report) -> None:
    changed(copied / "config.json", lambda document: document.pop("data"))
    changed(copied / "results.json", lambda document: (document.pop("warnings"), document.pop("command")))
    document, page = reported(copied)
    assert document["runs"][0]["finished"]
    assert "does not say how it was made" in words(page)
    assert "were not looked for in copied" in words(page)


def test_what_is_known_of_data_outlives_an_interruption(folder: Path, tmp_path: Path) -> None:
    stopped = Path(shutil.copytree(folder / "stopped", tmp_path / "stopped"))
    described = json.loads((stopped / "config.json").read_text())["data"]
    # The same content, which does not say where it comes from.
    resume = ["train", "--resume", str(stopped), "--env", ENV, "--dataset", str(folder / "plain.npz")]
    assert main(resume) == 0
    assert json.loads((stopped / "config.json").read_text())["data"] == described


def test_films_are_in_the_page_while_there_is_room(
    folder: Path, reported: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, page = reported(folder / HOSTILE)
    assert 'src="data:video/mp4;base64,AAAAGGZ0eXBtcDQy"' in page
    monkeypatch.setattr(report, "MOST_VIDEO_BYTES", len(FILM) - 1)
    _, page = reported(folder / HOSTILE)
    assert "<video" not in page
    (link,) = re.findall(r'<a href="([^"]+)">film.mp4</a>', page)
    assert link.endswith("/%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E%20%26%20%27b%22/film.mp4")


def test_films_of_each_seed_are_in_the_page(folder: Path, reported: Report, tmp_path: Path) -> None:
    several = Path(shutil.copytree(folder / HOSTILE, tmp_path / "several"))
    for place in ("seed-0", "seed-1", "seed-1/bc"):
        (several / place / "film.mp4").write_bytes(FILM)
    _, page = reported(several)
    films = re.findall(r"<figcaption>several: (\S+\.mp4)</figcaption>", page)
    assert films == ["film.mp4", "seed-0/film.mp4", "seed-1/bc/film.mp4", "seed-1/film.mp4"]


def test_what_is_no_run_is_one_line(folder: Path, copied: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "which runs?" in refused()
    assert "'nowhere' is no run directory" in refused("nowhere")
    assert "config.json: a run directory has it" in refused(tmp_path)
    assert "the same run, give it once" in refused(copied, f"{copied}/")
    assert "--output must be a .html file" in refused(copied, "-o", "report.pdf")
    assert "there is no folder" in refused(copied, "-o", tmp_path / "nowhere" / "report.html")
    for name, text, words in (
        ("results.json", '{"n_steps": 40, "episodes": 2}', "has no results of a run: KeyError"),
        ("metrics.csv", "step,a\n1,x\n", "is damaged in line 2"),
        ("config.json", (copied / "config.json").read_text().replace('"episodes": 10', '"episodes": []'),
         "describes no data"),
    ):  # fmt: skip
        before = (copied / name).read_bytes()
        (copied / name).write_text(text)
        assert words in refused(copied)
        (copied / name).write_bytes(before)


# Curves


def test_curves_are_where_all_seeds_were_measured() -> None:
    by_seed = [[(10, [1.0, 3.0]), (20, [5.0, 7.0, 9.0])], [(20, [1.0, 3.0]), (30, [0.0])]]
    curve = return_curve(by_seed)
    expected = estimate([[5.0, 7.0], [1.0, 3.0]])
    assert curve == Curve([20], [4.0], [expected.low], [expected.high])
    rows = [[{"step": step, "a": float(step + seed)} for step in range(100)] for seed in (0, 2)]
    curve = metric_curve([rows[0], rows[1][:-1]], "a")
    assert (len(curve.steps), curve.steps[-1]) == (50, 98)
    assert (curve.mean[0], curve.low[0], curve.high[0]) == (1.5, 0.5, 2.5)
    assert metric_curve([[], rows[0]], "a").steps == []


def test_runs_are_told_apart_by_marker_and_colour() -> None:
    styles = [Line(Curve([], [], [], []), run).style for run in range(42)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 42
    assert len({style["marker"] for style in styles[:7]}) == 7


# In a browser


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser(browser_program()) as page:
        yield page


@pytest.fixture(scope="module")
def written(folder: Path) -> Path:
    """A page with everything that there can be on one."""
    runs = [str(folder / name) for name in (HOSTILE, MATHEMATICS, "stopped", "blind")]
    assert main(["report", *runs, "-o", str(folder / "report.html")]) == 0
    return folder / "report.html"


#: What is wrong with the page that is open: texts whose contrast to what is behind them is below 4.5, and the like.
PROBLEMS = """(() => {
    const found = []
    const numbers = color => color.match(/[\\d.]+/g).map(Number)
    const luminance = color => numbers(color).slice(0, 3)
        .map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0)
    const ground = element => {
        for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor
            if ((numbers(color)[3] ?? 1) > 0) return color
        }
        return 'rgb(255, 255, 255)'
    }
    let texts = 0
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement
        const shown = element.getClientRects().length && !element.closest('title, desc')
        if (!walker.currentNode.data.trim() || !shown) continue
        const style = getComputedStyle(element)
        const [a, b] = [element.closest('svg') ? style.fill : style.color, ground(element)].map(luminance)
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
        if (contrast < 4.5) found.push(`contrast ${contrast.toFixed(1)}: ${walker.currentNode.data.trim()}`)
        if (parseFloat(style.fontSize) < 11) found.push(`${style.fontSize}: ${walker.currentNode.data.trim()}`)
        texts++
    }
    if (texts < 100) found.push(`only ${texts} texts`)
    const root = document.documentElement
    if (root.scrollWidth > root.clientWidth) found.push(`wider than the window: ${root.scrollWidth}`)
    if (!root.lang) found.push('no language')
    if (!document.title) found.push('no title')
    if (!document.querySelector('meta[name=viewport]')) found.push('no viewport')
    const levels = [...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(heading => Number(heading.tagName[1]))
    levels.forEach((level, index) => {
        if (index ? level > levels[index - 1] + 1 : level != 1) found.push(`heading ${level} at ${index}`)
    })
    if (levels.filter(level => level == 1).length != 1) found.push('more than one first heading')
    for (const cell of document.querySelectorAll('th')) if (!cell.scope) found.push(`no scope: ${cell.textContent}`)
    for (const table of document.querySelectorAll('table')) if (!table.caption) found.push('table without caption')
    const names = [...document.querySelectorAll('[id]')].map(element => element.id)
    for (const name of names) if (names.indexOf(name) != names.lastIndexOf(name)) found.push(`twice: ${name}`)
    for (const element of document.querySelectorAll('[aria-labelledby]'))
        for (const name of element.getAttribute('aria-labelledby').split(' '))
            if (!document.getElementById(name)?.textContent.trim()) found.push(`no label ${name}`)
    for (const use of document.querySelectorAll('use'))
        if (!document.querySelector(use.getAttribute('href'))) found.push(`nothing to use: ${use.getAttribute('href')}`)
    return found
})()"""


@pytest.mark.parametrize(("width", "dark"), [*itertools.product((375, 1280), (False, True))])
def test_a_page_can_be_read_on_every_screen(width: int, dark: bool, page: Page, written: Path) -> None:
    page.open(written, width=width, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert page.evaluate(PROBLEMS) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb({}, {}, {})".format(*bytes.fromhex(THEME["ground"][dark][1:]))
    named = page.named()
    assert {"image", "table", "region", "Video"} <= {role for role, _ in named}
    assert not [role for role, name in named if role in ("image", "table", "region", "Video", "link") and not name]


def test_no_request_leaves_a_page_and_nothing_runs_in_it(page: Page, written: Path) -> None:
    page.open(written, width=375)
    assert [url for url in page.requests() if not url.startswith("data:")] == [written.as_uri()]
    assert page.complaints() == []
    assert page.evaluate("document.scripts.length + document.images.length") == 0
    # Nor would what had got into it.
    page.evaluate("new Promise(done => { const image = new Image(); image.onerror = image.onload = done;"
                  "image.src = 'http://127.0.0.1:9/x.png' })")  # fmt: skip
    assert "Content Security Policy" in page.complaints()[0]


@pytest.mark.parametrize(("width", "shown"), [(375, "narrow"), (1280, "wide")])
def test_curves_are_drawn_for_the_width_of_the_screen(width: int, shown: str, page: Page, written: Path) -> None:
    page.open(written, width=width)
    curves = page.evaluate(
        "[...document.querySelectorAll('section > figure > svg')].filter(svg => svg.getClientRects().length)"
        ".map(svg => [svg.getAttribute('class'), svg.querySelectorAll('use:not([style*=opacity])').length,"
        " svg.querySelectorAll('use[style*=opacity]').length,"
        " svg.querySelector('desc').textContent])"
    )
    # Four evaluations of IQL and of its baseline, four of the second run, and three of the one that was stopped.
    ((kind, marked, bands, description),) = curves
    assert (kind, marked, bands) == (shown, 4 + 4 + 4 + 3, 4)
    assert f"{HOSTILE}, behaviour cloning: " in description
    # Every metric has a curve for each of the four runs.
    metrics = page.evaluate(
        "[...document.querySelectorAll('.metrics svg')]"
        ".map(svg => svg.querySelectorAll('path[style*=\"stroke: var(--run-\"]').length)"
    )
    assert len(metrics) == 12
    assert all(count >= 4 for count in metrics)


def test_tables_scroll_inside_their_box(page: Page, written: Path) -> None:
    page.open(written, width=375)
    moved = page.evaluate(
        "[...document.querySelectorAll('.box')].map(box => { box.scrollLeft = 9; return box.scrollLeft })"
    )
    assert moved[0] == 9


def test_a_printed_page_shows_what_is_folded_and_cuts_nothing_off(page: Page, written: Path) -> None:
    page.open(written, width=700, media="print", dark=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    folded = "[...document.querySelectorAll('details')].map(fold => fold.lastElementChild.checkVisibility())"
    assert page.evaluate(folded) == [True, True]
    assert page.printed().startswith(b"%PDF")


@pytest.mark.parametrize("order", [1, -1])
def test_how_data_were_made_is_told_by_the_run_that_knows_it(order: int) -> None:
    knows, does_not = ({"episodes": 1, "returns": None, "provenance": made} for made in ({"recipe": "walk"}, {}))
    settings = SimpleNamespace(dataset="data.npz", dataset_sha256="abc", transitions=7)
    runs = [SimpleNamespace(run=SimpleNamespace(data=data, settings=settings)) for data in (knows, does_not, {})]
    [found] = report._datasets(runs[::order])  # type: ignore[arg-type]  # no more of a run is read
    assert found["provenance"] == {"recipe": "walk"}
