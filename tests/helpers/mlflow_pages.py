"""MLflow's own pages, opened in a browser and waited for until they are drawn."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from urllib.parse import urlencode

import numpy as np
import PIL.Image

from tests.helpers.browser import Page
from tests.helpers.waiting import wait_until

MODEL_TRAINING = {"workflowType": "machine_learning"}
"""MLflow 3.17 opens every experiment among its tools for language-model applications, whatever its
kind, until the reader chooses "Model training" in the side bar or follows an address with this."""
CELLS = """
JSON.stringify([...document.querySelectorAll('[role=gridcell]')].map(cell => [
    cell.closest('[role=row]').getAttribute('row-index'), cell.getAttribute('col-id'),
    cell.innerText.trim()]))
"""
"""Cells of the run table, which is divided into parts that each have some of the columns."""
CHARTS = """
JSON.stringify([...document.querySelectorAll('.js-plotly-plot')].map(chart => {
    let card = chart;
    while (card && !/\\([^()]+\\)\\s*$/.test(card.innerText)) card = card.parentElement;
    const lines = [...chart.querySelectorAll('path.js-line')];
    return [card ? card.innerText : '', Math.max(
        0, ...lines.map(line => line.getAttribute('d').split('L').length))];
}))
"""
"""Every chart in the page: its text, which ends with "run (metric)", and the number of points of
its longest line."""
ASSISTANT_CLOSE = "[data-component-id='mlflow.assistant.chat_panel.close']"
EXPAND = "[role=row][row-id='{run_id}'] [col-id*='Run Name'] button"
NAME = "attributes.`Run Name`"
COLUMNS = {
    "attributes.`Source`": "Source",
    "attributes.`Dataset`": "Dataset",
    "attributes.`Models`": "Models",
    "duration": "Duration",
    "runDateAndNestInfo": "Created",
}
"""Headings of columns by their names in the page."""
LEGEND = re.compile(r"\(([^()]+)\)\s*$")
Row = dict[str, str]
COLORED = 40
"""Difference between the channels of a pixel from which on it counts as colored."""


class MlflowPages:
    """The pages of one MLflow server."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self._address = address

    def _open(self, path: str, **parameters: object) -> None:
        words = {name: json.dumps(value) for name, value in parameters.items()}
        query = urlencode({**words, **MODEL_TRAINING})
        self.page.open(f"{self._address}/#{path}?{query}")

    def runs(self, experiment_id: str, expected: int, parent: str | None = None) -> dict[str, Row]:
        """The run table: text of the cells by column, of each run by its name.

        Args:
            experiment_id: which experiment.
            expected: how many rows to wait for.
            parent: id of a run whose children are to be shown below it.
        """
        self._open(f"/experiments/{experiment_id}/runs")
        if parent is not None:
            button = EXPAND.format(run_id=parent)
            self.page.wait_for(button)
            self.page.click(f"document.querySelector({json.dumps(button)})")
        wait_until(
            lambda: len(self._rows()) == expected, 60, every_s=0.2, told=lambda: str(self._rows())
        )
        return self._rows()

    def _rows(self) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for row, column, text in json.loads(self.page.ask(CELLS)):
            rows.setdefault(row, {})[column] = text
        return {
            row[NAME].splitlines()[-1]: {COLUMNS.get(column, column): row[column] for column in row}
            for row in rows.values()
            if row.get(NAME)
        }

    def overview(self, experiment_id: str, run_id: str) -> str:
        """The first page of a run; gives its text."""
        self._open(f"/experiments/{experiment_id}/runs/{run_id}")
        self.page.wait_for_text("About this run", "Run ID", run_id)
        return self.page.text

    def charts(self, experiment_id: str, run_id: str, expected: int) -> dict[str, int]:
        """The charts of a run: number of points of the longest line, by metric.

        Charts outside of the visible part of the page are not drawn.
        """
        self._open(f"/experiments/{experiment_id}/runs/{run_id}/model-metrics")
        wait_until(
            lambda: sum(points > 1 for points in self._charts().values()) >= expected,
            60,
            every_s=0.2,
            told=lambda: f"{self._charts()} in {self.page.text}",
        )
        return self._charts()

    def _charts(self) -> dict[str, int]:
        found = {}
        for text, points in json.loads(self.page.ask(CHARTS)):
            if (legend := LEGEND.search(text)) is not None:
                found[legend.group(1)] = int(points)
        return found

    def comparison(self, experiment_id: str, run_ids: Sequence[str]) -> str:
        """The comparison of runs with its parallel coordinates; gives its text."""
        self._open("/compare-runs", runs=list(run_ids), experiments=[experiment_id])
        self.page.wait_for_text(f"Comparing {len(run_ids)} Runs", "Parallel Coordinates Plot")
        self.page.wait_for(".parcoords")
        wait_until(lambda: self.colored(".js-plotly-plot") > 500, every_s=0.5)
        return self.page.text

    def model(self, name: str, version: str | None = None) -> None:
        """A registered model, or one of its versions."""
        rest = "" if version is None else f"/versions/{version}"
        self._open(f"/models/{name}{rest}")
        self.page.wait_for_text("Registered Models", "Versions" if version is None else "Schema")

    def close_assistant(self) -> None:
        """Close the panel that opens by itself with the first page of a new browser."""
        self.page.wait_for(ASSISTANT_CLOSE)
        self.page.click(f"document.querySelector({json.dumps(ASSISTANT_CLOSE)})")
        wait_until(lambda: not self.page.count(ASSISTANT_CLOSE), every_s=0.2)

    def colored(self, selector: str) -> int:
        """How many pixels of an element are neither white nor gray."""
        with PIL.Image.open(io.BytesIO(self.page.picture(self.box(selector)))) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        return int((pixels.max(axis=2) - pixels.min(axis=2) > COLORED).sum())

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Where an element is: x, y, width and height."""
        script = (
            "(box => [box.x, box.y, box.width, box.height])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        x, y, width, height = self.page.ask(script)
        return x, y, width, height
