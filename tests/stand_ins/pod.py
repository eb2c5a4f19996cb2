"""What stands in for a container: its command as a process of its own, in a clean directory, with only the environment it is given."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""What a role would give to the pods, and the user's configuration to the machine that starts the run."""

DOCKERFILE = Path(__file__).resolve().parents[2] / "infra" / "Dockerfile"
SET = [line.split()[1:] for line in DOCKERFILE.read_text().splitlines() if line.startswith("ENV ")]
IMAGE = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"} | dict(
    pair.split("=", 1) for pairs in SET for pair in pairs
)
"""What the image sets."""

KEPT = ("HF_HUB_OFFLINE", "HF_HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "OMP_NUM_THREADS")
KEPT += ("GOMP_SPINCOUNT", "A2D_CACHE")  # the embedded base is trained once for all tests


class Pod:
    """One container: started when it is made."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path):
        self.home = Path(tempfile.mkdtemp(prefix="pod-", dir=folder))
        self.killed = False
        copy = self.home / "a2d_core" / "__init__.py"  # the image has one in its working directory, as old as the image
        copy.parent.mkdir()
        copy.write_text("raise ImportError('this is the image and not the package of the run')")
        mine = {"HOME": str(self.home), "TMPDIR": str(self.home)} | {name: os.environ[name] for name in KEPT if name in os.environ}
        with (self.home / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.home,
                env=IMAGE | CREDENTIALS | mine | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> int:
        """The exit code, 137 for SIGKILL, once all its processes have ended."""
        code = self.process.wait()
        self.kill_group()
        return code if code >= 0 else 128 - code

    def kill(self) -> None:
        """End it as an eviction does: without a word to its processes."""
        self.killed = True
        self.kill_group()

    def kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)

    def log(self) -> str:
        """What it has printed."""
        return (self.home / "log").read_text(errors="replace")
