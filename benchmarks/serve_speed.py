"""Tokens per second and time to the first token of `holdfast serve` beside `transformers serve`.

    python benchmarks/serve_speed.py [CHECKPOINT] [--clients 1 8 32] [--rounds 3] [--tokens 64]

The same weights (exported with save_pretrained for the peer), machine, client and requests: greedy,
streamed, `--tokens` tokens each, every client asking again as soon as it is answered. While one
server is asked the others are stopped (SIGSTOP); every round asks each of them once at each number
of clients, in an order that rotates. `transformers serve` is measured as it comes and with
--continuous-batching. Without a CHECKPOINT a model of the shape `--model` is trained for a few
steps. The result is printed and, with --out, written to a file.

`transformers serve` needs accelerate, which is in the extra [bench].
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS, PLAIN, CONTINUOUS = "holdfast", "transformers", "transformers --continuous-batching"
# In the sample's own style; lengths differ, as they do in life.
PROMPTS = (
    "明月几时有，", "东风夜放花千树。更吹落、星如雨。", "大江东去，浪淘尽，", "春",
    "昨夜雨疏风骤，浓睡不消残酒。试问卷帘人，", "红", "寒蝉凄切，对长亭晚，", "庭院深深深几许，",
)  # fmt: skip


# ------------------------------------------------------------------------------ one model for all


def trained(shape: str, folder: Path) -> Path:
    """A checkpoint of a model that was trained for a few steps."""
    words = ["train", "--model", shape, "--num-steps", "5", "--batch-size", "2", "--no-log",
             "--checkpoint-dir", str(folder / "run"), "--cache-dir", str(folder / "cache"),
             "--data-file", str(ROOT / "data" / "zh_sample.txt"), "--quiet"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "holdfast", *words], check=True)
    return folder / "run" / "latest.pt"


def export(checkpoint: Path, folder: Path) -> str:
    """The same model for the peer; it is told of no end of text, so that every answer has its
    length. Returns what the model is, for the record."""
    import torch

    from holdfast.training.inference import load_for_inference

    loaded = load_for_inference(checkpoint, device="cpu", dtype=torch.float32)
    model = loaded.model
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    loaded.tokenizer.save(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{model.config.model_type}, {count / 1e6:.1f} M parameters, fp32"


# ------------------------------------------------------------------------------------- the servers


@dataclass(frozen=True)
class Peer:
    """A running server; `model`: what it calls the model."""

    process: subprocess.Popen[bytes]
    port: int
    model: str

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """It runs, and stands still afterwards: an idle server may burn what others need."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextlib.contextmanager
def server(name: str, checkpoint: Path, exported: Path, log: Path) -> Iterator[Peer]:
    """A server of that name, until the block ends."""
    port = free_port()
    if name == OURS:
        words = [sys.executable, "-m", "holdfast", "serve", str(checkpoint), "--port", str(port)]
        model = checkpoint.stem
    else:
        program = Path(sys.executable).parent / "transformers"
        words = [str(program), "serve", str(exported), "--port", str(port), "--device", "cpu",
                 "--dtype", "float32", "--log-level", "error", *name.split()[1:]]  # fmt: skip
        model = str(exported)
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 180
        while not reachable(port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield Peer(process, port, model)
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def reachable(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


# -------------------------------------------------------------------------------------- the clients


async def ask(port: int, body: dict[str, Any]) -> tuple[float, int]:
    """Stream one answer over a plain socket: seconds to the first text, tokens.

    No library of a client in between: on a machine with few cores it would be what is measured.
    """
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n")  # fmt: skip
    began = time.perf_counter()
    writer.write(head.encode() + data)
    first, answer = 0.0, bytearray()
    while piece := await reader.read(1 << 16):
        answer += piece
        if not first and re.search(rb'"text": ?"[^"]', answer):
            first = time.perf_counter() - began
    writer.close()
    tokens = re.findall(rb'"completion_tokens": ?(\d+)', bytes(answer))
    if not tokens or not first:
        raise RuntimeError(bytes(answer[:1000]))
    return first, int(tokens[-1])


async def measure(
    name: str, peer: Peer, clients: int, tokens: int, seconds: float
) -> dict[str, float]:
    """`clients` at once, for about `seconds`: tokens a second, seconds to the first token."""
    firsts: list[float] = []
    total = 0
    more = {"ignore_eos": True, "stream_options": {"include_usage": True}} if name == OURS else {}
    began = time.perf_counter()

    async def client(number: int) -> None:
        nonlocal total
        asked = 0
        while not asked or time.perf_counter() - began < seconds:
            body = {"model": peer.model, "prompt": PROMPTS[(number + asked) % len(PROMPTS)],
                    "max_tokens": tokens, "temperature": 0, "stream": True, **more}  # fmt: skip
            first, count = await ask(peer.port, body)
            firsts.append(first)
            total += count
            asked += 1

    await asyncio.gather(*map(client, range(clients)))
    return {
        "tokens_per_second": total / (time.perf_counter() - began),
        "first_token": statistics.median(firsts),
    }


def rounds(given: argparse.Namespace, checkpoint: Path, folder: Path) -> dict[Any, list[Any]]:
    """Every figure of every round, by server and number of clients."""
    found: dict[Any, list[Any]] = {}
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(
                server(name, checkpoint, folder / "hf", folder / f"{number}.log")
            )
            for number, name in enumerate((OURS, PLAIN, CONTINUOUS))
        }
        for name, peer in running.items():  # the first answer loads and warms up
            with peer.alone():
                asyncio.run(measure(name, peer, 2, 8, 1.0))
        for number in range(given.rounds):
            names = list(running)
            names = names[number % len(names) :] + names[: number % len(names)]
            for clients in given.clients:
                for name in names:
                    peer = running[name]
                    with peer.alone():
                        figures = asyncio.run(
                            measure(name, peer, clients, given.tokens, given.seconds)
                        )
                    found.setdefault((name, clients), []).append(figures)
                    print(f"round {number + 1}: {clients:2} clients, {name}: "
                          f"{figures['tokens_per_second']:.0f} tokens/s",
                          file=sys.stderr)  # fmt: skip
    return found


# --------------------------------------------------------------------------------------- the result


def table(found: dict[Any, list[Any]]) -> list[str]:
    """Medians of the rounds, with the smallest and the largest."""
    lines = [f"{'clients':>7}  {'server':36}{'tokens/s':>9}  {'(of the rounds)':18}"
             f"{'first token':>12}  {'times ours':>10}"]  # fmt: skip
    for name, clients in sorted(found, key=lambda key: key[1]):
        every = [f["tokens_per_second"] for f in found[name, clients]]
        ours = statistics.median(f["tokens_per_second"] for f in found[OURS, clients])
        first = statistics.median(f["first_token"] for f in found[name, clients])
        speed = statistics.median(every)
        lines.append(
            f"{clients:7}  {name:36}{speed:9.0f}  {f'({min(every):.0f} to {max(every):.0f})':18}"
            f"{first * 1000:9.0f} ms  {speed / ours:10.2f}"
        )
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="what both serve")
    parser.add_argument("--model", default="tiny", help="shape to train where none is given")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="that each answer has")
    parser.add_argument("--seconds", type=float, default=6, help="of each measurement")
    parser.add_argument("--out", type=Path, help="where the result is written")
    given = parser.parse_args()
    busy = os.getloadavg()[0]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = given.checkpoint or trained(given.model, folder)
        described = export(checkpoint, folder / "hf")
        found = rounds(given, checkpoint, folder)
    import torch
    import transformers

    threads = os.environ.get("OMP_NUM_THREADS")  # on a busy machine waiting threads decide all
    words = f"OMP_NUM_THREADS={threads} " if threads else ""
    words += shlex.join(["python", "benchmarks/serve_speed.py", *sys.argv[1:]])
    lines = [
        f"{datetime.date.today().isoformat()}  {words}",
        f"{described}; {os.cpu_count()} cores, {platform.machine()}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {given.tokens} tokens an answer, medians of "
        f"{given.rounds} rounds",
        f"others on the machine: load {busy:.1f} at the start"
        + ("; a busy machine: repeat it on a quiet one" if busy > 0.5 else ""),
        "",
        *table(found),
    ]
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
