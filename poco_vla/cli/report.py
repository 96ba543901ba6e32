"""`poco-vla report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.text import Text

from poco_vla.cli.errors import error_console
from poco_vla.errors import ConfigError
from poco_vla.terminal import SafeConsole


@dataclass
class Report:
    """Table, learning curves and one HTML page of finished runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders with runs up to three levels below."""
    output: Path = Path("report.html")
    """What to write: .html is one page with everything in it; .png, .pdf and .svg are a picture of the curves."""
    max_video_bytes: int = 20_000_000
    """Most bytes of videos that the page takes in; it says which were left out."""

    def execute(self) -> None:
        """Print the table, and write the page or the picture."""
        from poco_vla.report import draw_curves, find_runs, result_table, write_page

        kind = self.output.suffix.lower()
        if kind not in (".html", ".png", ".pdf", ".svg"):
            raise ConfigError(f"--output {self.output} ends in {kind or 'nothing'}; .html, .png, .pdf or .svg")
        runs, problems = find_runs(self.runs)
        for problem in problems:
            error_console().print(Text.assemble(("left out", "yellow"), f": {problem}"))
        console = SafeConsole()
        console.print(result_table(runs))
        if kind == ".html":
            console.print(write_page(runs, self.output, max_video_bytes=self.max_video_bytes))
        else:
            console.print(draw_curves(runs, self.output))
