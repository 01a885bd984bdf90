"""A machine that boots again goes on training: the text of a systemd user unit.

What runs there is `holdfast run`, so that crashes are handled as they are by hand; systemd itself
starts it at boot and looks after the supervisor. Only text is made here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import ConfigError
from holdfast.i18n import _
from holdfast.manage.supervising.supervisor import ASKED, FINAL
from holdfast.table import printable

STOP_TIMEOUT = 300  # seconds to finish a step and save; see the comment in the unit
RESTART_DELAY = 30  # seconds before systemd starts a supervisor again that was itself killed

# What a training needs of the environment it was tried in. Not all of it: it may hold secrets.
KEPT = (
    "PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "OMP_NUM_THREADS",
    "LANGUAGE",
    "HOLDFAST_CACHE",
    "HOLDFAST_DISABLE",
)

_NAME = re.compile(r"[A-Za-z0-9:_.@-]+")
_PLAIN = re.compile(r"[A-Za-z0-9_./:=,+@-]+")


@dataclass(frozen=True, slots=True)
class Service:
    """A command for every boot: its program and `directory` are absolute."""

    name: str
    command: tuple[str, ...]
    directory: Path
    environment: Mapping[str, str]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                "--name {name}: expected letters, digits and the characters : _ . @ -",
                name=printable(self.name),
            )
        for text in (str(self.directory), *self.command, *self.environment.values()):
            _check(text)
        if "\n" in str(self.directory) or str(self.directory).endswith(("\\", " ")):
            raise ConfigError(
                "systemd cannot work in a directory with such a name: {directory}",
                directory=printable(str(self.directory)),
            )

    @property
    def file(self) -> str:
        """The name of the unit's file."""
        return f"{self.name}.service"

    def install(self) -> list[str]:
        """The commands that make it start now and at every boot, once the file is in place."""
        return [
            "systemctl --user daemon-reload",
            f"systemctl --user enable --now {self.file}",
            "loginctl enable-linger",
        ]

    def unit(self) -> str:
        """The unit file; systemd.service(5), systemd.exec(5) and systemd.syntax(7) have its rules.

        `KillMode=mixed`: only the supervisor is asked to stop, and asks the training, once.
        `OOMPolicy=continue`: a training that the kernel kills is the supervisor's business.
        """
        title = _("Training in {directory}, kept going by holdfast", directory=self.directory)
        lines = [
            *(f"# {line}" for line in self._how_to()),
            "",
            "[Unit]",
            f"Description={printable(title).replace('%', '%%')}",
            "",
            "[Service]",
            "Type=exec",
            f"WorkingDirectory={str(self.directory).replace('%', '%%')}",
            *(
                f"Environment={quote(f'{name}={value}', dollar='$')}"
                for name, value in self.environment.items()
            ),
            "ExecStart=" + exec_line(self.command),
            "Restart=on-failure",
            f"RestartSec={RESTART_DELAY}",
            "RestartPreventExitStatus=" + " ".join(map(str, sorted(FINAL))),
            "SuccessExitStatus=" + " ".join(str(128 + number) for number in sorted(ASKED)),
            "KillMode=mixed",
            "KillSignal=SIGTERM",
            f"TimeoutStopSec={STOP_TIMEOUT}",
            "OOMPolicy=continue",
            "",
            "[Install]",
            "WantedBy=default.target",
        ]
        return "\n".join(lines) + "\n"

    def _how_to(self) -> list[str]:
        enable, start, linger = self.install()
        return [
            _("Save this text as ~/.config/systemd/user/{file}; then:", file=self.file),
            f"  {enable}",
            f"  {start}",
            f"  {linger}",
            _("To watch it: journalctl --user -f -u {name}", name=self.name),
            _("To stop it: systemctl --user stop {name} (it saves first)", name=self.name),
            _(
                "A machine that shuts down gives it 2 minutes to save. If that is too short, raise "
                "TimeoutStopSec of user@.service: sudo systemctl edit user@.service"
            ),
        ]


def exec_line(command: Sequence[str]) -> str:
    """`command` as the value of ExecStart: in the program's own path a $ stands for itself."""
    program, *arguments = command
    return " ".join([quote(program, dollar="$"), *(quote(word) for word in arguments)])


def quote(word: str, *, dollar: str = "$$") -> str:
    """`word` by the rules of systemd.syntax(7): specifiers, variables and escapes mean nothing.

    `dollar` is what stands for a $: two of them where variables are filled in.
    """
    if _PLAIN.fullmatch(word):
        return word
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    text = text.replace("$", dollar)
    text = "".join(f"\\x{ord(c):02x}" if ord(c) < 32 or ord(c) == 127 else c for c in text)
    return f'"{text}"'


def _check(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            "{text} is not UTF-8, and such a file must be.", text=printable(text)
        ) from None
