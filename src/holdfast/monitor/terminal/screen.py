"""`holdfast monitor`: a run on one screen, with Textual. Draws what a Watcher has seen.

What the panels say is in panels.py. Only what has changed is drawn again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Horizontal, Vertical, VerticalScroll
from textual.css.query import NoMatches
from textual.message import Message
from textual.screen import ModalScreen, Screen
from textual.widgets import Static

from holdfast.i18n import _, language, set_language
from holdfast.monitor.terminal import panels
from holdfast.monitor.terminal.watcher import Look, Watcher

_SIDE, _WIDE_SIDE = 36, 48  # cells of the column beside the curve
_LOSS = 24  # cells without which a curve says nothing
_FIXED = 4  # lines: one at the head, two of progress, one at the foot
_BODY, _CHECKPOINTS, _EVENTS = 20, 5, 4  # lines at 80x24, titles included
_SIGNALS = ("SIGTERM", "SIGHUP")


class Panel(Static, can_focus=True):
    """A part of the screen with a title, that scrolls where it holds more than it shows.

    One that is `whole` is as high as what it holds.
    """

    def __init__(self, id: str, *, whole: bool = False) -> None:
        super().__init__(id=id)
        self._whole = whole
        self._lines: list[Text] = []
        self._offset = 0
        self._shown: Text | None = None

    def put(self, title: str, lines: Sequence[Text]) -> None:
        """Show `lines`, from where the user has scrolled to."""
        self._lines = list(lines)
        if self.border_title != title:
            self.border_title = title
        self._draw()

    def scroll_by(self, lines: int) -> None:
        self._offset += lines
        self._draw()

    def scroll_page(self, pages: int) -> None:
        self.scroll_by(pages * max(1, self.content_size.height - 1))

    def _draw(self) -> None:
        height = len(self._lines) if self._whole else self.content_size.height
        self._offset = max(0, min(self._offset, len(self._lines) - height))
        below = len(self._lines) - self._offset - height
        more = f"↑{self._offset} ↓{max(0, below)}" if self._offset or below > 0 else ""
        if self.border_subtitle != more:
            self.border_subtitle = more
        shown = Text("\n").join(self._lines[self._offset : self._offset + height])
        if self._shown is None or shown != self._shown:
            self._shown = shown
            self.update(shown)

    def on_resize(self) -> None:
        self._draw()

    def on_mouse_scroll_down(self, _event: events.MouseScrollDown) -> None:
        self.scroll_by(1)

    def on_mouse_scroll_up(self, _event: events.MouseScrollUp) -> None:
        self.scroll_by(-1)


class Line(Static):
    """Text without a title; drawn again where it is another one."""

    _shown: Text | None = None

    def put(self, text: Text) -> None:
        if self._shown is None or text != self._shown:
            self._shown = text
            self.update(text)


class Help(ModalScreen[None]):
    """The keys and the words; a key closes it, but for those that scroll it on a small screen."""

    def compose(self) -> ComposeResult:
        text = Text("\n").join(panels.help_lines(min(90, self.app.size.width - 8)))
        with VerticalScroll(can_focus=False) as box:
            yield Static(text)
        box.border_title = _("Help")

    def on_resize(self) -> None:
        self.call_after_refresh(self._say_how_to_leave)

    def _say_how_to_leave(self) -> None:
        box = self.query_one(VerticalScroll)
        box.border_subtitle = (
            _("↑ ↓: more, another key: back") if box.max_scroll_y else _("any key: back")
        )

    def on_key(self, event: events.Key) -> None:
        event.stop()
        box = self.query_one(VerticalScroll)
        page = max(1, box.size.height - 1)
        by = {"up": -1, "down": 1, "pageup": -page, "pagedown": page}.get(event.key, 0)
        if by and box.max_scroll_y:
            box.scroll_relative(y=by, animate=False)
        else:
            self.dismiss()

    def on_click(self) -> None:
        self.dismiss()


class Monitor(App[int]):
    """The screen. `run()` it; what the watcher sees comes as messages."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #body, #top { height: 1fr; }
    #side { margin-left: 1; }
    Panel { border-top: solid $primary-darken-2; border-title-color: $text-primary;
            border-subtitle-color: $text-muted; text-wrap: nowrap; text-overflow: clip; }
    Panel:focus { border-top: heavy $accent; border-title-style: bold; }
    Line { height: auto; text-wrap: nowrap; text-overflow: clip; }
    #head { background: $surface; }
    #loss { width: 1fr; height: 1fr; }
    #safety { height: auto; }
    #machine { height: 1fr; }
    Help { align: center middle; }
    Help VerticalScroll { width: auto; max-width: 96; height: auto; max-height: 100%;
                          padding: 0 2; border: round $accent; background: $surface; }
    Help Static { width: auto; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c,ctrl+q", "leave", show=False, priority=True),
        Binding("question_mark,h,f1", "help", show=False),
        Binding("l", "language", show=False),
        Binding("down", "focus_next", show=False),
        Binding("up", "focus_previous", show=False),
        Binding("left", "other_run(-1)", show=False),
        Binding("right", "other_run(1)", show=False),
        Binding("enter", "enlarge", show=False),
        Binding("escape", "shrink", show=False),
        Binding("pagedown,j", "page(1)", show=False),
        Binding("pageup,k", "page(-1)", show=False),
        Binding("ctrl+z", "suspend_process", show=False),
        *(Binding(str(n), f"run_number({n})", show=False) for n in range(1, 10)),
    ]

    class Looked(Message):
        """The watcher has looked."""

        def __init__(self, look: Look) -> None:
            super().__init__()
            self.look = look

    def __init__(self, root: Path, interval: float = 1.0) -> None:
        super().__init__()
        self.animation_level = "none"
        self._watcher = Watcher(root, interval, self._deliver)
        self._seen = Look(root, problem=_("Reading {directory} …", directory=root))
        self._large: Panel | None = None
        self._curve: tuple[object, ...] = ()  # what the curve was drawn from
        self._curve_lines: list[Text] = []

    def _deliver(self, look: Look) -> None:
        self.post_message(self.Looked(look))  # from the watcher's thread

    # ---------------------------------------------------------------------------------- the screen

    def compose(self) -> ComposeResult:
        yield Line(id="head")
        yield Line(id="progress")
        with Container(id="body"):
            with Horizontal(id="top"):
                yield Panel("loss")
                with Vertical(id="side"):
                    yield Panel("safety", whole=True)
                    yield Panel("machine")
            yield Panel("checkpoints")
            yield Panel("events")
        yield Line(id="keys")

    def on_mount(self) -> None:
        for name in _SIGNALS:
            # Leaves the terminal as it was found; a terminal that is gone ends the monitor too.
            with contextlib.suppress(NotImplementedError, RuntimeError, AttributeError, ValueError):
                number = getattr(signal, name)
                asyncio.get_running_loop().add_signal_handler(number, self._end, 128 + number)
        self._main.query_one("#loss", Panel).focus()
        self._watcher.start()

    def _end(self, status: int) -> None:
        self._watcher.stop()
        self.exit(status, return_code=status)

    def on_resize(self, event: events.Resize) -> None:
        self._arrange(event.size.width, event.size.height)
        self.call_after_refresh(self._draw)

    def on_unmount(self) -> None:
        self._watcher.stop()

    def on_monitor_looked(self, message: Looked) -> None:
        self._seen = message.look
        with contextlib.suppress(NoMatches):  # the screen is being taken down
            if self.screen_stack:
                self._draw()

    def _arrange(self, width: int, height: int) -> None:
        """Share out the screen: at 80x24 everything that matters has its place."""
        extra = height - _FIXED - _BODY
        checkpoints, happened = _CHECKPOINTS, _EVENTS
        if extra > 0:
            checkpoints += 35 * extra // 100
            happened += 25 * extra // 100
        else:
            happened = max(2, happened + extra)
            checkpoints = max(2, checkpoints + min(0, extra + _EVENTS - 2))
        self._main.query_one("#checkpoints").styles.height = checkpoints
        self._main.query_one("#events").styles.height = happened
        side = self._main.query_one("#side")
        narrow = width < _SIDE + _LOSS
        side.styles.width = "1fr" if narrow else _WIDE_SIDE if width >= 110 else _SIDE
        self._show_panels(narrow)

    def _show_panels(self, narrow: bool) -> None:
        """Show all panels, or the enlarged one alone; on a narrow screen the curve steps back."""
        large = self._large
        in_side = large is not None and large.id in ("safety", "machine")
        for panel in self._main.query(Panel):
            panel.display = large in (None, panel)
        self._main.query_one("#loss").display = (large is None and not narrow) or self._is_large(
            "loss"
        )
        self._main.query_one("#side").display = large is None or in_side
        self._main.query_one("#top").display = large is None or in_side or self._is_large("loss")
        for name in ("checkpoints", "events"):
            if self._is_large(name):
                self._main.query_one(f"#{name}").styles.height = "1fr"
        if in_side:
            self._main.query_one("#side").styles.width = "1fr"

    @property
    def _main(self) -> Screen[object]:
        """The screen with the panels, also while the help lies over it."""
        return self.screen_stack[0]

    def _is_large(self, name: str) -> bool:
        return self._large is not None and self._large.id == name

    def _draw(self) -> None:
        look, width = self._seen, self.size.width
        main = self._main
        main.query_one("#head", Line).put(panels.header(look, width))
        main.query_one("#progress", Line).put(Text("\n").join(panels.progress(look, width)))
        main.query_one("#keys", Line).put(panels.keys(len(look.runs) > 1, width))
        titles = panels.titles()
        for panel in main.query(Panel):
            name = str(panel.id)
            if panel.display:
                panel.put(titles[name], self._lines_of(name, panel))

    def _lines_of(self, name: str, panel: Panel) -> list[Text]:
        look, (width, height) = self._seen, panel.content_size
        if name == "loss":
            last = look.snapshot and (look.snapshot.last, look.snapshot.validation)
            key = (look.curves, last, width, height, language())
            if key != self._curve:
                self._curve, self._curve_lines = key, panels.loss(look, width, height)
            return self._curve_lines
        draw = {
            "safety": panels.safety,
            "machine": panels.machine,
            "checkpoints": panels.checkpoints,
            "events": panels.events,
        }[name]
        return draw(look, width)

    # ------------------------------------------------------------------------------------ the keys

    def action_leave(self) -> None:
        self._end(0)

    def action_help(self) -> None:
        self.push_screen(Help())

    def action_language(self) -> None:
        set_language("en" if language() == "zh" else "zh")
        self._draw()

    def action_other_run(self, by: int) -> None:
        runs = self._seen.runs
        if len(runs) > 1:
            self._watcher.choose(runs[(self._seen.index + by) % len(runs)])

    def action_run_number(self, number: int) -> None:
        if number <= len(self._seen.runs):
            self._watcher.choose(self._seen.runs[number - 1])

    def action_enlarge(self) -> None:
        if isinstance(self.focused, Panel):
            self._large = None if self._large is self.focused else self.focused
            self._rearrange()

    def action_shrink(self) -> None:
        self._large = None
        self._rearrange()

    def _rearrange(self) -> None:
        self._arrange(*self.size)
        self.call_after_refresh(self._draw)

    def action_page(self, by: int) -> None:
        if isinstance(self.focused, Panel):
            self.focused.scroll_page(by)
