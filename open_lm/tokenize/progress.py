"""How far the work is: a bar on a terminal, else a line now and then."""

import sys
import time
from contextlib import ExitStack


class Progress(ExitStack):
    """Shows a step's share done, MB/s and the time left. `advance` with what has ended since."""

    def __init__(self, every_seconds: float, is_terminal: bool | None = None) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self.bar = None
        self.title = ""
        if sys.stderr.isatty() if is_terminal is None else is_terminal:
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self.bar = self.enter_context(Bar(*columns, console=Console(stderr=True)))

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def start(self, title: str, total_bytes: int, done_bytes: int = 0) -> None:
        """A new step of so many bytes, of which an earlier run did some."""
        self.title, self.total, self.before = title, max(total_bytes, 1), done_bytes
        self.done = self.text = 0
        self.started = self.shown = time.monotonic()
        if self.bar is not None:
            self.row = self.bar.add_task(title, total=self.total, completed=done_bytes, rate="")

    def advance(self, done_bytes: int, text_bytes: int = 0) -> None:
        """Bytes of the step that are done, and bytes of text that were encoded in them."""
        self.done += done_bytes
        self.text += text_bytes
        now = time.monotonic()
        rate = f"{(self.text or self.done) / 1e6 / max(now - self.started, 1e-9):.2f} MB/s"
        if self.bar is not None:
            self.bar.update(self.row, advance=done_bytes, rate=rate)
        elif now - self.shown >= self.every_seconds:
            self.shown = now
            left = (self.total - self.before - self.done) * (now - self.started) / max(self.done, 1)
            share = (self.before + self.done) / self.total
            self.say(f"{self.title}: {share:.1%}, {rate}, {format_seconds(left)} left")


def format_seconds(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
