"""Everything that is measured on one H100, in parts that each fit a short lease.

    python benchmarks/h100.py [--parts 8b,135m,…] [--budget 540] [--out DIR] [--bundle FILE.tar.gz] [--model DIR]

A part is one command, a process of its own; its result is `h100_PART.json` in DIR (kernels: what their scripts write),
what it printed goes to `h100.log` there. Parts that are complete in DIR are skipped, as are those for which the budget
(seconds, for all) is surely too short; a command that runs out of time leaves what it had measured. After every part
FILE holds all results of this run. One line a case is printed beside its target and the peer's figure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import PROMPTS, RESULTS, ROOT
from benchmarks.report import target_of, verdict

STATE, LOG = "h100_state.json", "h100.log"
BIG = ("--random-weights", "llama-3.1-8b")
SMALL = ("--model", "MODEL", "--label", "135m-bf16")
LATENCY = ("--batch", "1,8,16,32,64", "--input", "128", "--output", "256")
SPECULATIVE = (
    *("--batch", "1,8,32,64", "--input", "128", "--output", "256"),
    *("--max-draft-tokens", "4", "--accept", "3", "--no-adaptive"),
)
EXACT = (*LATENCY, "--deterministic", "--only", "latency", "--repeats", "3", "--label")
TEXT = ("--model", "MODEL", "--prompts", "PROMPTS", "--draft-model", "HEAD")
WIDENED = ("--speed", "--widened", "--label", "8b", "--drafters", "eagle3", "--fixed", "3,5", "--passes", "2")
LOW = (
    *(*BIG, "--batch", "1,8,64", "--input", "128", "--output", "256", "--repeats", "3", "--prefill", "16x2048"),
    *("--only", "latency,prefill,memory"),
)
LOW_DRAFTED = (
    *(*BIG, "--drafter", "eagle3", "--draft-model", "random-head", "--batch", "1,8", "--input", "128"),
    *("--output", "256", "--max-draft-tokens", "4", "--accept", "3", "--no-adaptive"),
)
WIDENED_INT4 = (
    *("--speed", "--widened", "--label", "8b-int4", "--drafters", "eagle3", "--fixed", "3,5", "--passes", "2"),
    *("--quantise", "int4", "--quantise-head", "fp8-weights", "--name", "h100_widened_int4_speed"),
)
PROFILE = ("--batch", "1,8,64", "--only", "profile", "--profile", "{profile}")


@dataclass(frozen=True)
class Part:
    """Python's arguments. `seconds` is about what it takes on a quiet machine.

    `{json}` is the part's result file, `{text}` one that is no result (no rows), `{profile}` a folder for traces;
    scripts without them write results of their own. MODEL, PROMPTS, HEAD and SMALL-LM stand for what the options say;
    one that was not given is left out together with the option before it.
    """

    seconds: float
    command: tuple[str, ...]


def bench(seconds: float, *arguments: str) -> Part:
    return Part(seconds, ("-m", "server", "bench", *arguments, "--json", "{json}"))


def script(seconds: float, name: str, *arguments: str) -> Part:
    return Part(seconds, (f"benchmarks/{name}.py", *arguments))


def low(name: str, seconds: float, form: str, *arguments: str) -> Part:
    """`outpace bench` with weights rounded on the device (benchmarks/quantised.py); cases are called `name`."""
    named = ("--label", name, "--name", f"h100_{name}", "--json", "{json}")
    return script(seconds, "quantised", form, *arguments, *named)


PARTS = {
    "8b": bench(150, *BIG, *LATENCY),
    "135m": bench(60, *SMALL, *LATENCY),
    "8b-eagle3": bench(60, *BIG, "--drafter", "eagle3", *SPECULATIVE),
    "8b-draft1b": bench(75, *BIG, "--draft-random-weights", "llama-3.2-1b", *SPECULATIVE),
    "135m-eagle3": bench(45, "--random-weights", "smollm2-135m", "--drafter", "eagle3", *SPECULATIVE),
    "8b-fp8": low("8b-fp8", 100, "fp8", *LOW),
    "8b-int8": low("8b-int8", 100, "int8", *LOW),
    "8b-int4": low("8b-int4", 110, "int4", *LOW),
    "8b-w4a8": low("8b-w4a8", 110, "w4a8", *LOW),
    "8b-fp8-head8": low("8b-fp8-head8", 90, "fp8", "--lm-head", "fp8", *LOW),
    "8b-int4-head8": low("8b-int4-head8", 90, "int4", "--lm-head", "int8-weights", *LOW),
    "8b-int4-profile": low("8b-int4-profile", 60, "int4", *BIG, *PROFILE),
    "8b-int4-eagle3": low("8b-int4-eagle3", 80, "int4", "--head", "int4", *LOW_DRAFTED),
    "8b-int4-eagle3-fp8": low("8b-int4-eagle3-fp8", 80, "int4", "--head", "fp8-weights", *LOW_DRAFTED),
    "8b-fp8-eagle3": low("8b-fp8-eagle3", 80, "fp8", "--head", "fp8-weights", *LOW_DRAFTED),
    "headline": script(260, "headline", "--budget", "280"),
    "kernels-8bit": script(60, "kernels_8bit"),
    "kernels-int4": script(60, "kernels_8bit", "--kinds", "int4", "--name", "kernels_int4"),
    "kernels-attention": script(120, "kernels_attention"),
    "kernels-prefill": script(30, "kernels_prefill"),
    "kernels-linear": script(120, "kernels_linear"),
    "kernels-verify": script(60, "kernels_verify"),
    "kernels-chain": script(60, "kernels_chain"),
    "kernels-persistent": script(75, "kernels_persistent", "--json", "{text}"),
    "kernels-products": script(45, "kernels_products"),
    "start": bench(75, *BIG, "--only", "start"),
    "8b-deterministic": bench(75, *BIG, *EXACT, "8b-bf16-deterministic"),
    "135m-deterministic": bench(45, "--model", "MODEL", *EXACT, "135m-bf16-deterministic"),
    "8b-profile": bench(60, *BIG, *PROFILE),
    "135m-profile": bench(45, *SMALL, *PROFILE),
    "8b-timeline": script(60, "gpu_timeline", *BIG),
    "135m-timeline": script(45, "gpu_timeline", "--model", "MODEL"),
    "parity": script(150, "gpu_parity", "--model", "MODEL", "--prompts", "PROMPTS"),
    "text": script(150, "gpu_text", "--model", "MODEL", "--prompts", "PROMPTS"),
    "emitted": script(240, "emitted", *TEXT, "--small-lm", "SMALL-LM", "--budget", "210"),
    "speed": script(75, "emitted", *TEXT, "--speed", "--drafters", "eagle3,suffix", "--limit", "2", "--budget", "90"),
    "widened-speed": script(120, "emitted", *TEXT, *WIDENED, "--budget", "140"),
    "widened-int4": script(120, "emitted", *TEXT, *WIDENED_INT4, "--budget", "140"),
    "break-even": script(75, "break_even"),
    "sweep": script(
        340, "load_sweep", *TEXT, "--streams", "1,2,4,8", "--budget", "400", "--name", "h100_sweep_eagle3_few"
    ),
    "sweep-many": script(
        520, "load_sweep", *TEXT, "--streams", "16,32,64,128", "--budget", "580", "--name", "h100_sweep_eagle3_many"
    ),
    "http-135m": script(180, "gpu_http", "--case", "135m", "--model", "MODEL"),
    "http-8b": script(180, "gpu_http", "--case", "8b"),
}
GROUPS = {
    "kernels": tuple(
        name for name in PARTS if name.startswith("kernels-") and name not in ("kernels-8bit", "kernels-int4")
    ),
    "low": ("kernels-8bit", "kernels-int4", "8b-fp8", "8b-int8", "8b-int4", "8b-fp8-eagle3", "8b-int4-eagle3"),
}
TABLE = ("8b", "135m", "8b-eagle3", "8b-draft1b", "135m-eagle3", "kernels", "start")
"""What is measured unless told otherwise."""


class Driver:
    """Runs parts until the budget is spent."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out: Path = args.out
        self.bundle: Path | None = args.bundle
        self.words: dict[str, str | None] = {
            "MODEL": args.model,
            "PROMPTS": str(args.prompts),
            "HEAD": args.head,
            "SMALL-LM": args.small_lm,
        }
        self.force: bool = args.force
        self.end: float = time.monotonic() + args.budget
        self.environment = {**os.environ, "OUTPACE_RESULTS": str(self.out), "PYTHONUNBUFFERED": "1"}
        self.targets = tomllib.loads((ROOT / "benchmarks" / "targets.toml").read_text())["cases"]
        self.out.mkdir(parents=True, exist_ok=True)
        self.known = self._files()

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def run(self, name: str) -> bool:
        """Whether the part is complete now."""
        seconds, state = PARTS[name].seconds, self._state()
        if name in state and not self.force:
            print(f"== {name}: complete already", flush=True)
            return True
        if self.left_s < 0.7 * seconds:
            print(f"== {name}: left out; it takes about {seconds:.0f} s, {self.left_s:.0f} s are left", flush=True)
            return False
        started, before = time.monotonic(), self._files()
        code = self._command(name)
        for file, written in self._files().items():
            if file.suffix == ".json" and before.get(file) != written:
                self._show(file)
        took = time.monotonic() - started
        print(f"== {name}: {'complete' if code == 0 else f'NOT complete ({code})'}, {took:.0f} s", flush=True)
        if code == 0:
            (self.out / STATE).write_text(json.dumps({**state, name: round(took, 1)}))
        self._gather(name)
        return code == 0

    def _state(self) -> dict[str, float]:
        """Seconds by complete part."""
        file = self.out / STATE
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def _command(self, name: str) -> int:
        """Its exit status; negative where it ran out of time and was ended, with all that it had started."""
        places = {
            f"{{{kind}}}": str(self.out / f"h100_{name}.{end}") for kind, end in (("json", "json"), ("text", "txt"))
        }
        places["{profile}"] = str(self.out / f"profile-{name}")
        words = filled(PARTS[name].command, {**places, **self.words})
        if "bench" in words:
            words += ["--name", f"h100_{name}"]
        print(f"-- {' '.join(Path(w).name if w.startswith('/') else w for w in words)}", flush=True)
        with (self.out / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                code = process.wait(max(1.0, self.left_s))
            except subprocess.TimeoutExpired:
                code = -1
            if code < 0:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            tail = (self.out / LOG).read_text(errors="replace").splitlines()[-12:]
            print("\n".join(tail), flush=True)
        return code

    def _files(self) -> dict[Path, int]:
        """When each result was written; not the state, and not the folders of traces."""
        files = [f for f in self.out.iterdir() if f.is_file() and f.name != STATE and f != self.bundle]
        return {file: file.stat().st_mtime_ns for file in sorted(files)}

    def _gather(self, name: str) -> None:
        """The tables of a profile in one file (traces are large and stay where they are), and the bundle anew."""
        tables = sorted((self.out / f"profile-{name}").glob("*.txt"))
        if tables:
            (self.out / f"h100_{name}.txt").write_text("\n".join(file.read_text() for file in tables))
        if self.bundle is not None:
            with tarfile.open(self.bundle, "w:gz") as bundle:
                for file, written in self._files().items():
                    if self.known.get(file) != written:
                        bundle.add(file, file.name)

    def _show(self, file: Path) -> None:
        rows: list[dict[str, Any]] = json.loads(file.read_text()).get("rows", [])
        for row in rows:
            print(line(row, target_of(row["case"], self.targets)), flush=True)


def filled(command: tuple[str, ...], words: dict[str, str | None]) -> list[str]:
    """`command` with words replaced; one that stands for None goes, and so does the option whose value it is."""
    result: list[str] = []
    for word in command:
        value = words.get(word, word)
        if value is None:
            result.pop()
        else:
            result.append(value)
    return result


def line(row: dict[str, Any], target: dict[str, Any] | None) -> str:
    """One case: value, range, target with a sign where it is missed, peer."""
    text = f"{row['case']:58} {row['value']:>11,.3f} {row['unit']:6}"
    if row.get("spread"):
        text += f" [{row['spread'][0]:g}, {row['spread'][1]:g}]"
    if target is not None and "target" in target:
        said = verdict(row, target)
        text += f"  {'' if said == 'met' else said.upper() + ' '}target {target['target']:g}"
    if target is not None and "peer" in target:
        text += f"  peer {target['peer']:g} (x{row['value'] / target['peer']:.2f})"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(TABLE), help=f"some of {', '.join([*PARTS, *GROUPS])}")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), default=RESULTS)
    parser.add_argument("--bundle", type=lambda text: Path(text).resolve(), help="FILE.tar.gz to pack results into")
    parser.add_argument("--model", default="smollm2-135m", help="the 135M model: a name, directory or GGUF file")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--head", help="directory of the 135M model's EAGLE-3 head (default: the packaged one)")
    parser.add_argument("--small-lm", help="directory of the 135M model's small-LM drafter")
    parser.add_argument("--force", action="store_true", help="complete parts again")
    parser.add_argument("--list", action="store_true", help="print the parts and leave")
    args = parser.parse_args()
    if args.list:
        for name, part in PARTS.items():
            print(f"{name:18} {part.seconds:5.0f} s  {' '.join(part.command)}")
        return
    names = [part for name in args.parts.split(",") for part in GROUPS.get(name.strip(), (name.strip(),))]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; use some of {', '.join(PARTS)}")
    driver = Driver(args)
    whole = [driver.run(name) for name in names]
    sys.exit(0 if all(whole) else 1)


if __name__ == "__main__":
    main()
