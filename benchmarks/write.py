"""Run the benchmarks, one after the other, and rewrite their parts of docs/BENCHMARKS.md.

    python benchmarks/write.py [NAME ...] [--quick]

Without names all are run, which takes hours; leave the machine alone meanwhile. Each part of the page has the benchmark's own
description, the machine, date and versions, its table and its plot. Parts of benchmarks that are not named stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, IMAGES = ROOT / "docs" / "BENCHMARKS.md", ROOT / "docs" / "images"
TITLES = {
    "training": "Training cost",
    "variance": "Noise of the loss and its gradient",
    "ar_start": "What the autoregressive start is worth",
    "sampling": "Sampling cost",
    "frontier": "Quality against tokens per evaluation",
    "evaluation": "Evaluation cost",
}
AIMS = {
    "training": "at least 3 times the supervised tokens and at most a third of the memory at vocabulary 151,936, 1.5 times at 2,048",
    "variance": "at least 3 times less variance of the loss",
    "sampling": "at least 2 (32 evaluations), 1.5 (128) and 3 (temperature 1), and 3 times fewer evaluations with the threshold",
    "frontier": "at least 3 tokens per evaluation",
    "evaluation": "at least 5 times the requests",
}
HEAD = """# Benchmarks

This page is written by `make benchmark`. Every ratio compares numbers that were measured in one run on one machine; do not compare
numbers of different parts. Nothing has been measured on a GPU yet: `benchmarks/training.py --gpu` has the mode for it.
"""


def machine() -> str:
    """The processor and its cores, the system, and the versions that matter."""
    info = Path("/proc/cpuinfo")  # which macOS does not have
    about = info.read_text() if info.exists() else ""
    model = next((line.partition(":")[2].strip() for line in about.splitlines() if line.startswith("model name")), platform.processor())
    flags = ", AVX-512 BF16" if "avx512_bf16" in about else ""
    libraries = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", "transformers"))
    versions = f"{platform.system()}, Python {platform.python_version()}, {libraries}"
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    return f"{os.cpu_count()} cores ({model}{flags}; threads: {threads}), {versions}"


def part(name: str, output: str, minutes: float, has_plot: bool, options: list[str]) -> str:
    """A benchmark's part of the page."""
    docstring = re.match(r'"""(.*?)"""', (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"), re.DOTALL)
    assert docstring, f"benchmarks/{name}.py says nothing of itself"
    head, _, words = docstring[1].partition("\n\n")
    words = "\n\n".join(text for text in words.split("\n\n") if not text.startswith("    python"))
    *table, last = output.strip().splitlines()
    ratios = ", ".join(f"{key} **{value}**" for key, value in json.loads(last)["ratios"].items())
    aim = f" Aimed at: {AIMS[name]}." if name in AIMS else ""
    plot = f"![{TITLES[name]}](images/{name}.png)\n\n" if has_plot else ""
    command = " ".join(["python", f"benchmarks/{name}.py", *options])
    return (
        f"## {TITLES[name]}\n\n{head}\n\n{words.strip()}\n\n`{command}`, {time.strftime('%Y-%m-%d')}, {minutes:.0f} min on {machine()}.\n\n"
        f"{plot}```\n" + "\n".join(line.rstrip() for line in table) + f"\n```\n\nRatios: {ratios}.{aim}\n"
    )


def update(parts: dict[str, str]) -> None:
    """Put these parts into the page, in the order of `TITLES`, and leave the others."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    there = {title: f"## {title}\n{text}" for title, text in re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)}
    chosen = [parts.get(name) or there.get(title) for name, title in TITLES.items()]
    PAGE.write_text("\n".join([HEAD, *(text.strip() + "\n" for text in chosen if text)]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TITLES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="each in its quick form: under 5 minutes")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in TITLES]
    if unknown:
        parser.error(f"no benchmark '{unknown[0]}': there are {', '.join(TITLES)}")
    given = ["--quick"] if options.quick else []
    for name in options.names or TITLES:
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *given, "--output-dir", folder]
            start, lines = time.monotonic(), []
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout or ():
                    print(line, end="", flush=True)
                    lines.append(line)
            if process.returncode:
                sys.exit(f"benchmarks/{name}.py failed: {PAGE.name} keeps its earlier part")
            plot = Path(folder) / "plot.png"
            if plot.exists():
                (IMAGES / f"{name}.png").write_bytes(plot.read_bytes())
            update({name: part(name, "".join(lines), (time.monotonic() - start) / 60, plot.exists(), given)})


if __name__ == "__main__":
    main()
